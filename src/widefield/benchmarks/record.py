"""Print the rows of a benchmark as they are measured, and write a JSON and a Markdown file per run."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from widefield import bench, report
from widefield.benchmarks.settings import LAYOUTS, Settings, keep_freed_memory

Row = dict[str, Any]

_TIMES = 22
"""Width of a time and its percentiles, in characters."""
_WORD = 13
_WORDS = ("step", "mode", "layout", "layers")
"""Columns of short words. They get a fixed width of ``_WORD`` characters, so that all rows line up."""


@dataclass(frozen=True)
class Bar:
    """A limit for a benchmark, with the worst row."""

    text: str
    limit: float
    at_least: bool
    """True if the limit is a lower bound, False if it is an upper bound."""
    measured: float | None
    """None if no row applies."""
    where: str = ""

    @property
    def verdict(self) -> str:
        """ "met", "not met" or "not measured"."""
        if self.measured is None:
            return "not measured"
        met = self.measured >= self.limit if self.at_least else self.measured <= self.limit
        return "met" if met else "not met"

    def to_dict(self) -> Row:
        """Return the fields and the verdict."""
        return {**asdict(self), "verdict": self.verdict}

    def formatted(self) -> dict[str, str]:
        """Return the bar as a row of the summary."""
        return {
            "bar": self.text,
            "limit": f"{'>=' if self.at_least else '<='} {self.limit:g}",
            "measured": "-" if self.measured is None else f"{self.measured:.4g}",
            "verdict": self.verdict,
            "worst row": self.where or "-",
        }


def bar(
    text: str,
    rows: Iterable[Row],
    value: Callable[[Row], float],
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Bar:
    """Return a bar that compares the worst of ``rows`` with a limit.

    Args:
        text: name of the bar.
        rows: may be empty; the "label" of the worst row is recorded.
        value: row -> the number to compare.
        at_least: lower bound; give either this or ``at_most``.
        at_most: upper bound.
    """
    limit = at_least if at_least is not None else at_most
    if limit is None or (at_least is not None and at_most is not None):
        raise ValueError("give either at_least or at_most.")
    values = [(value(row), str(row["label"])) for row in rows]
    if not values:
        return Bar(text, limit, at_least is not None, None)
    worst = (min if at_least is not None else max)(values)
    return Bar(text, limit, at_least is not None, *worst)


class Table:
    """Rows under a title, kept for JSON and formatted by ``columns``: heading -> formatter."""

    def __init__(self, title: str, columns: Mapping[str, Callable[[Row], str]], note: str = "") -> None:
        self.title = title
        self.columns = columns
        self.note = note
        self.rows: list[Row] = []

    def formatted(self, row: Row) -> dict[str, str]:
        """Return a row as text."""
        return {heading: show(row) for heading, show in self.columns.items()}

    def markdown(self) -> str:
        """Return title, note and rows as Markdown."""
        note = f"{self.note}\n\n" if self.note else ""
        return f"## {self.title}\n\n{note}{report.markdown([self.formatted(row) for row in self.rows])}"


class Record:
    """One run of a benchmark: prints rows as they are added, and finally writes ``NAME_DEVICE.json`` and ``.md``.

    Args:
        name: of the files.
        settings: of the measurement.
        environment: where the measured processes differ from this one, such as ``threads="1"``.
    """

    def __init__(self, name: str, settings: Settings, **environment: str) -> None:
        self.name = name
        self.settings = settings
        malloc = "keeps what is freed" if keep_freed_memory() else "as the system has it"
        here = {**bench.environment(settings.device), "dtype": settings.dtype, "malloc": malloc}
        self.environment = {**here, **environment}
        self.facts: list[str] = []
        self.tables: list[Table] = []
        self._widths: list[int] = []
        self._say(f"{settings.command}: {self._about()}")

    def _about(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.environment.items())

    def _say(self, line: str) -> None:
        print(line, flush=True)

    def fact(self, text: str) -> None:
        """Print and keep a sentence about the measurement."""
        self.facts.append(text)
        self._say(text)

    def table(self, title: str, columns: Mapping[str, Callable[[Row], str]], note: str = "") -> Table:
        """Return a new table; add rows with :meth:`add`. Its headings are printed with the first row."""
        table = Table(title, columns, note)
        self.tables.append(table)
        return table

    def add(self, table: Table, row: Row) -> None:
        """Append a row and print it."""
        table.rows.append(row)
        cells = table.formatted(row)
        if len(table.rows) == 1:
            self._say(f"\n{table.title}" + (f"\n{table.note}" if table.note else ""))
            self._widths = [_TIMES if "p20" in heading else _WORD if heading in _WORDS else 0 for heading in cells]
            self._widths = _wider(_wider(self._widths, list(cells)), list(cells.values()))
            self._line(list(cells))
        self._line(list(cells.values()))

    def _line(self, cells: Sequence[str]) -> None:
        self._widths = _wider(self._widths, cells)
        self._say("  ".join(cell.ljust(width) for cell, width in zip(cells, self._widths, strict=True)).rstrip())

    @contextlib.contextmanager
    def until_interrupted(self) -> Iterator[None]:
        """End the measurements inside on Ctrl-C without ending the run, so that finished rows are still written."""
        try:
            yield
        except KeyboardInterrupt:
            self.fact("Interrupted: the rows that are missing were not measured.")

    def finish(self, bars: Sequence[Bar], digest: Sequence[tuple[str, Sequence[Mapping[str, str]]]] = ()) -> None:
        """Print the summary, and write the files if ``settings.out`` is a folder.

        Args:
            bars: may be empty.
            digest: additional small tables of text, (title, rows), for the head of the Markdown file.
        """
        shown = [b.formatted() for b in bars]
        if shown:
            self._say("\nSummary")
            lines = [list(shown[0]), *(list(line.values()) for line in shown)]
            self._widths = functools.reduce(_wider, lines, [0] * len(lines[0]))
            for line in lines:
                self._line(line)
        rows = {table.title: table.rows for table in self.tables}
        result = {
            "environment": self.environment,
            "facts": self.facts,
            "summary": [b.to_dict() for b in bars],
        }
        if self.settings.finished is not None:
            self.settings.finished({**result, "tables": rows})
        if self.settings.out is None:
            return
        stem = self.settings.out / f"{self.name}_{self.settings.slug}"
        stem.with_suffix(".json").write_text(_document({"command": self.settings.command, **result}, rows))
        # A page of the docs includes only the text between these markers.
        parts = ["<!-- --8<-- [start:summary] -->", f"`{self.settings.command}`: {self._about()}", *self.facts]
        if shown:
            parts.append(report.markdown(shown).rstrip())
        parts += [f"**{title}**\n\n{report.markdown(rows).rstrip()}" for title, rows in digest]
        parts.append("<!-- --8<-- [end:summary] -->")
        parts += [table.markdown().rstrip() for table in self.tables if table.rows]
        stem.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
        self._say(f"\nwritten: {stem}.json, {stem}.md")


def publish(
    stem: Path,
    command: str,
    content: Mapping[str, Any],
    text: str,
    *,
    bars: Sequence[Bar] = (),
    before: str = "",
    beside: Sequence[str] = (),
) -> None:
    """Write a script's measurements to STEM.json and STEM.md, each with the command, machine, versions and date.

    Args:
        stem: path without a suffix; its folder is created if needed.
        command: the command line that produced the figures.
        content: of the JSON file, which also has the bars, as "summary".
        text: Markdown after the bars.
        bars: limits, with the worst rows.
        before: Markdown before that line.
        beside: see :func:`widefield.bench.environment`.
    """
    environment = bench.environment(beside=beside)
    made = ", ".join(f"{key} {value}" for key, value in environment.items())
    stem.parent.mkdir(parents=True, exist_ok=True)
    summary = {"summary": [each.to_dict() for each in bars]} if bars else {}
    document = {"command": command, "environment": environment, **summary, **content}
    judged = f"{report.markdown([each.formatted() for each in bars])}\n" if bars else ""
    stem.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(f"{before}`{command}`: {made}\n\n{judged}{text}", encoding="utf-8")


def _wider(widths: Sequence[int], cells: Sequence[str]) -> list[int]:
    return [max(width, len(cell)) for width, cell in zip(widths, cells, strict=True)]


def in_better_layout(row: Row, peer: str) -> float:
    """Return a peer's median in seconds, in its faster memory format."""
    return float(min(row["times"][f"{peer} {layout}"]["p50"] for layout in LAYOUTS))


def milliseconds(row: Mapping[str, Any]) -> str:
    """Format a row of times in milliseconds as "p50 (p20-p80)", three digits of each."""
    return f"{_ms(row['p50'])} ({_ms(row['p20'])}-{_ms(row['p80'])})"


def _ms(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def times(rows: Mapping[str, bench.Row]) -> dict[str, Row]:
    """Return measured rows as plain dictionaries: times in seconds, and peak memory where it is known."""
    return {
        name: {key: value for key, value in row.to_dict().items() if key != "name" and value is not None}
        for name, row in rows.items()
    }


def _document(result: Mapping[str, Any], tables: Mapping[str, Sequence[Row]]) -> str:
    """Return JSON with one line per row, so that runs can be compared line by line."""
    parts = (
        f"  {json.dumps(title)}: [\n" + ",\n".join(f"   {json.dumps(row)}" for row in rows) + "\n  ]"
        for title, rows in tables.items()
    )
    head = json.dumps(result, indent=1).removesuffix("\n}")
    return f'{head},\n "tables": {{\n' + ",\n".join(parts) + "\n }\n}\n"
