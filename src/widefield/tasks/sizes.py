"""Group objects by size: the finer groups next to COCO's."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from widefield import _checks
from widefield._coco.curves import Floats

OCTAVES = (8, 16, 32, 64, 128, 256, 512)
"""Edges between the finer groups of objects by size: square roots of the area in pixels."""
RELATIVE_OCTAVES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Edges of the groups in units of the square root of the image's area."""


def checked(edges: Sequence[float]) -> tuple[float, ...]:
    """Return the edges between groups; raises TypeError or ValueError unless they are positive and rising."""
    if not isinstance(edges, (tuple, list)) or not edges:
        raise TypeError(f"size_bins must be a list of rising numbers such as {list(OCTAVES)}; got {edges!r}.")
    found = tuple(_checks.number("every entry of size_bins", edge) for edge in edges)
    if found[0] <= 0 or any(a >= b for a, b in itertools.pairwise(found)):
        raise ValueError(f"size_bins must be positive and rising; got {list(edges)}.")
    return found


def ranges(edges: Sequence[float], side: float = 1.0) -> Floats:
    """Return the smallest and the largest area of each group, both included, (B, 2).

    Args:
        edges: between the groups, square roots of areas in units of ``side``.
        side: in pixels.
    """
    ends = np.array([0.0, *edges, 1e5]) * side
    return np.stack([ends[:-1] ** 2, np.nextafter(ends[1:] ** 2, 0)], 1)  # without their upper ends


def names(edges: Sequence[float]) -> tuple[str, ...]:
    """Return the names of the groups, (B,)."""
    texts = [f"{edge:g}" for edge in edges]
    return (f"<{texts[0]}", *(f"{a}-{b}" for a, b in itertools.pairwise(texts)), f">={texts[-1]}")
