"""Show progress on terminals of any width, and in notebooks."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

_BAR, _SHORT_BAR, _LONG_BAR = 10, 4, 40
"""Length of the bar, in characters, for which other parts give way; least and largest length."""
_SHORTEST = 8
"""A description is not shortened further; where there is less room it gets its own line."""
_CELL_SECONDS = 0.2
"""Time between two states of a bar in a notebook."""
_MARGIN = 1
"""Columns at the right that stay free: some terminals start a new line once the last one is filled."""


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    return Console().is_jupyter


def progress_console() -> Console:
    """Return the console for progress: stderr; in a notebook plain stdout, whose lines stay in one block.

    rich's own consoles make every line of a notebook an output of its own, and those of stderr look like errors.
    """
    notebook = in_notebook()  # whose kernel sets FORCE_COLOR, which rich takes for a terminal
    return Console(stderr=not notebook, force_jupyter=False, force_terminal=False if notebook else None)


class ProgressLine(Progress):
    """A progress bar that keeps bar, count and time left at any width.

    Where there is less room, the bar becomes shorter, then the time so far goes, then the description is shortened or
    moves to its own line. The text of a task, ``update(task, text=...)``, follows on the same line or below.

    In a notebook the bar is an output of the cell. Its last state stays.

    Args:
        console: where to show it.
        transient: leave nothing on the screen at the end.
        visible: False shows nothing; neither does a quiet console, or one that is not a terminal, except in notebooks.
    """

    def __init__(self, console: Console, *, transient: bool = True, visible: bool = True) -> None:
        on_screen = not console.quiet and console.file in (sys.stdout, sys.stderr)
        self._cell = _Cell() if visible and on_screen and in_notebook() else None
        # rich needs ipywidgets in a notebook. Without its thread, `track` refreshes after each step, in this thread.
        on = visible and console.is_terminal and self._cell is None
        super().__init__(console=console, transient=transient, disable=not on, auto_refresh=self._cell is None)

    @property
    def shown(self) -> bool:
        """Return whether the bar is on a screen."""
        return self._cell is not None or not self.disable

    def stop(self) -> None:
        """Show the last state, and stop."""
        super().stop()
        if self._cell is not None:
            for task in self.tasks:
                if task.total is None:  # there is no more to come
                    super().update(task.id, total=task.completed)
            self._cell.show(self.tasks, last=True)

    def refresh(self) -> None:
        """Show the present state."""
        super().refresh()
        if self._cell is not None:
            self._cell.show(self.tasks)

    def update(self, task_id: TaskID, *args: Any, **fields: Any) -> None:
        """Change a task as rich does; a notebook shows it soon."""
        super().update(task_id, *args, **fields)
        if self._cell is not None:
            self._cell.show(self.tasks)

    def get_renderables(self) -> Iterator[RenderableType]:
        """Yield the lines of each task."""
        for task in self.tasks:
            if task.visible:
                yield from _lines(task, self.console.width - _MARGIN)


def _lines(task: Task, width: int) -> Iterator[RenderableType]:
    count = MofNCompleteColumn().render(task)
    left = TimeRemainingColumn().render(task)
    spent = Text.assemble(TimeElapsedColumn().render(task), " <")
    text = str(task.fields.get("text", ""))
    name = task.description
    fixed = len(count) + len(left) + 2  # and a space before each
    shown = [spent, left] if fixed + len(spent) + 1 + _BAR <= width else [left]
    room = width - sum(len(each) + 1 for each in (count, *shown)) - _BAR - 1
    beside = min(len(name), room) >= min(_SHORTEST, len(name))
    if beside and len(name) > room:
        name = f"{name[: room - 1]}…"
    free = width - sum(len(each) + 1 for each in (count, *shown)) - (len(name) + 1 if beside and name else 0)
    bar = BarColumn(max(_SHORT_BAR, min(_LONG_BAR, free))).render(task)
    first = [Text(name)] if beside and name else []
    after = text and len(text) + 1 <= free - (bar.width or 0)
    row: list[RenderableType] = [*first, bar, count, *shown, *([Text(text)] if after else [])]
    line = Table.grid(*[""] * len(row), padding=(0, 1))
    for column in line.columns:
        column.no_wrap = True
    line.add_row(*row)
    if not beside:
        yield Text(name, no_wrap=True, overflow="ellipsis")
    yield line
    if text and not after:
        yield Text(text, overflow="fold")


class _Cell:
    """The output of a notebook's cell that shows a bar; each state replaces the one before it."""

    def __init__(self) -> None:
        from IPython.display import DisplayHandle

        self._handle = DisplayHandle()
        self._next = 0.0
        self._begun = False

    def show(self, tasks: list[Task], *, last: bool = False) -> None:
        """Show tasks, unless others were shown just before; the last ones always."""
        tasks = [task for task in tasks if task.visible]
        if not tasks or (not last and time.monotonic() < self._next):
            return
        self._next = time.monotonic() + _CELL_SECONDS
        output = {
            "text/html": "".join(_cell_html(task) for task in tasks),
            "text/plain": "\n".join(" ".join(_cell_texts(task)) for task in tasks),
        }
        if self._begun:
            self._handle.update(output, raw=True)
        else:
            self._handle.display(output, raw=True)
        self._begun = True


def _cell_html(task: Task) -> str:
    name, *facts = (html.escape(text) for text in _cell_texts(task))
    state = "" if task.total is None else f' value="{task.completed:g}" max="{task.total:g}"'
    return f"<div>{name} <progress{state}></progress> {' '.join(facts)}</div>"


def _cell_texts(task: Task) -> list[str]:
    """Return description, count, times, and the text of a task."""
    times = [TimeElapsedColumn().render(task).plain]
    if task.time_remaining:
        times.append(f"< {TimeRemainingColumn().render(task).plain}")
    text = str(task.fields.get("text", ""))
    return [task.description, MofNCompleteColumn().render(task).plain.strip(), *times, *([text] if text else [])]
