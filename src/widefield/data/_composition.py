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
from numpy.typing import NDArray

from widefield.data.drawing import (
    CELLS,
    KEYPOINTS_FLIPPED,
    OUTLINES,
    POINTS,
    REACH,
    interpolate,
    interpolate_smooth,
)

Floats = NDArray[np.float32]
Window = tuple[slice, slice]

MATERIAL_DRAWS = 13  # random numbers of one material
OBJECT_DRAWS = 7  # random numbers of one object
PATCHES = 3  # materials of a generated background
_LIGHTNESS, _COLOR = 0.25, 0.3  # largest distance of a material from mid gray, in gray level and in color
_TEXTURE = 0.2  # amplitude of a texture with a clutter of 1
_FRONT = 2.0  # an object's distance varies by this many octaves of size either way
_OUTLINES = tuple(OUTLINES.values())
_POINTS = np.array(tuple(POINTS.values()), dtype=np.float32)  # (shapes, K, 2)


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
    def distances(self) -> Floats:
        """Return distances in pixels from pixel centers to the outline, negative inside, in a window around it."""
        top, bottom, left, right = self._span
        x = (torch.arange(left, right, dtype=torch.float32) + 0.5 - self.x)[None, :]
        y = (torch.arange(top, bottom, dtype=torch.float32) + 0.5 - self.y)[:, None]
        u, v = (self.cos * x + self.sin * y) / self.side, (self.cos * y - self.sin * x) / self.side
        distances = _OUTLINES[self.shape](-u if self.mirrored else u, v) * self.side
        return distances.numpy()

    @cached_property
    def inside(self) -> NDArray[np.bool_]:
        """Return whether pixel centers are inside the outline, in the window of ``distances``."""
        return self.distances <= 0

    def window(self, size: int) -> tuple[Window, Window]:
        """Return the part of the window inside an image of ``size``: in the image, and in ``distances``."""
        top, bottom, left, right = self._span
        rows, columns = slice(max(top, 0), min(bottom, size)), slice(max(left, 0), min(right, size))
        part = slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left)
        return (rows, columns), part


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
    free = np.ones((size, size), bool)
    drawn = []
    for one in sorted(things, key=lambda one: one.distance):
        window, part = one.window(size)
        seen = one.inside[part] & free[window]
        area = np.count_nonzero(seen)
        if area and area >= min_visible * np.count_nonzero(one.inside):
            free[window] &= ~one.inside[part]
            drawn.append(one)
    return drawn[::-1]


def owners(things: Sequence[Thing], size: int) -> NDArray[np.int16]:
    """Return the index of the object seen at each pixel, (size, size), or -1; later objects hide earlier ones."""
    seen = np.full((size, size), -1, np.int16)
    for index, one in enumerate(things):
        window, part = one.window(size)
        seen[window][one.inside[part]] = index
    return seen


def keypoints(things: Sequence[Thing], seen: NDArray[np.int16]) -> Floats:
    """Return (x, y, visibility) of all key points, (M, K, 3), given the ``owners`` of the pixels.

    Visibility is 2 if no other object lies over the point's pixel, 1 if one does, and 0 if the point is outside the
    image.
    """
    points = _POINTS[[one.shape for one in things]]
    for index, one in enumerate(things):
        if one.mirrored:  # left stays left of the center: the names change places
            points[index] = points[index, list(KEYPOINTS_FLIPPED)] * np.array([-1, 1], np.float32)
    names = ("x", "y", "side", "cos", "sin")
    frames = np.array([[getattr(one, name) for name in names] for one in things], np.float32).reshape(-1, 5, 1)
    x, y, side, cos, sin = frames.swapaxes(0, 1)
    u, v = points[..., 0], points[..., 1]
    places = np.stack([x + side * (cos * u - sin * v), y + side * (sin * u + cos * v)], -1)
    size = len(seen)
    column, row = np.moveaxis(places.clip(0, size - 1).astype(np.int64), -1, 0)
    covered = seen[row, column] > np.arange(len(things))[:, None]
    visibility = np.where(covered, 1, 2) * ((places >= 0) & (places < size)).all(-1)
    return np.concatenate([places, visibility[..., None].astype(np.float32)], -1)


class Materials:
    """Colored textures from one layered noise; each material has its own color, strengths and piece of the noise.

    Args:
        draws: ``MATERIAL_DRAWS`` random numbers in [0, 1) per material, (N, 13).
        noise: random numbers in [-1, 1), (``Materials.nodes(size)``,).
        size: side of the images in pixels.
        clutter: amplitude of the textures.
    """

    def __init__(self, draws: Floats, noise: Floats, size: int, clutter: float) -> None:
        layers, self._size = [], size
        for cell, nodes in zip(CELLS, np.split(noise, np.cumsum(_layer_sizes(size))[:-1]), strict=True):
            side = math.isqrt(len(nodes))
            square = torch.from_numpy(nodes).reshape(1, side, side)
            layers.append((square if cell == 1 else interpolate(square, cell, size))[0].numpy())
        self._layers = layers
        draws = 2 * draws - 1
        self._colors = (0.5 + _LIGHTNESS * draws[:, :1] + _COLOR * _saturated(draws[:, 1:4]))[..., None, None]
        self._steps = draws[:, 4:7, None, None]
        self._strengths = (clutter * _TEXTURE * draws[:, 7:11]).tolist()
        self._places = (0.5 * (draws[:, 11:] + 1)).tolist()

    @staticmethod
    def nodes(size: int) -> int:
        """Return the number of random numbers that the noise needs."""
        return sum(_layer_sizes(size))

    def pixels(self, index: int, height: int, width: int) -> Floats:
        """Return an area of material ``index``, (3, height, width), at most as large as the image."""
        down, right = self._places[index]
        top, left = int(down * (self._size - height + 1)), int(right * (self._size - width + 1))
        window = slice(top, top + height), slice(left, left + width)
        texture = np.zeros((height, width), np.float32)
        for layer, strength in zip(self._layers, self._strengths[index], strict=True):
            texture += strength * layer[window]
        pixels: Floats = self._steps[index] * texture
        pixels += self._colors[index]
        return pixels


def _gray(colors: Floats) -> Floats:
    """Return the mean of the three channels, which are the first axis."""
    red, green, blue = colors
    gray: Floats = (red + green + blue) / 3
    return gray


def _saturated(colors: Floats) -> Floats:
    """Return colors (N, 3) without their gray part, and scaled so that the largest channel is 1 or -1."""
    pure = colors - _gray(colors.T)[:, None]
    scale = np.maximum(np.maximum(abs(pure[:, 0]), abs(pure[:, 1])), abs(pure[:, 2]))
    saturated: Floats = pure / np.maximum(scale, np.float32(1e-6))[:, None]
    return saturated


def _layer_sizes(size: int) -> list[int]:
    return [size**2 if cell == 1 else ((size - 1) // cell + 2) ** 2 for cell in CELLS]


def patch_nodes(size: int) -> int:
    """Return the number of random numbers that ``patchwork`` needs for its borders."""
    return (PATCHES - 1) * ((size - 1) // _patch_cell(size) + 3) ** 2


def _patch_cell(size: int) -> int:
    return max(1, size // 4)


def patchwork(materials: Materials, noise: Floats, size: int, colorfulness: float) -> Floats:
    """Return a background of the first ``PATCHES`` materials with smooth random borders, (3, size, size).

    ``colorfulness`` scales its colors: 0 makes it gray.
    """
    cell = _patch_cell(size)
    side = (size - 1) // cell + 3
    nodes = torch.from_numpy(noise).reshape(PATCHES - 1, side, side)
    image = materials.pixels(0, size, size)
    for index, field in enumerate(interpolate_smooth(nodes, cell, size).numpy(), start=1):
        share = (0.5 + 2 * cell * field).clip(0, 1)  # the border is about as sharp as an object's edge
        _blend(image, share, materials.pixels(index, size, size))
    gray = _gray(image)
    image -= gray
    image *= colorfulness
    image += gray
    return image


def paint(image: Floats, things: Sequence[Thing], materials: Materials, first: int) -> None:
    """Draw ``things`` in order over ``image`` (3, size, size), in place; their materials are those from ``first``.

    Edges are one pixel wide: a pixel is covered to the part 0.5 - distance.
    """
    size = image.shape[-1]
    for index, one in enumerate(things, start=first):
        (rows, columns), part = one.window(size)
        share = (0.5 - one.distances[part]).clip(0, 1)
        _blend(image[:, rows, columns], share, materials.pixels(index, *share.shape))


def _blend(under: Floats, share: Floats, over: Floats) -> None:
    """Move ``under`` towards ``over`` by ``share``; both are overwritten."""
    over -= under
    over *= share
    under += over
