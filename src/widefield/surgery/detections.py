"""Compare the detections of two models as sets: their order does not matter.

A detection has a partner in the other set if both have the same label, overlap by :data:`OVERLAP` or differ by less
than :data:`PIXELS`, and have scores within :data:`SCORE`. Each detection has at most one partner.

Rounding decides whether a detection just passes a threshold. Detections without a partner are therefore left out if
they are at such a limit: at the score threshold, or at the end of a full list. It also decides which of two overlapping
boxes of equal score suppresses the other; such detections count as without a partner, but as tied.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from widefield.surgery.average_precision import AveragePrecision, overlaps

OVERLAP = 0.9
PIXELS = 0.1
"""Largest difference of corners in pixels at which boxes are partners whatever their overlap, as tiny ones."""
SCORE = 0.05
NEAR = 1e-3
"""Relative difference of scores that rounding may cause."""

RIVAL = 0.3
"""Overlap of two boxes from which non-maximum suppression may keep only one of them."""

TARGETS = ("boxes", "labels", "crowd", "iscrowd")
"""Keys of targets in batches that are mappings, and of the target of one image."""

_THRESHOLDS = ("score_threshold", "score_thresh")
"""Attribute of detectors, or of their heads: here, and in torchvision."""

_BOUND = "least_score"
"""Attribute of detectors here: a bound of the scores of detections, or None."""


class Found(NamedTuple):
    """The detections of one image, whatever the model calls their container."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None


def detections(output: Any) -> list[Found] | None:
    """Return the detections in a model's output, or None if it holds something else.

    Args:
        output: a list or tuple with an entry for each image: a mapping, named tuple or dataclass with ``boxes`` (D, 4),
            ``scores`` (D,), ``labels`` (D,) and perhaps ``masks`` (D, ...).
    """
    if not isinstance(output, (list, tuple)) or not output or hasattr(output, "_fields"):
        return None
    found = [_found(entry) for entry in output]
    return None if None in found else [one for one in found if one is not None]


def threshold_of(model: object) -> float | None:
    """Return the score that every detection of a model exceeds; None if there is no such bound, or it is unknown."""
    if not isinstance(model, nn.Module):
        return None
    if hasattr(model, _BOUND):
        bound: float | None = getattr(model, _BOUND)
        return bound
    return next((value for _, _, value in _thresholds(model)), None)


def _thresholds(model: nn.Module) -> list[tuple[nn.Module, str, float]]:
    """Return the score thresholds of a model: the module, the attribute's name, and its value."""
    return [
        (module, name, getattr(module, name))
        for module in model.modules()
        for name in _THRESHOLDS
        if isinstance(getattr(module, name, None), (int, float))
    ]


@contextmanager
def sensitive(model: nn.Module, images: Tensor) -> Iterator[None]:
    """Set the score thresholds of a detector that finds nothing in these images to 0 in the block.

    Its best boxes can then be compared, as on noise. Other models stay as they are.

    Args:
        model: in evaluation mode.
        images: that the model runs on.
    """
    if _thresholds(model) and _finds_nothing(model, images):
        with lowered(model):
            yield
    else:
        yield


def can_be_lowered(model: object) -> bool:
    """Return whether a model is a detector whose score threshold can be set."""
    return isinstance(model, nn.Module) and bool(_thresholds(model))


@contextmanager
def lowered(*models: nn.Module) -> Iterator[None]:
    """Set the score thresholds of detectors to 0 in the block."""
    found = [entry for model in models for entry in _thresholds(model)]
    try:
        for module, name, _ in found:
            setattr(module, name, 0.0)
        yield
    finally:
        for module, name, value in found:
            setattr(module, name, value)


def _finds_nothing(model: nn.Module, images: Tensor) -> bool:
    try:
        with torch.no_grad():
            found = detections(model(images.clone()))
    except Exception:  # the caller's own call of the model reports it
        return False
    return found is not None and not any(len(one.scores) for one in found)


class Gaps:
    """Sums of differences of one quantity, such as the scores, over partners."""

    def __init__(self) -> None:
        self.max_abs = self.scale = self.moved = self.squares = 0.0

    def add(self, first: Tensor, second: Tensor) -> None:
        """Add the quantity of partners, of one shape."""
        if first.numel():
            gap = (second.double() - first.double()).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.inf)
            self.max_abs = max(self.max_abs, gap.abs().max().item())
            self.moved += gap.square().sum().item()
            self.weigh(first)

    def weigh(self, first: Tensor) -> None:
        """Add to the size of the first model's quantity only."""
        if first.numel():
            self.scale = max(self.scale, first.abs().max().item())
            self.squares += first.double().square().sum().item()

    @property
    def relative(self) -> float:
        """The largest difference in units of the largest value."""
        return self.max_abs / self.scale if self.scale else self.max_abs

    def rms(self) -> float:
        """Return the root of the sum of squared differences, over the same root for the first model's values."""
        return math.sqrt(self.moved / self.squares) if self.squares else (math.inf if self.moved else 0.0)


class DetectionCounts:
    """Partners, differences and average precisions, image by image.

    Args:
        threshold: score threshold of the models, see :func:`threshold_of`; None: unknown.
    """

    def __init__(self, threshold: float | None = None) -> None:
        self._threshold = threshold
        self.seen = self.counted = self.agreed = self.tied = 0
        """Detections of both models; without those left out; those with a partner; those that are tied instead."""
        self.gaps = {name: Gaps() for name in ("scores", "boxes", "masks")}
        self._before, self._after = AveragePrecision(), AveragePrecision()

    def add(self, first: Sequence[Found], second: Sequence[Found], targets: Any = None) -> None:
        """Add the detections of both models for a batch.

        Args:
            first, second: an entry for each image.
            targets: for each image the objects, as a mapping, named tuple or dataclass with ``boxes`` (M, 4) and
                ``labels`` (M,), and perhaps ``crowd`` or ``iscrowd`` (M,). Anything else is ignored.

        Raises:
            ValueError: different numbers of images; first detections that are not finite.
        """
        if len(first) != len(second):
            raise ValueError(f"the outputs hold detections of {len(first)} and of {len(second)} images.")
        objects = _targets(targets, len(first))
        for index, (a, b) in enumerate(zip(first, second, strict=True)):
            if not (a.boxes.isfinite().all() and a.scores.isfinite().all()):
                raise ValueError(
                    "the first model's detections are not finite, so nothing can be compared: choose another input."
                )
            b = Found(*(None if part is None else part.to(a.boxes.device) for part in b))  # type: ignore[arg-type]
            self._compare(a, b)
            if objects is not None:
                for precision, one in ((self._before, a), (self._after, b)):
                    precision.add(one.boxes.cpu(), one.scores.cpu(), one.labels.cpu(), *objects[index])

    @property
    def agreement(self) -> float | None:
        """Share of detections that have a partner; None if there are none."""
        return self.agreed / self.counted if self.counted else None

    @property
    def average_precisions(self) -> tuple[float | None, float | None]:
        """Box AP of the first and of the second model; None without objects."""
        return self._before.value(), self._after.value()

    def rms(self) -> float:
        """Return the relative RMS difference of scores, boxes and masks, whichever is largest.

        A detection without a partner counts as one whose score has become 0, or was 0 before.
        """
        return max(gaps.rms() for gaps in self.gaps.values())

    def _compare(self, a: Found, b: Found) -> None:
        overlap = overlaps(a.boxes, b.boxes)
        overlap = torch.where((a.boxes[:, None] - b.boxes).abs().amax(-1) < PIXELS, 1.0, overlap)
        overlap = torch.where(a.labels[:, None] == b.labels, overlap, -1.0)
        apart = (a.scores[:, None] - b.scores).abs()
        ours, theirs = _pairs(overlap - apart, (overlap >= OVERLAP) & (apart <= SCORE))
        self.gaps["scores"].add(a.scores[ours], b.scores[theirs])
        self.gaps["boxes"].add(a.boxes[ours], b.boxes[theirs])
        if a.masks is not None and b.masks is not None and a.masks.shape[1:] == b.masks.shape[1:]:
            self.gaps["masks"].add(a.masks[ours], b.masks[theirs])
        self.seen += len(a.scores) + len(b.scores)
        lost, new = self._alone(a.scores, b.scores, ours), self._alone(b.scores, a.scores, theirs)
        rivals = (overlap >= RIVAL) & (apart <= NEAR * a.scores[:, None])
        self.tied += int(rivals[lost].any(1).sum()) + int(rivals[:, new].any(0).sum())
        self.agreed += 2 * len(ours)
        self.counted += 2 * len(ours) + len(lost) + len(new)
        self.gaps["scores"].weigh(a.scores[lost])
        for alone in (a.scores[lost], b.scores[new]):
            self.gaps["scores"].moved += alone.double().square().sum().item()

    def _alone(self, mine: Tensor, others: Tensor, paired: Tensor) -> Tensor:
        """Return the indices of the detections without a partner that are at no limit."""
        alone = torch.ones(len(mine), dtype=torch.bool, device=mine.device)
        alone[paired] = False
        limit = mine.new_full((), -torch.inf) if self._threshold is None else mine.new_full((), self._threshold)
        if len(mine) == len(others) > 0:  # both lists may be full
            limit = torch.maximum(limit, others.min())
        return (alone & ~(mine <= limit * (1 + NEAR))).nonzero()[:, 0]  # scores that are not numbers are at no limit


def _pairs(quality: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows and columns of a matching of allowed pairs, the best ones first."""
    rows, columns = allowed.nonzero(as_tuple=True)
    order = quality[rows, columns].argsort(descending=True, stable=True)
    partner: dict[int, int] = {}
    taken: set[int] = set()
    for row, column in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        if row not in partner and column not in taken:
            partner[row] = column
            taken.add(column)
    pairs = torch.tensor(list(partner.items()), dtype=torch.long, device=quality.device).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _field(entry: Any, *names: str) -> Any:
    for name in names:
        value = entry.get(name) if isinstance(entry, Mapping) else getattr(entry, name, None)
        if value is not None:
            return value
    return None


def _found(entry: Any) -> Found | None:
    parts = [_field(entry, name) for name in Found._fields]
    boxes, scores, labels, masks = (part if isinstance(part, Tensor) else None for part in parts)
    if boxes is None or scores is None or labels is None or boxes.shape != (len(scores), 4) or scores.ndim != 1:
        return None
    return Found(boxes, scores, labels, masks)


def _targets(given: Any, images: int) -> list[tuple[Tensor, Tensor, Tensor]] | None:
    """Return boxes, labels and crowd flags of every image, or None if these are no targets of detection."""
    if not isinstance(given, (list, tuple)) or hasattr(given, "_fields"):
        return None
    found = [_target(entry) for entry in given]
    known = [one for one in found if one is not None]
    if not known or len(known) != len(found):
        return None
    if len(known) != images:
        raise ValueError(f"there must be targets for each image; got {len(known)} for {images} images.")
    return known


def _target(entry: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    boxes, labels = _field(entry, "boxes"), _field(entry, "labels")
    if boxes is None or labels is None:
        return None
    boxes, labels = torch.as_tensor(boxes).cpu().reshape(-1, 4), torch.as_tensor(labels).cpu()
    crowd = _field(entry, "crowd", "iscrowd")
    known = torch.zeros(len(labels)) if crowd is None else torch.as_tensor(crowd).cpu()
    return boxes, labels, known.bool()


def targets_in(batch: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the objects of each image in a batch of lists, or None if it has no boxes.

    Args:
        batch: with ``boxes`` and ``labels``, a list each with an entry per image, and perhaps ``crowd``. If it has
            ``size``, the (height, width) of each file, and ``image_size``, that of each image without its padding, then
            boxes are in pixels of the file. They are scaled to those of the images, as models find them.
    """
    names = [name for name in TARGETS if batch.get(name) is not None]
    if not {"boxes", "labels"} <= set(names):
        return None
    columns: Iterable[tuple[Any, ...]] = zip(*(batch[name] for name in names), strict=True)
    found = [dict(zip(names, values, strict=True)) for values in columns]
    if batch.get("size") is not None and batch.get("image_size") is not None:
        for target, file, image in zip(found, batch["size"], batch["image_size"], strict=True):
            height, width = (float(new) / float(old) for new, old in zip(image, file, strict=True))
            boxes = torch.as_tensor(target["boxes"])
            target["boxes"] = boxes * boxes.new_tensor([width, height, width, height])
    return found
