"""The page about a fit, and its figures."""

from __future__ import annotations

import html
import re
from dataclasses import replace

import pytest

from displays import assert_displays
from widefield.fitting import FitResult
from widefield.fitting.figures import draw_wanted
from widefield.fitting.page import draw_rings, page


def test_the_page_says_what_was_found(finished: FitResult) -> None:
    text = finished.page.read_text()
    assert text == page(finished)
    assert finished.verdict.text in html.unescape(text)
    for group in finished.groups:
        assert f">{group.name}</td>" in text
    chosen = ", ".join(map(str, finished.choice.sizes))
    assert re.search(rf"<tr><td[^>]*>{re.escape(chosen)}</td>.*?chosen.*?</tr>", text)
    assert text.count("<svg ") == 4  # what was wanted, the front, object sizes, the rings
    assert text.count('src="data:image/svg+xml;base64,') == 1  # the field
    assert 'src="http' not in text  # it holds its pictures


def test_pages_leave_out_what_is_unknown(finished: FitResult) -> None:
    bare = replace(finished.verdict, plain=replace(finished.verdict.plain, field={}),
                   unchanged=replace(finished.verdict.unchanged, field={}))  # fmt: skip
    text = page(replace(finished, verdict=bare, readings=replace(finished.readings, rings={})))
    assert text.count("<svg ") == 3
    assert "Effective receptive field" not in text


def test_figures_show_the_choice(finished: FitResult) -> None:
    axis = draw_wanted(finished.choice, finished.groups).axes[0]
    stars = {tuple(line.get_xydata()[0]) for line in axis.lines if line.get_marker() == "*"}
    ticks, effects = finished.groups.sizes, finished.choice.model.effects
    expected = {(ticks.index(size), effects[name][size]) for name, size in finished.sizes.items()}
    assert stars == {tuple(map(float, pair)) for pair in expected}

    front = finished.plot().axes[0]
    chosen = next(line for line in front.lines if line.get_label() == "chosen")
    assert chosen.get_xdata()[0] == pytest.approx(finished.choice.predicted)
    assert [text.get_text() for text in draw_rings(finished).axes[0].get_yticklabels()] == list(finished.readings.rings)


@pytest.mark.parametrize("name", ["FitResult", "Costs", "Groups"])
def test_the_records_of_a_fit_display_themselves(finished: FitResult, name: str) -> None:
    found = {type(one).__name__: one for one in (finished, finished.costs, finished.groups)}[name]
    assert_displays(found)
    assert ("data:image/png" in found._repr_html_()) == (name == "FitResult")
