"""Provide the outlines, key points and textures that the generated sets share.

Pixels are computed only with + - * / sqrt min max, whose rounding IEEE 754 specifies. An image therefore has the same
bytes on every machine, with any number of threads and at any position in a chunk. This does not hold for matrix
products, sums over an axis or atan2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

REACH = 0.55  # every shape lies inside a circle of this radius, in units of the object's side
CELLS = (1, 2, 4, 8)  # sides in pixels of the cells of a texture's layers


def _disk(u: Tensor, v: Tensor, radius: float) -> Tensor:
    return (u * u + v * v).sqrt() - radius


def _box(u: Tensor, v: Tensor, half_width: float, half_height: float) -> Tensor:
    return torch.maximum(u.abs() - half_width, v.abs() - half_height)


def _sides(u: Tensor, v: Tensor, count: int, inradius: float) -> list[Tensor]:
    """Return signed distances to the lines through the sides of a regular polygon standing on a side."""
    turns = [2 * math.pi * k / count for k in range(count)]
    return [math.sin(turn) * u + math.cos(turn) * v - inradius for turn in turns]


def _triangle(u: Tensor, v: Tensor) -> Tensor:
    first, second, third = _sides(u, v, 3, REACH / 2)
    return torch.maximum(torch.maximum(first, second), third)


def _star(u: Tensor, v: Tensor) -> Tensor:
    # Five lines make a pentagram; its points are beyond one line at most. So the second largest distance decides.
    largest, *others = _sides(u, -v, 5, REACH * math.cos(math.tau / 5))
    second = torch.full_like(largest, -math.inf)
    for other in others:
        second = torch.maximum(second, torch.minimum(largest, other))
        largest = torch.maximum(largest, other)
    return second


def _cross(u: Tensor, v: Tensor) -> Tensor:
    return torch.minimum(_box(u, v, 0.5, 0.17), _box(u, v, 0.17, 0.5))


def _ring(u: Tensor, v: Tensor) -> Tensor:
    return _disk(u, v, 0.37).abs() - 0.12


def _crescent(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(_disk(u, v, 0.52), -_disk(u - 0.27, v, 0.4))


def _heart(u: Tensor, v: Tensor) -> Tensor:
    lobes = _disk(u.abs() - 0.184, v + 0.144, 0.26)
    return torch.minimum(lobes, (u.abs() + (v - 0.04).abs()) * math.sqrt(0.5) - 0.26)


OUTLINES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "disk": lambda u, v: _disk(u, v, 0.42),
    "square": lambda u, v: _box(u, v, 0.37, 0.37),
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "crescent": _crescent,
    "heart": _heart,
}
"""Signed distances to the outlines, negative inside, at (right, down) from the center in units of the side.

Areas are 0.34 to 0.57 of the square of the side.
"""

Points = tuple[tuple[float, float], ...]

KEYPOINTS = ("center", "top", "right", "bottom", "left")
"""Names of an object's key points, in order."""

KEYPOINTS_FLIPPED = (0, 1, 4, 3, 2)
"""Index of the point that each one becomes when the image is flipped left to right."""


def _axes(radius: float) -> Points:
    return (0, 0), (0, -radius), (radius, 0), (0, radius), (-radius, 0)


def _mirror_symmetric(top: float, right: tuple[float, float], bottom: float) -> Points:
    return (0, 0), (0, top), right, (0, bottom), (-right[0], right[1])


def _crescent_points() -> Points:
    across = (0.27**2 + 0.52**2 - 0.4**2) / (2 * 0.27)  # the circles of radius 0.52 and 0.4 meet here
    tip = math.sqrt(0.52**2 - across**2)
    return (0, 0), (across, -tip), (0.27 - 0.4, 0), (across, tip), (-0.52, 0)


_NOTCH = REACH * math.cos(math.tau / 5) / math.cos(math.tau / 10)  # from a star's center to its inner corners
_LOBE = 0.26 * math.sqrt(2)  # half the diagonal of the square between a heart's lobes

POINTS: dict[str, Points] = {
    "disk": _axes(0.42),
    "square": _axes(0.37),
    "triangle": _mirror_symmetric(-REACH, (REACH * math.sqrt(0.75), REACH / 2), REACH / 2),
    "star": _mirror_symmetric(-REACH, (REACH * math.sin(math.tau / 5), -REACH * math.cos(math.tau / 5)), _NOTCH),
    "cross": _axes(0.5),
    "ring": _axes(0.49),
    "crescent": _crescent_points(),
    "heart": _mirror_symmetric(0.04 - _LOBE, (0.184 + 0.26, -0.144), 0.04 + _LOBE),
}
"""Key points of each shape in the order of ``KEYPOINTS``, (right, down) from the center in units of the side.

All but the center lie on the outline: at tips and notches where the shape has some, else on the axes.
"""


def interpolate(noise: Tensor, cell: int, size: int) -> Tensor:
    """Interpolate ``noise`` (N, n, n), given ``cell`` pixels apart, linearly to (N, size, size)."""
    pixels = torch.arange(size)
    low, weight = pixels // cell, (pixels % cell).float() / cell
    rows = noise[:, low] * (1 - weight)[:, None] + noise[:, low + 1] * weight[:, None]
    return rows[:, :, low] * (1 - weight) + rows[:, :, low + 1] * weight


def interpolate_smooth(noise: Tensor, cell: int, size: int) -> Tensor:
    """Interpolate ``noise`` (N, n, n), given ``cell`` pixels apart, by quadratic B-splines to (N, size, size)."""
    pixels = torch.arange(size)
    low, t = pixels // cell, (pixels % cell).float() / cell
    weights = 0.5 * (1 - t) * (1 - t), 0.5 + t - t * t, 0.5 * t * t
    first, second, third = (noise[:, low + k] * weight[:, None] for k, weight in enumerate(weights))
    rows = first + second + third
    first, second, third = (rows[:, :, low + k] * weight for k, weight in enumerate(weights))
    return first + second + third


def step_colors(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Return the middle color and the step from background to object, (N, 3, 1, 1), from seven numbers in [-1, 1)."""
    middle = 0.5 + 0.15 * draws[:, :3]
    polarity = 1 - 2 * (draws[:, 3:4] < 0).float()  # objects are equally often darker and lighter than the background
    step = polarity * (0.5 + 0.2 * draws[:, 4:])
    return middle[:, :, None, None], step[:, :, None, None]
