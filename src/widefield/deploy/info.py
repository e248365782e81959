"""Describe the class names of an exported model and the images that it expects."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

INFO = "widefield.json"
"""Key of a model's info in PyTorch's archives and OpenVINO's files."""

Numbers = tuple[float, ...]


@dataclass(frozen=True)
class ModelInfo:
    """Class names and image properties of a model. Unknown fields are None, never a guess.

    They are stored in the JSON file next to an export and in the exported file, and :func:`widefield.deploy.load`
    returns them.
    """

    classes: tuple[str, ...] | None = None
    """Class names in the order of the scores."""
    mean: Numbers | None = None
    """Mean of each channel, subtracted from images in [0, 1]."""
    std: Numbers | None = None
    """Standard deviation of each channel, by which they are then divided."""
    size: tuple[int, int] | None = None
    """Height and width of the images in pixels."""

    @classmethod
    def of(cls, model: nn.Module) -> ModelInfo:
        """Return what timm's configuration of a model states (``pretrained_cfg``); empty for other models."""
        config = getattr(model, "pretrained_cfg", None) or {}
        size = config.get("input_size")
        names = config.get("label_names")
        if names is not None and len(names) != getattr(model, "num_classes", None):
            names = None  # they belong to the published weights, but the head was replaced
        return cls(
            None if names is None else tuple(map(str, names)),
            _numbers(config.get("mean")),
            _numbers(config.get("std")),
            None if size is None else (int(size[-2]), int(size[-1])),
        )

    @classmethod
    def from_weights(cls, weights: Any) -> ModelInfo:
        """Return what torchvision states about weights, such as ``torchvision.models.ResNet50_Weights.DEFAULT``.

        Raises:
            TypeError: not weights of torchvision.
        """
        if not hasattr(weights, "meta") or not hasattr(weights, "transforms"):
            raise TypeError(
                f"weights must be of torchvision, such as ResNet50_Weights.DEFAULT; got {weights!r} of type "
                f"{type(weights).__name__}."
            )
        names, shown = weights.meta.get("categories"), weights.transforms()
        side = getattr(shown, "crop_size", None)
        sides = None if not side else (int(side[0]), int(side[-1]))
        mean, std = (_numbers(getattr(shown, name, None)) for name in ("mean", "std"))
        return cls(None if names is None else tuple(names), mean, std, sides)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> ModelInfo:
        """Return the info in a dictionary made by :meth:`to_dict`; other keys are ignored."""
        given = {name: found.get(name) for name in ("classes", "mean", "std", "size")}
        return cls(**{name: None if value is None else tuple(value) for name, value in given.items()})

    def to_dict(self) -> dict[str, Any]:
        """Return all fields in JSON's types."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]


def collected(
    model: nn.Module,
    shape: Sequence[int],
    outputs: int | None,
    *,
    classes: Sequence[str] | None,
    normalization: tuple[Sequence[float], Sequence[float]] | None,
    info: ModelInfo | None,
    fixed: bool,
) -> ModelInfo:
    """Return what is known about a model: the given facts, and timm's configuration for the rest.

    Args:
        model: see :meth:`ModelInfo.of`.
        shape: (N, C, H, W) of the example input.
        outputs: number of classes; None if the output does not tell.
        classes, normalization, info: see :func:`widefield.deploy.export`.
        fixed: the file accepts only images of the example's size.

    Raises:
        TypeError, ValueError: another number of names than outputs; normalization for other channels.
    """
    found = ModelInfo.of(model)
    if info is not None:
        if not isinstance(info, ModelInfo):
            raise TypeError(f"info must be a ModelInfo, such as ModelInfo.from_weights(...); got {info!r}.")
        found = replace(found, **{name: value for name, value in vars(info).items() if value is not None})
    if classes is not None:
        if isinstance(classes, str) or not all(isinstance(name, str) for name in classes):
            raise TypeError(f"classes must be names, one for each output; got {classes!r}.")
        found = replace(found, classes=tuple(classes))
    if normalization is not None:
        mean, std = (tuple(float(value) for value in numbers) for numbers in normalization)
        found = replace(found, mean=mean, std=std)
    given = normalization is not None or (info is not None and (info.mean or info.std) is not None)
    if found.classes is not None and outputs is not None and len(found.classes) != outputs:
        raise ValueError(
            f"classes must have a name for each of the model's {outputs} outputs; got {len(found.classes)}: "
            f"{', '.join(found.classes[:5])}{', ...' if len(found.classes) > 5 else ''}."
        )
    found = _fitting(found, shape[1], given=given)
    return replace(found, size=(shape[2], shape[3])) if fixed else found


def _fitting(found: ModelInfo, channels: int, *, given: bool) -> ModelInfo:
    """Return the info with normalization for this number of channels, or none; raises ValueError if it was given."""
    if found.mean is None and found.std is None:
        return found
    mean, std = found.mean or (), found.std or ()
    if {len(mean), len(std)} != {channels}:
        if not given:
            return replace(found, mean=None, std=None)
        raise ValueError(
            f"normalization must have a mean and a std for each of {channels} channels; got {(mean, std)!r}."
        )
    if not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
        raise ValueError(f"normalization must be finite, and std above 0; got {(mean, std)!r}.")
    return found


def _numbers(found: Any) -> Numbers | None:
    return None if found is None else tuple(float(value) for value in found)


def to_texts(info: ModelInfo) -> dict[str, str]:
    """Return key -> JSON, as stored in ONNX metadata."""
    return {key: json.dumps(value) for key, value in info.to_dict().items()}


def from_texts(texts: Mapping[str, str]) -> ModelInfo:
    """Return the info made by :func:`to_texts`; empty if others wrote these keys."""
    found = {}
    for key, text in texts.items():
        try:
            found[key] = json.loads(text)
        except ValueError:
            continue
    try:
        return ModelInfo.from_dict(found)
    except TypeError:
        return ModelInfo()
