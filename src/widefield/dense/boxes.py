"""Code, compare, assign, sample and suppress boxes.

Boxes are xyxy in continuous pixels: (0, 0) is the top left corner of the image, and a box from 0 to 10 is 10 wide. The
rules are OpenMMLab's (mmdetection 2.x and 3.x), so that training and detections follow the published models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import nms

from widefield import _checks
from widefield.dense.layers import widened

OVERLAPS = ("iou", "iof", "giou")
"""Kinds of overlap: see :func:`pairwise_iou`."""

LARGEST = abs(math.log(16 / 1000))
"""Bound of the logarithm of a predicted change of width or height, on both sides."""

BACKGROUND = -1
"""Entry of :class:`Assignment` for a box without an object."""

IGNORED = -2
"""Entry of :class:`Assignment` for a box that is used neither as an object nor as background."""

_EPS = 1e-6  # least union, as published
_BLOCK = {"cpu": 2**17}  # overlaps computed at once: on the CPU about what its cache holds
_BLOCK_ELSEWHERE = 2**24
_NARROWEST = 64  # boxes of a block
_NEAR = 0.02  # distance of logits from that of a threshold, in units of that, from which on no rounding matters
_JOINT_NMS = {"cpu": 1000}  # with more boxes, one NMS per label is faster than one for all
_JOINT_NMS_ELSEWHERE = 20000

Size = tuple[int, int]
"""Height and width."""


# Geometry


def clip(boxes: Tensor, size: Size) -> Tensor:
    """Return the boxes (..., 4) cut at the borders of an image of (height, width)."""
    height, width = size
    return torch.stack((boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)), -1).flatten(-2)


def area(boxes: Tensor) -> Tensor:
    """Return width * height of boxes (..., 4)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def pairwise_iou(a: Tensor, b: Tensor, mode: str = "iou") -> Tensor:
    """Return the overlap of every box of a with every box of b, (N, M).

    Unions and other denominators are at least 1e-6, so boxes without area have overlap 0.

    Args:
        a: (N, 4) xyxy.
        b: (M, 4) xyxy.
        mode: "iou": intersection / union. "iof": intersection / area of the box of a. "giou": generalized IoU, in
            (-1, 1] (Rezatofighi et al., CVPR 2019, algorithm 1).

    Raises:
        ValueError: an unknown mode.
    """
    return _overlap(a[:, None], b[None], mode)


def paired_iou(a: Tensor, b: Tensor, mode: str = "iou") -> Tensor:
    """Return the overlap of each box of a with the box of b at the same place: (..., 4) and (..., 4) -> (...).

    ``mode`` is that of :func:`pairwise_iou`.
    """
    return _overlap(a, b, mode)


def _overlap(a: Tensor, b: Tensor, mode: str) -> Tensor:
    _checks.choice("mode", mode, OVERLAPS)
    a, b = widened(a), widened(b)
    ax1, ay1, ax2, ay2 = a.unbind(-1)
    bx1, by1, bx2, by2 = b.unbind(-1)
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    shared = width * height
    whole = area(a) if mode == "iof" else area(a) + area(b) - shared
    whole = whole.clamp(min=_EPS)
    overlap = shared / whole
    if mode != "giou":
        return overlap
    hull = (torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)) * (torch.maximum(ay2, by2) - torch.minimum(ay1, by1))
    hull = hull.clamp(min=_EPS)
    return overlap - (hull - whole) / hull


@dataclass(frozen=True)
class BoxCoder:
    """Boxes as differences to reference boxes: (dx, dy, dw, dh) (Girshick et al., CVPR 2014, appendix C).

    Args:
        stds: the four differences are divided by these. (1, 1, 1, 1) for anchors, (0.1, 0.1, 0.2, 0.2) for RoIs.
        largest: when decoding, dw and dh are clamped to +-this value.
    """

    stds: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    largest: float = LARGEST

    def __post_init__(self) -> None:
        if len(self.stds) != 4 or any(_checks.number("every entry of stds", value) == 0 for value in self.stds):
            raise ValueError(f"stds must be four positive numbers; got {self.stds!r}.")
        object.__setattr__(self, "stds", tuple(self.stds))

    def encode(self, references: Tensor, boxes: Tensor) -> Tensor:
        """Return the differences (..., 4) of boxes (..., 4) to references (..., 4), all with positive sides."""
        references, boxes = widened(references), widened(boxes)
        sides, center = references[..., 2:] - references[..., :2], (references[..., :2] + references[..., 2:]) * 0.5
        moved = ((boxes[..., :2] + boxes[..., 2:]) * 0.5 - center) / sides
        scaled = torch.log((boxes[..., 2:] - boxes[..., :2]) / sides)
        return torch.cat((moved, scaled), -1) / references.new_tensor(self.stds)

    def decode(self, references: Tensor, deltas: Tensor, size: Size | None = None) -> Tensor:
        """Return the boxes that differ from the references by ``deltas``.

        Args:
            references: (..., 4) xyxy; broadcast against ``deltas``. For deltas per class, (N, K, 4), give (N, 1, 4).
            deltas: (..., 4).
            size: (height, width) of the image; the boxes are cut at its borders. None: they are not cut.
        """
        references, deltas = widened(references), widened(deltas)
        deltas = deltas * deltas.new_tensor(self.stds)
        sides, center = references[..., 2:] - references[..., :2], (references[..., :2] + references[..., 2:]) * 0.5
        center = center + sides * deltas[..., :2]
        half = sides * deltas[..., 2:].clamp(-self.largest, self.largest).exp() * 0.5
        boxes = torch.cat((center - half, center + half), -1)
        return boxes if size is None else clip(boxes, size)


def from_distances(points: Tensor, distances: Tensor, size: Size | None = None) -> Tensor:
    """Return the boxes (..., 4) around points.

    Args:
        points: (..., 2) as x, y.
        distances: (..., 4) from the point to the left, top, right and bottom edge.
        size: (height, width) of the image; the boxes are cut at its borders. None: they are not cut.
    """
    points, distances = widened(points), widened(distances)
    boxes = torch.cat((points - distances[..., :2], points + distances[..., 2:]), -1)
    return boxes if size is None else clip(boxes, size)


# Targets


class Assignment(NamedTuple):
    """Which object each of N boxes stands for.

    Attributes:
        objects: int64 (N,): position of the object, :data:`BACKGROUND` or :data:`IGNORED`.
        overlaps: (N,): IoU with the best object; 0 without objects, -1 in ignored regions.
    """

    objects: Tensor
    overlaps: Tensor

    def with_objects(self, count: int) -> Assignment:
        """Return the assignment of the same boxes after ``count`` boxes that are the objects themselves.

        It belongs to the list of boxes that starts with the objects.
        """
        own = torch.arange(count, device=self.objects.device)
        ones = self.overlaps.new_ones(count)
        return Assignment(torch.cat((own, self.objects)), torch.cat((ones, self.overlaps)))


@dataclass(frozen=True)
class Assigner:
    """Assign objects to boxes by IoU (Ren et al. 2015, section 3.1.2), as OpenMMLab's ``MaxIoUAssigner`` does.

    A box stands for the object with the largest IoU if that is at least ``positive``; of equal ones for the first. It
    is background below ``negative``, and ignored in between. With ``low_quality``, every box that reaches the largest
    IoU of an object stands for this object too, if that is at least ``minimum``; of several such objects, for the last.

    Args:
        positive: least IoU of an object's box.
        negative: below this IoU, a box is background.
        minimum: least IoU for ``low_quality``. With 0, an object that touches no box gets all that have no overlap.
        low_quality: whether objects without a box of high IoU get their best ones.
        crowd: boxes of which more than this part lies within a crowd region are ignored. None: crowd regions have no
            effect, as in the published configurations. They have none in images without other objects either.

    Raises:
        ValueError: a threshold outside [0, 1], or ``negative`` above ``positive``.
    """

    positive: float = 0.7
    negative: float = 0.3
    minimum: float = 0.3
    low_quality: bool = True
    crowd: float | None = None

    def __post_init__(self) -> None:
        for name in ("positive", "negative", "minimum", "crowd"):
            if getattr(self, name) is not None:
                _checks.number(name, getattr(self, name), maximum=1.0)
        if self.negative > self.positive:
            raise ValueError(f"negative must not exceed positive; got {self.negative} and {self.positive}.")

    @torch.no_grad()
    def __call__(self, boxes: Tensor, objects: Tensor, crowd: Tensor | None = None) -> Assignment:
        """Return which object each box stands for. Memory grows with N and M, not with N * M.

        Args:
            boxes: (N, 4) xyxy: anchors or proposals.
            objects: (M, 4) xyxy.
            crowd: (C, 4) xyxy: crowd regions.
        """
        boxes = widened(boxes)
        objects, count = objects.to(boxes), len(boxes)
        if not count or not len(objects):
            return Assignment(torch.full((count,), BACKGROUND, device=boxes.device), boxes.new_zeros(count))
        ignored = self._in_crowd(boxes, crowd)
        columns = boxes.t().contiguous()
        overlaps, best = boxes.new_empty(count), torch.empty(count, dtype=torch.long, device=boxes.device)
        parts = _blocks(boxes, len(objects))
        tops = boxes.new_empty(len(parts), len(objects))
        for number, part in enumerate(parts):
            block = _block(columns, objects, ignored, part)
            torch.max(block, 0, out=(overlaps[part], best[part]))
            torch.amax(block, 1, out=tops[number])
        index = torch.where(overlaps >= self.positive, best, IGNORED)
        index[(overlaps < self.negative) & (overlaps >= 0)] = BACKGROUND
        if self.low_quality:
            largest = tops.amax(0)
            reached = ((tops == largest) & (largest >= self.minimum)).cpu()
            for part, chosen in zip(parts, reached, strict=True):
                _match_best(index, columns, objects, ignored, part, chosen.nonzero().flatten())
        return Assignment(index, overlaps)

    def _in_crowd(self, boxes: Tensor, crowd: Tensor | None) -> Tensor | None:
        """Return which boxes lie in crowd regions, or None if that does not matter."""
        if not self.crowd or crowd is None or not len(crowd):
            return None
        parts = _blocks(boxes, len(crowd))
        return torch.cat([pairwise_iou(boxes[part], crowd, "iof").amax(1) > self.crowd for part in parts])


def _blocks(boxes: Tensor, rows: int) -> list[slice]:
    """Return slices of the boxes whose overlaps with ``rows`` others are computed at once."""
    step = max(_NARROWEST, _BLOCK.get(boxes.device.type, _BLOCK_ELSEWHERE) // rows)
    return [slice(start, start + step) for start in range(0, len(boxes), step)]


def _block(columns: Tensor, objects: Tensor, ignored: Tensor | None, part: slice) -> Tensor:
    """Return the IoU of every object with some of the boxes, -1 for ignored ones: (M, length of the part).

    The numbers are those of :func:`pairwise_iou`. This is faster on the CPU: long rows, few intermediates.
    """
    x1, y1, x2, y2 = columns[:, part]
    left, top, right, bottom = (column[:, None] for column in objects.unbind(1))
    shared = torch.minimum(right, x2).sub_(torch.maximum(left, x1)).clamp_(min=0)
    whole = torch.minimum(bottom, y2).sub_(torch.maximum(top, y1)).clamp_(min=0)
    shared.mul_(whole)
    torch.add((right - left) * (bottom - top), (x2 - x1) * (y2 - y1), out=whole)
    overlaps = shared.div_(whole.sub_(shared).clamp_(min=_EPS))
    return overlaps if ignored is None else overlaps.masked_fill_(ignored[part], -1)


def _match_best(
    index: Tensor, columns: Tensor, objects: Tensor, ignored: Tensor | None, part: slice, chosen: Tensor
) -> None:
    """Assign to the chosen objects, in place, all boxes of this part that have their largest IoU in it."""
    if not len(chosen):
        return
    chosen = chosen.to(index.device)
    overlaps = _block(columns, objects[chosen], ignored, part)
    equal = overlaps == overlaps.amax(1, keepdim=True)
    last = torch.where(equal, chosen[:, None], -1).amax(0)
    index[part] = torch.where(last >= 0, last, index[part])


class Sample(NamedTuple):
    """Boxes chosen for training, as positions in the list of boxes by rising index.

    Attributes:
        positive: int64 (P,): boxes that stand for objects.
        negative: int64 (Q,): boxes of the background.
    """

    positive: Tensor
    negative: Tensor


@dataclass(frozen=True)
class Sampler:
    """Choose boxes for training at random, as OpenMMLab's ``RandomSampler`` does.

    Random numbers come from torch's default generator of the device. None are drawn if nothing is left out.

    Args:
        num: how many boxes. If there are fewer, all are used.
        fraction: largest part of ``num`` that stands for objects.
    """

    num: int = 256
    fraction: float = 0.5

    def __post_init__(self) -> None:
        _checks.integer("num", self.num)
        _checks.number("fraction", self.fraction, maximum=1.0)

    @torch.no_grad()
    def __call__(self, assignment: Assignment) -> Sample:
        """Return the chosen boxes: at most num * fraction for objects, and background up to ``num`` in all."""
        positive = _chosen((assignment.objects >= 0).nonzero().flatten(), int(self.num * self.fraction))
        background = (assignment.objects == BACKGROUND).nonzero().flatten()
        return Sample(positive, _chosen(background, self.num - len(positive)))


def _chosen(candidates: Tensor, count: int) -> Tensor:
    if len(candidates) <= count:
        return candidates
    order = torch.randperm(len(candidates), device=candidates.device)
    return candidates[order[:count]].sort().values


# Detections


class Kept(NamedTuple):
    """Boxes that are left, by falling score.

    Attributes:
        boxes: (D, 4) xyxy.
        scores: (D,).
        labels: int64 (D,).
        places: int64 (D,): position in the flattened scores.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    places: Tensor


def nms_by_label(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Return the positions of the boxes that are left, int64, by falling score.

    A box is dropped if its IoU with a kept one of the same label and a higher score exceeds the threshold.

    Args:
        boxes: (N, 4) xyxy.
        scores: (N,).
        labels: int64 (N,): classes or levels.
        threshold: largest IoU of two kept boxes of one label.
    """
    boxes, scores = widened(boxes), widened(scores)
    exporting = torch.compiler.is_exporting()
    if exporting or len(boxes) <= _JOINT_NMS.get(boxes.device.type, _JOINT_NMS_ELSEWHERE):
        if not exporting:  # float32 rounds coordinates that are moved far; exported graphs have NMS in float32 only
            boxes, scores = boxes.double(), scores.double()
        some = torch.cat((boxes.flatten(), boxes.new_zeros(1)))
        apart = labels.to(boxes) * (some.max() - some.min() + 1)  # boxes of different labels must not overlap
        joint: Tensor = nms(boxes + apart[:, None], scores, threshold)
        return joint
    kept = []
    for label in labels.unique():
        own = (labels == label).nonzero().flatten()
        kept.append(own[nms(boxes[own], scores[own], threshold)])
    found = torch.cat(kept).sort().values
    return found[scores[found].sort(descending=True, stable=True).indices]


def nms_per_class(
    boxes: Tensor,
    scores: Tensor,
    *,
    score_threshold: float = 0.05,
    nms_threshold: float = 0.5,
    max_per_image: int = 100,
) -> Kept:
    """Return the best detections of an image, as OpenMMLab's ``multiclass_nms`` does.

    Args:
        boxes: (N, 4), or (N, K, 4) with a box per class.
        scores: (N, K), without the background.
        score_threshold: scores must exceed it.
        nms_threshold: largest IoU of two detections of one class.
        max_per_image: number of detections to keep.
    """
    found = (scores > score_threshold).nonzero()
    rows, labels = found.unbind(1)
    chosen = boxes[rows] if boxes.ndim == 2 else boxes[rows, labels]
    values = scores[rows, labels]
    kept = nms_by_label(chosen, values, labels, nms_threshold)[:max_per_image]
    places = rows * scores.shape[1] + labels
    return Kept(chosen[kept], values[kept], labels[kept], places[kept])


class Candidates(NamedTuple):
    """The best scores of one level of a one-stage detector.

    Attributes:
        scores: (P,), falling.
        labels: int64 (P,).
        rows: int64 (P,): positions of the boxes.
    """

    scores: Tensor
    labels: Tensor
    rows: Tensor


def best_of_level(logits: Tensor, classes: int, threshold: float, count: int) -> Candidates:
    """Return the ``count`` largest scores of a level above a threshold: sigmoids of logits, in float32 or wider.

    A level has millions of logits. Only those above that of the threshold, or near it, are read again.

    Args:
        logits: (A * classes, H, W), A boxes per position, without the background.
        classes: number of classes.
        threshold: scores must exceed it.
        count: how many; fewer if fewer exceed the threshold.

    Returns:
        The candidates; positions of boxes count rows, columns and A, the last the fastest.
    """
    bound = _logit(threshold)
    near = bound - _NEAR * max(1.0, abs(bound)) if math.isfinite(bound) else bound
    channels, rows, columns = (logits > near).nonzero().unbind(1)
    values = widened(logits[channels, rows, columns]).sigmoid()
    labels, per_cell = channels % classes, logits.shape[0] // classes
    places = (rows * logits.shape[2] + columns) * per_cell + channels // classes
    order = (places * classes + labels)[values > threshold].argsort()
    values, places, labels = (part[values > threshold][order] for part in (values, places, labels))
    values, order = values.sort(descending=True, stable=True)  # of equal ones, the first box and class come first
    order = order[:count]
    return Candidates(values[:count], labels[order], places[order])


def _logit(share: float) -> float:
    if 0 < share < 1:
        return math.log(share / (1 - share))
    return math.inf if share >= 1 else -math.inf
