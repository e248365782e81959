"""Measure the fields of single key points of people, and add them up by key point and by size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from widefield.analysis._keypoints import peaks
from widefield.analysis._objects import CELLS, SHARES, Colors, overlap
from widefield.surgery.inputs import place
from widefield.surgery.poses import PCK

if TYPE_CHECKING:
    from widefield.data import Sample


@dataclass(frozen=True, eq=False)
class KeypointExample:
    """One person with the field of one key point.

    Attributes:
        image: (h, w, 3), float32 in [0, 1]: the crop.
        field: (h, w), float32: contributions relative to the largest.
        peak: (x, y) in pixels of ``image``: the key point that the model finds.
        label: (x, y): the true one.
    """

    image: NDArray[np.float32]
    field: NDArray[np.float32]
    peak: tuple[float, float]
    label: tuple[float, float]


@dataclass(frozen=True, eq=False)
class KeypointGroup:
    """One key point of people of similar size.

    Attributes:
        keypoint: its index.
        size: the range of sizes, as text.
        people: their number.
        found: share of the people whose key point is found within 5 % of the longer side of the crop.
        height: mean height of the heatmap's peak.
        reach: for a share of all contributions, the radius around the peak that holds it, in units of the longer side
            of the person's box; the median of the people.
        reach_pixels: likewise in pixels of the crop.
        field: (96, 96), float64: the share of a person's contributions in each cell, averaged over the people. The
            cells cover ``extent`` sides from the peak to each side.
        example: the first person.
    """

    keypoint: int
    size: str
    people: int
    found: float
    height: float
    reach: Mapping[float, float]
    reach_pixels: Mapping[float, float]
    field: NDArray[np.float64]
    example: KeypointExample


@dataclass(frozen=True, eq=False)
class Look:
    """The field of one key point of one person."""

    group: tuple[int, int]
    """Index of the key point, and of the size."""
    field: NDArray[np.float64]
    """(h, w): contributions of the pixels of the crop, with a sum of 1."""
    peak: tuple[float, float]
    label: tuple[float, float]
    side: float
    """Longer side of the person's box in pixels of the crop."""
    height: float
    image: Tensor
    """(C, h, w), normalized."""


Groups = dict[tuple[int, int], "Group"]


def looks(model: nn.Module, sample: Sample, size: int, groups: Groups, count: int, batch_size: int) -> Iterator[Look]:
    """Yield the fields of a person's labeled key points whose groups are not full yet.

    Args:
        model: a pose model in evaluation mode.
        sample: of a pose set.
        size: index of the person's size.
        groups: by key point and size.
        count: people in a full group.
        batch_size: key points at a time.
    """
    device, dtype = place(model)
    image = sample["image"].to(device, dtype)
    labels = sample["keypoints"]
    limits = labels.new_tensor([image.shape[2], image.shape[1]])
    usable = (labels[:, 2] > 0) & ((labels[:, :2] >= -0.5) & (labels[:, :2] < limits - 0.5)).all(1)
    wanted = [
        int(k) for k in usable.nonzero()[:, 0] if (int(k), size) in groups and groups[int(k), size].people < count
    ]
    side = longer_side(sample)
    for start in range(0, len(wanted), batch_size):
        part = torch.tensor(wanted[start : start + batch_size], device=device)
        rows = torch.arange(len(part), device=device)
        with torch.inference_mode(False), torch.enable_grad():
            leaf = image.expand(len(part), -1, -1, -1).clone().requires_grad_()
            found = peaks(model, leaf.clone())
            values = found.values[rows, part]
            gradient = torch.autograd.grad(values.sum(), leaf)[0]
        fields = gradient.clamp(min=0).sum(1, dtype=torch.float64).cpu().numpy()
        if not np.isfinite(fields).all():
            raise ValueError("the gradient of a key point is not finite: activations overflow, or weights are.")
        for row, keypoint in enumerate(part.tolist()):
            if fields[row].any():  # else no pixel contributes
                x, y = found.points[row, keypoint].tolist()
                label_x, label_y = labels[keypoint, :2].tolist()
                field = fields[row] / fields[row].sum()
                height = float(values[row].detach())
                yield Look((keypoint, size), field, (x, y), (label_x, label_y), side, height, image.detach())


def longer_side(sample: Sample) -> float:
    """Return the longer side of the person's box in pixels of the crop; that of the crop if the box is unknown."""
    if "box" not in sample or "affine" not in sample:
        return float(max(sample["image"].shape[-2:]))
    scale = float(torch.linalg.det(sample["affine"][:, :2].double()).abs().sqrt())
    left, top, right, bottom = sample["box"].tolist()
    return scale * float(max(right - left, bottom - top))


class Group:
    """Fields of one key point of people of one range of sizes, as they are added up."""

    def __init__(self, keypoint: int, size: str, extent: float) -> None:
        self.keypoint, self.size, self.extent = keypoint, size, extent
        self.people = self.found = 0
        self.field = np.zeros((CELLS, CELLS))
        self.heights: list[float] = []
        self.reach: list[tuple[list[float], float]] = []
        self.example: KeypointExample | None = None

    def add(self, look: Look, colors: Colors) -> None:
        """Add the field of a person."""
        (x, y), (label_x, label_y) = look.peak, look.label
        h, w = look.field.shape
        half = look.side / 2
        across = overlap(w, x + 0.5 - half, x + 0.5 + half, self.extent, CELLS)
        down = overlap(h, y + 0.5 - half, y + 0.5 + half, self.extent, CELLS)
        self.field += down @ look.field @ across.T
        self.people += 1
        self.found += bool(np.hypot(x - label_x, y - label_y) <= PCK * max(h, w))
        self.heights.append(look.height)
        self.reach.append((_radii(look.field, look.peak), look.side))
        if self.example is None:
            field = (look.field / look.field.max()).astype(np.float32)
            self.example = KeypointExample(colors.of(look.image), field, look.peak, look.label)

    def result(self) -> KeypointGroup:
        """Return the means and medians."""
        if self.example is None:
            raise ValueError(f"the group of key point {self.keypoint}, {self.size}, has no people.")
        pixels = np.array([radii for radii, _ in self.reach])
        sides = np.array([side for _, side in self.reach])[:, None]
        return KeypointGroup(
            keypoint=self.keypoint,
            size=self.size,
            people=self.people,
            found=self.found / self.people,
            height=float(np.mean(self.heights)),
            reach=dict(zip(SHARES, np.median(pixels / sides, 0).tolist(), strict=True)),
            reach_pixels=dict(zip(SHARES, np.median(pixels, 0).tolist(), strict=True)),
            field=self.field / self.people,
            example=self.example,
        )


def _radii(field: NDArray[np.float64], peak: Sequence[float]) -> list[float]:
    """Return the radii in pixels around a peak (x, y) that hold each of ``SHARES`` of a field."""
    down, across = (np.arange(length) - at for length, at in zip(field.shape, (peak[1], peak[0]), strict=True))
    radius = np.hypot(down[:, None], across[None]).ravel()
    order = np.argsort(radius)
    held = field.ravel()[order].cumsum()
    found: list[float] = radius[order][np.searchsorted(held, np.array(SHARES) * held[-1] * (1 - 1e-9))].tolist()
    return found
