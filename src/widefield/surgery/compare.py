"""Measure how far the outputs of two models are apart, on one tensor or over a loader."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from widefield import _checks
from widefield.report import Report
from widefield.surgery.answers import aligned_corners, described, place_of_meant, tensors, wrapping
from widefield.surgery.detections import DetectionCounts, can_be_lowered, detections, lowered, threshold_of
from widefield.surgery.inputs import batches
from widefield.surgery.poses import KeypointCounts, is_pose_model
from widefield.surgery.predictions import ImageCounts, PixelCounts, Shares, counts_for

_NO_NUMBERS = (
    "there is nothing to compare: the outputs hold no numbers, as those of a detector without detections. Choose other "
    "images, or set the score threshold of the detectors to 0."
)

COMPLETE = 0.95
"""Share of detections with a partner, or of key points at the same place, from which two sets count as the same.
Rounding may exchange a few whose scores, overlaps or peaks are nearly equal."""


class NothingToCompareError(ValueError):
    """Outputs that hold no number."""


@dataclass(frozen=True)
class Difference(Report):
    """How far two models' outputs are apart; the first model is the reference.

    In outputs of several tensors each tensor is measured against its own size, and the worst counts: small scores do
    not hide next to large boxes. Tensors are matched by their position in the output.

    Outputs of detectors, a list with ``boxes``, ``scores`` and ``labels`` of each image, are compared as sets:
    :mod:`widefield.surgery.detections` says which detections are partners. ``max_abs`` and ``scale`` are then those of
    partners' scores, boxes or masks; in ``rms``, a detection without a partner counts as one with the score 0.

    Heatmaps of pose models are compared as tensors, and by the key points that the first model reads from them; see
    :mod:`widefield.surgery.poses`. If the second model gives key points, ``max_abs``, ``scale`` and ``rms`` are those
    of their scores.

    Attributes:
        images: number of images compared.
        max_abs: largest absolute difference, in the tensor with the largest ``relative``; infinite where an output is
            not finite.
        scale: largest absolute value of the first model's output, in the same tensor.
        rms: root of the sum of squared differences, over the same root for the first model's output; of several
            tensors, the largest.
        agreement: share of images for which both models have the same top class; of a segmentation model, share of
            pixels; of a detector, share of detections, of both models, that have a partner; of a pose model, share of
            key points that are within a pixel of the image. None for other outputs: neither detections nor key points,
            nor of the shape (N, classes) or (N, classes, H, W), nor with a tensor of these shapes that
            :func:`widefield.surgery.answers.meant` finds.
        accuracy_before: share of labeled images, or labeled pixels, that the first model classifies correctly; None
            without labels.
        accuracy_after: the same for the second model.
        miou_before: mean over the classes of the first model's intersection over union with the labels, both summed
            over all images; None unless outputs are (N, classes, H, W) and there are masks.
        miou_after: the same for the second model.
        pixels: number of pixels that ``agreement`` counts; None if it does not count pixels.
        detections: number of detections, of both models, that ``agreement`` counts; None if it does not count
            detections.
        tied: number of those detections without a partner that overlap one of nearly equal score in the other set:
            rounding decides which of the two suppresses the other. Of key points: number of those farther than a pixel
            whose heatmap has another peak of nearly equal height there.
        ap_before: box AP (COCO's, over ten overlaps) of the first model; None unless outputs are detections and there
            are targets.
        ap_after: the same for the second model.
        keypoints: number of key points that ``agreement`` counts; None if it does not count key points.
        distance: largest distance in pixels of the image between the key points of both models, without tied ones.
        near: share of key points that are within 5 % of the longer side of the image, as PCK counts them.
        pck_before: share of labeled key points that the first model finds within 5 % of the longer side of the image;
            None unless it is a pose model and there are labels.
        pck_after: the same for the second model.
    """

    images: int
    max_abs: float
    scale: float
    rms: float
    agreement: float | None = None
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    miou_before: float | None = None
    miou_after: float | None = None
    pixels: int | None = None
    detections: int | None = None
    tied: int = 0
    ap_before: float | None = None
    ap_after: float | None = None
    keypoints: int | None = None
    distance: float | None = None
    near: float | None = None
    pck_before: float | None = None
    pck_after: float | None = None

    @property
    def score(self) -> str:
        """Name of the score that counts: "mIoU", "box AP" (detectors), "PCK" (pose models), or else "accuracy"."""
        if self.detections is not None:
            return "box AP"
        if self.keypoints is not None:
            return "PCK"
        return "accuracy" if self.pixels is None else "mIoU"

    @property
    def scores(self) -> tuple[float, float] | None:
        """The score of the first and of the second model, from 0 to 1; None without labels."""
        before, after = {
            "box AP": (self.ap_before, self.ap_after),
            "PCK": (self.pck_before, self.pck_after),
            "mIoU": (self.miou_before, self.miou_after),
            "accuracy": (self.accuracy_before, self.accuracy_after),
        }[self.score]
        return None if before is None or after is None else (before, after)

    @property
    def agreed(self) -> str:
        """``agreement`` as a clause, such as "top-1 the same for 99.00% of pixels"; empty if there is none."""
        if self.agreement is None:
            return ""
        if self.detections is not None:
            return f"{self.agreement:.2%} of {self.detections} detections found by both"
        if self.keypoints is not None:
            return (
                f"{self.agreement:.2%} of {self.keypoints} key points within a pixel and {self.near:.2%} within 5 % of "
                f"the image (largest distance {self.distance:.2g} pixels)"
            )
        return f"top-1 the same for {self.agreement:.2%}" + (" of pixels" if self.pixels is not None else "")

    @property
    def same(self) -> str:
        """Heading of ``agreement`` in tables: "same top-1", "found by both" (detectors) or "within a pixel" (poses)."""
        if self.detections is not None:
            return "found by both"
        return "same top-1" if self.keypoints is None else "within a pixel"

    @property
    def matched(self) -> int | None:
        """Number of detections or key points that ``agreement`` counts; None if it counts images or pixels."""
        return self.keypoints if self.detections is None else self.detections

    def within(self, tolerance: float) -> bool:
        """Return whether ``relative`` is at most a tolerance and nearly all detections or key points agree.

        Tied ones count as agreeing if most others do.
        """
        if self.matched is not None:
            share = self.agreement or 0.0
            if share < 0.5 or share + self.tied / self.matched < COMPLETE:
                return False
        return self.relative <= tolerance

    @property
    def relative(self) -> float:
        """``max_abs`` in units of ``scale``."""
        return self.max_abs / self.scale if self.scale else self.max_abs

    def summary(self) -> str:
        """Return the difference as one clause."""
        text = f"outputs on {self.images} images change by {self.rms:.2g} (relative RMS)"
        if self.agreed:
            text += f", {self.agreed}"
        if self.scores is not None:
            text += ", {} {:.2%} -> {:.2%}".format(self.score, *self.scores)
        return text

    def __str__(self) -> str:
        """Return the clause alone, as it stands in sentences."""
        return self.summary()

    def rows(self) -> list[dict[str, str]]:
        """Return one row with the differences, and the scores if there are labels."""
        row = {
            "images": f"{self.images:,}",
            "largest difference": f"{self.max_abs:.2g}",
            "relative": f"{self.relative:.2g}",
            "relative RMS": f"{self.rms:.2g}",
        }
        if self.agreement is not None:
            row[self.same] = f"{self.agreement:.2%}"
        if self.scores is not None:
            row |= {
                f"{self.score} {when}": f"{x:.2%}" for when, x in zip(("before", "after"), self.scores, strict=True)
            }
        return [row]


class _Sums:
    """Running sums for one output tensor."""

    def __init__(self) -> None:
        self.max_abs = self.scale = self._squares = self._moved = 0.0

    def add(self, first: Tensor, second: Tensor) -> None:
        if first.ndim == 4:  # maps of a whole batch would need several times their size in float64
            for one, other in zip(first.split(1), second.split(1), strict=True):
                self._add(one, other)
        else:
            self._add(first, second)

    def _add(self, first: Tensor, second: Tensor) -> None:
        first = first if first.is_floating_point() else first.double()
        gap = second.to(first.device).double() - first
        moved = _largest(gap)
        self.max_abs = max(self.max_abs, moved if math.isfinite(moved) else math.inf)
        self.scale = max(self.scale, _largest(first))
        self._moved += _sum_of_squares(gap) if math.isfinite(moved) else math.inf
        self._squares += _sum_of_squares(first)

    def relative(self) -> float:
        return self.max_abs / self.scale if self.scale else self.max_abs

    def rms(self) -> float:
        return math.sqrt(self._moved / self._squares) if self._squares else (math.inf if self._moved else 0.0)


def _largest(x: Tensor) -> float:
    """Return the largest absolute value, or nan if there is one, in a single pass over x."""
    low, high = x.aminmax()
    return float(torch.maximum(-low, high))


def _sum_of_squares(x: Tensor) -> float:
    """Return the sum of squares, added in float64, without a copy of x."""
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


class Tally:
    """Accumulates the difference between two models' outputs, batch by batch.

    Args:
        model: the first model. Its ``align_corners`` is that of resizing logits to masks of another size, its score
            threshold tells which detections are near it, and a pose model decodes heatmaps. None: it is unknown.
        predicts: whether outputs predict classes, so that agreement counts. False for outputs of parts.
    """

    def __init__(self, model: nn.Module | None = None, *, predicts: bool = True) -> None:
        self._images, self._align_corners, self._threshold = 0, aligned_corners(model), threshold_of(model)
        self._outputs: dict[int, _Sums] = {}
        self._counts: ImageCounts | PixelCounts | None = None
        self._predict = predicts
        self._found: DetectionCounts | None = None
        self._poses = KeypointCounts(model) if is_pose_model(model) else None

    def add(
        self,
        first: Any,
        second: Any,
        labels: Any = None,
        *,
        images: int | None = None,
        size: Sequence[int] | None = None,
    ) -> None:
        """Add both models' outputs for one batch.

        Args:
            first, second: outputs with the same tensors, alone or in tuples, mappings and dataclasses; or detections
                of each image, see :func:`widefield.surgery.detections.detections`.
            labels: of images, integers (N,) or (N, 1), as a tensor, an array or a list; -1: unlabeled. Of pixels,
                masks (N, H, W) or a list of masks (H, W); 255: unlabeled. Of detections, ``boxes`` and ``labels`` of
                each image. Of poses, key points (N, K, 3); third value 0: unlabeled. Anything else is ignored.
            images: N. Default: the length of the first output tensor that has one, or else 1.
            size: (height, width) of the images, for pose models. Default: that of heatmaps times their stride.

        Raises:
            ValueError: outputs of different shapes; a first output that is not finite; another number of labels than N.
        """
        before = detections(first)
        if before is not None:
            after = detections(second)
            if after is None:
                raise ValueError(f"the first model returns detections, and the second {described(second)}.")
            self._found = self._found or DetectionCounts(self._threshold)
            self._images += len(before)
            self._found.add(before, after, labels)
        elif self._poses is not None and self._poses.reads(first):
            self._images += len(first)
            self._poses.add(first, second, labels, size)
        else:
            self._add_tensors(first, second, labels, images)

    def _add_tensors(self, first: Any, second: Any, labels: Any, images: int | None) -> None:
        ours, theirs = comparable(first, second)
        count = next((len(out) for out in ours if out.ndim), 1) if images is None else images
        self._images += count
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if a.numel():
                self._outputs.setdefault(index, _Sums()).add(a, b)
        place = place_of_meant(first)
        kind = counts_for(None if place is None else ours[place], count)
        if self._counts is None and self._predict and kind is not None:
            self._counts = PixelCounts(self._align_corners) if kind is PixelCounts else kind()
        self._predict &= kind is not None and isinstance(self._counts, kind)
        if self._predict and self._counts is not None and place is not None:
            self._counts.add(ours[place], theirs[place], labels)

    @property
    def without_detections(self) -> bool:
        """Whether the outputs are detections of which there is none."""
        return self._found is not None and not self._found.seen

    def difference(self) -> Difference:
        """Return the difference over all batches; raises NothingToCompareError if the outputs held no number."""
        if self._found is not None:
            return _of_sets(self._images, self._found)
        if self._poses is not None and self._poses.counted:
            return _of_poses(self._images, self._poses)
        if not self._outputs:
            raise NothingToCompareError(_NO_NUMBERS)
        worst = max(self._outputs.values(), key=_Sums.relative)
        shares = self._counts.shares() if self._predict and self._counts is not None else Shares()
        return Difference(
            self._images,
            worst.max_abs,
            worst.scale,
            max(sums.rms() for sums in self._outputs.values()),
            **shares._asdict(),
        )


def _of_sets(images: int, found: DetectionCounts) -> Difference:
    if not found.seen:
        raise NothingToCompareError(_NO_NUMBERS)
    worst = max(found.gaps.values(), key=lambda gaps: gaps.relative)
    before, after = found.average_precisions
    return Difference(
        images,
        worst.max_abs,
        worst.scale,
        found.rms(),
        found.agreement,
        detections=found.counted,
        tied=found.tied,
        ap_before=before,
        ap_after=after,
    )


def _of_poses(images: int, found: KeypointCounts) -> Difference:
    before, after = found.scores
    return Difference(
        images,
        found.gaps.max_abs,
        found.gaps.scale,
        found.gaps.rms(),
        found.close / found.counted,
        tied=found.tied,
        keypoints=found.counted,
        distance=found.distance,
        near=found.near / found.counted,
        pck_before=before,
        pck_after=after,
    )


@_checks.guided
def compare(first: nn.Module, second: Callable[[Tensor], Any], images: Tensor | Iterable[Any]) -> Difference:
    """Run two models on the same images and return how far their outputs are apart.

    Both models run in their current mode, without gradients. Detectors that find nothing in any image run again with
    score thresholds of 0, so that their best boxes are compared.

    Args:
        first: the reference.
        second: another model, or what :func:`widefield.deploy.load` returns.
        images: one input tensor, passed as it is; or a loader, see :func:`widefield.surgery.inputs.batches`. Its labels
            give accuracies, its masks mean IoUs, its boxes box APs, and its key points PCKs.

    Raises:
        TypeError: a loader whose batches hold no images, or that runs out after one pass.
        ValueError: a loader without images; outputs of different shapes; a first output that is not finite; a
            :class:`NothingToCompareError` for outputs without a number.
    """
    return Reference(first, images, room=0).compare(second)


class Reference:
    """A model and images that several others are compared on, one after the other.

    The first model's outputs are kept for the next comparison, as long as there is room. A loader may return other
    images when it is iterated again; these are computed anew.

    Args:
        model: the first model, which must not change.
        images: see :func:`compare`.
        room: bytes of images and outputs to keep at most.
    """

    def __init__(self, model: nn.Module, images: Tensor | Iterable[Any], *, room: int = 2**28) -> None:
        self._model, self._images, self._room = model, images, room
        self._kept: dict[int, tuple[Tensor, Any]] = {}

    def compare(self, second: Callable[[Tensor], Any]) -> Difference:
        """Return how far the outputs of a model are from the first one's; raises as :func:`compare` does."""
        tally = self._tally(second, self._room)
        if tally.without_detections and can_be_lowered(self._model) and can_be_lowered(second):
            self._kept.clear()
            with lowered(self._model, second):  # type: ignore[arg-type]
                tally = self._tally(second, 0)
        return tally.difference()

    def _tally(self, second: Callable[[Tensor], Any], room: int) -> Tally:
        tally = Tally(self._model)
        with torch.no_grad():
            if isinstance(self._images, Tensor):
                images = self._images
                tally.add(self._outputs(0, images, room), second(images), size=images.shape[-2:])
            else:
                for index, (batch, labels) in enumerate(batches(self._images, self._model)):
                    before = self._outputs(index, batch, room)
                    tally.add(before, second(batch), labels, images=len(batch), size=batch.shape[-2:])
        return tally

    def _outputs(self, index: int, batch: Tensor, room: int) -> Any:
        images, outputs = self._kept.pop(index, (None, None))
        if images is None or not torch.equal(images, batch):
            images, outputs = batch, self._model(batch)
        held = sum(part.nbytes for image, found in self._kept.values() for part in (image, *tensors(found)))
        if held + sum(part.nbytes for part in (images, *tensors(outputs))) <= room:
            self._kept[index] = images, outputs
        return outputs


def difference(first: Any, second: Any, model: nn.Module | None = None) -> Difference:
    """Return how far two outputs are apart; raises as :func:`compare` does.

    Args:
        first, second: outputs.
        model: the first model, if these are outputs of whole models; see :class:`Tally`.
    """
    tally = Tally(model, predicts=model is not None)
    tally.add(first, second)
    return tally.difference()


def comparable(first: Any, second: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors of both outputs in the same order.

    Raises ValueError for different shapes, or a first output that is not finite.
    """
    ours, theirs = tensors(first), tensors(second)
    if not ours or [t.shape for t in ours] != [t.shape for t in theirs]:
        raise ValueError(
            "the outputs cannot be compared: expected the same tensors, alone or in tuples, lists, mappings and "
            f"dataclasses; got {[tuple(t.shape) for t in ours] or type(first).__name__} and "
            f"{[tuple(t.shape) for t in theirs] or type(second).__name__}.{wrapping(first)}"
        )
    if not all(map(_is_finite, ours)):
        raise ValueError("the first model's outputs are not finite, so nothing can be compared: choose another input.")
    return ours, theirs


def _is_finite(x: Tensor) -> bool:
    if x.is_floating_point():
        return not x.numel() or math.isfinite(_largest(x))
    return bool(x.isfinite().all())
