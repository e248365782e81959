"""Properties of all results: numbers that JSON can represent, and files that are written completely or not at all."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from widefield import bench, report
from widefield.analysis import Result, save
from widefield.analysis._result import plain


@dataclass(frozen=True)
class Line(Result):
    name: str
    about: Mapping[str, Any]
    values: np.ndarray

    title = "A line"
    lead = "How it rises."

    def rows(self):
        return [{"model": self.name, "largest": f"{self.values.max():g}"}]

    @classmethod
    def reading(cls, results):
        return f"{' and '.join(results)} rise."

    @classmethod
    @report.paper()
    def draw(cls, results, *, log=False):
        figure = report.blank(report.COLUMN, 2)
        axes = figure.subplots()
        for name, result in results.items():
            axes.plot(result.values, label=name)
        axes.set_yscale("log" if log else "linear")
        axes.legend()
        return figure


@pytest.fixture
def lines():
    return {name: Line(name, {"seed": 0}, np.arange(1.0, 4) * k) for k, name in enumerate("ab", 1)}


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_figures_are_files_that_repeat_to_the_bit(lines, tmp_path, suffix, magic):
    first, second = (save(lines, tmp_path / f"{i}.{suffix}", log=True).read_bytes() for i in range(2))
    assert first.startswith(magic)
    assert first == second


def test_json_holds_everything(lines, tmp_path):
    stored = json.loads(save(lines, tmp_path / "deep" / "x.json").read_text())
    assert stored["results"]["b"] == {"kind": "Line", "name": "b", "about": {"seed": 0}, "values": [2, 4, 6]}
    assert stored["environment"]["torch"] == bench.environment()["torch"]
    assert json.loads(lines["a"].save(tmp_path / "a.json").read_text())["results"]["a"]["name"] == "a"


def test_a_page_is_one_file_with_figure_and_table(lines, tmp_path):
    page = save(lines, tmp_path / "x.html").read_text()
    assert "A line" in page
    assert "<svg " in page
    assert "<td>6</td>" in page
    assert page.count("How it rises.") == 2  # the caption, and the text for those who cannot see it: no lead repeats it
    assert page.index("<p>a and b rise.</p>") < page.index("<figure>")
    assert "How this was measured" in page
    assert "http" not in page.replace("http-equiv", "")


def test_what_cannot_be_saved_leaves_no_file(lines, tmp_path):
    with pytest.raises(ValueError, match=r"suffix of path.*got '\.jpeg'"):
        save(lines, tmp_path / "x.jpeg")
    with pytest.raises(ValueError, match="got none"):
        save({}, tmp_path / "x.png")
    other = type("Other", (Line,), {})("c", {}, np.ones(1))
    with pytest.raises(ValueError, match="Line', 'Other"):
        save({**lines, "c": other}, tmp_path / "x.png")
    with pytest.raises(TypeError, match="unexpected keyword"):
        save(lines, tmp_path / "x.png", lgo=True)
    (tmp_path / "x.json").mkdir()
    with pytest.raises(OSError, match=r"x\.json"):
        save(lines, tmp_path / "x.json")
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_plain_knows_what_json_has_not():
    given = {"t": torch.ones(2), "n": np.float32(2), "nan": float("nan"), "x": (1, "a", None, True), 0.5: [np.inf]}
    assert plain(given) == {"t": [1, 1], "n": 2, "nan": None, "x": [1, "a", None, True], "0.5": [None]}
    with pytest.raises(TypeError, match="object"):
        plain(object())
