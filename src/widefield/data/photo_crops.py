"""Provide crops of photographs as a classification set: which photograph is this crop from?

Real pixels, thousands of samples, no download. What it is not: a set of natural categories. There are twelve scenes, so
results say how well a network tells textures and parts of these scenes apart, and nothing about recognition in general.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from widefield import _checks
from widefield.data.base import SPLITS, LabeledImages, Sample, normalize
from widefield.data.photo_files import photograph_names, photographs

_COUNTS = {"train": 6_000, "val": 1_200}
_LARGEST_SIDE = 512  # of a photograph's shorter side; larger ones are reduced, so that all show details of similar size
_STRIPS = {"train": ((0, 1), (2, 4), (5, 6)), "val": ((1, 2), (4, 5))}  # from and to, in sixths of the width
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_TRIES = 16  # places among which a crop with enough contrast is looked for
_FLAT = 10 / 255  # standard deviation of gray values below which a crop shows hardly anything
_MEAN, _STD = 0.5, 0.25


class PhotoCrops(LabeledImages):
    """Crops of photographs; the class is the photograph.

    Each photograph is divided into six vertical strips of equal width. The second and the fifth are for val, the others
    for train. No pixel is in both splits, and no crop crosses a border between them. By default crops are gray and have
    the same mean and contrast, because color and brightness are shortcuts. Places without contrast, such as plain sky,
    are passed over. The photographs are decoded once, and crops are cut in memory.

    Samples: ``image`` float32 (3, size, size), ``label`` int, ``side`` float32 (), the side of the crop in pixels of
    the photograph.

    Args:
        split: ``"train"`` or ``"val"``. Train crops are at other places in each epoch; val crops are always the same.
        size: side of the images in pixels.
        crop_sizes: (smallest, largest) side of a crop in pixels of the photograph; the logarithm is uniform in between,
            and crops are resized to ``size``. Smaller crops are harder. Default: ``size``, without resizing.
        count: number of crops in an epoch; None means 6,000 for train and 1,200 for val.
        color: keep colors, mean and contrast. The task is then much easier, and tells networks apart less.
        photographs: names of the photographs (see `widefield.data.photographs`); default: all twelve, which need
            scikit-image.
        hflip: probability that a train crop is flipped left to right.
        seed: seed of the places.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong type; the message names it.
        ModuleNotFoundError: the package of a photograph is not installed.
    """

    def __init__(
        self,
        split: str,
        *,
        size: int = 64,
        crop_sizes: tuple[float, float] | None = None,
        count: int | None = None,
        color: bool = False,
        photographs: Sequence[str] | None = None,
        hflip: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__(split, size, seed)
        self.classes = photograph_names(photographs)
        if len(set(self.classes)) < len(self.classes):
            raise ValueError(f"every photograph is a class, so none may be named twice; got {list(self.classes)}.")
        self.mean, self.std = (_MEAN,) * 3, (_STD,) * 3
        self.color = bool(color)
        self.hflip = _checks.number("hflip", hflip, maximum=1)
        self.labels = np.arange(_COUNTS[split] if count is None else _checks.integer("count", count)) % len(
            self.classes
        )
        self._pixels = [_pixels(name, self.color) for name in self.classes]
        self._strips = [
            [(start * width // 6, stop * width // 6) for start, stop in _STRIPS[split]]
            for width in (pixels.shape[2] for pixels in self._pixels)
        ]
        narrowest = min(pixels.shape[2] // 6 for pixels in self._pixels)
        self.crop_sizes = _crop_sizes(crop_sizes, size, narrowest)

    def __len__(self) -> int:
        return len(self.labels)

    def sample(self, index: int) -> Sample:
        """Return crop ``index``."""
        label = int(self.labels[index])
        key = self.key(index) if self.split == "train" else (self.seed, index)
        generator = np.random.default_rng((SPLITS.index(self.split), *key))
        smallest, largest = self.crop_sizes
        side = round(smallest * (largest / smallest) ** generator.random())
        crop = self._cut(label, side, generator)
        if side != self.image_size:
            crop = interpolate(crop[None], (self.image_size,) * 2, mode="bilinear", antialias=True)[0]
        if not self.color:
            crop = (crop - crop.mean()) / crop.std().clamp(min=1 / 255) * _STD + _MEAN
        if self.split == "train" and generator.random() < self.hflip:
            crop = crop.flip(-1)
        image = normalize(crop.expand(3, -1, -1), self.mean, self.std)
        return {"image": image, "label": label, "side": torch.tensor(float(side))}

    def _cut(self, label: int, side: int, generator: np.random.Generator) -> Tensor:
        """Return the first of some random crops that is not flat, or the one with the most contrast, float32."""
        pixels = self._pixels[label]
        rows = pixels.shape[1] - side + 1
        columns = np.concatenate([np.arange(start, stop - side + 1) for start, stop in self._strips[label]])
        places = zip(generator.integers(rows, size=_TRIES), generator.choice(columns, _TRIES), strict=True)
        best, most = pixels, -1.0
        for top, left in places:
            crop = pixels[:, top : top + side, left : left + side].float() / 255
            contrast = float(crop.mean(0).std())
            if contrast > most:
                best, most = crop, contrast
            if most >= _FLAT:
                break
        return best


def _pixels(name: str, color: bool) -> Tensor:
    """Return a photograph, uint8 (3 or 1, H, W), reduced if it is large."""
    pixels = photographs([name])[0].pixels
    shorter = min(pixels.shape[1:])
    if shorter > _LARGEST_SIDE:
        shape = [round(length * _LARGEST_SIDE / shorter) for length in pixels.shape[1:]]
        pixels = interpolate(pixels[None].float(), shape, mode="bilinear", antialias=True)[0].round().to(torch.uint8)
    if not color:
        pixels = (pixels * torch.tensor(_LUMA)[:, None, None]).sum(0, keepdim=True).round().to(torch.uint8)
    return pixels


def _crop_sizes(sizes: Any, size: int, largest_possible: int) -> tuple[float, float]:
    """Check the range of the sides of crops; raises TypeError or ValueError."""
    if sizes is None:
        sizes = size, size
    if not isinstance(sizes, (tuple, list)) or len(sizes) != 2:
        raise TypeError(f"crop_sizes must be a pair (smallest, largest) such as (32, 96), or None; got {sizes!r}.")
    smallest = _checks.number("the smallest of crop_sizes", sizes[0], minimum=8)
    largest = _checks.number("the largest of crop_sizes", sizes[1])
    if not smallest <= largest <= largest_possible or not math.isfinite(largest):
        raise ValueError(
            f"crop_sizes must be two sides in increasing order, at most {largest_possible}, the width of the narrowest "
            f"strip of these photographs; got {tuple(sizes)!r}."
        )
    return smallest, largest
