"""Compute class scores of a model: logits of classifiers, or scores from segmentation maps and detections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widefield.analysis._detectors import DetectionScore, box_scores
from widefield.analysis._keypoints import KeypointPeak, is_pose_model, peaks
from widefield.analysis._model import running
from widefield.analysis._targets import Target
from widefield.surgery.answers import described, meant, wrapping


class Scores(NamedTuple):
    """The score of every class for every image."""

    values: Tensor
    """(N, K); gradients flow through."""
    probability: Tensor
    """(N, K), float32, in [0, 1]."""
    predicted: Tensor
    """(N,), int64; -1 if a detector detects nothing."""
    known: bool = True
    """Whether K is the number of the model's classes. For detectors, K is one more than the largest detected label."""
    boxes: Tensor | None = None
    """(N, 4): the box that was asked about, in pixels; NaN if there is no such detection."""
    points: Tensor | None = None
    """(N, K, 2): of a pose model, the key points in pixels."""

    def upto(self, count: int) -> Scores:
        """Return the scores of at least ``count`` classes; if K is unknown, missing ones are 0."""
        more = max(0, 0 if self.known else count - self.values.shape[1])
        return self._replace(values=F.pad(self.values, (0, more)), probability=F.pad(self.probability, (0, more)))


def gives_scores(model: nn.Module) -> bool:
    """Return whether a model may give class scores; encoders of masked pre-training say that they give features."""
    return not getattr(model, "returns_features", False)


def check_scores(model: nn.Module) -> None:
    """Raise ValueError for a model that gives features."""
    if not gives_scores(model):
        raise ValueError(
            f"{type(model).__name__} gives features and no class scores: it was pre-trained without classes. Fine-tune "
            "it first (widefield train RECIPE --model.pretrained RUN), and analyze that run."
        )


def logits(model: nn.Module, images: Tensor, given: Tensor | None = None) -> Tensor:
    """Return the logits of a classifier, (N, classes), if they are its output or the obvious one of several.

    ``given`` are the original images, if ``images`` are crops of them.

    Raises ValueError for other outputs, or values that are not finite.
    """
    check_scores(model)
    if is_pose_model(model):
        raise ValueError(
            f"{type(model).__name__} is a pose model: it returns a heatmap for each key point. This analysis needs one "
            "score per class for the whole image. effective_receptive_field and class_activation examine key points "
            "(KeypointPeak)."
        )
    with running(model, images, given):
        output = model(images)
    found = _classifiers(output, len(images))
    if found is not None:
        return _finite(model, found)
    if _maps(output, len(images)) is not None:
        raise ValueError(
            f"{type(model).__name__} is a segmentation model: it returns logits for every pixel. This analysis needs "
            "one score per class for the whole image. effective_receptive_field and class_activation examine pixels "
            "and regions (ClassAt, ClassIn)."
        )
    raise _refusal(model, output, len(images), "")


def class_scores(
    model: nn.Module,
    images: Tensor,
    weights: Mapping[str, Tensor] | None = None,
    target: Target | DetectionScore | KeypointPeak | None = None,
) -> Scores:
    """Run a model with its parameters replaced by ``weights``, by name; return the score of every class.

    - Classifier, (N, classes): its logits.
    - Segmentation model, (N, classes, h, w): the mean logit of the pixels predicted as the class, as in Seg-Grad-CAM
      (Vinogradova et al. 2020, section 3); of all pixels if there are none. The predicted class covers the most pixels.
    - Detector, a list with {"labels": (n,), "scores": (n,), ...} per image as in torchvision, or with these attributes:
      the sum of the scores of that class's detections.
    - Pose model: its key points take the place of classes; the score is the height of the heatmap's peak.

    With a ``target`` `DetectionScore`, the scores are a detector's logits for one box. With another target, which needs
    a segmentation model, the scores are those of its pixel or region: each class's mean logit there, at the images'
    resolution. The predicted class covers the most pixels of the region.

    Raises ValueError for other outputs, a target outside the images, or values that are not finite.
    """
    check_scores(model)
    if isinstance(target, DetectionScore):
        boxed = box_scores(model, images, target)
        values = _finite(model, boxed.values)
        return Scores(values, boxed.probability, boxed.labels, boxes=boxed.boxes.detach())
    if isinstance(target, KeypointPeak) or (target is None and is_pose_model(model)):
        found_peaks = peaks(model, images, weights)
        height = found_peaks.values.detach().float().clamp(0, 1)
        return Scores(found_peaks.values, height, height.argmax(1), points=found_peaks.points)
    with running(model, images):
        output = torch.func.functional_call(model, dict(weights), (images,)) if weights else model(images)
    maps = _maps(output, len(images))
    if target is not None:
        if maps is None:
            raise ValueError(
                f"{type(target).__name__} needs a segmentation model, which returns logits (N, classes, h, w); "
                f"{type(model).__name__} returns {described(output)}. Give the index of a class instead."
            )
        return _at(_finite(model, maps), images.shape[-2:], target)
    detections = _detections(output, len(images))
    if detections is not None:
        return _detected(model, detections)
    found = _classifiers(output, len(images))
    if found is not None:
        values = _finite(model, found)
        rated = _rated(values)
        return Scores(values, rated, values.argmax(1))
    if maps is not None:
        return _segmented(_finite(model, maps))
    raise _refusal(model, output, len(images), ", maps of them (N, classes, h, w), or a list of detections")


def _classifiers(output: Any, images: int) -> Tensor | None:
    found = meant(output)
    fits = found is not None and found.ndim == 2 and len(found) == images and found.shape[1] > 0
    return found if fits and found is not None and found.is_floating_point() else None


def _maps(output: Any, images: int) -> Tensor | None:
    found = meant(output)
    fits = found is not None and found.ndim == 4 and len(found) == images and found.numel() > 0
    return found if fits and found is not None and found.is_floating_point() else None


def _refusal(model: nn.Module, output: Any, images: int, more: str) -> ValueError:
    got = "shape " * isinstance(output, Tensor) + described(output)
    return ValueError(
        f"{type(model).__name__} must return scores (N, classes){more}; got {got} for {images} images."
        f"{wrapping(output)}"
    )


def _finite(model: nn.Module, scores: Tensor) -> Tensor:
    if not scores.isfinite().all():
        raise ValueError(f"{type(model).__name__} returned scores that are not finite.")
    return scores


def _rated(values: Tensor) -> Tensor:
    values = values.detach().float()
    return values.softmax(1) if values.shape[1] > 1 else values.sigmoid()


def _at(maps: Tensor, size: Sequence[int], target: Target) -> Scores:
    """Return the class scores of a pixel or region of images (H, W), from logits (N, K, h, w)."""
    if maps.shape[2:] != torch.Size(size):
        maps = F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)
    logits = maps[:, :, target.where(size).to(maps.device)]
    covered = _covered(logits).sum(2)
    return Scores(logits.mean(2), _rated(logits).mean(2), covered.argmax(1))


def _covered(maps: Tensor) -> Tensor:
    """Return where each class is predicted, as bool (N, K, ...), from logits; a single class where it is above 0."""
    count = maps.shape[1]
    if count == 1:
        return maps > 0
    places = torch.arange(count, device=maps.device).view(-1, *[1] * (maps.ndim - 2))
    return maps.argmax(1, keepdim=True) == places


def _segmented(maps: Tensor) -> Scores:
    """Return class scores from logits (N, K, h, w); with one class, its pixels are those above 0."""
    where = _covered(maps)
    covered = where.sum((2, 3))
    share = torch.where((covered > 0)[:, :, None, None], where, True).to(maps)
    share = share / share.sum((2, 3), keepdim=True)
    return Scores((maps * share).sum((2, 3)), (_rated(maps) * share.float()).sum((2, 3)), covered.argmax(1))


def _detections(output: Any, images: int) -> list[tuple[Tensor, Tensor]] | None:
    """Return (labels, scores) of each image; None if the output is not a list of detections."""
    if not isinstance(output, (list, tuple)) or len(output) != images:
        return None
    found = []
    for entry in output:
        labels, scores = (
            entry.get(key) if isinstance(entry, Mapping) else getattr(entry, key, None) for key in ("labels", "scores")
        )
        if not isinstance(labels, Tensor) or not isinstance(scores, Tensor) or labels.shape != scores.shape:
            return None
        found.append((labels, scores))
    return found


def _detected(model: nn.Module, found: list[tuple[Tensor, Tensor]]) -> Scores:
    count = max(int(labels.max()) + 1 if len(labels) else 1 for labels, _ in found)
    values = torch.stack([scores.new_zeros(count).index_add(0, labels, scores) for labels, scores in found])
    best = [
        torch.zeros(count, device=scores.device).scatter_reduce(0, labels, scores.detach().float(), "amax")
        for labels, scores in found
    ]
    predicted = _finite(model, values).argmax(1)
    nothing = torch.tensor([not len(labels) for labels, _ in found], device=predicted.device)
    return Scores(values, torch.stack(best), predicted.masked_fill(nothing, -1), known=False)
