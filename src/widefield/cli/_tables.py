"""Print tables."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence


def print_table(rows: Sequence[Mapping[str, str]], right: Collection[str] | None = None) -> None:
    """Print rows under the keys of the first; output to a file or another program is never truncated.

    Args:
        rows: at least one, all with the same keys.
        right: right-aligned columns; default: all except the first.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for index, column in enumerate(rows[0]):
        number = column in right if right is not None else index > 0
        table.add_column(column, justify="right" if number else "left", no_wrap=number, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row.values()))  # as plain text: [3, 5] is not markup
    console = Console()
    if not console.is_terminal:
        wide = console.options.update(width=10_000)
        console.width = max(console.width, console.measure(table, options=wide).maximum)
    console.print(table)
