"""Draw which patches of an image are masked.

A mask is bool (N, h, w), True where a patch is masked, over the grid of patches of each image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from widefield import _checks

ROUNDINGS: Mapping[str, Callable[[int, float], int]] = {
    "keep_floor": lambda patches, ratio: patches - int(patches * (1 - ratio)),
    "keep_round": lambda patches, ratio: patches - round(patches * (1 - ratio)),
    "mask_ceil": lambda patches, ratio: math.ceil(patches * ratio),
}
"""Name -> number of masked patches from that of all and the ratio, as the published codes of FCMAE, SparK and SimMIM
round. With 49 patches and 0.6 they mask 30, 29 and 30."""

SHAPES = ("random", "blocks")

_ASPECT = 0.3
_TRIES = 10


@dataclass(frozen=True)
class PatchMask:
    """How masks are drawn: every image has the same number of masked patches.

    Args:
        patch: side of a patch in pixels. The total stride of a network must divide it.
        ratio: share of the patches that are masked, above 0 and below 1.
        rounding: one of :data:`ROUNDINGS`.
        shape: "random": any patches. "blocks": rectangles of at least four patches, with sides in proportions from 0.3
            to 1/0.3, as in Bao et al., "BEiT: BERT Pre-Training of Image Transformers", ICLR 2022, algorithm 1; the
            last one is cut, so that the number is exact.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.
    """

    patch: int = 32
    ratio: float = 0.6
    rounding: str = "keep_floor"
    shape: str = "random"

    def __post_init__(self) -> None:
        _checks.integer("patch", self.patch)
        _checks.choice("rounding", self.rounding, tuple(ROUNDINGS))
        _checks.choice("shape", self.shape, SHAPES)
        if not 0 < _checks.number("ratio", self.ratio) < 1:
            raise ValueError(f"ratio must be above 0 and below 1, the share of masked patches; got {self.ratio}.")

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of patches; raises ValueError if the patches do not fill the image."""
        if height % self.patch or width % self.patch:
            near = (max(1, round(side / self.patch)) * self.patch for side in (height, width))
            raise ValueError(
                f"images of {height}x{width} pixels cannot be divided into patches of {self.patch}: use sides that are "
                f"multiples of it, such as {'x'.join(map(str, near))}."
            )
        return height // self.patch, width // self.patch

    def count(self, rows: int, columns: int) -> int:
        """Return the number of masked patches of a grid; raises ValueError if none or all would be masked."""
        patches = rows * columns
        masked = ROUNDINGS[self.rounding](patches, self.ratio)
        if not 0 < masked < patches:
            raise ValueError(
                f"a ratio of {self.ratio} masks {masked} of {patches} patches ({rows}x{columns}); at least one must be "
                "masked and one visible. Use larger images, smaller patches, or another ratio."
            )
        return masked

    def draw(self, images: int, height: int, width: int, generator: torch.Generator | None = None) -> Tensor:
        """Return masks for images of this size, bool (N, height / patch, width / patch), on the CPU.

        Args:
            images: N.
            height, width: of the images in pixels.
            generator: of the CPU; None: PyTorch's own.
        """
        rows, columns = self.grid(height, width)
        masked = self.count(rows, columns)
        if self.shape == "blocks":
            return torch.stack([_blocks(rows, columns, masked, generator) for _ in range(images)])
        order = torch.rand(images, rows * columns, generator=generator).argsort(1)
        mask: Tensor = (order.argsort(1) < masked).unflatten(1, (rows, columns))
        return mask


def _blocks(rows: int, columns: int, masked: int, generator: torch.Generator | None) -> Tensor:
    """Return the mask of one image, bool (rows, columns), made of rectangles."""
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    while (left := masked - int(mask.sum())) > 0:
        before = mask.clone()
        for _ in range(_TRIES):
            area, aspect, down, right = torch.rand(4, generator=generator).tolist()
            size = min(4, left) + area * max(0, left - 4)
            ratio = math.exp(math.log(_ASPECT) * (1 - 2 * aspect))
            height = min(rows, max(1, round(math.sqrt(size * ratio))))
            width = min(columns, max(1, round(math.sqrt(size / ratio))))
            top, start = int(down * (rows - height + 1)), int(right * (columns - width + 1))
            mask[top : top + height, start : start + width] = True
            if not torch.equal(mask, before):
                break
        surplus = int(mask.sum()) - masked
        if surplus > 0:  # cut the new patches that are too many, from the last
            fresh = (mask & ~before).flatten().nonzero()[:, 0]
            mask.view(-1)[fresh[len(fresh) - surplus :]] = False
    return mask


def stretched(mask: Tensor, height: int, width: int) -> Tensor:
    """Return a mask (N, h, w) for maps of another size, (N, height, width): every patch becomes several positions.

    Raises:
        ValueError: the size is not a multiple of the mask's.
    """
    rows, columns = mask.shape[1:]
    if height % rows or width % columns:
        raise ValueError(
            f"a map of {height}x{width} cannot be divided into the {rows}x{columns} patches of the mask: the network's "
            "strides must divide the side of a patch."
        )
    return mask.repeat_interleave(height // rows, 1).repeat_interleave(width // columns, 2)
