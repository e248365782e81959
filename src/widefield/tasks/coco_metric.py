"""Compute COCO's metrics of detection: average precision of boxes and masks, by IoU, object size and class.

Figures equal those of pycocotools on the same detections, to the last digit. Images are matched when they come, so that
masks are not kept. What is kept of each detection are some 60 bytes, which are gathered over processes and sorted by
image. Metrics therefore do not depend on how images are batched or spread over processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from widefield import _checks, dense
from widefield._coco import matching
from widefield.dense.detector import Detections
from widefield.tasks import sizes
from widefield.tasks.detection_errors import DetectionTally, classify, confused
from widefield.tasks.detection_scores import DetectionScores
from widefield.tasks.records import RecordMetric

KINDS = ("box", "mask")
"""What overlaps are measured of."""


@dataclass(frozen=True, eq=False)
class TrueObjects:
    """The objects of an image, which detections are compared with.

    Attributes:
        boxes: (M, 4), x1, y1, x2, y2 in pixels of the file.
        labels: int64 (M,).
        size: (height, width) of the file in pixels.
        crowd: bool (M,): regions of many objects. None: no crowd regions.
        area: (M,): areas by which objects are grouped. None: those of the masks, or of the boxes without masks.
        masks: bool (M, H, W) at the size of the file; None without masks.
    """

    boxes: Tensor
    labels: Tensor
    size: tuple[int, int]
    crowd: Tensor | None = None
    area: Tensor | None = None
    masks: Tensor | None = None


class CocoMetric(RecordMetric[DetectionScores]):
    """Average precision and recall of detections; ``compute`` gives the main figures by name.

    The first objects that detections of a class may match are those of the same class in the same image, as in
    pycocotools. Detections are cut off at ``max_per_image`` of each class in each image.

    Args:
        classes: names of the K classes.
        masks: also measure masks.
        size_bins: edges between the finer groups of objects, square roots of areas in pixels, rising.
        relative_sizes: the edges are in units of the square root of the image's area.
        max_per_image: number of detections of one class in one image that are used.
        options: of torchmetrics' Metric.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range; the message names it.
    """

    objects: Tensor
    missed: Tensor
    confusion: Tensor

    def __init__(
        self,
        classes: Sequence[str],
        *,
        masks: bool = False,
        size_bins: Sequence[float] = sizes.OCTAVES,
        relative_sizes: bool = False,
        max_per_image: int = 100,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.classes = tuple(classes)
        self.kinds = KINDS if masks else KINDS[:1]
        self.size_bins = sizes.checked(size_bins)
        self.relative_sizes = bool(relative_sizes)
        self.max_per_image = _checks.integer("max_per_image", max_per_image)
        count, areas = len(self.classes), len(matching.AREAS) + len(self.size_bins) + 1
        self.add_records("rows", _record(len(self.kinds), areas))
        self.add_state("objects", torch.zeros(count, areas, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("missed", torch.zeros(len(self.kinds), count, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("confusion", torch.zeros(count + 1, count + 1, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Sequence[Detections], target: Sequence[TrueObjects], index: Tensor | None = None) -> None:
        """Match the detections of N images.

        Args:
            preds: boxes in pixels of the file. Masks are probabilities inside the boxes, which are pasted, or bool
                (D, H, W) at the size of the file.
            target: the objects of each image.
            index: int64 (N,), the places of the images in the data set; they decide the order of detections with equal
                scores. None: the order in which they come.
        """
        for place, found, true in zip(self.places(len(preds), index), preds, target, strict=True):
            self._add(place, found, true)

    def _scores(self) -> DetectionScores:
        rows = self.kept("rows")
        rows = rows[np.argsort(rows["image"], kind="stable")]
        objects = self.objects.cpu().numpy()
        areas = self.objects.shape[1]
        shape = len(rows), len(matching.THRESHOLDS), areas
        tallies = {}
        for place, kind in enumerate(self.kinds):
            right, counted = (_unpacked(rows[name][:, place], shape) for name in ("right", "counted"))
            tallies[kind] = DetectionTally(
                labels=rows["label"].astype(np.int64),
                scores=rows["score"],
                ranks=rows["rank"].astype(np.int64),
                right=right,
                counted=counted,
                objects=objects,
                errors=rows["error"][:, place],
                targets=rows["target"][:, place].astype(np.int64),
                missed=self.missed[place].cpu().numpy(),
            )
        return DetectionScores.of(
            self.classes, tallies, sizes.names(self.size_bins), self.confusion.cpu(), self.max_per_image
        )

    def _add(self, place: int, found: Detections, true: TrueObjects) -> None:
        """Match one image."""
        found = _ranked(found, self.max_per_image)
        labels, scores = found.labels.cpu().numpy(), found.scores.double().cpu().numpy()
        object_labels = true.labels.long().cpu().numpy()
        crowd = np.zeros(len(object_labels), np.bool_) if true.crowd is None else true.crowd.bool().cpu().numpy()
        records = np.zeros(len(labels), self._formats["rows"])
        records["image"], records["label"], records["score"] = place, labels, scores
        records["rank"] = matching.ranks_in_class(labels)
        ranges, object_areas = self._ranges(true.size), _areas(true)
        for number, kind in enumerate(self.kinds):
            overlaps, areas = _OVERLAPS[kind](found, true, crowd)
            matches = matching.match(overlaps, labels, object_labels, areas, object_areas, crowd, ranges)
            records["right"][:, number] = _packed(matches.right)
            records["counted"][:, number] = _packed(matches.counted)
            errors = classify(overlaps, labels, object_labels, crowd, self.max_per_image)
            records["error"][:, number], records["target"][:, number] = errors.kinds, errors.targets
            self.missed[number] += self._counts(object_labels[errors.missed])
            if kind == "box":
                for area, counts in enumerate(matches.objects.T):
                    self.objects[:, area] += self._counts(object_labels[counts])
                pairs = confused(overlaps, labels, scores, object_labels, crowd, len(self.classes))
                self.confusion += torch.from_numpy(pairs).to(self.device)
        self.keep("rows", records)

    def _counts(self, labels: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.bincount(labels, minlength=len(self.classes))).to(self.device)

    def _ranges(self, size: tuple[int, int]) -> NDArray[np.float64]:
        """Return the smallest and the largest area of each group, (A, 2): COCO's groups, then the finer ones."""
        side = float(np.sqrt(size[0] * size[1])) if self.relative_sizes else 1.0
        return np.concatenate([np.array(list(matching.AREAS.values())), sizes.ranges(self.size_bins, side)])


def _record(kinds: int, areas: int) -> np.dtype[Any]:
    """Return the format of what is kept of a detection."""
    bits = -(-len(matching.THRESHOLDS) * areas // 8)
    return np.dtype(
        [
            ("image", "<i8"), ("score", "<f8"), ("label", "<i4"), ("rank", "<u4"),
            ("right", "u1", (kinds, bits)), ("counted", "u1", (kinds, bits)),
            ("error", "u1", (kinds,)), ("target", "<i4", (kinds,)),
        ]
    )  # fmt: skip


def _packed(flags: NDArray[np.bool_]) -> NDArray[np.uint8]:
    return np.packbits(flags.reshape(len(flags), flags.shape[1] * flags.shape[2]), axis=1)


def _unpacked(bits: NDArray[np.uint8], shape: tuple[int, int, int]) -> NDArray[np.bool_]:
    return np.unpackbits(bits, axis=1, count=shape[1] * shape[2]).astype(np.bool_).reshape(shape)


def _areas(true: TrueObjects) -> NDArray[np.float64]:
    if true.area is not None:
        return true.area.double().cpu().numpy()
    if true.masks is not None:
        return matching.mask_areas(true.masks.cpu().numpy())
    return matching.box_areas(true.boxes.double().cpu().numpy())


def _ranked(found: Detections, most: int) -> Detections:
    """Return the detections best first, at most so many of each class."""
    order = found.scores.argsort(descending=True, stable=True)
    labels = found.labels.long()
    ranks = matching.ranks_in_class(labels[order].cpu().numpy())
    order = order[torch.from_numpy(ranks < most).to(order.device)]
    if torch.equal(order, torch.arange(len(labels), device=order.device)):  # a copy of masks takes long
        return found._replace(boxes=found.boxes.reshape(-1, 4), labels=labels)
    masks = None if found.masks is None else found.masks[order]
    return Detections(found.boxes[order].reshape(-1, 4), found.scores[order], labels[order], masks)


def _box_overlaps(
    found: Detections, true: TrueObjects, crowd: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    boxes, objects = (x.boxes.double().cpu().numpy().reshape(-1, 4) for x in (found, true))
    return matching.box_overlaps(boxes, objects, crowd), matching.box_areas(boxes)


def _mask_overlaps(
    found: Detections, true: TrueObjects, crowd: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if found.masks is None or true.masks is None:
        whose = "the model gives" if found.masks is None else "the data have"
        raise ValueError(f"average precision of masks needs masks, and {whose} none.")
    masks = found.masks
    if masks.dtype != torch.bool:
        masks = dense.paste_masks(masks, found.boxes, true.size)
    return matching.mask_overlaps(masks, true.masks.to(masks.device), crowd)


_OVERLAPS = {"box": _box_overlaps, "mask": _mask_overlaps}
"""Kind -> the overlaps (D, M) with the objects, and the areas (D,)."""
