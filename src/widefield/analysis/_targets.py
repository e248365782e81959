"""Choose what a segmentation model is asked about: the logit of a class at one pixel, or over a region."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from widefield import _checks

Box = tuple[int, int, int, int]
"""(top, left, bottom, right) in pixels; rows top to bottom - 1, columns left to right - 1."""


@dataclass(frozen=True)
class ClassAt:
    """The logit of one class at one pixel of a segmentation model's output.

    Attributes:
        label: index of the class. None: for each image the class with the largest logit at that pixel.
        y: row of the pixel in the image, from 0. None: the middle, H // 2.
        x: column of the pixel in the image, from 0. None: the middle, W // 2.
    """

    label: int | None = None
    y: int | None = None
    x: int | None = None

    def __post_init__(self) -> None:
        for name in ("label", "y", "x"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _checks.integer(name, getattr(self, name), minimum=0))

    def where(self, size: Sequence[int]) -> Tensor:
        """Return the pixel as a mask, bool (H, W); raises ValueError if it lies outside an image of this size."""
        H, W = size
        y, x = H // 2 if self.y is None else self.y, W // 2 if self.x is None else self.x
        if y >= H or x >= W:
            raise ValueError(f"the pixel {(y, x)} (row, column) lies outside the image, which is {H}x{W}.")
        mask = torch.zeros(H, W, dtype=torch.bool)
        mask[y, x] = True
        return mask

    def place(self, size: Sequence[int]) -> str:
        """Return the pixel as text, for an image of this size."""
        return f"pixel {tuple(self.where(size).nonzero()[0].tolist())}"


@dataclass(frozen=True, eq=False)
class ClassIn:
    """The mean logit of one class over a region of a segmentation model's output.

    Attributes:
        label: index of the class. None: for each image the class that covers most of the region.
        region: pixels of the image: (top, left, bottom, right) with the last row and column excluded, or a mask, bool
            (H, W).
    """

    label: int | None
    region: Box | Tensor | np.ndarray

    def __post_init__(self) -> None:
        if self.label is not None:
            object.__setattr__(self, "label", _checks.integer("label", self.label, minimum=0))
        if isinstance(self.region, (Tensor, np.ndarray)):
            mask = torch.as_tensor(self.region).detach().cpu()
            if mask.dtype != torch.bool or mask.ndim != 2:
                raise ValueError(f"region must be a mask, bool (H, W); got {mask.dtype} {tuple(mask.shape)}.")
            if not mask.any():
                raise ValueError("region has no pixel: set at least one of them.")
            object.__setattr__(self, "region", mask)
            return
        if not isinstance(self.region, (tuple, list)) or len(self.region) != 4:
            raise TypeError(f"region must be (top, left, bottom, right) or a mask, bool (H, W); got {self.region!r}.")
        box = tuple(_checks.integer("every entry of region", side, minimum=0) for side in self.region)
        if box[0] >= box[2] or box[1] >= box[3]:
            raise ValueError(f"region (top, left, bottom, right) must have top < bottom and left < right; got {box}.")
        object.__setattr__(self, "region", box)

    def where(self, size: Sequence[int]) -> Tensor:
        """Return the region as a mask, bool (H, W); raises ValueError if it does not fit an image of this size."""
        H, W = size
        if isinstance(self.region, Tensor):
            if tuple(self.region.shape) != (H, W):
                raise ValueError(f"region is {tuple(self.region.shape)}, and the images are {(H, W)}: they must agree.")
            return self.region
        top, left, bottom, right = self.region
        if bottom > H or right > W:
            raise ValueError(
                f"the region {self.region} (top, left, bottom, right) does not lie in the image, which is {H}x{W}."
            )
        mask = torch.zeros(H, W, dtype=torch.bool)
        mask[top:bottom, left:right] = True
        return mask

    def place(self, size: Sequence[int]) -> str:
        """Return the region as text, for an image of this size."""
        if isinstance(self.region, Tensor):
            return f"region of {int(self.where(size).sum())} pixels"
        return f"region {tuple(self.region)}"


Target = ClassAt | ClassIn


def label_text(label: int, classes: Sequence[str] | None) -> str:
    """Return the name of a class, or "class 3" if the names are unknown."""
    return classes[label] if classes else f"class {label}"


def keypoint_text(keypoint: int, names: Sequence[str] | None) -> str:
    """Return the name of a key point, or "key point 3" if the names are unknown."""
    return names[keypoint] if names else f"key point {keypoint}"
