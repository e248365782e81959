"""Lay out tables for terminals of any width, and for files and other programs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

Rows = Sequence[Mapping[str, str]]

_WORDS, _WORD = 16, 24
"""Least widths of columns of long texts, and of long words such as paths, in characters."""
_BREAKS = "/_-.,:"
"""Characters after which a line may end in the middle of a word: a path is cut between folders, if long enough."""


def print_table(
    rows: Rows,
    right: Collection[str] | None = None,
    *,
    caption: str = "",
    title: str = "",
    console: Console | None = None,
) -> None:
    """Print rows on stdout under the keys of the first.

    On a terminal long texts are folded. If columns would become too narrow, several tables follow each other, each with
    as many of the first columns as tell the rows apart. Output to a file or another program has one line a row,
    whatever its width, and no colors.

    Args:
        rows: at least one, all with the same keys.
        right: right-aligned columns, which are not folded; default: all except the first.
        caption: text below the table.
        title: text above it.
        console: where to print; default: stdout.
    """
    console = console or _Stdout()
    columns = _columns(rows, right)
    parts = list(_parts(columns, console.width)) if console.is_terminal else [columns]
    for number, part in enumerate(parts):
        _print_part(console, part, title if number == 0 else "")
    if caption:
        console.print(Text(caption, style="italic dim"), soft_wrap=not console.is_terminal)


def print_text(text: str) -> None:
    """Print a paragraph on stdout: folded between words on a terminal, else as one line."""
    console = _Stdout()
    console.print(Text(text), soft_wrap=not console.is_terminal)


class _Stdout(Console):
    """Passes on that nobody reads stdout any more, which the command line turns into an exit code."""

    def on_broken_pipe(self) -> None:
        """Raise the BrokenPipeError that is handled."""
        raise  # rich calls this while it handles the error


@dataclass(frozen=True)
class _Column:
    heading: str
    cells: Sequence[str]
    right: bool

    @property
    def widest(self) -> int:
        """Return the width without folding."""
        return max(cell_len(line) for text in (self.heading, *self.cells) for line in text.split("\n"))

    @property
    def narrowest(self) -> int:
        """Return the least width."""
        if not self.right:
            word = max((cell_len(word) for text in (self.heading, *self.cells) for word in text.split()), default=0)
            return min(self.widest, max(_WORDS, min(word, _WORD)))
        heading = max(map(cell_len, self.heading.split()), default=0)
        return max(heading, *(cell_len(line) for text in self.cells for line in text.split("\n")))


def _columns(rows: Rows, right: Collection[str] | None) -> list[_Column]:
    aligned = list(rows[0])[1:] if right is None else right
    return [_Column(name, [row[name] for row in rows], name in aligned) for name in rows[0]]


def _needed(widths: Sequence[int]) -> int:
    """Return the width of a table with columns of these widths: with borders, and a space on each side of a cell."""
    return sum(widths) + 3 * len(widths) + 1


def _parts(columns: Sequence[_Column], width: int) -> Iterator[list[_Column]]:
    """Split columns into tables that fit, each of which starts with the columns that tell the rows apart."""
    heads = _heads(columns, width)
    part = list(columns[:heads])
    for column in columns[heads:]:
        if len(part) > heads and _needed([each.narrowest for each in (*part, column)]) > width:
            yield part
            part = list(columns[:heads])
        part.append(column)
    yield part


def _heads(columns: Sequence[_Column], width: int) -> int:
    """Return how many of the first columns tell the rows apart; 1 if these would take more than half of the width."""
    rows = len(columns[0].cells)
    for count in range(1, len(columns)):
        if _needed([each.narrowest for each in columns[:count]]) > width / 2:
            return 1
        if len(set(zip(*(each.cells for each in columns[:count]), strict=True))) == rows:
            return count
    return 1


def _widths(columns: Sequence[_Column], width: int) -> list[int]:
    """Return the widths of columns in a table that is at most ``width`` wide, if that is possible."""
    widths = [column.widest for column in columns]
    while (excess := _needed(widths) - width) > 0:
        spare = [now - column.narrowest for now, column in zip(widths, columns, strict=True)]
        if not any(spare):
            return widths
        # The widest of those that can be narrower, down to the next one.
        index = max((i for i, left in enumerate(spare) if left), key=lambda i: widths[i])
        others = [now for i, now in enumerate(widths) if spare[i] and now < widths[index]]
        widths[index] -= min(spare[index], excess, max(1, widths[index] - max(others, default=0)))
    return widths


def _print_part(console: Console, columns: Sequence[_Column], title: str) -> None:
    terminal = console.is_terminal
    widths = _widths(columns, console.width) if terminal else [column.widest for column in columns]
    console.width = max(console.width if terminal else 0, _needed(widths), len(title))
    table = Table(title=Text(title) if title else None, title_justify="left")
    cells = []
    for column, width in zip(columns, widths, strict=True):
        heading = Text("\n".join(folded(column.heading, width)))
        table.add_column(heading, justify="right" if column.right else "left", min_width=width, no_wrap=True)
        cells.append([Text("\n".join(folded(text, width))) for text in column.cells])  # [3, 5] is not markup
    for row in zip(*cells, strict=True):
        table.add_row(*row)
    console.print(table, crop=False)


def folded(text: str, width: int) -> list[str]:
    """Return a text as lines of at most ``width`` characters.

    Lines end at spaces if possible, or else after one of ``/_-.,:``, folders first.
    """
    lines = []
    for line in text.split("\n"):
        rest = line
        while cell_len(rest) > width:
            at = _place(rest, width)
            lines.append(rest[:at].rstrip())
            rest = rest[at:].lstrip()
        lines.append(rest)
    return lines


def _place(text: str, width: int) -> int:
    """Return where to end the first line of a text that is longer than ``width``."""
    end = max((n for n in range(1, min(len(text), width) + 1) if cell_len(text[:n]) <= width), default=1)
    space = text.rfind(" ", 0, end + 1)
    if text[: max(space, 0)].strip():
        return space
    folder = text.rfind("/", 0, end) + 1
    place = folder if 3 * folder >= end else max(text.rfind(mark, 0, end) for mark in _BREAKS) + 1
    return place or end
