"""Draw predictions of every kind: as cards of a page, panels of a figure, and image files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from widefield._lazy import load_on_demand

if TYPE_CHECKING:
    from widefield.drawing.kinds import DRAWINGS, drawing_of
    from widefield.drawing.parts import Drawing

load_on_demand(
    __name__,
    {
        "kinds": "DRAWINGS drawing_of",
        "parts": "Drawing",
    },
)

__all__ = [
    "DRAWINGS",
    "Drawing",
    "drawing_of",
]
