"""Compute COCO's average precision of boxes from detections and targets of a few images.

This is the figure that reports show before and after a change of a model. It follows COCO's rules: ten overlaps from
0.5 to 0.95, 101 recalls, at most 100 detections per image and class, crowd regions neither right nor wrong, and the
mean over the classes that have objects.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

OVERLAPS = 0.5 + (0.95 - 0.5) / 9 * torch.arange(10, dtype=torch.float64)
"""Overlaps at which a detection may count as right, rounded as in pycocotools."""

RECALLS = 0.01 * torch.arange(101, dtype=torch.float64)
MOST = 100
"""Detections of a class in an image that count, best first."""


def overlaps(first: Tensor, second: Tensor, crowd: Tensor | None = None) -> Tensor:
    """Return the intersection over union of all pairs of boxes.

    Args:
        first: (D, 4), x1, y1, x2, y2.
        second: (M, 4).
        crowd: bool (M,): boxes of crowd regions, for which the area of the first box takes the place of the union.

    Returns:
        float64 (D, M). Equal boxes without area have 1, other pairs without area 0.
    """
    a, b = first.double()[:, None], second.double()[None]
    inside = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    area_a, area_b = ((box[..., 2:] - box[..., :2]).clamp(min=0).prod(-1) for box in (a, b))
    total = area_a + area_b - inside
    if crowd is not None:
        total = torch.where(crowd, area_a, total)
    return torch.where(total > 0, inside / total, (a == b).all(-1).double())


class AveragePrecision:
    """Detections and objects of images, added one by one; gives the box AP over all of them."""

    def __init__(self) -> None:
        self._objects: dict[int, int] = defaultdict(int)
        self._scores: dict[int, list[Tensor]] = defaultdict(list)
        self._right: dict[int, list[Tensor]] = defaultdict(list)
        """For each class and image: bool (10, D)."""
        self._counted: dict[int, list[Tensor]] = defaultdict(list)

    def add(
        self, boxes: Tensor, scores: Tensor, labels: Tensor, objects: Tensor, classes: Tensor, crowd: Tensor
    ) -> None:
        """Add one image.

        Args:
            boxes, scores, labels: of the detections, (D, 4), (D,), (D,).
            objects, classes: boxes and labels of the objects, (M, 4), (M,).
            crowd: bool (M,), which objects are crowd regions.
        """
        for label in classes[~crowd].tolist():
            self._objects[label] += 1
        best = scores.argsort(descending=True, stable=True)
        for label in torch.cat((labels, classes)).unique().tolist():
            mine = best[labels[best] == label][:MOST]
            theirs = (classes == label).nonzero()[:, 0]
            theirs = theirs[crowd[theirs].argsort(stable=True)]  # regions come last: an object is taken first
            right, ignored = _matched(overlaps(boxes[mine], objects[theirs], crowd[theirs]), crowd[theirs])
            self._scores[label].append(scores[mine].double())
            self._right[label].append(right)
            self._counted[label].append(~ignored)

    def value(self) -> float | None:
        """Return the box AP from 0 to 1; None without an object that is not a crowd region."""
        found = [self._of_class(label, count) for label, count in self._objects.items()]
        return sum(found) / len(found) if found else None

    def _of_class(self, label: int, count: int) -> float:
        scores = torch.cat(self._scores[label])
        order = scores.argsort(descending=True, stable=True)
        right, counted = (torch.cat(parts[label], 1)[:, order] for parts in (self._right, self._counted))
        hits, misses = (right & counted).cumsum(1).double(), (~right & counted).cumsum(1).double()
        recall = hits / count
        precision = hits / (hits + misses).clamp(min=1)
        envelope = precision.flip(1).cummax(1).values.flip(1)  # the best precision at this recall or a higher one
        places = torch.searchsorted(recall, RECALLS.to(recall.device).expand(len(recall), -1).contiguous())
        padded = torch.cat((envelope, envelope.new_zeros(len(envelope), 1)), 1)
        return padded.gather(1, places).mean().item()


def _matched(found: Tensor, crowd: Tensor) -> tuple[Tensor, Tensor]:
    """Give each detection, best first, the object with which it overlaps most, at every overlap in :data:`OVERLAPS`.

    Args:
        found: overlaps (D, M), crowd regions last.
        crowd: bool (M,).

    Returns:
        Which detections are right, and which count neither way, bool (10, D).
    """
    detections, objects = found.shape
    least = OVERLAPS.to(found.device)[:, None]
    right = torch.zeros(len(OVERLAPS), detections, dtype=torch.bool, device=found.device)
    ignored, free = right.clone(), torch.ones(len(OVERLAPS), objects, dtype=torch.bool, device=found.device)
    columns = torch.arange(objects, device=found.device)
    for index in range(detections if objects else 0):
        possible = torch.where((free | crowd) & (found[index] >= least), found[index], -1.0)
        single = torch.where(crowd, -1.0, possible)
        best = single.amax(1, keepdim=True)
        right[:, index] = best[:, 0] >= 0
        ignored[:, index] = ~right[:, index] & (possible.amax(1) >= 0)
        # Of equal overlaps the last one is taken, as in pycocotools.
        chosen = torch.where((single == best) & (best >= 0), columns, -1).amax(1, keepdim=True)
        free &= columns != chosen
    return right, ignored
