"""Define what a part of the demo contributes to the page, the results and the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from widefield.report import Section

Rows = tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class Chapter:
    """The outcome of one part of the demo."""

    headline: str
    """One or two sentences for the top of the page."""
    sections: tuple[Section, ...]
    numbers: Mapping[str, Any]
    """For ``results.json``, in JSON's types."""
    tables: tuple[tuple[str, Rows], ...] = ()
    """(title, rows) for the terminal."""
