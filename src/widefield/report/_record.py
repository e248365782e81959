"""Print and display records as a summary and a table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from widefield.report._blocks import Plot, Table
from widefield.report._page import fragment

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Return rows as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([row[key] for key in rows[0]] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


class Report(ABC):
    """Base class of records that print themselves, and display themselves in notebooks.

    They print a summary and a table. Notebooks show the figures, too.
    """

    @abstractmethod
    def summary(self) -> str:
        """Return the main facts as plain text, one to a line."""

    def rows(self) -> list[dict[str, str]]:
        """Return the details as table rows with the same columns; empty if there are none."""
        return []

    def drawings(self) -> Mapping[str, Figure]:
        """Return the figures that notebooks show, by caption; empty if there are none."""
        return {}

    def __str__(self) -> str:
        """Return the summary and a Markdown table."""
        rows = self.rows()
        return "\n\n".join(filter(None, (self.summary(), markdown(rows).rstrip() if rows else "")))

    def _repr_html_(self) -> str:
        """Return the summary, the figures and an HTML table, which Jupyter displays."""
        rows = self.rows()
        figures = [Plot(figure, caption) for caption, figure in self.drawings().items()]
        return fragment(*self.summary().splitlines(), *figures, *([Table(rows)] if rows else []))

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        """Return what front ends without HTML, such as IPython in a terminal, display."""
        return {"text/plain": str(self)}


class Row(Protocol):
    """A record that is an entry of a table."""

    def row(self) -> dict[str, str]:
        """Return the cells by column, as text."""


R = TypeVar("R", bound=Row | dict[str, str])


class Listing(Report, list[R]):
    """A list of records, or of rows, that displays itself as a table with one row for each."""

    def summary(self) -> str:
        """Return nothing, unless the list is empty."""
        return "" if self else "None."

    def rows(self) -> list[dict[str, str]]:
        """Return the rows of the records."""
        return [entry if isinstance(entry, dict) else entry.row() for entry in self]
