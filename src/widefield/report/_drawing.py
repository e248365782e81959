"""Write figures as files."""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PNG_DPI = 192
SCALE = 0.75
"""CSS pixels of a page per pixel of a figure, so that figures are sharp on screens with small pixels."""


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG at 192 dots per inch."""
    return drawing(figure, "png", PNG_DPI)


def drawing(figure: Figure, kind: str, dpi: int = 200, background: str = "white") -> bytes:
    """Return a figure as a file: "png"; or "pdf" or "svg", with selectable text and without a date."""
    import matplotlib

    buffer = io.BytesIO()
    dateless = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
    with matplotlib.rc_context({"pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "widefield"}):
        figure.savefig(
            buffer, format=kind, dpi=dpi, bbox_inches="tight", facecolor=background, metadata=dateless.get(kind)
        )
    return buffer.getvalue()


def width_of(file: bytes) -> int:
    """Return the width on a page, in CSS pixels, of a figure's PNG; its first 24 bytes are enough."""
    width: int = struct.unpack(">I", file[16:20])[0]
    return round(SCALE * width)
