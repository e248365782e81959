"""Estimate poses in images of any size: a crop around each box, a pose model, and the poses back in the image.

Crops, flip test, decoding, scores and the suppression of duplicates are those of mmpose, which published results were
measured with. Boxes come from anywhere: a detector of this package, one of torchvision, or a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from widefield import _checks
from widefield._coco.keypoints import distinct
from widefield.data.crops import crop_box, crop_matrix, warp
from widefield.dense.detector import Detections, Detector
from widefield.dense.heatmap import HeatmapPose
from widefield.dense.pose_rules import PoseRules
from widefield.surgery.answers import evaluating
from widefield.surgery.inputs import place

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet, for pixels in [0, 1]."""
_SLACK = 1e-3
"""How far pixels may leave [0, 1]: resized images do, by rounding."""

Boxes = Tensor | Detections | Mapping[str, Tensor] | nn.Module
"""Boxes (D, 4), detections, torchvision's detections of one image, or a detector."""


@dataclass(frozen=True)
class DetectorInput:
    """How the input of a :class:`Detector` is made of an image. It must be the same as in the detector's evaluation.

    Args:
        scale: (longer side, shorter side) of the rectangle that the image is fitted into, such as (1333, 800) for
            published detectors. None keeps its size.
        mean, std: of each channel, for pixels in [0, 1]. Default: those of ImageNet.
        antialias: smooth the image before it is shrunk.
    """

    scale: Sequence[int] | None
    mean: Sequence[float] = MEAN
    std: Sequence[float] = STD
    antialias: bool = False


class Poses(NamedTuple):
    """The poses in one image, best first.

    Attributes:
        points: (D, K, 2), x and y of the key points in pixels of the image. As in COCO, the center of the top left
            pixel is (0, 0).
        scores: (D, K), of the key points.
        pose_scores: (D,), descending: the mean score of the sure key points times the score of the box.
        boxes: (D, 4), the boxes around which the crops were.
        box_scores: (D,).
        labels: int64 (D,), classes of the boxes.
    """

    points: Tensor
    scores: Tensor
    pose_scores: Tensor
    boxes: Tensor
    box_scores: Tensor
    labels: Tensor


@_checks.guided
def estimate_poses(
    model: nn.Module,
    image: Tensor,
    boxes: Boxes,
    rules: PoseRules,
    *,
    classes: Sequence[int] | None = None,
    min_score: float = 0.3,
    detector_input: DetectorInput | None = None,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    batch_size: int = 32,
) -> Poses:
    """Return the pose in each box of an image, without duplicates. No gradients.

    Args:
        model: maps crops (N, C, h, w) to heatmaps (N, K, H, W). It runs in evaluation mode, on its device and in its
            dtype; its mode is restored.
        image: (C, H, W), uint8, or floating point from 0 to 1; not normalized. C is 1 (gray), or the number of
            channels of ``mean``.
        boxes: one of these:

            - (D, 4): x1, y1, x2, y2 in continuous pixels of the image; (0, 0) is its top left corner;
            - :class:`Detections`, or a mapping with ``boxes``, ``scores`` and ``labels``, as torchvision's detectors
              return for one image;
            - a detector, which runs on the image first: see :func:`find_boxes`. A :class:`Detector` needs
              ``detector_input``.
        rules: of the model; see :meth:`PoseRules.for_model`.
        classes: labels of the boxes that get a pose, such as those of people; None: all. Labels are those of the
            detector: people are 0 in ``widefield.dense`` and 1 in torchvision.
        min_score: least score of the boxes that get a pose.
        detector_input: how the input of a :class:`Detector` is made of the image. Boxes of other kinds take none.
        mean, std: of each channel, with which crops are normalized. They do not concern the detector.
        batch_size: crops at a time. With the flip test, each runs twice.

    Returns:
        The poses on the device of the model, points in float64, the others in float32.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a shape is wrong, an argument is out of range, the model does not fit the rules, or
            ``detector_input`` is missing or not used.
    """
    _checks.integer("batch_size", batch_size)
    _checks.number("min_score", min_score, maximum=1.0)
    _check_image(image, len(mean))
    _check_model(model, rules)
    device, dtype = place(model)
    if isinstance(boxes, nn.Module):
        boxes = find_boxes(boxes, image, detector_input)
    elif detector_input is not None:
        raise ValueError("detector_input is for a detector, and the boxes are given. Leave it out.")
    found = _chosen(_detections(boxes), classes, min_score, device)
    center, scale = crop_box(found.boxes, rules.crop_size, padding=rules.padding)
    matrices = crop_matrix(center, scale, rules.crop_size, udp=rules.aligned)
    shift, width = (torch.tensor(values, device=device)[:, None, None] for values in (mean, std))
    pixels, count = image.to(device), len(rules.swapped)
    points = [torch.zeros(0, count, 2, dtype=torch.float64, device=device)]
    scores = [torch.zeros(0, count, device=device)]
    with evaluating(model), torch.no_grad():
        for part in matrices.split(batch_size):
            crops = (_floating(warp(pixels, part, rules.crop_size)) - shift) / width
            read = rules.decode(rules.heatmaps(model, crops.to(dtype)))
            points.append(rules.to_file(read.points, part))
            scores.append(read.scores.float())
    every, sure = torch.cat(points), torch.cat(scores)
    overall = rules.pose_scores(sure, found.scores)
    kept = _distinct(every, overall, scale.prod(1), found.labels, rules)
    return Poses(*(one[kept] for one in (every, sure, overall, found.boxes, found.scores, found.labels)))


@_checks.guided
def find_boxes(detector: nn.Module, image: Tensor, detector_input: DetectorInput | None = None) -> Detections:
    """Return what a detector finds in an image, in pixels of the image. No gradients.

    Args:
        detector: a :class:`Detector`; or a module that is called like torchvision's detectors, which resize and
            normalize themselves: ``detector([image])[0]`` is a mapping with ``boxes``, ``scores`` and ``labels``.
        image: (C, H, W), uint8, or floating point from 0 to 1; not normalized.
        detector_input: how the input of a :class:`Detector` is made of the image. It has no default, as another scale
            or normalization than in training gives worse boxes without an error. Other modules take none.

    Raises:
        TypeError: the image or the result of the module is of the wrong type.
        ValueError: the image has another form, the module returns something else, or ``detector_input`` is missing
            or not used.
    """
    from widefield.data import joint  # torchvision.transforms.v2 is slow to import

    own = isinstance(detector, Detector)
    if own and detector_input is None:
        raise ValueError(
            "a Detector needs detector_input: it finds worse boxes at another scale or normalization than in training. "
            "Published detectors take DetectorInput(scale=(1333, 800))."
        )
    if not own and detector_input is not None:
        raise ValueError(
            f"detector_input is for a widefield.dense.Detector, and {type(detector).__name__} resizes and normalizes "
            "images itself. Leave it out."
        )
    _check_image(image, len(detector_input.mean) if detector_input else None)
    pixels = _floating(image)
    device, dtype = place(detector)
    with evaluating(detector), torch.no_grad():
        if detector_input is None:
            return _detections(detector([pixels.to(device, dtype)])[0])
        transform = joint.evaluation(
            detector_input.scale, detector_input.mean, detector_input.std, antialias=detector_input.antialias
        )
        pixels = pixels.expand(len(detector_input.mean), -1, -1)
        prepared = joint.apply(transform, {"image": pixels})["image"]
        found: list[Detections] = detector(prepared[None].to(device, dtype), out_sizes=[pixels.shape[1:]])
    return found[0]


def _check_image(image: Tensor, channels: int | None) -> None:
    """Raise TypeError or ValueError unless this is an image that is not normalized, gray or with so many channels."""
    if not isinstance(image, Tensor):
        raise TypeError(f"image must be a tensor (C, H, W); got {type(image).__name__}.")
    if image.ndim != 3:
        raise ValueError(f"image must be (C, H, W), one image; got shape {tuple(image.shape)}.")
    if channels is not None and image.shape[0] not in (1, channels):
        rest = image.shape[0] - 1
        advice = f" Drop the alpha channel: image[:{rest}]." if rest in (1, channels) else ""
        raise ValueError(
            f"image must have {channels} channels, as mean and std, or 1; got shape {tuple(image.shape)}.{advice}"
        )
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise TypeError(f"image must be uint8, or floating point from 0 to 1; got {image.dtype}.")
    if image.is_floating_point() and image.numel() and (image.amin() < -_SLACK or image.amax() > 1 + _SLACK):
        raise ValueError(
            f"image must be from 0 to 1, as crops are normalized later; got values from {image.amin():g} to "
            f"{image.amax():g}. Pass the image itself, uint8 or divided by 255."
        )


def _check_model(model: nn.Module, rules: PoseRules) -> None:
    """Raise ValueError if a model knows how its heatmaps are read, and the rules say something else."""
    for name in ("kind", "sigma", "blur") if isinstance(model, HeatmapPose) else ():
        own, given = getattr(model, name), getattr(rules, name)
        if own != given:
            raise ValueError(
                f"the heatmaps of the model have {name} {own!r}, and the rules {given!r}: make the rules with "
                "PoseRules.for_model."
            )


def _floating(image: Tensor) -> Tensor:
    """Return an image as floating-point numbers from 0 to 1."""
    return image / 255 if image.dtype == torch.uint8 else image


def _chosen(found: Detections, classes: Sequence[int] | None, min_score: float, device: torch.device) -> Detections:
    """Return the detections that get a pose, on a device; arguments and errors as of :func:`estimate_poses`."""
    wanted = found.scores >= min_score
    if classes is not None:
        listed = [_checks.integer("every entry of classes", label, minimum=0) for label in classes]
        wanted = wanted & torch.isin(found.labels, found.labels.new_tensor(listed))
    boxes, scores, labels = (one[wanted].detach().to(device) for one in found[:3])
    return Detections(boxes.float(), scores.float(), labels)


def _detections(boxes: Any) -> Detections:
    """Return boxes of any form as detections, without masks."""
    if isinstance(boxes, Mapping):
        if "boxes" not in boxes:
            raise ValueError(f"a mapping of detections needs boxes, and may have scores and labels; got {[*boxes]}.")
        given = [boxes.get(name) for name in ("boxes", "scores", "labels")]
    elif isinstance(boxes, Detections):
        given = [boxes.boxes, boxes.scores, boxes.labels]
    else:
        given = [boxes, None, None]
    corners, scores, labels = given
    if not isinstance(corners, Tensor):
        raise TypeError(
            f"boxes must be a tensor (D, 4), detections of one image, or a detector; got {type(boxes).__name__}."
        )
    if corners.ndim != 2 or corners.shape[1] != 4:
        raise ValueError(f"boxes must be (D, 4), x1, y1, x2, y2 of one image; got shape {tuple(corners.shape)}.")
    if not corners.isfinite().all() or (corners[:, 2:] <= corners[:, :2]).any():
        bad = (~(corners[:, 2:] > corners[:, :2]).all(1) | ~corners.isfinite().all(1)).nonzero()[0].item()
        raise ValueError(
            f"boxes must have x1 < x2 and y1 < y2; box {bad} is {corners[int(bad)].tolist()}. Boxes of (x, y, width, "
            "height) become such with torchvision.ops.box_convert."
        )
    corners = corners if corners.is_floating_point() else corners.float()
    scores = corners.new_ones(len(corners)) if scores is None else scores
    labels = corners.new_zeros(len(corners), dtype=torch.int64) if labels is None else labels
    return Detections(corners, scores, labels)


def _distinct(points: Tensor, scores: Tensor, areas: Tensor, labels: Tensor, rules: PoseRules) -> Tensor:
    """Return the indices of poses that no better one of their class is much like, best first."""
    places, values, sizes = (one.double().cpu().numpy() for one in (points, scores, areas))
    sigmas = torch.tensor(rules.sigmas, dtype=torch.float64).numpy()
    kept = distinct(places, values, sizes, labels.cpu().numpy(), sigmas, rules.nms_threshold)
    return torch.from_numpy(kept).to(scores.device)
