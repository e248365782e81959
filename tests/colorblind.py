"""How different two colors look to people without one kind of cones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def _linear(color: Any) -> np.ndarray:
    channels = np.array(color) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def _lab(linear: np.ndarray) -> np.ndarray:
    """Return CIE L*a*b* of linear sRGB."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(np.maximum(to_xyz @ linear / np.array([0.9505, 1, 1.089]), 0.008856))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


DICHROMATS = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}
"""What linear sRGB looks like without one kind of cones: Machado, Oliveira, Fernandes 2009, table of severity 1."""


def color_distance(first: Sequence[int], second: Sequence[int], kind: str | None = None) -> float:
    """Return the distance of two sRGB colors in CIE L*a*b*, as seen by a dichromat of this kind; 2.3 is noticeable."""
    seen = np.eye(3) if kind is None else np.array(DICHROMATS[kind])
    a, b = (_lab(np.clip(seen @ _linear(color), 0, 1)) for color in (first, second))
    return float(np.linalg.norm(a - b))
