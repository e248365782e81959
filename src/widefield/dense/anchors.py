"""Place anchors and points on the cells of feature maps.

An anchor is a box of fixed size and shape that a detector refines (Ren, He, Girshick, Sun, "Faster R-CNN", NeurIPS
2015, section 3.1.1; Lin, Goyal, Girshick, He, Dollár, "Focal Loss for Dense Object Detection", ICCV 2017, section 4). A
point is the center of a cell (Tian, Shen, Chen, He, "FCOS", ICCV 2019, section 3.1). The numbers are OpenMMLab's:
anchors are not rounded, and they are centered on the top left corner of their cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from widefield import _checks

DIVISOR = 32
"""Published training pads each image to a multiple of this. Anchors of cells beyond that are not used."""


@dataclass(frozen=True)
class Anchors:
    """The anchors of every cell of a feature pyramid.

    Their order within a map is that of the channels of a head's output: row, column, ratio, scale; the scale varies
    fastest.

    Args:
        strides: stride of each level in pixels, finest first.
        scales: side of a square anchor, in strides.
        ratios: height / width.

    Raises:
        ValueError: an argument is empty or has an entry that is not positive.
    """

    strides: tuple[int, ...] = (4, 8, 16, 32, 64)
    scales: tuple[float, ...] = (8.0,)
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)

    def __post_init__(self) -> None:
        for name in ("strides", "scales", "ratios"):
            values = tuple(getattr(self, name))
            if not values or any(_checks.number(f"every entry of {name}", value) == 0 for value in values):
                raise ValueError(f"{name} must hold one or more positive numbers; got {values!r}.")
            object.__setattr__(self, name, values)

    @classmethod
    def octaves(
        cls,
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        *,
        base: float = 4.0,
        per_octave: int = 3,
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
    ) -> Anchors:
        """Return anchors with the scales base * 2^(i / per_octave) (RetinaNet, section 4)."""
        count = _checks.integer("per_octave", per_octave)
        return cls(tuple(strides), tuple(base * 2 ** (i / count) for i in range(count)), tuple(ratios))

    @property
    def per_cell(self) -> int:
        """Number of anchors of a cell."""
        return len(self.scales) * len(self.ratios)

    def shapes(self, level: int) -> list[list[float]]:
        """Return the anchors of the cell at (0, 0) of a level: ``per_cell`` rows xyxy in pixels."""
        rows = []
        for ratio in self.ratios:
            for scale in self.scales:
                side = self.strides[level] * scale
                x, y = side / ratio**0.5 / 2, side * ratio**0.5 / 2
                rows.append([-x, -y, x, y])
        return rows

    def grid(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return the anchors of every level, float32 or the maps' float64, (H_i * W_i * per_cell, 4) xyxy in pixels.

        Args:
            maps: one tensor (..., H_i, W_i) per level; only shape, dtype and device are read.

        Raises:
            ValueError: the number of maps is not that of the strides.
        """
        self._check(maps)
        return [self._level(level, x) for level, x in enumerate(maps)]

    def _level(self, level: int, x: Tensor) -> Tensor:
        corners = _cells(x, self.strides[level], 0.0)
        shapes = corners.new_tensor(self.shapes(level))
        return (corners.repeat(1, 2)[:, None] + shapes).flatten(0, 1)

    def covered(self, maps: Sequence[Tensor], size: tuple[int, int]) -> list[Tensor]:
        """Return which anchors of every level belong to cells within an area: bool (H_i * W_i * per_cell,).

        Args:
            maps: as in :meth:`grid`.
            size: (height, width) of the area in pixels, from the top left corner. Cells that are partly inside count.
        """
        self._check(maps)
        flags = []
        for stride, x in zip(self.strides, maps, strict=True):
            rows = torch.arange(x.shape[-2], device=x.device) * stride < size[0]
            columns = torch.arange(x.shape[-1], device=x.device) * stride < size[1]
            cells = (rows[:, None] & columns).flatten()
            flags.append(cells[:, None].expand(-1, self.per_cell).flatten())
        return flags

    def usable(self, maps: Sequence[Tensor], size: tuple[int, int], border: float | None = None) -> Tensor:
        """Return the positions of the anchors that an image is trained on, int64, counted over all levels.

        Args:
            maps: as in :meth:`grid`.
            size: (height, width) of the image without the padding of its batch.
            border: anchors that leave the image by more pixels are not used. None: all are.
        """
        height, width = (-(-side // DIVISOR) * DIVISOR for side in size)
        flags = torch.cat(self.covered(maps, (height, width)))
        if border is not None:
            flags = flags & inside(torch.cat(self.grid(maps)), size, border)
        return flags.nonzero().flatten()

    def _check(self, maps: Sequence[Tensor]) -> None:
        if len(maps) != len(self.strides):
            raise ValueError(f"these anchors have {len(self.strides)} levels {self.strides}; got {len(maps)} maps.")


def inside(boxes: Tensor, size: tuple[int, int], border: float = 0.0) -> Tensor:
    """Return which boxes leave the image by no more than ``border`` pixels, bool (N,).

    The right and bottom edges must be strictly less than the size plus the border, as published.

    Args:
        boxes: (N, 4) xyxy.
        size: (height, width) of the image.
        border: allowed distance in pixels.
    """
    height, width = size
    x1, y1, x2, y2 = boxes.unbind(-1)
    return (x1 >= -border) & (y1 >= -border) & (x2 < width + border) & (y2 < height + border)


def by_anchor(outputs: Sequence[Tensor], values: int) -> list[Tensor]:
    """Reorder outputs of a head like the anchors: (N, A * values, H_i, W_i) -> (N, H_i * W_i * A, values) per level."""
    return [x.permute(0, 2, 3, 1).reshape(len(x), -1, values) for x in outputs]


def points(maps: Sequence[Tensor], strides: Sequence[int], offset: float = 0.5) -> list[Tensor]:
    """Return one point per cell of every level, float32 or the maps' float64, (H_i * W_i, 2) as x, y in pixels.

    Args:
        maps: one tensor (..., H_i, W_i) per level; only shape, dtype and device are read.
        strides: stride of each level in pixels.
        offset: of the point from the cell's top left corner, in strides; 0.5 is the center.

    Raises:
        ValueError: the number of maps is not that of the strides.
    """
    if len(maps) != len(strides):
        raise ValueError(f"there are {len(strides)} strides {tuple(strides)} for {len(maps)} maps; give one per map.")
    return [_cells(x, stride, offset) for x, stride in zip(maps, strides, strict=True)]


def _cells(x: Tensor, stride: int, offset: float) -> Tensor:
    """Return (H * W, 2): x, y of a point of each cell. Traced with sizes as symbols, it holds for any size."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = (torch.arange(x.shape[-2], device=x.device, dtype=dtype) + offset) * stride
    columns = (torch.arange(x.shape[-1], device=x.device, dtype=dtype) + offset) * stride
    y, x_ = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack((x_, y), -1).flatten(0, 1)
