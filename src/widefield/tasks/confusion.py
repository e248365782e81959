"""Count which classes are predicted at the pixels of each class, and compute the metrics of segmentation from it.

Counts are integers that are summed over images and processes. Metrics therefore do not depend on how images are batched
or spread over processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from widefield._pixels import IGNORED, NO_OBJECT, intersection_over_union
from widefield.report import Report
from widefield.tasks.metric_names import finite, percent


@dataclass(frozen=True, eq=False)
class SegmentationScores(Report):
    """The counts of an evaluation, and all metrics of segmentation.

    A class that is neither in the masks nor predicted has no IoU (NaN), one that is not in the masks no accuracy (NaN);
    means leave these out.

    Attributes:
        classes: names of the K classes.
        counts: int64 (1 + groups, K, K): pixels by (size group, true class, predicted class). Entry 0 of the first
            dimension holds the pixels outside of objects; all pixels if sizes are unknown.
        size_groups: names of the groups of objects by size.
        boundaries: int64 (2, K): pixels of each class in the intersection and the union of true and predicted
            boundaries; None if they were not counted.
    """

    classes: tuple[str, ...]
    counts: Tensor
    size_groups: tuple[str, ...] = ()
    boundaries: Tensor | None = None

    @property
    def confusion(self) -> Tensor:
        """Return int64 (K, K): the number of pixels by (true class, predicted class)."""
        return self.counts.sum(0)

    @property
    def iou(self) -> Tensor:
        """Return the intersection over union of each class, float64 (K,)."""
        return _iou(self.confusion)

    @property
    def accuracy(self) -> Tensor:
        """Return the share of each class's pixels that are predicted as such, float64 (K,)."""
        return self.confusion.diagonal().double() / self.confusion.sum(1)

    def iou_by_size(self) -> dict[str, Tensor]:
        """Return the IoU of each class among the objects of a size group, float64 (K,), by the group's name.

        The pixels of the other groups' objects are ignored, pixels outside of objects stay. NaN: the group has no
        object of the class.
        """
        return {
            name: torch.where(objects.sum(1) > 0, _iou(self.counts[0] + objects), torch.nan)
            for name, objects in zip(self.size_groups, self.counts[1:], strict=True)
        }

    def metrics(self) -> dict[str, float]:
        """Return ``miou``, ``macc``, ``aacc``, ``miou_NAME`` of each size group, and ``boundary_miou`` if counted.

        ``miou`` and ``macc`` are means over the classes, ``aacc`` is the accuracy of all pixels. For a size group, the
        pixels of the other groups' objects are ignored, pixels outside of objects stay, and the mean is over the
        classes of the group's objects. ``boundary_miou`` is the mean over the classes of the boundary IoU.
        """
        confusion = self.confusion
        found = {
            "miou": _mean(self.iou),
            "macc": _mean(self.accuracy),
            "aacc": float(confusion.diagonal().sum().double() / confusion.sum()),
        }
        found |= {f"miou_{name}": _mean(values) for name, values in self.iou_by_size().items()}
        if self.boundaries is not None:
            found["boundary_miou"] = _mean(self.boundaries[0].double() / self.boundaries[1])
        return found

    def summary(self) -> str:
        """Return the metrics in percent, and the number of pixels, as one line."""
        numbers = ", ".join(f"{name} {percent(value)}" for name, value in self.metrics().items())
        return f"{numbers}; {int(self.counts.sum()):,} pixels of {len(self.classes)} classes"

    def rows(self) -> list[dict[str, str]]:
        """Return one row per class: IoU, accuracy, its share of the pixels, and the class it is mistaken for most."""
        confusion = self.confusion
        wrong = confusion - confusion.diagonal().diag()
        total = max(int(confusion.sum()), 1)
        rows = []
        for index, name in enumerate(self.classes):
            missed = int(wrong[index].max())
            rows.append(
                {
                    "class": name,
                    "IoU": percent(float(self.iou[index])),
                    "accuracy": percent(float(self.accuracy[index])),
                    "pixels": percent(int(confusion[index].sum()) / total),
                    "mistaken for": self.classes[int(wrong[index].argmax())] if missed else "-",
                    "in": percent(missed / int(confusion[index].sum())) if missed else "-",
                }
            )
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Return everything in JSON types; what is not a number becomes None."""
        return {
            "metrics": {name: finite(value) for name, value in self.metrics().items()},
            "classes": list(self.classes),
            "iou": [finite(value) for value in self.iou.tolist()],
            "accuracy": [finite(value) for value in self.accuracy.tolist()],
            "confusion": self.confusion.tolist(),
            "size_groups": list(self.size_groups),
        }


class Confusion(Metric):
    """Count pixels by size group, true class and predicted class; ``compute`` gives the metrics by name.

    Args:
        classes: names of the classes.
        size_groups: names of the groups of objects by size; empty if sizes are unknown.
        ignore_index: value of pixels without a class in masks.
        boundary: also count boundaries (Cheng et al. 2021, Boundary IoU): pixels of a class no further than this
            fraction of the image's diagonal from another class or the image's border; None: do not.
        options: of torchmetrics' Metric.
    """

    full_state_update = False
    counts: Tensor
    boundaries: Tensor

    def __init__(
        self,
        classes: Sequence[str],
        size_groups: Sequence[str] = (),
        ignore_index: int = IGNORED,
        boundary: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.classes, self.size_groups = tuple(classes), tuple(size_groups)
        self.ignore_index, self.boundary = ignore_index, boundary
        zeros = torch.zeros(1 + len(self.size_groups), len(classes), len(classes), dtype=torch.int64)
        self.add_state("counts", zeros, dist_reduce_fx="sum")
        self.add_state("boundaries", torch.zeros(2, len(classes), dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self, preds: Sequence[Tensor], target: Sequence[Tensor], size_group: Sequence[Tensor] | None = None
    ) -> None:
        """Count the pixels of N images.

        Args:
            preds: predicted classes, int64 (H, W) for each image, or (N, H, W).
            target: true classes or ``ignore_index``, likewise.
            size_group: uint8, likewise: an index into ``size_groups``, 255 where there is no object.
        """
        groups = [None] * len(preds) if size_group is None or not self.size_groups else size_group
        for mine, true, group in zip(preds, target, groups, strict=True):
            slot = 0 if group is None else torch.where(group == NO_OBJECT, 0, group.long() + 1)
            size = self.counts.shape[1]
            index = ((slot * size + true) * size + mine)[true != self.ignore_index]
            self.counts += torch.bincount(index, minlength=self.counts.numel()).view_as(self.counts)
            if self.boundary is not None:
                self.boundaries += _boundaries(mine, true, size, self.ignore_index, self.boundary)

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics of :meth:`SegmentationScores.metrics` as float64 scalars on the CPU."""
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in self.scores().metrics().items()}

    def scores(self) -> SegmentationScores:
        """Return the counts so far, on the CPU."""
        boundaries = None if self.boundary is None else self.boundaries.cpu()
        return SegmentationScores(self.classes, self.counts.cpu(), self.size_groups, boundaries)


def boundary(mask: Tensor, distance: int) -> Tensor:
    """Return the pixels that are at most ``distance`` rows and columns from another value or from outside of the image.

    It is what remains of each value's region without its erosion by a square of 2 distance + 1 pixels.

    Args:
        mask: int64 (H, W), values below 2^24.
        distance: in pixels, at least 1.

    Returns:
        bool (H, W).
    """
    values = mask.float()[None]
    inner = torch.zeros_like(mask, dtype=torch.bool)
    inner[distance : mask.shape[0] - distance, distance : mask.shape[1] - distance] = True
    return ~(inner & (_largest(values, distance) == mask) & (-_largest(-values, distance) == mask))


def _largest(values: Tensor, distance: int) -> Tensor:
    """Return the largest value within a distance of each pixel, (H, W) from (1, H, W)."""
    side = 2 * distance + 1
    rows = F.max_pool2d(values, (side, 1), 1, (distance, 0))
    return F.max_pool2d(rows, (1, side), 1, (0, distance))[0]


def _boundaries(mine: Tensor, true: Tensor, size: int, ignore_index: int, fraction: float) -> Tensor:
    """Return int64 (2, K): pixels of each class in the intersection and in the union of both boundaries."""
    distance = max(round(fraction * math.hypot(*true.shape)), 1)
    ignored = true == ignore_index
    here, there = boundary(torch.where(ignored, ignore_index, mine), distance), boundary(true, distance)
    both = torch.bincount(true[here & there & ~ignored & (mine == true)], minlength=size)
    each = torch.bincount(torch.cat([mine[here & ~ignored], true[there & ~ignored]]), minlength=size)
    return torch.stack([both, each - both])


def _iou(confusion: Tensor) -> Tensor:
    return intersection_over_union(confusion.sum(1), confusion.sum(0), confusion.diagonal())


def _mean(values: Tensor) -> float:
    """Return the mean of the values that are not NaN; NaN if there are none."""
    return float(values.nanmean())
