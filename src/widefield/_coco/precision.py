"""Box AP of a few images, from tensors: the figure that reports show before and after a change of a model.

It is COCO's: the mean over ten overlaps from 0.5 to 0.95 and over the classes that have objects, with at most 100
detections per image and class.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from widefield._coco.curves import ordered, precisions
from widefield._coco.matching import AREAS, Bools, Floats, Ints, box_areas, box_overlaps, match, ranks_in_class

MOST = 100
"""Detections of a class in an image that count, best first."""

_ANY = np.array([AREAS["all"]])


def overlaps(first: Tensor, second: Tensor) -> Tensor:
    """Return the intersection over union of boxes (D, 4) and (M, 4), float64 (D, M); without area it is 0."""
    ours, theirs = (boxes.detach().double().cpu().numpy() for boxes in (first, second))
    with np.errstate(invalid="ignore"):  # boxes of a wrong model need not be finite
        found = box_overlaps(ours, theirs, np.zeros(len(theirs), bool))
    return torch.from_numpy(found).to(first.device)


class AveragePrecision:
    """Detections and objects of images, added one by one; gives the box AP over all of them."""

    def __init__(self) -> None:
        self._objects: list[Ints] = [np.zeros(0, np.int64)]
        self._labels: list[Ints] = [np.zeros(0, np.int64)]
        self._scores: list[Floats] = [np.zeros(0)]
        self._right: list[Bools] = []
        self._counted: list[Bools] = []

    def add(
        self, boxes: Tensor, scores: Tensor, labels: Tensor, objects: Tensor, classes: Tensor, crowd: Tensor
    ) -> None:
        """Add one image.

        Args:
            boxes, scores, labels: of the detections, (D, 4), (D,), (D,).
            objects, classes: boxes and labels of the objects, (M, 4), (M,).
            crowd: bool (M,), which objects are crowd regions.
        """
        values, truth, groups = scores.double().cpu().numpy(), objects.double().cpu().numpy(), crowd.cpu().numpy()
        kinds, known = labels.long().cpu().numpy(), classes.long().cpu().numpy()
        best = np.argsort(-values, kind="stable")
        best = best[ranks_in_class(kinds[best]) < MOST]
        found, kinds = boxes.double().cpu().numpy()[best], kinds[best]
        shared = box_overlaps(found, truth, groups)
        matches = match(shared, kinds, known, box_areas(found), box_areas(truth), groups, _ANY)
        self._objects.append(known[~groups])
        self._labels.append(kinds)
        self._scores.append(values[best])
        self._right.append(matches.right[..., 0])
        self._counted.append(matches.counted[..., 0])

    def value(self) -> float | None:
        """Return the box AP from 0 to 1; None without an object that is not a crowd region."""
        counts = np.bincount(np.concatenate(self._objects))
        if not counts.any():
            return None
        labels = np.concatenate(self._labels)
        right, counted = np.concatenate(self._right), np.concatenate(self._counted)
        by_class = ordered(labels, np.concatenate(self._scores), max(len(counts), labels.max(initial=0) + 1))
        pairs = zip(by_class, counts.tolist(), strict=False)
        return float(np.mean([precisions(right[rows], counted[rows], count).mean() for rows, count in pairs if count]))
