"""Show progress on terminals of any width."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

_BAR, _SHORT_BAR, _LONG_BAR = 10, 4, 40
"""Length of the bar, in characters, for which other parts give way; least and largest length."""
_SHORTEST = 8
"""A description is not shortened further; where there is less room it gets its own line."""
_MARGIN = 1
"""Columns at the right that stay free: some terminals start a new line once the last one is filled."""


class ProgressLine(Progress):
    """A progress bar that keeps bar, count and time left at any width.

    Where there is less room, the bar becomes shorter, then the time so far goes, then the description is shortened or
    moves to its own line. The text of a task, ``update(task, text=...)``, follows on the same line or below.

    Args:
        console: where to show it.
        transient: leave nothing on the screen at the end.
        visible: False shows nothing; a console that is not a terminal shows nothing, either.
    """

    def __init__(self, console: Console, *, transient: bool = True, visible: bool = True) -> None:
        super().__init__(console=console, transient=transient, disable=not (visible and console.is_terminal))

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
