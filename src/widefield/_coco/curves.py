"""Compute precision and recall of detections, as pycocotools' ``COCOeval.accumulate`` does, to the last digit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

RECALLS: Floats = np.linspace(0.0, 1.0, 101)
"""Recalls at which precision is averaged."""


@dataclass(frozen=True, eq=False)
class Tally:
    """The matched detections of all images, in the order of the images, and the number of objects.

    Attributes:
        labels: (D,).
        scores: (D,).
        ranks: (D,), the place of each detection among those of its class in its image, by score, from 0.
        right, counted: (D, T, A), see `widefield._coco.matching.Matches`.
        objects: (K, A), the number of objects that count.
    """

    labels: Ints
    scores: Floats
    ranks: Ints
    right: Bools
    counted: Bools
    objects: Ints

    @cached_property
    def by_class(self) -> list[Ints]:
        """Return the detections of each class, best first; of equal scores, by image."""
        return ordered(self.labels, self.scores, len(self.objects))

    def precision(self, area: int) -> Floats:
        """Return the precision (T, R, K) at ``RECALLS`` for objects of one range of areas; -1 without objects."""
        found = np.full((self.right.shape[1], len(RECALLS), len(self.objects)), -1.0)
        for label, rows in enumerate(self.by_class):
            count = int(self.objects[label, area])
            if count:
                found[:, :, label] = precisions(self.right[rows, :, area], self.counted[rows, :, area], count)
        return found

    def recall(self, area: int, most: int | None = None) -> Floats:
        """Return the recall (T, K) by the ``most`` best detections of each class in each image; -1 without objects."""
        found = np.full((self.right.shape[1], len(self.objects)), -1.0)
        for label, rows in enumerate(self.by_class):
            count = int(self.objects[label, area])
            if count:
                used = rows if most is None else rows[self.ranks[rows] < most]
                found[:, label] = self.right[used, :, area].sum(0) / count
        return found


def ordered(labels: Ints, scores: Floats, classes: int) -> list[Ints]:
    """Return the detections of each class, best first, those with equal scores in the given order."""
    order = np.argsort(-scores, kind="stable")
    order = order[np.argsort(labels[order], kind="stable")]
    edges = np.searchsorted(labels[order], np.arange(1, classes))
    return list(np.split(order, edges))


def precisions(right: Bools, counted: Bools, objects: int) -> Floats:
    """Return the precision at each of ``RECALLS``, which is the largest one at this recall or a higher one.

    Args:
        right, counted: (n, T) of the detections of one class, best first.
        objects: number of objects, at least 1.

    Returns:
        (T, R); 0 at recalls that are not reached.
    """
    hits = np.cumsum(right, 0).astype(np.float64)
    wrong = np.cumsum(counted & ~right, 0).astype(np.float64)
    curve = hits / (wrong + hits + np.spacing(1))
    curve = np.maximum.accumulate(curve[::-1], 0)[::-1]
    recall = hits / objects
    found = np.zeros((right.shape[1], len(RECALLS)))
    for threshold in range(right.shape[1]):
        places = np.searchsorted(recall[:, threshold], RECALLS, side="left")
        reached = places < len(right)
        found[threshold, reached] = curve[places[reached], threshold]
    return found


def mean(values: Floats) -> float:
    """Return the mean of the values that are not -1; NaN if there are none."""
    known = values[values > -1]
    return float(np.mean(known)) if known.size else float("nan")
