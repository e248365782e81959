"""What whoever serves a model has to know of it: names of its classes, and the images that it expects."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

INFO = "widefield.json"
"""Where PyTorch's archives, and OpenVINO's files, hold a model's info."""

Numbers = tuple[float, ...]


@dataclass(frozen=True)
class ModelInfo:
    """Classes and images of a model, as far as they are known. What is not known is None, never a guess.

    It stands in the JSON file beside an export and in the exported file itself, and :func:`widefield.deploy.load`
    gives it back.
    """

    classes: tuple[str, ...] | None = None
    """Names of the outputs, in order."""
    mean: Numbers | None = None
    """Of each channel, to subtract from images in [0, 1]."""
    std: Numbers | None = None
    """Of each channel, to divide by after that."""
    size: tuple[int, int] | None = None
    """Height and width of the images in pixels."""

    @classmethod
    def of(cls, model: nn.Module) -> ModelInfo:
        """Return what timm's configuration of a model says (``pretrained_cfg``); nothing for models without one."""
        config = getattr(model, "pretrained_cfg", None) or {}
        size = config.get("input_size")
        names = config.get("label_names")
        if names is not None and len(names) != getattr(model, "num_classes", None):
            names = None  # of the weights that were published, and the head is another
        return cls(
            None if names is None else tuple(map(str, names)),
            _numbers(config.get("mean")),
            _numbers(config.get("std")),
            None if size is None else (int(size[-2]), int(size[-1])),
        )

    @classmethod
    def from_weights(cls, weights: Any) -> ModelInfo:
        """Return what torchvision says of weights, such as ``torchvision.models.ResNet50_Weights.DEFAULT``.

        Raises:
            TypeError: no weights of torchvision.
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
        """Return what :meth:`to_dict` gave, whatever else stands beside it."""
        given = {name: found.get(name) for name in ("classes", "mean", "std", "size")}
        return cls(**{name: None if value is None else tuple(value) for name, value in given.items()})

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
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
    """Return what is known of a model: what is given, and for the rest what its configuration says.

    Args:
        model: see :meth:`ModelInfo.of`.
        shape: (N, C, H, W) of the example.
        outputs: number of classes that the model tells apart; None where its output does not say.
        classes, normalization, info: of :func:`widefield.deploy.export`.
        fixed: the file takes images of the example's size only.

    Raises:
        TypeError, ValueError: names that are not as many as the outputs; normalization of other channels.
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
    """Return it with a normalization of so many channels, or none; raises ValueError for one that was given."""
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
    """Return key -> JSON, as an ONNX file's own metadata hold it."""
    return {key: json.dumps(value) for key, value in info.to_dict().items()}


def from_texts(texts: Mapping[str, str]) -> ModelInfo:
    """Return what :func:`to_texts` gave; nothing for what others wrote under these keys."""
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
