"""Describe the parts of a page: tables, figures, pictures, cards. Templates turn them into HTML."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from widefield.report._drawing import png, width_of
from widefield.report._svg import svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LONG = 24
"""Tables with more rows are folded."""
_FEW = 3
"""Largest number of rows that a narrow window shows as lists of their columns."""
_WORDY = 40
"""Letters from which a cell is a text."""
_NARROW = 3
"""Largest number of columns that fit a narrow window."""


class Block:
    """Base class of the parts of a page; plain text is a paragraph."""

    template: ClassVar[str]
    """File with the HTML."""


Part: TypeAlias = "Block | str"


@dataclass(frozen=True)
class Table(Block):
    """A table; if it is long, it is folded until a reader opens it.

    Attributes:
        rows: the cells as text; the keys of the first row are the columns.
        title: what the rows are, which a folded table shows.
    """

    rows: Sequence[Mapping[str, str]]
    title: str = ""
    template = "table.html"

    @property
    def columns(self) -> list[str]:
        """Return the headings of the columns."""
        return list(self.rows[0])

    @property
    def wordy(self) -> set[str]:
        """Return the columns of texts, which are aligned to the left and wrapped."""
        return {name for name in self.columns if any(len(row[name]) > _WORDY for row in self.rows)}

    @property
    def folded(self) -> bool:
        """Return whether the table is folded."""
        return len(self.rows) > LONG

    @property
    def listed(self) -> bool:
        """Return whether a narrow window shows each row as a list of its columns, as it would cut the table."""
        return len(self.rows) <= _FEW and len(self.columns) > _NARROW

    @property
    def label(self) -> str:
        """Return what a reader sees of a folded table."""
        return f"{self.title or ', '.join(filter(None, self.columns))}: {len(self.rows)} rows"


@dataclass(frozen=True)
class Plot(Block):
    """A matplotlib figure with a caption: in the colors of a page, or in a notebook in light ones."""

    figure: Figure
    caption: str
    template = "plot.html"

    @property
    def drawing(self) -> str:
        """Return the figure as HTML."""
        return svg(self.figure, self.caption)

    @cached_property
    def light(self) -> str:
        """Return the figure in light colors as the address of a PNG."""
        return address(png(self.figure), "png")

    @property
    def width(self) -> int:
        """Return the width in CSS pixels."""
        return width_of(base64.b64decode(self.light.partition(",")[2][:32]))


@dataclass(frozen=True)
class Photo(Block):
    """An image file of a kind, "png" or "jpeg", with a caption; pages show ``drawing``, a file of SVG, if there is one.

    The drawing becomes an image, as browsers run no scripts in images: the file may come from somebody else.
    """

    file: bytes
    kind: str
    caption: str
    drawing: bytes = b""
    template = "photo.html"

    @property
    def source(self) -> str:
        """Return the image as an address that holds it."""
        return address(self.file, self.kind)

    @property
    def drawn(self) -> str:
        """Return what pages show, as an address that holds it."""
        return address(self.drawing, "svg+xml") if self.drawing else self.source


@dataclass(frozen=True)
class Card(Block):
    """A framed block with a title."""

    title: str
    parts: Sequence[Part]
    template = "card.html"


@dataclass(frozen=True)
class Cards(Block):
    """Cards in as many columns as fit the window, or wide ones below one another."""

    cards: Sequence[Block]
    wide: bool = False
    template = "cards.html"


@dataclass(frozen=True)
class Views(Block):
    """Pictures side by side, or below one another if the window is narrow."""

    parts: Sequence[Part]
    template = "views.html"


@dataclass(frozen=True)
class Bars(Block):
    """Named shares, from 0 to 1, as horizontal bars with percentages."""

    shares: Mapping[str, float]
    template = "bars.html"


@dataclass(frozen=True)
class Legend(Block):
    """Colors, (red, green, blue) from 0 to 255, and their meanings."""

    entries: Sequence[tuple[Sequence[int], str]]
    template = "legend.html"


@dataclass(frozen=True)
class Fold(Block):
    """Details that a reader can open."""

    title: str
    parts: Sequence[Part]
    template = "fold.html"


@dataclass(frozen=True)
class Link(Block):
    """A link to a file, by its path relative to the page."""

    place: str
    text: str
    template = "link.html"


@dataclass(frozen=True)
class Terms(Block):
    """Words that the page uses, and what they mean."""

    meanings: Mapping[str, str]
    template = "terms.html"


def address(file: bytes, kind: str) -> str:
    """Return an image file, "png", "jpeg" or "svg+xml", as an address that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(file).decode()}"
