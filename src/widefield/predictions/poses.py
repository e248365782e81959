"""Estimate the poses of images in files: in boxes of a detector, of a file, or in the whole image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from widefield import _checks, dense
from widefield.data import Skeleton
from widefield.drawing.parts import MIN_SCORE
from widefield.loading.load import load
from widefield.loading.subjects import Subject
from widefield.predictions.box_files import BoxFile, is_box_file, read_boxes
from widefield.surgery.answers import evaluating
from widefield.surgery.inputs import place
from widefield.tasks import BoxPrediction, PosePrediction

FindBoxes = Callable[[str, Tensor], BoxPrediction]
"""(name of a file, its pixels, uint8 (C, H, W)) -> boxes."""


@dataclass(frozen=True)
class BoxSource:
    """Where the boxes of poses come from.

    Attributes:
        name: of the detector or file; "" for the whole image.
        find: gives the boxes of an image, with labels of the source.
        labels: label of the source -> class of the poses. Boxes of other labels get no pose.
        min_score: least score of the boxes that get a pose.
        labeled: whether it is known of which class the boxes are.
        match: of a file: from the names of all images to ``find`` for these images. It raises ValueError for images
            that the file does not know.
    """

    name: str
    find: FindBoxes
    labels: dict[int, int]
    min_score: float
    labeled: bool = True
    match: Callable[[Sequence[str]], FindBoxes] | None = None

    def for_images(self, names: Sequence[str]) -> BoxSource:
        """Return the source for images with these names; raises ValueError if a file does not know all of them."""
        return self if self.match is None else replace(self, find=self.match(names))

    def __call__(self, name: str, pixels: Tensor) -> dense.Detections:
        """Return the boxes of an image that get a pose, labeled by the classes of the poses."""
        found = self.find(name, pixels).at_least(self.min_score)
        wanted = [index for index, label in enumerate(found.labels.tolist()) if label in self.labels]
        labels = [self.labels[label] for label in found.labels[wanted].tolist()]
        scores = torch.ones(len(found)) if found.scores is None else found.scores
        return dense.Detections(found.boxes[wanted], scores[wanted], torch.tensor(labels, dtype=torch.int64))


def box_source(
    subject: Subject,
    boxes: str | Path | Subject | None,
    *,
    classes: Sequence[str] | None = None,
    min_score: float = MIN_SCORE,
    size: int | None = None,
    coco: str | Path | None = None,
    pretrained: bool = False,
) -> BoxSource | None:
    """Return where the boxes of poses come from; None if the model is not a pose model.

    Args:
        subject: the model.
        boxes: a detector, by name or by the folder of a run, as of :func:`load`, or a loaded one; or a JSON file, see
            :func:`read_boxes`. None: the whole image is one box.
        classes: names of the classes of the boxes that get a pose. Default: those that the pose model knows.
        min_score: least score of the boxes that get a pose.
        size: shorter side of the images for the detector; default: its own.
        coco: a COCO file with the names of images and categories of COCO's results.
        pretrained: fetch the published weights of a detector that is named.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: the model is not a pose model, but boxes are given; the other is not a detector, the file holds no
            boxes, or no class of theirs is known.
    """
    if subject.work != "pose":
        if boxes is not None or classes is not None:
            raise ValueError(
                f"boxes and box_classes are for pose models, and {subject.name} is a model for {subject.work}."
            )
        return None
    _checks.number("min_score", min_score, maximum=1.0)
    detects = isinstance(boxes, Subject) or (boxes is not None and not is_box_file(boxes))
    if size is not None and not detects:
        raise ValueError(
            "size is that of a detector's images, and there is no detector; the crops of a "
            "pose model have one size. Leave out size (--size)."
        )
    if boxes is None:
        if classes is not None:
            raise ValueError(f"box_classes chooses among boxes, and there are none; got {list(classes)}. Give boxes.")
        return BoxSource("", _whole, {0: 0}, min_score, labeled=len(subject.classes) == 1)
    if not detects:
        file = read_boxes(str(boxes), subject.classes, coco)
        labels = _labels(str(boxes), file.classes, subject, classes)

        def match(names: Sequence[str]) -> FindBoxes:
            return partial(_in_file, file.matched(names))

        return BoxSource(str(boxes), partial(_in_file, file), labels, min_score, match=match)
    detector = (
        boxes if isinstance(boxes, Subject) else load(str(boxes), pretrained=pretrained, device=place(subject.model)[0])
    )
    if detector.work != "detection":
        raise ValueError(f"boxes must be a detector or a JSON file; {detector.name} is a model for {detector.work}.")
    if not detector.class_names:
        raise ValueError(
            f"the classes of {detector.name} have no names, as its weights are {detector.weights}: take published "
            "weights (--pretrained) or a run."
        )
    labels = _labels(detector.name, detector.class_names, subject, classes)
    return BoxSource(detector.name, partial(_detected, detector, size), labels, min_score)


def _labels(source: str, names: Sequence[str], subject: Subject, chosen: Sequence[str] | None) -> dict[int, int]:
    """Return label of the boxes -> class of the poses; raises ValueError if there is none."""
    known = list(subject.classes)
    if chosen is None:
        found = {label: known.index(name) for label, name in enumerate(names) if name in known}
        if not found:
            raise ValueError(
                f"no class of {source} ({_some(names)}) is one of {subject.name} ({_some(known)}): name the classes "
                "of the boxes that get a pose (box_classes, --box-classes)."
            )
        return found
    found = {}
    for name in [chosen] if isinstance(chosen, str) else chosen:
        if name not in names:
            raise ValueError(f"{source} has no class {name!r}, only {_some(names)}.{_checks.did_you_mean(name, names)}")
        if name not in known and len(known) > 1:
            raise ValueError(
                f"the poses have the classes {_some(known)}, and {name!r} is none of them: results would name none."
            )
        found[names.index(name)] = known.index(name) if name in known else 0
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _in_file(file: BoxFile, name: str, pixels: Tensor) -> BoxPrediction:
    """Return the boxes that a file has for an image."""
    return file.of(name, (pixels.shape[1], pixels.shape[2]))


def _whole(name: str, pixels: Tensor) -> BoxPrediction:
    """Return the whole image as a box."""
    height, width = pixels.shape[1:]
    box = torch.tensor([[0.0, 0, width, height]])
    return BoxPrediction(box, torch.zeros(1, dtype=torch.int64), torch.ones(1), size=(height, width))


def _detected(detector: Subject, size: int | None, name: str, pixels: Tensor) -> BoxPrediction:
    """Return the objects that a detector finds."""
    image = Image.fromarray(pixels.expand(3, -1, -1).movedim(0, -1).contiguous().numpy())
    device, dtype = place(detector.model)
    prepared, shape = detector.prepare(size)(image)[None].to(device, dtype), (image.height, image.width)
    with evaluating(detector.model), torch.no_grad():
        (found,) = detector.model(prepared, out_sizes=[shape])  # without its masks, which take time to paste
    return BoxPrediction(found.boxes.float().cpu(), found.labels.cpu(), found.scores.float().cpu(), size=shape)


def pose_prediction(
    subject: Subject,
    rules: dense.PoseRules,
    skeleton: Skeleton,
    boxes: dense.Detections,
    pixels: Tensor,
    batch_size: int = 32,
    *,
    labeled: bool = True,
) -> PosePrediction:
    """Return the poses in an image.

    Args:
        subject: a pose model.
        rules: of the model.
        skeleton: of its key points.
        boxes: in pixels of the image; all of them get a pose.
        pixels: uint8 (C, H, W), as in the file.
        batch_size: crops at a time.
        labeled: whether the boxes have labels.
    """
    found = dense.estimate_poses(
        subject.model, pixels, boxes, rules, min_score=0.0, mean=subject.mean, std=subject.std, batch_size=batch_size
    )
    cpu = dense.Poses(*(one.cpu() for one in found))
    return PosePrediction(
        cpu.points.float(),
        cpu.scores,
        cpu.pose_scores,
        cpu.boxes,
        labels=cpu.labels if labeled else None,
        skeleton=skeleton,
        size=(pixels.shape[1], pixels.shape[2]),
        threshold=rules.keypoint_threshold,
    )
