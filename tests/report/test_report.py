import dataclasses

import numpy as np

from widefield import report

ROWS = [{"a": "x", "b": "1 < 2"}, {"a": "y", "b": "3"}]


def test_tables_keep_columns_and_escape():
    assert report.markdown(ROWS) == "| a | b |\n| --- | --- |\n| x | 1 < 2 |\n| y | 3 |\n"
    html = report.table(ROWS)
    assert "<th>b</th>" in html
    assert "1 &lt; 2" in html


def test_page_is_one_complete_document():
    figure = report.curves({"a": ([1, 2], [3, 4])}, "x", "y")
    page = report.page("T & T", "lead", [("S", report.picture(figure, "caption"))], {"torch": "2"})
    assert page.startswith("<!doctype html>")
    assert "T &amp; T" in page
    assert "data:image/png;base64," in page
    assert "torch 2" in page


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
    shown = Facts(1)._repr_html_()
    assert shown.startswith("<p>1 facts &lt; 3</p><p>and a second line</p>")
    assert "<td>&lt;b&gt;</td>" in shown
    assert "<table" not in Facts(0)._repr_html_()


def test_links_are_escaped():
    assert report.link('a"b.html', "<all>") == '<p><a href="a&quot;b.html">&lt;all&gt;</a></p>'
