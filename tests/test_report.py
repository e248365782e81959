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
