"""Generate images of shapes of very different sizes, to compare receptive fields in minutes on a CPU.

Each image shows one of eight shapes on a mild texture, at a random place and at a size drawn log-uniformly over more
than two octaves. Fine detail identifies a small shape, and edges far apart identify a large one, so the receptive field
that is needed differs from image to image. Colors are random and independent of the class.

For orientation: a ConvNeXt of widths 24-48-96-128 and depths 1-1-2-1 behind a 3x3 stem of stride 2, trained for 14
epochs on the defaults, reaches 78 % with 3x3 kernels and 72 % with 7x7 (means of two seeds); chance is 12.5 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from widefield import _checks
from widefield.data.base import SPLITS, LabeledImages, Sample, normalize

_REACH = 0.55  # every shape lies inside a circle of this radius, in units of the object's side
_CELLS = (1, 2, 4, 8)  # sides in pixels of the cells of the texture's layers
_CHUNK = 512  # images rendered at once; keeps temporaries in tens of megabytes
_COUNTS = {"train": 12_000, "val": 2_000}

# Pixels are computed only with + - * / sqrt min max, whose rounding IEEE 754 specifies. An image therefore has the
# same bytes on every machine, with any number of threads and at any position in a chunk. This does not hold for matrix
# products or atan2.


def _disk(u: Tensor, v: Tensor, radius: float) -> Tensor:
    return (u * u + v * v).sqrt() - radius


def _box(u: Tensor, v: Tensor, half_width: float, half_height: float) -> Tensor:
    return torch.maximum(u.abs() - half_width, v.abs() - half_height)


def _sides(u: Tensor, v: Tensor, count: int, inradius: float) -> Tensor:
    """Return signed distances to the lines through the sides of a regular polygon standing on a side, (count, ...)."""
    turns = [2 * math.pi * k / count for k in range(count)]
    return torch.stack([math.sin(turn) * u + math.cos(turn) * v - inradius for turn in turns])


def _triangle(u: Tensor, v: Tensor) -> Tensor:
    return _sides(u, v, 3, _REACH / 2).amax(0)


def _star(u: Tensor, v: Tensor) -> Tensor:
    # Five lines make a pentagram; its points are beyond one line at most.
    return _sides(u, -v, 5, _REACH * math.cos(math.tau / 5)).sort(0).values[-2]


def _cross(u: Tensor, v: Tensor) -> Tensor:
    return torch.minimum(_box(u, v, 0.5, 0.17), _box(u, v, 0.17, 0.5))


def _ring(u: Tensor, v: Tensor) -> Tensor:
    return _disk(u, v, 0.37).abs() - 0.12


def _crescent(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(_disk(u, v, 0.52), -_disk(u - 0.27, v, 0.4))


def _heart(u: Tensor, v: Tensor) -> Tensor:
    lobes = _disk(u.abs() - 0.184, v + 0.144, 0.26)
    return torch.minimum(lobes, (u.abs() + (v - 0.04).abs()) * math.sqrt(0.5) - 0.26)


_OUTLINES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
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


class Scales(LabeledImages):
    """Images of one shape each, of very different sizes, on a mild texture; 8 balanced classes.

    An image is a function of (seed, split, index) and of the drawing options. It does not depend on ``count`` or on the
    images drawn before. The splits use separate random streams, so they share no image. All images are rendered at
    construction (12,000 take about a second) and kept as bytes.

    Samples: ``image`` float32 (3, size, size); ``label`` int; ``size`` float32 (), the side of the object in pixels;
    ``mask`` bool (size, size), True on the object. The object covers 0.34 to 0.57 of the square of its
    side and lies wholly inside the image.

    Args:
        split: ``"train"`` or ``"val"``.
        size: side of the images in pixels.
        count: number of images; None means 12,000 for train and 2,000 for val.
        seed: seed of the set; another seed gives other images of the same kind.
        object_sizes: (smallest, largest) side of the object in pixels; the logarithm is uniform in between.
        clutter: amplitude of each of the texture's four layers relative to the step from background to object, from
            0 to 2.
        rotation: largest rotation of the object either way, in degrees, from 0 to 180.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong type; the message names it.
    """

    classes = tuple(_OUTLINES)
    mean = (0.5, 0.5, 0.5)
    std = (0.27, 0.27, 0.27)

    def __init__(
        self,
        split: str,
        *,
        size: int = 32,
        count: int | None = None,
        seed: int = 0,
        object_sizes: tuple[float, float] = (6, 28),
        clutter: float = 0.25,
        rotation: float = 30,
    ) -> None:
        super().__init__(split, size, seed)
        self.object_sizes = _object_sizes(object_sizes, size)
        self.clutter = _checks.number("clutter", clutter, maximum=2)
        self.rotation = _checks.number("rotation", rotation, maximum=180)
        count = _COUNTS[split] if count is None else _checks.integer("count", count)

        self._labels = torch.arange(count) % len(self.classes)
        self._images = torch.empty(count, 3, size, size, dtype=torch.uint8)
        self._masks = torch.empty(count, size, size, dtype=torch.bool)
        self._sizes = torch.empty(count, dtype=torch.float32)
        for start in range(0, count, _CHUNK):
            self._render(slice(start, min(start + _CHUNK, count)))

    def __len__(self) -> int:
        return len(self._labels)

    def sample(self, index: int) -> Sample:
        """Return sample ``index``; its tensors are copies."""
        return {
            "image": normalize(self._images[index] / 255, self.mean, self.std),
            "label": int(self._labels[index]),
            "size": self._sizes[index].clone(),
            "mask": self._masks[index].clone(),
        }

    def _render(self, span: slice) -> None:
        """Draw the images of ``span``, each from its own random stream."""
        nodes = [(self.image_size - 1) // cell + 2 for cell in _CELLS]
        lengths = [4, 7, len(nodes), *(n * n for n in nodes)]
        draws = torch.stack([self._stream(index, sum(lengths)) for index in range(span.start, span.stop)])
        geometry, colors, strengths, *noises = torch.split(draws, lengths, dim=1)

        sides, distances = self._distances(self._labels[span], geometry)
        field = (0.5 - distances).clamp(0, 1) - 0.5  # the object; its edge is one pixel wide
        for cell, n, strength, noise in zip(_CELLS, nodes, strengths.T, noises, strict=True):
            texture = _interpolate(noise.reshape(-1, n, n), cell, self.image_size)
            field += self.clutter * strength[:, None, None] * texture
        middle, step = _colors(colors)
        image = middle + step * field[:, None]

        self._images[span] = (255 * image.clamp(0, 1)).round().to(torch.uint8)
        self._masks[span] = distances <= 0
        self._sizes[span] = sides

    def _stream(self, index: int, length: int) -> Tensor:
        """Return the ``length`` random numbers of image ``index``, float32 and uniform in [-1, 1)."""
        generator = np.random.default_rng((self.seed, SPLITS.index(self.split), index))
        return 2 * torch.from_numpy(generator.random(length, dtype=np.float32)) - 1

    def _distances(self, labels: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Return object sides (N,) and distances in pixels to the outlines (N, size, size), negative inside."""
        # The four columns determine size, rotation and place. Functions that libraries round differently run in
        # float64.
        octave, turn = draws[:, :2].double().unbind(1)
        smallest, largest = self.object_sizes
        sides = (smallest * (largest / smallest) ** ((octave + 1) / 2)).float()
        angle = math.radians(self.rotation) * turn
        cos, sin = angle.cos().float()[:, None, None], angle.sin().float()[:, None, None]

        room = (self.image_size / 2 - _REACH * sides)[:, None]
        pixels = torch.arange(self.image_size, dtype=torch.float32) - (self.image_size - 1) / 2
        x = (pixels - room * draws[:, 2:3])[:, None, :]
        y = (pixels - room * draws[:, 3:4])[:, :, None]
        unit = sides[:, None, None]
        u, v = (cos * x + sin * y) / unit, (cos * y - sin * x) / unit

        distances = torch.empty_like(u)
        for label, outline in enumerate(_OUTLINES.values()):
            chosen = labels == label
            distances[chosen] = outline(u[chosen], v[chosen])
        return sides, distances * unit


def _interpolate(noise: Tensor, cell: int, size: int) -> Tensor:
    """Interpolate ``noise`` (N, n, n), given ``cell`` pixels apart, linearly to (N, size, size)."""
    pixels = torch.arange(size)
    low, weight = pixels // cell, (pixels % cell).float() / cell
    rows = noise[:, low] * (1 - weight)[:, None] + noise[:, low + 1] * weight[:, None]
    return rows[:, :, low] * (1 - weight) + rows[:, :, low + 1] * weight


def _colors(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Return the middle color and the step from background to object, (N, 3, 1, 1), from seven numbers in [-1, 1)."""
    middle = 0.5 + 0.15 * draws[:, :3]
    polarity = 1 - 2 * (draws[:, 3:4] < 0).float()  # objects are equally often darker and lighter than the background
    step = polarity * (0.5 + 0.2 * draws[:, 4:])
    return middle[:, :, None, None], step[:, :, None, None]


def _object_sizes(sizes: object, image_size: int) -> tuple[float, float]:
    """Check the range of object sizes against the image; raises TypeError or ValueError."""
    if not isinstance(sizes, (tuple, list)) or len(sizes) != 2:
        raise TypeError(f"object_sizes must be a pair (smallest, largest) such as (6, 28); got {sizes!r}.")
    largest_fit = math.floor(image_size / (2 * _REACH))
    smallest = _checks.number("the smallest of object_sizes", sizes[0], minimum=4)
    largest = _checks.number("the largest of object_sizes", sizes[1])
    if not smallest <= largest <= largest_fit:
        raise ValueError(
            f"object_sizes must be two sides in increasing order, at most {largest_fit} in images of {image_size} "
            f"pixels; got {tuple(sizes)!r}. Draw smaller objects or give a larger size."
        )
    return smallest, largest
