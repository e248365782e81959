"""Rasterize outlines of objects, and decode masks stored as run lengths, exactly as pycocotools does.

COCO's masks are defined by the code of pycocotools (``maskApi.c``): a polygon is traced on a grid of fifths of a pixel,
and a pixel belongs to the object if the trace crosses its column an odd number of times above it. Run lengths go down
the columns of an image, from left to right, and start with pixels outside the object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

NONE, POLYGONS, RUNS = range(3)
"""How an object's mask is stored: not at all, as polygons, or as run lengths."""

_FIFTHS = 5.0
_MORE, _SIGN, _BITS = 0x20, 0x10, 0x1F  # of a character: others follow; negative; the value
_MOST_CHARACTERS = 7  # of a number with 32 bits


@dataclass(frozen=True)
class Outlines:
    """The masks of M objects as arrays.

    An object has any number of parts: polygons, whose union is its mask, or one list of run lengths.
    """

    kinds: NDArray[np.uint8]
    """``NONE``, ``POLYGONS`` or ``RUNS`` for each object, (M,)."""
    parts: NDArray[np.int64]
    """The first part of each object, and the number of parts, (M + 1,)."""
    starts: NDArray[np.int64]
    """The first value of each part, and the number of values, (P + 1,)."""
    values: NDArray[np.int32]
    """Coordinates x, y of polygons in fifths of a pixel, as `fifths` rounds them; lengths of runs."""

    def masks(self, first: int, last: int, height: int, width: int) -> NDArray[np.bool_]:
        """Return the masks of the objects from ``first`` to before ``last``, (M, height, width)."""
        made = np.zeros((last - first, width, height), np.bool_)  # column by column
        for place in range(first, last):
            canvas = made[place - first]
            for part in range(self.parts[place], self.parts[place + 1]):
                values = self.values[self.starts[part] : self.starts[part + 1]]
                if self.kinds[place] == RUNS:
                    canvas.reshape(-1)[:] |= np.repeat(np.arange(len(values)) % 2 == 1, values)
                else:
                    _trace(values, canvas)
        return np.ascontiguousarray(made.transpose(0, 2, 1))


def fifths(polygon: Sequence[float]) -> list[int]:
    """Return coordinates in fifths of a pixel, rounded as pycocotools does: up from a half, and towards zero below 0.

    Raises:
        TypeError, ValueError, OverflowError: a coordinate is not a finite number.
    """
    return [int(_FIFTHS * value + 0.5) for value in polygon]


def polygon_mask(polygon: Sequence[float], height: int, width: int) -> NDArray[np.bool_]:
    """Return the pixels inside a polygon, (height, width), as pycocotools rasterizes it.

    Args:
        polygon: its corners x0, y0, x1, y1, ... in pixels; they may be outside the image.
        height, width: of the image in pixels.
    """
    canvas = np.zeros((width, height), np.bool_)
    _trace(np.array(fifths(polygon), np.int32), canvas)
    return np.ascontiguousarray(canvas.T)


def _trace(corners: NDArray[np.int32], canvas: NDArray[np.bool_]) -> None:
    """Add the pixels inside a polygon to ``canvas`` (width, height); corners in fifths of a pixel.

    ``rleFrPoly`` of pycocotools, without its loops over points.
    """
    width, height = canvas.shape
    x, y = corners[0::2].astype(np.int64), corners[1::2].astype(np.int64)
    across, down = _points(x, y)
    step = np.flatnonzero(across[1:] != across[:-1]) + 1  # where the trace enters another fifth of a column
    before, after = across[step - 1], across[step]
    place = np.where(after < before, after, after - 1) - 2  # a pixel's center is in the third of its fifths
    seen = (place % 5 == 0) & (place >= 0) & (place <= 5 * (width - 1))
    if not seen.any():
        return
    columns = place[seen] // 5
    rows = (np.minimum(down[step], down[step - 1])[seen] + 0.5) / _FIFTHS - 0.5
    rows = np.ceil(rows.clip(0, height)).astype(np.int64)
    first, last = int(columns.min()), int(columns.max())
    changes = np.sort((columns - first) * height + rows)  # an even number in each column, since the outline is closed
    window = canvas[first : last + 1].reshape(-1)
    edges = np.concatenate([[0], changes, [len(window)]])
    window |= np.repeat(np.arange(len(edges) - 1) % 2 == 1, np.diff(edges))


def _points(x: NDArray[np.int64], y: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the points of a closed outline, one for each step along the longer axis of each side."""
    dx, dy = np.roll(x, -1) - x, np.roll(y, -1) - y
    wide = abs(dx) >= abs(dy)
    length = np.where(wide, abs(dx), abs(dy))
    backward = np.where(wide, dx < 0, dy < 0)  # sides are drawn from their lower end along the axis
    low_x, low_y = np.where(backward, x + dx, x), np.where(backward, y + dy, y)
    slope = np.where(wide, dy, dx) * np.where(backward, -1, 1) / np.maximum(length, 1)

    count = length + 1
    side = np.repeat(np.arange(len(x)), count)
    along = np.arange(len(side)) - (np.cumsum(count) - count)[side]
    along = np.where(backward[side], length[side] - along, along)
    start = np.where(wide, low_y, low_x)[side]
    other = (start + slope[side] * along + 0.5).astype(np.int64)  # towards zero, as in C
    along = along + np.where(wide, low_x, low_y)[side]
    return np.where(wide[side], along, other), np.where(wide[side], other, along)


def runs(rle: Any, height: int, width: int) -> NDArray[np.int32]:
    """Return the lengths of the runs of a mask in COCO's form, compressed or not, after checking it.

    Args:
        rle: ``{"size": [height, width], "counts": ...}``, with a list of integers or a string.
        height, width: of the image in pixels.

    Raises:
        ValueError: it has another form or size, or its runs do not cover the image; the message says which.
    """
    size, counts = (rle.get(key) for key in ("size", "counts"))
    if size != [height, width]:
        raise ValueError(f"the size of its run lengths is {size!r}, and the image is [{height}, {width}]")
    if isinstance(counts, str):
        lengths = _decompressed(counts)
    elif isinstance(counts, list) and all(type(count) is int and abs(count) < 2**31 for count in counts):
        lengths = np.array(counts, np.int64)
    else:
        raise ValueError("the counts of its run lengths are neither integers of 32 bits nor a string")
    if len(lengths) and lengths.min() < 0:
        raise ValueError(f"a run length is negative: {lengths.min()}")
    if lengths.sum() != height * width:
        raise ValueError(f"its run lengths add up to {lengths.sum()}, and the image has {height * width} pixels")
    return lengths.astype(np.int32)


def _decompressed(text: str) -> NDArray[Any]:
    """Return the run lengths in COCO's string: numbers in base 32, from the third on less the one two places before."""
    try:
        codes = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - ord("0")
    except UnicodeEncodeError:
        codes = np.array([-1])
    last = (codes & _MORE) == 0
    if not len(codes) or codes.min() < 0 or codes.max() >= 2 * _MORE or not last[-1]:
        raise ValueError("the string of its run lengths is damaged")
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    if (ends - starts).max() >= _MOST_CHARACTERS:
        raise ValueError("the string of its run lengths is damaged")
    shift = 5 * (np.arange(len(codes)) - np.repeat(starts, ends - starts + 1))
    numbers = np.add.reduceat((codes & _BITS) << shift, starts)
    numbers -= np.where(codes[ends] & _SIGN, np.int64(1) << (shift[ends] + 5), 0)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers
