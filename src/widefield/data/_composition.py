"""Compose a scene: place objects, find the visible part of each, and paint them over a background.

Coordinates are continuous: the pixel of row i and column j covers [j, j + 1] x [i, i + 1]. Only operations with
specified rounding touch pixels; see `drawing`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from widefield.data.drawing import (
    CELLS,
    KEYPOINTS_FLIPPED,
    OUTLINES,
    POINTS,
    REACH,
    interpolate,
    interpolate_smooth,
)

MATERIAL_DRAWS = 12  # random numbers of one material
OBJECT_DRAWS = 7  # random numbers of one object
PATCHES = 3  # materials of a generated background
_CONTRAST = 0.35  # largest distance of a material's color from mid gray, by channel
_TEXTURE = 0.2  # amplitude of a texture with a clutter of 1
_FRONT = 2.0  # an object's distance varies by this many octaves of size either way
_OUTLINES, _POINTS = tuple(OUTLINES.values()), tuple(POINTS.values())


@dataclass(frozen=True)
class Thing:
    """One object of a scene; all lengths in pixels, exactly representable in float32.

    Attributes:
        shape: index into ``OUTLINES``.
        side: of the object.
        x, y: place of the center.
        cos, sin: of the rotation, clockwise in the image.
        mirrored: whether the shape is flipped left to right before it is rotated.
        distance: from the viewer, in octaves; nearer objects hide farther ones.
    """

    shape: int
    side: float
    x: float
    y: float
    cos: float
    sin: float
    mirrored: bool
    distance: float

    @cached_property
    def _span(self) -> tuple[int, int, int, int]:
        """Return (top, bottom, left, right) of a window around the whole object and its edge."""
        reach = REACH * self.side + 1
        return (
            math.floor(self.y - reach),
            math.ceil(self.y + reach),
            math.floor(self.x - reach),
            math.ceil(self.x + reach),
        )

    @cached_property
    def distances(self) -> Tensor:
        """Return distances in pixels from pixel centers to the outline, negative inside, in a window around it."""
        top, bottom, left, right = self._span
        x = (torch.arange(left, right, dtype=torch.float32) + 0.5 - self.x)[None, :]
        y = (torch.arange(top, bottom, dtype=torch.float32) + 0.5 - self.y)[:, None]
        u, v = (self.cos * x + self.sin * y) / self.side, (self.cos * y - self.sin * x) / self.side
        return _OUTLINES[self.shape](-u if self.mirrored else u, v) * self.side

    def window(self, size: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Return the part of the window inside an image of ``size``: in the image, and in ``distances``."""
        top, bottom, left, right = self._span
        rows, columns = (max(top, 0), min(bottom, size)), (max(left, 0), min(right, size))
        inside = slice(*rows), slice(*columns)
        return inside, (slice(rows[0] - top, rows[1] - top), slice(columns[0] - left, columns[1] - left))

    def points(self) -> Tensor:
        """Return the places (x, y) of the key points, float32 (K, 2)."""
        u, v = torch.tensor(_POINTS[self.shape], dtype=torch.float32).unbind(1)
        if self.mirrored:  # left stays left of the center: the names change places
            swapped = list(KEYPOINTS_FLIPPED)
            u, v = -u[swapped], v[swapped]
        x = self.x + self.side * (self.cos * u - self.sin * v)
        y = self.y + self.side * (self.sin * u + self.cos * v)
        return torch.stack([x, y], 1)


def thing(draws: Sequence[float], size: int, sizes: tuple[float, float], rotation: float) -> Thing:
    """Return the object that ``OBJECT_DRAWS`` random numbers in [0, 1) determine, in an image of ``size``.

    ``sizes`` are the smallest and largest side in pixels, ``rotation`` the largest angle either way in degrees.
    """
    shape, octave, x, y, turn, mirror, front = draws
    octaves = octave * math.log2(sizes[1] / sizes[0])
    side = _float32(sizes[0] * 2**octaves)
    angle = math.radians(rotation) * (2 * turn - 1)
    room = size - side / 2  # centers keep a quarter of the side away from the border
    return Thing(
        shape=int(shape * len(_OUTLINES)),
        side=side,
        x=_float32(side / 4 + room * x),
        y=_float32(side / 4 + room * y),
        cos=_float32(math.cos(angle)),
        sin=_float32(math.sin(angle)),
        mirrored=mirror < 0.5,
        distance=octaves + _FRONT * (2 * front - 1),
    )


def _float32(value: float) -> float:
    return float(np.float32(value))


def arranged(things: Sequence[Thing], size: int, min_visible: float) -> list[Thing]:
    """Return the objects to draw, farthest first, without those that would be hidden.

    Objects are taken nearest first. One is left out if less than the fraction ``min_visible`` of its area is inside the
    image and not covered by the nearer ones that are drawn, so every object that is drawn is at least so visible.
    """
    free = torch.ones(size, size, dtype=torch.bool)
    drawn = []
    for one in sorted(things, key=lambda one: one.distance):
        inside, part = one.window(size)
        own = one.distances <= 0
        seen = own[part] & free[inside]
        area = int(seen.sum())
        if area and area >= min_visible * int(own.sum()):
            free[inside] &= ~own[part]
            drawn.append(one)
    return drawn[::-1]


def owners(things: Sequence[Thing], size: int) -> Tensor:
    """Return the index of the object seen at each pixel, int64 (size, size), or -1; later objects hide earlier ones."""
    seen = torch.full((size, size), -1)
    for index, one in enumerate(things):
        inside, part = one.window(size)
        seen[inside].masked_fill_(one.distances[part] <= 0, index)
    return seen


def keypoints(things: Sequence[Thing], seen: Tensor) -> Tensor:
    """Return (x, y, visibility) of all key points, float32 (M, K, 3), given the ``owners`` of the pixels.

    Visibility is 2 if no other object lies over the point's pixel, 1 if one does, and 0 if the point is outside the
    image.
    """
    size = len(seen)
    if not things:
        return torch.zeros(0, len(KEYPOINTS_FLIPPED), 3)
    places = torch.stack([one.points() for one in things])
    inside = ((places >= 0) & (places < size)).all(-1)
    column, row = places.clamp(0, size - 1).long().unbind(-1)
    covered = seen[row, column] > torch.arange(len(things))[:, None]
    visibility = torch.where(covered, 1.0, 2.0) * inside
    return torch.cat([places, visibility[..., None]], -1)


class Materials:
    """Colored textures from one tile of periodic noise; each material has its own color, strengths and shift.

    Args:
        draws: ``MATERIAL_DRAWS`` random numbers in [0, 1) per material, float32 (N, 12).
        noise: random numbers in [-1, 1) for the tile, float32 (``Materials.nodes(size)``,).
        size: side of the images in pixels.
        clutter: amplitude of the textures.
    """

    def __init__(self, draws: Tensor, noise: Tensor, size: int, clutter: float) -> None:
        self._side = _tile(size)
        layers = []
        for cell, part in zip(CELLS, noise.split(_layer_sizes(size)), strict=True):
            nodes = part.reshape(self._side // cell, -1)
            nodes = torch.cat([nodes, nodes[:1]])
            nodes = torch.cat([nodes, nodes[:, :1]], 1)
            layers.append(interpolate(nodes[None], cell, self._side)[0])
        self._layers = torch.stack(layers)
        self._colors = 0.5 + _CONTRAST * (2 * draws[:, :3] - 1)
        self._steps = 2 * draws[:, 3:6] - 1
        self._strengths = (clutter * _TEXTURE * (2 * draws[:, 6:10] - 1)).tolist()
        self._shifts = (draws[:, 10:] * self._side).long().tolist()

    @staticmethod
    def nodes(size: int) -> int:
        """Return the number of random numbers that the tile needs."""
        return sum(_layer_sizes(size))

    def __getitem__(self, place: tuple[int, slice, slice]) -> Tensor:
        """Return the pixels of material ``place[0]`` in a window of the image, float32 (3, h, w)."""
        index, rows, columns = place
        down, right = self._shifts[index]
        row = (torch.arange(rows.start, rows.stop) + down) % self._side
        column = (torch.arange(columns.start, columns.stop) + right) % self._side
        layers = self._layers[:, row][:, :, column]
        texture = torch.zeros(layers.shape[1:])
        for layer, strength in zip(layers, self._strengths[index], strict=True):
            texture += strength * layer
        return self._colors[index][:, None, None] + self._steps[index][:, None, None] * texture


def _tile(size: int) -> int:
    """Return the side of the tile of noise: the next multiple of the largest cell."""
    return -(-size // CELLS[-1]) * CELLS[-1]


def _layer_sizes(size: int) -> list[int]:
    return [(_tile(size) // cell) ** 2 for cell in CELLS]


def patch_nodes(size: int) -> int:
    """Return the number of random numbers that ``patchwork`` needs for its borders."""
    return (PATCHES - 1) * ((size - 1) // _patch_cell(size) + 3) ** 2


def _patch_cell(size: int) -> int:
    return max(1, size // 4)


def patchwork(materials: Materials, noise: Tensor, size: int) -> Tensor:
    """Return a background of the first ``PATCHES`` materials with smooth random borders, float32 (3, size, size)."""
    whole, cell = slice(0, size), _patch_cell(size)
    side = (size - 1) // cell + 3
    fields = interpolate_smooth(noise.reshape(PATCHES - 1, side, side), cell, size)
    image = materials[0, whole, whole]
    for index, field in enumerate(fields, start=1):
        share = (0.5 + 2 * cell * field).clamp(0, 1)  # the border is about as sharp as an object's edge
        image += share * (materials[index, whole, whole] - image)
    return image


def paint(image: Tensor, things: Sequence[Thing], materials: Materials, first: int) -> None:
    """Draw ``things`` in order over ``image`` (3, size, size), in place; their materials are those from ``first``.

    Edges are one pixel wide: a pixel is covered to the part 0.5 - distance.
    """
    size = image.shape[-1]
    for index, one in enumerate(things, start=first):
        inside, part = one.window(size)
        share = (0.5 - one.distances[part]).clamp(0, 1)
        under = image[:, inside[0], inside[1]]
        under += share * (materials[index, inside[0], inside[1]] - under)
