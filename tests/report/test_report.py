"""Pages, figures and records, without a browser."""

import base64
import dataclasses
from html.parser import HTMLParser

import numpy as np
import pytest

from widefield import report
from widefield.report._blocks import LONG

ROWS = [{"a": "x", "b": "1 < 2"}, {"a": "y", "b": "3"}]
HOSTILE = "<script>alert('&')</script>\"'><img src=x>"
VOID = {"meta", "link", "img", "input", "source", "br"}


class Tree(HTMLParser):
    """Checks that tags are closed in order, and keeps the tags with their attributes and the text of each."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data.strip())

    def all(self, tag, key):
        return [found[key] for name, found in self.tags if name == tag and key in found]


def shown(*parts, **options):
    return Tree(report.page("T", "lead", [report.Section("S", parts)], {"torch": "2"}, **options))


def figure():
    return report.curves({"a": ([1, 2], [3, 4])}, "x", "y")


def test_markdown_keeps_columns():
    assert report.markdown(ROWS) == "| a | b |\n| --- | --- |\n| x | 1 < 2 |\n| y | 3 |\n"


def test_a_page_is_one_complete_document():
    text = report.page("T & T", "lead", [report.Section("S", ["words", report.Plot(figure(), "seen")])], {"torch": "2"})
    tree = Tree(text)
    assert text.startswith("<!doctype html>")
    assert tree.texts["title"] == tree.texts["h1"] == ["T & T"]
    assert tree.texts["figcaption"] == ["seen"]
    assert "torch 2" in tree.texts["p"]
    assert all(source.startswith("data:image/") for source in tree.all("img", "src"))
    assert not tree.all("script", "src")


def test_contents_link_to_every_section_of_a_long_page():
    headings = ["One", "Two & more", "Two   more", "%"]
    tree = Tree(report.page("T", "", [report.Section(one, [one]) for one in headings], {}))
    links = tree.all("a", "href")
    assert links == [f"#{name}" for name in tree.all("section", "id")]
    assert len(set(links)) == len(headings) == len(tree.texts["a"])
    assert tree.texts["h2"] == headings
    assert not Tree(report.page("T", "", [report.Section("One", ["one"])], {})).all("a", "href")


def test_text_of_every_kind_is_escaped():
    parts = [
        HOSTILE,
        report.Table([{HOSTILE: HOSTILE, "b": "1"}], HOSTILE),
        report.Table([{"a": HOSTILE}] * (LONG + 1), HOSTILE),
        report.Photo(b"", "png", HOSTILE),
        report.Plot(figure(), HOSTILE),
        report.Cards([report.Card(HOSTILE, [HOSTILE, report.Bars({HOSTILE: 0.5})])]),
        report.Views([report.Photo(b"", "jpeg", HOSTILE)]),
        report.Legend([((1, 2, 3), HOSTILE)]),
        report.Link(HOSTILE, HOSTILE),
        report.Fold(HOSTILE, [HOSTILE]),
        report.Terms({HOSTILE: HOSTILE}),
    ]
    text = report.page(HOSTILE, HOSTILE, [report.Section(HOSTILE, parts)] * 5, {HOSTILE: HOSTILE}, [HOSTILE])
    tree = Tree(text)
    assert "script" not in {tag for tag, _ in tree.tags}
    assert "x" not in tree.all("img", "src")
    assert tree.all("a", "href")[5] == HOSTILE
    assert "<script" not in report.fragment(*parts) + report.styled(*parts)


def test_long_tables_are_folded_and_wide_short_ones_become_lists_on_a_phone():
    long = shown(report.Table([{"a": "1"}] * (LONG + 1), "Classes"))
    assert long.texts["summary"] == [f"Classes: {LONG + 1} rows"]
    assert not shown(report.Table([{"a": "1"}] * LONG)).all("details", "open")
    assert "details" not in {tag for tag, _ in shown(report.Table([{"a": "1"}] * LONG)).tags}
    row = dict.fromkeys("abcde", "1")
    assert shown(report.Table([row])).all("table", "class") == ["listed"]
    assert not shown(report.Table([row] * 9)).all("table", "class")
    assert shown(report.Table([row])).all("td", "data-label") == list("abcde")


def test_a_column_of_texts_is_aligned_as_one():
    tree = shown(report.Table([{"error": "a", "what": "x" * 41, "n": "1"}, {"error": "b", "what": "short", "n": "2"}]))
    assert tree.all("td", "class") == ["text", "text"]
    assert tree.all("th", "class") == ["text"]


def test_figures_of_a_page_are_drawings_and_those_of_a_notebook_images():
    tree = shown(report.Plot(figure(), "f"), report.Photo(b"", "png", "p"))
    assert tree.all("svg", "aria-label") == ["f"]
    assert tree.all("img", "alt") == ["p"]
    assert len(tree.all("input", "type")) == 2  # each opens at full size
    alone = Tree(f"<div>{report.fragment(report.Plot(figure(), 'f'))}</div>")  # a notebook has a theme of its own
    assert alone.all("img", "alt") == ["f"]
    assert not alone.all("svg", "class")
    assert not alone.all("input", "type")


def test_an_image_may_have_a_drawing_for_pages():
    photo = report.Photo(b"image", "png", "p", b"<svg onload='alert(1)'></svg>")
    (source,) = shown(photo).all("img", "src")
    assert source.startswith("data:image/svg+xml;base64,")  # where a browser runs no scripts
    assert base64.b64decode(source.partition(",")[2]) == photo.drawing
    assert "data:image/png" in report.fragment(photo)


def test_a_headline_precedes_the_sections():
    tree = shown("words", headline=["A & B differ.", "Nothing is decided."])
    assert tree.texts["p"][:3] == ["lead", "A & B differ.", "Nothing is decided."]


def test_every_part_of_a_page_closes_its_tags():
    photo = report.Photo(b"", "png", "")
    parts = [report.Cards([report.Card("c", [report.Views([photo]), report.Bars({"x": 1.0})])], wide=True), photo]
    parts += [report.Legend([((0, 0, 0), "x")]), report.Link("x", "y"), report.Fold("z", [report.Terms({"a": "b"})])]
    tree = shown(*parts)
    assert tree.texts["dt"] == ["a"]
    assert not tree.texts.get("figcaption")
    assert Tree(report.styled(*parts)).texts["h3"] == ["c"]


def test_figures_are_pictures_of_what_they_got():
    weights = [np.array([[0.5, -0.5]]), np.array([[0.1, 0.9]])]
    examples = report.examples([np.zeros((4, 4, 3))] * 2, ["cat", "dog"], weights, ["b1"], ["3x3", "5x5"], "t")
    assert report.png(examples).startswith(b"\x89PNG")
    assert [axis.get_title() for axis in examples.axes[:4]].count("cat") == 1
    assert examples.axes[2].images[0].norm.vmin == -0.9  # negative weights: a scale with zero in its middle
    assert len(set(report.expert_colors(5))) == 5


@dataclasses.dataclass(frozen=True)
class Facts(report.Report):
    count: int

    def summary(self):
        return f"{self.count} facts < 3\nand a second line"

    def rows(self):
        return [{"fact": str(index), "value": "<b>"} for index in range(self.count)]


def test_reports_print_and_display_a_summary_and_a_table():
    assert str(Facts(1)) == "1 facts < 3\nand a second line\n\n| fact | value |\n| --- | --- |\n| 0 | <b> |"
    assert str(Facts(0)) == "0 facts < 3\nand a second line"
    tree = Tree(Facts(1)._repr_html_())
    assert tree.texts["p"] == ["1 facts < 3", "and a second line"]
    assert tree.texts["td"] == ["0", "<b>"]
    assert "<table" not in Facts(0)._repr_html_()


@pytest.mark.parametrize("color", ["#0072B2", "0.6", "black"])
def test_readable_text_contrasts_with_its_ground(color):
    from matplotlib.colors import to_rgba

    assert report.readable(to_rgba(color)) == ("black" if color == "0.6" else "white")
