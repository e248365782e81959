"""Generate images of shapes of very different sizes, to compare receptive fields in minutes on a CPU.

Each image shows one of eight shapes on a mild texture, at a random place and at a size drawn log-uniformly over more
than two octaves. Fine detail identifies a small shape, and edges far apart identify a large one, so the receptive field
that is needed differs from image to image. Colors are random and independent of the class.

For orientation: a ConvNeXt of widths 24-48-96-128 and depths 1-1-2-1, with a stem of two 3x3 convolutions of stride 2,
trained for 14 epochs on the defaults, reaches 78 % with 3x3 kernels and 72 % with 7x7 (means of two seeds); chance is
12.5 %.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from widefield import _checks
from widefield.data.base import SPLITS, LabeledImages, Sample, normalize
from widefield.data.drawing import CELLS, OUTLINES, REACH, interpolate, step_colors

_CHUNK = 512  # images rendered at once; keeps temporaries in tens of megabytes
_COUNTS = {"train": 12_000, "val": 2_000}


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

    classes = tuple(OUTLINES)
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

        self.labels = torch.arange(count) % len(self.classes)
        self._images = torch.empty(count, 3, size, size, dtype=torch.uint8)
        self._masks = torch.empty(count, size, size, dtype=torch.bool)
        self._sizes = torch.empty(count, dtype=torch.float32)
        for start in range(0, count, _CHUNK):
            self._render(slice(start, min(start + _CHUNK, count)))

    def __len__(self) -> int:
        return len(self.labels)

    def sample(self, index: int) -> Sample:
        """Return sample ``index``; its tensors are copies."""
        return {
            "image": normalize(self._images[index] / 255, self.mean, self.std),
            "label": int(self.labels[index]),
            "size": self._sizes[index].clone(),
            "mask": self._masks[index].clone(),
        }

    def _render(self, span: slice) -> None:
        """Draw the images of ``span``, each from its own random stream."""
        nodes = [(self.image_size - 1) // cell + 2 for cell in CELLS]
        lengths = [4, 7, len(nodes), *(n * n for n in nodes)]
        draws = torch.stack([self._stream(index, sum(lengths)) for index in range(span.start, span.stop)])
        geometry, colors, strengths, *noises = torch.split(draws, lengths, dim=1)

        sides, distances = self._distances(self.labels[span], geometry)
        field = (0.5 - distances).clamp(0, 1) - 0.5  # the object; its edge is one pixel wide
        for cell, n, strength, noise in zip(CELLS, nodes, strengths.T, noises, strict=True):
            texture = interpolate(noise.reshape(-1, n, n), cell, self.image_size)
            field += self.clutter * strength[:, None, None] * texture
        middle, step = step_colors(colors)
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

        room = (self.image_size / 2 - REACH * sides)[:, None]
        pixels = torch.arange(self.image_size, dtype=torch.float32) - (self.image_size - 1) / 2
        x = (pixels - room * draws[:, 2:3])[:, None, :]
        y = (pixels - room * draws[:, 3:4])[:, :, None]
        unit = sides[:, None, None]
        u, v = (cos * x + sin * y) / unit, (cos * y - sin * x) / unit

        distances = torch.empty_like(u)
        for label, outline in enumerate(OUTLINES.values()):
            chosen = labels == label
            distances[chosen] = outline(u[chosen], v[chosen])
        return sides, distances * unit


def _object_sizes(sizes: object, image_size: int) -> tuple[float, float]:
    """Check the range of object sizes against the image; raises TypeError or ValueError."""
    if not isinstance(sizes, (tuple, list)) or len(sizes) != 2:
        raise TypeError(f"object_sizes must be a pair (smallest, largest) such as (6, 28); got {sizes!r}.")
    largest_fit = math.floor(image_size / (2 * REACH))
    smallest = _checks.number("the smallest of object_sizes", sizes[0], minimum=4)
    largest = _checks.number("the largest of object_sizes", sizes[1])
    if not smallest <= largest <= largest_fit:
        raise ValueError(
            f"object_sizes must be two sides in increasing order, at most {largest_fit} in images of {image_size} "
            f"pixels; got {tuple(sizes)!r}. Draw smaller objects or give a larger size."
        )
    return smallest, largest
