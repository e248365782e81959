"""Measure the fields of single objects of a detector, and add them up by size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from widefield.analysis._model import running
from widefield.surgery.inputs import place

if TYPE_CHECKING:
    from widefield.data import Sample

SHARES = (0.5, 0.9)
"""Shares of all contributions whose extent is reported."""
CELLS = 96
"""Cells of a mean field along each side."""
_PYRAMID = 224 / 16
"""Side of the objects that the map of stride 1 would get: FPN (Lin et al. 2017, equation 1) has 224 px at stride 16."""
_KEPT = 320
"""Largest side of the images stored in a result, in pixels."""
_AROUND = 160
"""Least distance from the middle of an example to the border of its picture, in pixels."""


@dataclass(frozen=True, eq=False)
class ObjectExample:
    """One object with its field.

    Attributes:
        image: (h, w, 3), float32 in [0, 1]: the object and what is around it.
        field: (h, w), float32: contributions relative to the largest.
        box: (left, top, right, bottom) in pixels of ``image``.
        label: index of its class.
        probability: of its class, in its box.
    """

    image: NDArray[np.float32]
    field: NDArray[np.float32]
    box: tuple[float, float, float, float]
    label: int
    probability: float


@dataclass(frozen=True, eq=False)
class SizeGroup:
    """Objects of similar size.

    Attributes:
        name: the range of sizes, as text.
        objects: their number.
        side: mean of the square roots of their areas, in pixels of the model's images.
        probability: mean probability of the objects' classes in their boxes.
        field: (96, 96), float64: the share of an object's contributions in each cell, averaged over the objects. The
            cells cover ``extent`` boxes from the middle to each side.
        inside: share of the contributions inside of the box, averaged over the objects.
        reach: for a share of all contributions, the factor by which the box has to grow around its middle to hold it;
            the median of the objects.
        reach_pixels: likewise the square root of the grown box's area, in pixels; the median.
        example: the first object.
    """

    name: str
    objects: int
    side: float
    probability: float
    field: NDArray[np.float64]
    inside: float
    reach: Mapping[float, float]
    reach_pixels: Mapping[float, float]
    example: ObjectExample


@dataclass(frozen=True)
class Colors:
    """Mean and deviation by which images are normalized; empty if they are unknown."""

    mean: Sequence[float]
    std: Sequence[float]

    def of(self, image: Tensor) -> NDArray[np.float32]:
        """Return a normalized image (C, h, w) as (h, w, 3) in [0, 1]."""
        if self.mean:
            std, mean = (image.new_tensor(values)[:, None, None] for values in (self.std, self.mean))
            image = image * std + mean
        else:
            low, high = image.aminmax()
            image = (image - low) / (high - low).clamp(min=1e-6)
        shown = image.clamp(0, 1).float()
        shown = shown if len(shown) == 3 else shown.mean(0, keepdim=True).expand(3, -1, -1)
        return np.asarray(shown.movedim(0, -1).cpu().numpy())


@dataclass(frozen=True, eq=False)
class Look:
    """The field of one object."""

    group: int
    field: NDArray[np.float64]
    """(h, w): contributions of the pixels, with a sum of 1."""
    box: tuple[float, float, float, float]
    label: int
    probability: float
    image: Tensor
    """(C, h, w), normalized."""


def looks(
    model: nn.Module, sample: Sample, unit: str, edges: Sequence[float], groups: Sequence[Group], count: int
) -> Iterator[Look]:
    """Yield the fields of the objects of a sample whose groups are not full yet."""
    detector: Any = model
    device, dtype = place(model)
    image = sample["image"].to(device, dtype)
    boxes = _boxes_in(sample).to(device, dtype)
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1).sqrt()
    crowd = sample.get("crowd")
    usable = (sides >= 1) if crowd is None else (sides >= 1) & ~crowd.to(device)
    free = [count - len(group.inside) for group in groups]
    chosen: list[tuple[int, int]] = []
    for index in usable.nonzero()[:, 0].tolist():
        group = int(np.searchsorted(edges, float(sides[index]), side="right"))
        if free[group] > 0:
            free[group] -= 1
            chosen.append((index, group))
    if not chosen:
        return
    places = torch.tensor([index for index, _ in chosen], device=device)
    labels = sample["labels"].to(device)[places]
    with torch.inference_mode(False), torch.enable_grad(), running(model, image[None]):
        leaf = image[None].clone().requires_grad_()
        maps = detector.maps(leaf.clone())
        scores = detector.box_scores(maps, [boxes[places]])
        rows = torch.arange(len(places), device=device)
        chances = scores.probabilities.detach().float()[rows, labels]
        values = scores.logits[rows, labels] if unit == "score" else _centers(maps, boxes[places], image.shape[-2:])
        for number, (index, group) in enumerate(chosen):
            gradient = torch.autograd.grad(values[number], leaf, retain_graph=number + 1 < len(chosen))[0]
            field = gradient[0].clamp(min=0).sum(0, dtype=torch.float64).cpu().numpy()
            if not np.isfinite(field).all():
                raise ValueError("the gradient of an object is not finite: activations overflow, or weights are.")
            if field.any():  # else no pixel contributes
                left, top, right, bottom = boxes[index].tolist()
                box = (left, top, right, bottom)
                chance, label = float(chances[number]), int(labels[number])
                yield Look(group, field / field.sum(), box, label, chance, image.detach())


def _boxes_in(sample: Sample) -> Tensor:
    """Return the boxes of a sample in pixels of its image, (M, 4)."""
    boxes: Tensor = sample["boxes"]
    if "size" not in sample:
        return boxes
    height, width = (float(side) for side in sample["size"])
    h, w = sample["image"].shape[-2:]
    return boxes * boxes.new_tensor([w / width, h / height, w / width, h / height])


def _centers(maps: Sequence[Tensor], boxes: Tensor, size: Sequence[int]) -> Tensor:
    """Return the sum of the channels in the middle of each box, (M,), on the map for boxes of its size."""
    strides = [2 ** round(np.log2(max(size[1] / one.shape[3], 1))) for one in maps]
    found = []
    for left, top, right, bottom in boxes.tolist():
        wanted = np.sqrt((right - left) * (bottom - top)) / _PYRAMID
        level = max((k for k, stride in enumerate(strides) if stride <= wanted * (1 + 1e-6)), default=0)
        h, w = maps[level].shape[2:]
        row = min(max(int((top + bottom) / 2 / strides[level]), 0), h - 1)
        column = min(max(int((left + right) / 2 / strides[level]), 0), w - 1)
        found.append(maps[level][0, :, row, column].sum())
    return torch.stack(found)


class Group:
    """Fields of objects of one range of sizes, as they are added up."""

    def __init__(self, name: str, extent: float) -> None:
        self.name, self.extent = name, extent
        self.field = np.zeros((CELLS, CELLS))
        self.inside: list[float] = []
        self.sides: list[float] = []
        self.chances: list[float] = []
        self.reach: list[list[float]] = []
        self.example: ObjectExample | None = None

    def add(self, look: Look, colors: Colors) -> None:
        """Add the field of an object."""
        left, top, right, bottom = look.box
        across = overlap(look.field.shape[1], left, right, self.extent, CELLS)
        down = overlap(look.field.shape[0], top, bottom, self.extent, CELLS)
        self.field += down @ look.field @ across.T
        rows = overlap(look.field.shape[0], top, bottom, 0.5, 1)
        columns = overlap(look.field.shape[1], left, right, 0.5, 1)
        self.inside.append(float((rows @ look.field @ columns.T).item()))
        self.sides.append(float(np.sqrt((right - left) * (bottom - top))))
        self.chances.append(look.probability)
        self.reach.append(_reach(look.field, look.box))
        if self.example is None:
            self.example = _example(look, self.extent, colors)

    def result(self) -> SizeGroup:
        """Return the means and medians."""
        if self.example is None:
            raise ValueError(f"the group {self.name!r} has no objects.")
        factors = np.array(self.reach)
        pixels = factors * np.array(self.sides)[:, None]
        return SizeGroup(
            name=self.name,
            objects=len(self.inside),
            side=float(np.mean(self.sides)),
            probability=float(np.mean(self.chances)),
            field=self.field / len(self.inside),
            inside=float(np.mean(self.inside)),
            reach=dict(zip(SHARES, np.median(factors, 0).tolist(), strict=True)),
            reach_pixels=dict(zip(SHARES, np.median(pixels, 0).tolist(), strict=True)),
            example=self.example,
        )


def overlap(pixels: int, start: float, end: float, extent: float, cells: int) -> NDArray[np.float64]:
    """Return the share of each pixel of an axis that lies in each cell, (cells, pixels).

    The cells cover ``extent`` times the length of the box to either side of its middle.
    """
    middle, length = (start + end) / 2, end - start
    edges = middle + length * np.linspace(-extent, extent, cells + 1)
    lower, upper = edges[:-1, None], edges[1:, None]
    first = np.arange(pixels)[None]
    shared: NDArray[np.float64] = (np.minimum(upper, first + 1) - np.maximum(lower, first)).clip(min=0)
    return shared


def _reach(field: NDArray[np.float64], box: tuple[float, float, float, float]) -> list[float]:
    """Return the factor by which a box has to grow around its middle to hold each of ``SHARES`` of a field."""
    left, top, right, bottom = box
    down = np.abs(np.arange(field.shape[0]) + 0.5 - (top + bottom) / 2) / ((bottom - top) / 2)
    across = np.abs(np.arange(field.shape[1]) + 0.5 - (left + right) / 2) / ((right - left) / 2)
    factors = np.maximum(down[:, None], across[None]).ravel()
    order = np.argsort(factors)
    held = field.ravel()[order].cumsum()
    found: list[float] = factors[order][np.searchsorted(held, np.array(SHARES) * held[-1] * (1 - 1e-9))].tolist()
    return found


def _example(look: Look, extent: float, colors: Colors) -> ObjectExample:
    """Return an object with what is around it."""
    left, top, right, bottom = look.box
    h, w = look.field.shape
    around = max(_AROUND, extent * max(right - left, bottom - top) / 2)
    y, x = (top + bottom) / 2, (left + right) / 2
    first_row, first_column = max(0, int(y - around)), max(0, int(x - around))
    rows, columns = slice(first_row, min(h, int(y + around) + 1)), slice(first_column, min(w, int(x + around) + 1))
    image = colors.of(look.image[:, rows, columns])
    field = look.field[rows, columns]
    scale = max(1, -(-max(field.shape) // _KEPT))
    if scale > 1:
        image, field = _shrunk(image, scale), _shrunk(field[..., None], scale)[..., 0]
    box = np.array([left - first_column, top - first_row, right - first_column, bottom - first_row]) / scale
    return ObjectExample(
        image.astype(np.float32),
        (field / max(float(field.max()), 1e-300)).astype(np.float32),
        (float(box[0]), float(box[1]), float(box[2]), float(box[3])),
        look.label,
        look.probability,
    )


def _shrunk(values: NDArray[Any], scale: int) -> NDArray[Any]:
    """Return the means of squares of pixels of (h, w, C)."""
    given = torch.from_numpy(np.ascontiguousarray(values)).movedim(-1, 0)[None]
    found: NDArray[Any] = F.avg_pool2d(given, scale, ceil_mode=True)[0].movedim(0, -1).numpy()
    return found
