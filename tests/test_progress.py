"""The progress line at any width."""

from __future__ import annotations

import io
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from widefield._progress import ProgressLine, progress_console

NUMBERS = "loss 0.1234  lr 0.001  img/s 1234  top1 0.8123  ema_top1 0.83"
LONG = "morf_convnext_tiny{num_classes: 10, depths: [1, 1, 1, 1]} 224"


def shown(width: int, description: str, text: str = "", total: int | None = 123456) -> list[str]:
    """Return the lines for a task of which half is done."""
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    seconds = iter(range(1000))
    line = ProgressLine(console)
    line.get_time = lambda: float(next(seconds))
    task = line.add_task(description, total=total, text=text)
    line.update(task, completed=0 if total is None else total // 2 - 1)
    line.update(task, advance=1)
    console.print(line.get_renderable())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [30, 40, 60, 80, 120, 200])
@pytest.mark.parametrize(("description", "text"), [("training", NUMBERS), (LONG, ""), ("", "")])
def test_bar_count_and_time_left_are_always_there(width: int, description: str, text: str) -> None:
    lines = shown(width, description, text)
    assert max(map(cell_len, lines)) <= width
    (bar,) = [line for line in lines if "━━" in line]
    assert "61728/123456" in bar
    assert re.search(r" 1\d:\d\d:\d\d( |$)", bar)
    assert "…" not in bar.split("━")[-1]
    assert "".join(text.split()) in "".join("".join(lines).split())  # numbers are whole, on this line or below
    if width >= 40 and description:
        assert any(description[:7] in line for line in lines)


def test_numbers_follow_the_bar_where_there_is_room() -> None:
    assert [len(shown(width, "training", NUMBERS)) for width in (200, 80)] == [1, 2]
    assert shown(200, "training", NUMBERS)[0].rstrip().endswith(NUMBERS)


def test_an_unknown_number_of_steps() -> None:
    (line,) = shown(40, "erf", total=None)
    assert "0/?" in line or "1/?" in line


def test_nothing_is_shown_in_a_pipe_or_by_other_processes() -> None:
    for terminal, visible in ((False, True), (True, False)):
        console = Console(width=80, file=io.StringIO(), force_terminal=terminal)
        with ProgressLine(console, visible=visible) as line:
            assert list(line.track(range(3), description="erf")) == [0, 1, 2]
        assert isinstance(console.file, io.StringIO)
        assert console.file.getvalue().strip() == ""


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what a cell of a notebook shows, the first state and all that replace it."""
    display = pytest.importorskip("IPython.display")
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    found: list[str] = []
    for name in ("display", "update"):
        show = lambda handle, data, raw, name=name: found.append(f"{name} {data['text/plain']}")  # noqa: E731
        monkeypatch.setattr(display.DisplayHandle, name, show)
    return found


def test_a_notebook_shows_one_bar_that_changes_a_few_times_a_second(states: list[str]) -> None:
    with ProgressLine(progress_console()) as line:
        assert list(line.track(range(5000), description="erf")) == list(range(5000))
    assert states[0].startswith("display erf 0/5000 0:00:00")
    assert states[-1].startswith("update erf 5000/5000 0:00:0")
    assert all(state.startswith("update") for state in states[1:])
    assert len(states) < 50


def test_an_unknown_number_of_steps_ends_complete_in_a_notebook(states: list[str]) -> None:
    with ProgressLine(progress_console()) as line:
        assert list(line.track((letter for letter in "abc"), description="erf")) == ["a", "b", "c"]
    assert states[0].startswith("display erf 0/?")
    assert states[-1].startswith("update erf 3/3")


def test_a_notebook_shows_nothing_of_quiet_and_other_consoles(states: list[str]) -> None:
    for console in (Console(quiet=True), Console(file=io.StringIO())):
        with ProgressLine(console) as line:
            assert not line.shown
            assert list(line.track(range(3), description="erf")) == [0, 1, 2]
    assert states == []
