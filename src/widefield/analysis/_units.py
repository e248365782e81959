"""Differentiate one unit of a model with respect to its images: of a layer's map, or a class logit at a pixel."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from widefield.analysis._detectors import DetectionScore, check_detector
from widefield.analysis._keypoints import KeypointPeak, check_pose_model, peaks
from widefield.analysis._model import Layer, layer_name
from widefield.analysis._scores import Scores, class_scores
from widefield.analysis._targets import ClassAt, ClassIn, Target, keypoint_text, label_text
from widefield.analysis.theoretical import (
    Field,
    Position,
    candidates,
    feature_map,
    last_feature_maps,
    theoretical_receptive_field,
    unit,
    unknown,
)

_TRIED = 16
"""Number of layers whose maps are kept to choose from; more take another pass each."""

_CLEARLY = 0.01
"""Share of the differences of other sums from which a sum of channels depends on the image beyond rounding."""

OUTPUT = "(output)"
"""How tables name the layer "", which is the model itself."""


class Look(NamedTuple):
    """The gradient of a unit for some images."""

    gradient: Tensor
    """(N, C, H, W), or (N, C, T, H, W): gradient of the unit with respect to the images."""
    unit: tuple[int, int]
    """(row, column) on the map."""
    places: tuple[int, int]
    """Height and width of the map."""
    cancels: bool = False
    """Whether the channels' gradients cancel out."""


class Unit(ABC):
    """A number for each image that a model computes; ``first`` is called before the other methods."""

    layer: str
    """Name of the layer; "" for the output."""
    where: str
    """The unit's place, for errors."""
    box: tuple[float, float, float, float] | None = None
    """(left, top, right, bottom) in pixels of the box that was asked about."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @abstractmethod
    def first(self, images: Tensor) -> Look:
        """Look at the first batch of images, and decide what is still open."""

    @abstractmethod
    def look(self, images: Tensor) -> Look:
        """Return the gradients for images (N, C, H, W)."""

    @abstractmethod
    def about(self, look: Look) -> dict[str, Any]:
        """Return facts to store with a result."""

    @abstractmethod
    def of(self) -> str:
        """Return the class and its place as text; "" for a unit of a layer."""

    def theory(self, images: Tensor, look: Look) -> Field:
        """Return the theoretical field of the unit that was looked at."""
        try:
            return theoretical_receptive_field(self.model, images, layer=self.layer, position=look.unit)
        except (RuntimeError, ValueError) as error:  # compiled or scripted code may hide its operators
            reason = f"its operators cannot be followed: {str(error.__cause__ or error).splitlines()[0]}"
            return unknown(images, look.places, look.unit, reason)


def chosen(
    model: nn.Module,
    layer: Layer | None,
    position: Position,
    targets: Target | DetectionScore | KeypointPeak | None,
    classes: Sequence[str] | None,
) -> Unit:
    """Return the unit that arguments of ``effective_receptive_field`` choose; raises ValueError or TypeError."""
    if targets is None:
        return LayerUnit(model, None if layer is None else layer_name(model, layer), position)
    if not isinstance(targets, (ClassAt, ClassIn, DetectionScore, KeypointPeak)):
        raise TypeError(f"targets must be a ClassAt, ClassIn, DetectionScore or KeypointPeak; got {targets!r}.")
    if layer is not None or position != "center":
        raise ValueError("targets are logits of the model's output: leave out layer and position, or targets.")
    if isinstance(targets, DetectionScore):
        check_detector(model, "DetectionScore")
        return BoxLogit(model, targets, classes)
    if isinstance(targets, KeypointPeak):
        check_pose_model(model, "KeypointPeak")
        return Peak(model, targets, classes)
    return ClassLogit(model, targets, classes)


class LayerUnit(Unit):
    """The sum of all channels at one position of a layer's map.

    Args:
        model: in evaluation mode.
        name: the layer; None: the last one of the backbone whose channel sum has a gradient.
        position: on the map.
    """

    def __init__(self, model: nn.Module, name: str | None, position: Position) -> None:
        super().__init__(model)
        self.name, self.position = name, position

    @property
    def where(self) -> str:  # type: ignore[override]
        """The unit's place, for errors."""
        return f"layer {self.layer!r} of {type(self.model).__name__}"

    def first(self, images: Tensor) -> Look:
        """Look through the first layer whose channel sum has a gradient; one forward pass finds it."""
        with torch.inference_mode(False), torch.enable_grad():
            leaf = images.detach().clone().requires_grad_()
            maps = self._maps(leaf)
            for name, found in maps.items():
                self.layer = name
                look = self._checked(images, leaf, found)
                if look is not None:
                    return look
        for name in candidates(self.model, images[:1].clone())[::-1] if self.name is None else ():
            self.layer = name
            if name not in maps and not self._look(images[:1], check=True).cancels:
                return self._look(images)
        raise ValueError(
            f"the channels of layer {next(iter(maps))!r} of {type(self.model).__name__} always sum to the same value, "
            "as after a freshly initialized layer norm, so their sum has no gradient. Give the layer before it."
        )

    def look(self, images: Tensor) -> Look:
        """Return the gradients for images (N, C, H, W)."""
        return self._look(images)

    def _maps(self, leaf: Tensor) -> dict[str, Tensor]:
        """Return the maps to choose from by layer, the first choice first."""
        if self.name is None:
            return last_feature_maps(self.model, leaf.clone(), _TRIED)  # a copy, as models may modify their input
        return {self.name: feature_map(self.model, self.name, leaf.clone())}

    def _checked(self, images: Tensor, leaf: Tensor, found: Tensor) -> Look | None:
        """Return the gradients, or None if those of the channels cancel out."""
        if len(images) == 1:
            look = self._differentiated(leaf, found, check=True)
            return None if look.cancels else look
        row, column = unit(self.position, found, self.layer)
        if not _varies(found[:, :, row, column]) and self._look(images[:1], check=True).cancels:
            return None  # the check takes a second backward pass, so it is made on one image
        return self._differentiated(leaf, found)

    def _look(self, images: Tensor, *, check: bool = False) -> Look:
        with torch.inference_mode(False), torch.enable_grad():
            leaf = images.detach().clone().requires_grad_()
            return self._differentiated(leaf, feature_map(self.model, self.layer, leaf.clone()), check=check)

    def _differentiated(self, leaf: Tensor, found: Tensor, *, check: bool = False) -> Look:
        row, column = unit(self.position, found, self.layer)
        channels = found[:, :, row, column]
        gradient = _gradient(channels.sum(), leaf, keep=check)
        cancels = False
        if gradient is not None and check and channels.shape[1] > 1:
            other = _gradient((channels * _signs(channels)).sum(), leaf, keep=True)
            noise = min(0.1, 1000 * torch.finfo(leaf.dtype).eps)
            cancels = other is not None and bool(gradient.norm() <= noise * other.norm()) and bool(other.any())
        if gradient is None:
            raise ValueError(
                f"{self.where} has no gradient with respect to the images: it does not depend on them, or is computed "
                "without gradients (torch.no_grad, detach)."
            )
        return Look(gradient, (row, column), (found.shape[2], found.shape[3]), cancels)

    def about(self, look: Look) -> dict[str, Any]:
        """Return facts to store with a result."""
        h, w = look.places
        return {"layer": self.layer or OUTPUT, "unit": f"{look.unit} of {h if h == w else f'{h}x{w}'}"}

    def of(self) -> str:
        """Return "", as this is no class logit."""
        return ""


def _signs(channels: Tensor) -> Tensor:
    """Return random signs for channels (N, C), as many of each."""
    signs = torch.ones(channels.shape[1])
    signs[torch.randperm(len(signs), generator=torch.Generator().manual_seed(0))[::2]] = -1
    return signs.to(channels)


def _varies(channels: Tensor) -> bool:
    """Return whether the sum of channels (N, C) differs between images, measured against a sum with random signs."""
    channels = channels.detach().double()
    total, other = channels.sum(1), (channels * _signs(channels)).sum(1)
    return bool(total.max() - total.min() > _CLEARLY * (other.max() - other.min()))


class Logit(Unit):
    """A class's logit in a model's output.

    Args:
        model: in evaluation mode.
        target: the class and its place.
        classes: names of the classes.
    """

    layer = ""

    def __init__(self, model: nn.Module, target: Target | DetectionScore, classes: Sequence[str] | None) -> None:
        super().__init__(model)
        self.target, self.classes = target, classes
        self.labels: list[int] = []
        self.place = ""

    @property
    def where(self) -> str:  # type: ignore[override]
        """The unit's place, for errors."""
        return f"a class logit of {type(self.model).__name__} at {self.place}"

    def first(self, images: Tensor) -> Look:
        """Look at the first batch of images."""
        self.place = self.target.place(images.shape[-2:])
        return self.look(images)

    def look(self, images: Tensor) -> Look:
        """Return the gradients for images (N, C, H, W), and remember their classes."""
        H, W = images.shape[-2:]
        with torch.inference_mode(False), torch.enable_grad():
            leaf = images.detach().clone().requires_grad_()
            scores = class_scores(self.model, leaf.clone(), target=self.target)
            labels = self._labels(scores.predicted, scores.values.shape[1])
            gradient = _gradient(scores.values.gather(1, labels[:, None]).sum(), leaf)
        if gradient is None:
            raise ValueError(f"{self.where} has no gradient: it is computed without gradients (torch.no_grad, detach).")
        self.labels += labels.tolist()
        return Look(gradient, self._middle((H, W), scores), (H, W))

    def _labels(self, predicted: Tensor, count: int) -> Tensor:
        if self.classes is not None and len(self.classes) != count:
            raise ValueError(f"classes has {len(self.classes)} names, but the model returns {count} logits.")
        if self.target.label is None:
            return predicted
        if self.target.label >= count:
            raise ValueError(f"label must be a class from 0 to {count - 1}; got {self.target.label}.")
        return torch.full_like(predicted, self.target.label)

    @abstractmethod
    def _middle(self, size: tuple[int, int], scores: Scores) -> tuple[int, int]:
        """Return the pixel in the middle of what was asked about."""

    def about(self, look: Look) -> dict[str, Any]:
        """Return facts to store with a result."""
        return {"of": self.of(), "labels": self.labels}

    def of(self) -> str:
        """Return the class and its place as text."""
        label = self.target.label
        known = label_text(label, self.classes) if label is not None else "largest class"
        return f"{known} at {self.place}"


class ClassLogit(Logit):
    """A class's logit at a pixel, or its mean over a region, of a segmentation model's output."""

    target: Target

    def _middle(self, size: tuple[int, int], scores: Scores) -> tuple[int, int]:
        middle = self.target.where(size).nonzero().double().mean(0)
        return int(middle[0]), int(middle[1])

    def theory(self, images: Tensor, look: Look) -> Field:
        """Return the theoretical field of the pixel; that of a region is not computed."""
        if isinstance(self.target, ClassIn):
            return unknown(images, look.places, look.unit, "a region has a field for each of its pixels")
        return super().theory(images, look)


class BoxLogit(Logit):
    """A class's logit for one box of a detector."""

    target: DetectionScore

    def first(self, images: Tensor) -> Look:
        """Look at the first batch of images."""
        found = super().first(images)
        if self.target.label is None and len(images) == 1:  # name what was found
            self.place = f"{self.place}, {label_text(self.labels[0], self.classes)}"
        return found

    def look(self, images: Tensor) -> Look:
        """Return the gradients for images (N, C, H, W); raises ValueError without such a detection."""
        if self.target.box is None and len(self.labels) + len(images) > 1:
            raise ValueError(
                "the detections of several images lie at different places, so the mean of their fields says little: "
                "give one image, or a box; object_receptive_fields centers the fields of objects before it averages."
            )
        return super().look(images)

    def _labels(self, predicted: Tensor, count: int) -> Tensor:
        if (predicted < 0).any():
            of = "" if self.target.label is None else f" of {label_text(self.target.label, self.classes)}"
            raise ValueError(
                f"{type(self.model).__name__} has no detection {self.target.index}{of} in this image: give a smaller "
                "index (0 is the best), another image or a box, or lower the detector's score_threshold."
            )
        return super()._labels(predicted, count)

    def _middle(self, size: tuple[int, int], scores: Scores) -> tuple[int, int]:
        if scores.boxes is None:  # class_scores returns them for every DetectionScore
            raise TypeError("the scores have no boxes.")
        left, top, right, bottom = scores.boxes[0].tolist()
        self.box = (left, top, right, bottom)
        row, column = (top + bottom) / 2, (left + right) / 2
        return min(int(row), size[0] - 1), min(int(column), size[1] - 1)

    def of(self) -> str:
        """Return the class and its box as text."""
        if self.target.label is None:
            return self.place
        return f"{label_text(self.target.label, self.classes)} at {self.place}"

    def theory(self, images: Tensor, look: Look) -> Field:
        """Return the field of the box's middle, whose extent is not computed."""
        return unknown(images, look.places, look.unit, "a box has a field for each of its positions")


class Peak(Unit):
    """The value of a key point's heatmap at its peak.

    Args:
        model: in evaluation mode; gives heatmaps.
        target: the key point.
        names: of the key points.
    """

    layer = ""

    def __init__(self, model: nn.Module, target: KeypointPeak, names: Sequence[str] | None) -> None:
        super().__init__(model)
        self.target, self.names = target, names
        self.keypoint: int | None = None

    @property
    def where(self) -> str:  # type: ignore[override]
        """The unit's place, for errors."""
        return f"a heatmap of {type(self.model).__name__} at its peak"

    def first(self, images: Tensor) -> Look:
        """Look at the first batch of images."""
        return self.look(images)

    def look(self, images: Tensor) -> Look:
        """Return the gradients for an image (1, C, H, W); raises ValueError for several images."""
        if self.keypoint is not None or len(images) > 1:
            raise ValueError(
                "a key point is at different places in several images, so the mean of their fields says little: give "
                "one image; keypoint_receptive_fields centers the fields of key points before it averages."
            )
        with torch.inference_mode(False), torch.enable_grad():
            leaf = images.detach().clone().requires_grad_()
            found = peaks(self.model, leaf.clone())
            count = found.values.shape[1]
            if self.names is not None and len(self.names) != count:
                raise ValueError(f"classes has {len(self.names)} names, but the model has {count} key points.")
            chosen = int(found.values[0].argmax()) if self.target.keypoint is None else self.target.keypoint
            if chosen >= count:
                raise ValueError(f"keypoint must be from 0 to {count - 1}; got {chosen}.")
            gradient = _gradient(found.values[0, chosen], leaf)
        if gradient is None:
            raise ValueError(f"{self.where} has no gradient: it is computed without gradients (torch.no_grad, detach).")
        self.keypoint = chosen
        row, column = found.pixels[0, chosen].tolist()
        return Look(gradient, (row, column), found.size)

    def about(self, look: Look) -> dict[str, Any]:
        """Return facts to store with a result."""
        h, w = look.places
        return {"of": self.of(), "unit": f"{look.unit} of {h if h == w else f'{h}x{w}'}"}

    def of(self) -> str:
        """Return the key point as text."""
        return "" if self.keypoint is None else f"{keypoint_text(self.keypoint, self.names)} at its peak"

    def theory(self, images: Tensor, look: Look) -> Field:
        """Return the place of the unit, whose field is not computed."""
        reason = "transposed convolutions reach other pixels from even positions than from odd ones"
        return unknown(images, look.places, look.unit, reason)


def _gradient(value: Tensor, leaf: Tensor, *, keep: bool = False) -> Tensor | None:
    if not value.requires_grad:
        return None
    found: Tensor | None = torch.autograd.grad(value, leaf, retain_graph=keep, allow_unused=True)[0]
    return found
