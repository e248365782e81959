"""Print and display records as a summary and a table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from widefield.report._blocks import Table
from widefield.report._page import fragment


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Return rows as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([row[key] for key in rows[0]] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


class Report(ABC):
    """Base class of records that print themselves, and display themselves in notebooks, as a summary and a table."""

    @abstractmethod
    def summary(self) -> str:
        """Return the main facts as plain text, one to a line."""

    def rows(self) -> list[dict[str, str]]:
        """Return the details as table rows with the same columns; empty if there are none."""
        return []

    def __str__(self) -> str:
        """Return the summary and a Markdown table."""
        rows = self.rows()
        return f"{self.summary()}\n\n{markdown(rows).rstrip()}" if rows else self.summary()

    def _repr_html_(self) -> str:
        """Return the summary and an HTML table, which Jupyter displays."""
        rows = self.rows()
        return fragment(*self.summary().splitlines(), *([Table(rows)] if rows else []))
