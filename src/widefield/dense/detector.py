"""Define detectors, models that find objects as boxes, and what goes in and out of them.

Boxes are (x1, y1, x2, y2) in continuous pixels; (0, 0) is the top left corner of the image. Sizes are (height, width).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from widefield import _checks, _history
from widefield.dense.backbone import FeatureMaps
from widefield.dense.boxes import Size
from widefield.dense.detection_rules import DetectionRules
from widefield.surgery import anatomy

FIRST_STRIDE = 4
"""Stride of the first stage of a backbone. Each further stage doubles it."""

OVERHANG = 1.0
"""Pixels that a target may leave its image: sizes of resized images are rounded, boxes are not."""


class Targets(NamedTuple):
    """The objects of one image.

    Attributes:
        boxes: (M, 4), x1, y1, x2, y2 in pixels of the image that the model gets.
        labels: int64 (M,), from 0 to num_classes - 1.
        masks: bool (M, h, w) at the size of the image; None if the model has no mask head.
        crowd: bool (M,): regions of many objects. None of them is learned as an object. Whether what is inside counts
            as background depends on the model; in published ones it does. None: no crowd regions.
        size: (h, w) of the part of the padded image that is the image; None: all of it.
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor | None = None
    crowd: Tensor | None = None
    size: Size | None = None


def size_of(target: Targets) -> Size:
    """Return the size of an image from its targets, which must be set."""
    if target.size is None:
        raise ValueError("the size of each target must be set: pass targets through Detector.prepared.")
    return target.size


class Detections(NamedTuple):
    """What a detector found in one image, best first.

    Attributes:
        boxes: (D, 4), x1, y1, x2, y2.
        scores: (D,), descending.
        labels: int64 (D,), from 0 to num_classes - 1.
        masks: (D, S, S), probabilities on a grid inside each box; None without a mask head. See
            :func:`widefield.dense.paste_masks`.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None


class BoxScores(NamedTuple):
    """What a detector says about given boxes; R boxes, image after image.

    Attributes:
        logits: (R, num_classes), without the background; gradients flow to the maps.
        probabilities: (R, num_classes).
    """

    logits: Tensor
    probabilities: Tensor


class Detector(nn.Module, ABC):
    """A detection model: backbone, neck and heads.

    A detector defines :meth:`losses`, :meth:`detect` and :meth:`box_scores`. Neck and heads move to the device and
    dtype of the backbone.

    Args:
        backbone: the maps of a network.
        neck: from the backbone's maps to those of the heads.
        heads: further modules by name.
        num_classes: number of classes, without the background.
        masks: whether the model predicts masks, so that targets need them.
        frozen_stages: how many stages of the backbone are not trained, together with the stem; 0 trains everything.
            Frozen parts stay in evaluation mode.
        norm_eval: whether batch norms of the backbone stay in evaluation mode, so that their statistics do not change.
        rules: which boxes become detections; None: the defaults.

    Raises:
        ValueError: stages are to be frozen and the backbone's stages are unknown or fewer.
    """

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Note the arguments, for files of the model (:func:`widefield.save`)."""
        model = super().__new__(cls)
        _history.constructed(model, cls, args, options)
        return model

    def __init__(
        self,
        backbone: FeatureMaps,
        neck: nn.Module,
        heads: Mapping[str, nn.Module],
        *,
        num_classes: int,
        masks: bool = False,
        frozen_stages: int = 0,
        norm_eval: bool = False,
        rules: DetectionRules | None = None,
    ) -> None:
        super().__init__()
        self.rules = DetectionRules() if rules is None else rules
        self.num_classes = _checks.integer("num_classes", num_classes)
        self.has_masks = bool(masks)
        self.frozen_stages = _checks.integer("frozen_stages", frozen_stages, minimum=0)
        self.norm_eval = bool(norm_eval)
        self.backbone = backbone
        like = next((p for p in backbone.parameters() if p.is_floating_point()), torch.empty(0))
        self.neck = neck.to(like)
        for name, part in heads.items():
            self.add_module(name, part.to(like))
        self._frozen = _freeze(backbone, self.frozen_stages)
        self.train(self.training)

    @property
    def rules(self) -> DetectionRules:
        """Which boxes become detections; it can be set."""
        return self._rules

    @rules.setter
    def rules(self, value: DetectionRules) -> None:
        if not isinstance(value, DetectionRules):
            raise TypeError(
                f"rules must be widefield.dense.DetectionRules; got {type(value).__name__}. To change one of them: "
                "model.rules = dataclasses.replace(model.rules, max_per_image=300)."
            )
        self._rules = value

    @property
    def score_threshold(self) -> float:
        """The score that detections must exceed; it can be set."""
        return self.rules.score_threshold

    @score_threshold.setter
    def score_threshold(self, value: float) -> None:
        self.rules = replace(self.rules, score_threshold=value)

    @property
    def least_score(self) -> float | None:
        """The score that every detection exceeds; None if there is no such bound."""
        return self.score_threshold

    @abstractmethod
    def losses(self, maps: Sequence[Tensor], targets: Sequence[Targets]) -> dict[str, Tensor]:
        """Return the losses by name; their sum is the loss of training.

        Args:
            maps: of the neck, finest first.
            targets: from :meth:`prepared`, so that crowd and size are never None.
        """

    @abstractmethod
    def detect(self, maps: Sequence[Tensor], sizes: Sequence[Size]) -> list[Detections]:
        """Return the detections of each image in pixels of the images that the model gets.

        Args:
            maps: of the neck, finest first.
            sizes: (height, width) of each image without its padding. Boxes are clipped to it.
        """

    def box_scores(self, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> BoxScores:
        """Return the scores of every class for given boxes, without moving or choosing any.

        A second stage pools features inside of each box. A dense head reads the anchor or point that fits the box best.
        The boxes are constants: gradients flow to the maps only.

        Args:
            maps: of the neck, finest first.
            boxes: (M_i, 4) of each image, in pixels of the images that the model gets.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define box_scores, the scores of given boxes.")

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the maps that the heads get, finest first, from images (N, C, H, W).

        Images with a side below the backbone's largest stride are padded to it.
        """
        maps = self.backbone(enlarged(images, max(self.backbone.strides)))
        found: list[Tensor] = self.neck(maps)
        return found

    def prepared(self, images: Tensor, targets: Sequence[Targets]) -> list[Targets]:
        """Check targets and return them without None for crowd and size, and with boxes in float32 or wider.

        Args:
            images: (N, C, H, W).
            targets: one for each image.

        Raises:
            TypeError: there are no targets, or they have another type.
            ValueError: the number of targets, a shape, a label, a box or a size is wrong.
        """
        if targets is None:
            raise TypeError(
                "a detector in training mode needs targets: call model(images, targets), or model.eval() first to get "
                "detections."
            )
        if len(targets) != len(images):
            raise ValueError(f"there are {len(images)} images and {len(targets)} targets; give one Targets per image.")
        found = [_prepared(index, images, entry, self.has_masks) for index, entry in enumerate(targets)]
        _check_objects(found, self.num_classes)
        return found

    def forward(
        self,
        images: Tensor,
        targets: Sequence[Targets] | None = None,
        *,
        sizes: Sequence[Sequence[int]] | Tensor | None = None,
        out_sizes: Sequence[Sequence[int]] | Tensor | None = None,
    ) -> dict[str, Tensor] | list[Detections]:
        """Return losses in training mode, detections in evaluation mode.

        Args:
            images: (N, C, H, W), normalized, of any height and width. Smaller images of a batch are padded by zeros on
                the right and at the bottom.
            targets: the objects of each image; in training mode only.
            sizes: (height, width) of each image without its padding; None: all of it. In evaluation mode only, as
                targets have a size.
            out_sizes: (height, width) of each image to which boxes are scaled, such as that of its file; None: sizes.

        Returns:
            A dictionary of scalar losses, whose sum is the loss of training, or one :class:`Detections` per image.

        Raises:
            TypeError: arguments of the other mode, or no targets in training mode.
            ValueError: a shape, size, label or box is wrong.
        """
        _check_images(images)
        if self.training:
            if sizes is not None or out_sizes is not None:
                raise TypeError(
                    "sizes and out_sizes are for evaluation mode; in training mode, set the size of each Targets."
                )
            return self.losses(self.maps(images), self.prepared(images, targets))  # type: ignore[arg-type]
        if targets is not None:
            raise TypeError("targets are for training mode: call model.train() for losses, or leave them out.")
        whole: Size = (images.shape[2], images.shape[3])
        inner = [whole] * len(images) if sizes is None else _listed("sizes", sizes, len(images), within=whole)
        found = self.detect(self.maps(images), inner)
        if out_sizes is None:
            return found
        outer = _listed("out_sizes", out_sizes, len(images))
        return [_scaled(*entry) for entry in zip(found, inner, outer, strict=True)]

    def train(self, mode: bool = True) -> Detector:
        """Set the mode; frozen parts, and batch norms if ``norm_eval``, stay in evaluation mode."""
        super().train(mode)
        if mode and (self.norm_eval or self._frozen):
            for name, module in self.backbone.named_modules():
                if name in self._frozen or (self.norm_eval and isinstance(module, _BatchNorm)):
                    module.eval()
        return self


# Frozen parts


def _freeze(backbone: FeatureMaps, count: int) -> frozenset[str]:
    """Freeze the stem and the first stages; return the names of the frozen modules."""
    if not count:
        return frozenset()
    parts = anatomy(backbone)
    largest = FIRST_STRIDE * 2 ** (count - 1)
    inside = [i for i, stage in enumerate(parts.stages) if (stage.reduction or FIRST_STRIDE * 2**i) <= largest]
    if not inside or largest > max(backbone.strides):
        raise ValueError(
            f"frozen_stages={count} needs a backbone with as many stages; found "
            f"{[stage.name for stage in parts.stages]}. Use frozen_stages=0 and freeze parameters with "
            "requires_grad_(False)."
        )

    def frozen(name: str) -> bool:
        stage = parts.stage_of(name)
        return stage is not None and stage <= inside[-1]

    for name, parameter in backbone.named_parameters():
        if frozen(name):
            parameter.requires_grad_(False)
    return frozenset(name for name, _ in backbone.named_modules() if frozen(name))


# Checks


def _check_images(images: Tensor) -> None:
    if images.ndim != 4:
        raise ValueError(
            f"images must be (N, C, H, W); got shape {tuple(images.shape)}. Add the batch dimension to a single image "
            "with images[None]."
        )
    if not images.numel():
        raise ValueError(f"there are no pixels in images of shape {tuple(images.shape)}; give at least one image.")


def enlarged(images: Tensor, side: int) -> Tensor:
    """Pad images on the right and at the bottom to at least this side."""
    height, width = images.shape[2:]
    if any(isinstance(length, torch.SymInt) for length in images.shape):  # a branch would bind a graph for any size
        return images
    if height >= side and width >= side:
        return images
    return F.pad(images, (0, max(0, side - width), 0, max(0, side - height)))


def _listed(name: str, sizes: Sequence[Sequence[int]] | Tensor, count: int, within: Size | None = None) -> list[Size]:
    """Return (height, width) of each image after checks."""
    if len(sizes) != count:
        raise ValueError(f"there are {count} images and {len(sizes)} {name}; give (height, width) of each.")
    rows: Sequence[Sequence[int]] = sizes.tolist() if isinstance(sizes, Tensor) else sizes
    return [_checked_size(f"{name}[{index}]", size, within) for index, size in enumerate(rows)]


def _checked_size(name: str, size: Sequence[int], within: Size | None = None) -> Size:
    if len(size) != 2 or not all(side > 0 for side in size):
        raise ValueError(f"{name} must be (height, width), both positive; got {tuple(size)}.")
    height, width = size
    if within is not None and (height > within[0] or width > within[1]):
        raise ValueError(
            f"{name} is {(height, width)}, larger than the padded images of {within}. It is the size (height, width) "
            "of the image inside its padding, not that of the file."
        )
    return height, width


def _prepared(index: int, images: Tensor, target: Targets, masks: bool) -> Targets:
    """Return the targets of one image with every field set, after checks of types and shapes."""
    where = f"targets[{index}]"
    if not isinstance(target, Targets):
        raise TypeError(f"{where} must be widefield.dense.Targets; got {type(target).__name__}.")
    count = len(target.boxes)
    if target.boxes.shape != (count, 4):
        raise ValueError(
            f"{where}.boxes must be (M, 4); got {tuple(target.boxes.shape)}. Without objects: torch.zeros(0, 4)."
        )
    if target.labels.shape != (count,):
        raise ValueError(f"{where}.labels must be ({count},), like the boxes; got {tuple(target.labels.shape)}.")
    if target.crowd is not None and target.crowd.shape != (count,):
        raise ValueError(f"{where}.crowd must be ({count},), like the boxes; got {tuple(target.crowd.shape)}.")
    whole: Size = (images.shape[2], images.shape[3])
    size = whole if target.size is None else _checked_size(f"{where}.size", [int(x) for x in target.size], whole)
    if masks and target.masks is None:
        raise ValueError(f"{where}.masks is None, and this model learns masks: give a bool tensor ({count}, h, w).")
    if masks and target.masks is not None and target.masks.shape != (count, *size):
        raise ValueError(
            f"{where}.masks must be {(count, *size)}, one mask per box at the size of the image; got "
            f"{tuple(target.masks.shape)}."
        )
    _check_types(where, target, masks)
    crowd = target.crowd
    return Targets(
        boxes=target.boxes.to(torch.promote_types(images.dtype, torch.float32)),
        labels=target.labels.long(),
        masks=target.masks if masks else None,
        crowd=torch.zeros_like(target.labels, dtype=torch.bool) if crowd is None else crowd.bool(),
        size=size,
    )


def _check_types(where: str, target: Targets, masks: bool) -> None:
    """Refuse labels with fractions, and numbers in place of masks, which would be taken for coverage."""
    if len(target.labels) and (target.labels.is_floating_point() or target.labels.dtype == torch.bool):
        raise TypeError(f"{where}.labels must be integers; got {target.labels.dtype}.")
    for name, value in (("masks", target.masks if masks else None), ("crowd", target.crowd)):
        if value is not None and value.dtype != torch.bool:
            raise TypeError(f"{where}.{name} must be bool; got {value.dtype}. Write {name} != 0 or {name} > 0.5.")


def _check_objects(targets: Sequence[Targets], num_classes: int) -> None:
    """Refuse labels out of range, and boxes without area or outside of their image."""
    if torch.compiler.is_compiling() or any(target.boxes.is_meta for target in targets):
        return
    faults = [_faults(target, num_classes) for target in targets]
    if not torch.cat([fault.flatten() for fault in faults]).any():  # one transfer per batch
        return
    index = next(i for i, fault in enumerate(faults) if fault.any())
    kind, row = faults[index].nonzero()[0].tolist()
    target = targets[index]
    box = [round(value, 3) for value in target.boxes[row].tolist()]
    raise ValueError(
        (
            f"targets[{index}].labels[{row}] is {int(target.labels[row])}; labels must be from 0 to {num_classes - 1}, "
            "without an entry for the background.",
            f"targets[{index}].boxes[{row}] is {box}, without area: boxes are (x1, y1, x2, y2) with x1 < x2 and "
            "y1 < y2. Remove it, or convert boxes given as (x, y, width, height).",
            f"targets[{index}].boxes[{row}] is {box}, outside of the image of (height, width) {target.size}. Boxes are "
            "in pixels of the image that the model gets, not fractions of it or pixels of the file; clip them.",
        )[kind]
    )


def _faults(target: Targets, num_classes: int) -> Tensor:
    """Return which objects have a wrong label, no area, or a box outside of the image: bool (3, M)."""
    height, width = target.size  # type: ignore[misc]
    x1, y1, x2, y2 = target.boxes.unbind(1)
    label = (target.labels < 0) | (target.labels >= num_classes)
    empty = ~((x2 > x1) & (y2 > y1))  # also not a number
    outside = (x1 < -OVERHANG) | (y1 < -OVERHANG) | (x2 > width + OVERHANG) | (y2 > height + OVERHANG)
    return torch.stack([label, empty, outside])


def _scaled(found: Detections, size: Size, out_size: Size) -> Detections:
    """Scale boxes from an image to its file. Overlaps, and with them the choice of boxes, do not change."""
    height, width = (new / old for new, old in zip(out_size, size, strict=True))
    return found._replace(boxes=found.boxes * found.boxes.new_tensor([width, height, width, height]))
