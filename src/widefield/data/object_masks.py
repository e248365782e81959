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
        made = np.zeros((last - first, height, width), np.bool_)
        edges = self.parts[first : last + 1]
        drawn = np.repeat(self.kinds[first:last] == POLYGONS, np.diff(edges))
        for place in np.flatnonzero(self.kinds[first:last] == RUNS):
            for part in range(edges[place], edges[place + 1]):
                values = self.values[self.starts[part] : self.starts[part + 1]]
                column_by_column = np.repeat(np.arange(len(values)) % 2 == 1, values).reshape(width, height)
                made[place] |= column_by_column.T
        parts = np.arange(edges[0], edges[-1])[drawn]
        if len(parts):
            owners = np.repeat(np.arange(last - first), np.diff(edges))[drawn]
            corners = [self.values[self.starts[part] : self.starts[part + 1]] for part in parts]
            _fill(corners, owners, made)
        return made


def fifths(polygon: Sequence[float]) -> list[int]:
    """Return coordinates in fifths of a pixel, rounded as pycocotools does: up from a half, and towards zero below 0.

    Raises:
        TypeError, ValueError, OverflowError: a coordinate is not a finite number.
    """
    return [int(_FIFTHS * value + 0.5) for value in polygon]


def _fill(polygons: Sequence[NDArray[np.int32]], owners: NDArray[np.int64], masks: NDArray[np.bool_]) -> None:
    """Add the pixels inside of polygons to masks (M, height, width).

    ``rleFrPoly`` of pycocotools for all polygons at once.

    Args:
        polygons: corners of each in fifths of a pixel.
        owners: the mask of each polygon, rising.
        masks: changed in place.
    """
    height, width = masks.shape[1:]
    numbers, columns, rows = _crossings(polygons, height, width)
    # A column's crossings go in pairs, since outlines are closed: from the first of two on, up to before the second.
    order = np.lexsort((rows, columns, numbers))
    numbers, columns, rows = numbers[order], columns[order], rows[order]
    bounds = np.searchsorted(owners[numbers], np.arange(len(masks) + 1))
    for mask, start, end in zip(masks, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        if start == end:
            continue
        across, down = columns[start:end], rows[start:end]
        left, right, top, bottom = across.min(), across.max() + 1, down.min(), down.max()
        covers = np.zeros((bottom - top + 1, right - left), np.int16)  # polygons that cover each pixel
        np.add.at(covers, (down[0::2] - top, across[0::2] - left), 1)
        np.subtract.at(covers, (down[1::2] - top, across[1::2] - left), 1)
        np.add.accumulate(covers, axis=0, out=covers)
        mask[top:bottom, left:right] |= covers[:-1] > 0


def _crossings(
    polygons: Sequence[NDArray[np.int32]], height: int, width: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return where outlines cross the centers of columns: number of the polygon, column, and the first row below."""
    corners = np.concatenate(polygons)
    counts = np.array([len(polygon) // 2 for polygon in polygons])
    across, down, numbers = _points(corners[0::2].astype(np.int64), corners[1::2].astype(np.int64), counts)
    # where the trace enters another fifth of a column
    step = np.flatnonzero((across[1:] != across[:-1]) & (numbers[1:] == numbers[:-1])) + 1
    before, after = across[step - 1], across[step]
    place = np.where(after < before, after, after - 1) - 2  # a pixel's center is in the third of its fifths
    seen = (place % 5 == 0) & (place >= 0) & (place <= 5 * (width - 1))
    rows = (np.minimum(down[step], down[step - 1])[seen] + 0.5) / _FIFTHS - 0.5
    return numbers[step][seen], place[seen] // 5, np.ceil(rows.clip(0, height)).astype(np.int64)


def _points(
    x: NDArray[np.int64], y: NDArray[np.int64], counts: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the points of closed outlines, one for each step along the longer axis of each side.

    Args:
        x, y: corners of all outlines.
        counts: number of corners of each.

    Returns:
        x and y of each point, and the number of its outline.
    """
    ends = np.cumsum(counts)
    following = np.arange(1, len(x) + 1)
    following[ends - 1] = ends - counts
    dx, dy = x[following] - x, y[following] - y
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
    numbers = np.repeat(np.arange(len(counts)), counts)[side]
    return np.where(wide[side], along, other), np.where(wide[side], other, along), numbers


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
