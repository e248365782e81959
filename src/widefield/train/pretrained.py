"""Weights to start from: read from a file or a run, and put into a model whole, or not at all."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from widefield.train import checkpoint

_HEADS = ("head.fc.weight", "head.weight", "fc.weight", "classifier.weight", "head.l.weight")


def read_weights(source: str) -> dict[str, Tensor]:
    """Return the weights in a file (safetensors, or what torch saved), or the best ones of a run, on the CPU.

    Of a training script's checkpoint the moving average is taken, if it holds one. Nothing is unpickled but tensors and
    plain values.

    Raises:
        FileNotFoundError: neither a file nor a run.
        ValueError: a file that holds something else.
    """
    from timm.models import load_state_dict

    path = Path(source).expanduser()
    if path.is_dir():
        path = checkpoint.chosen(path, "best").weights
    elif not path.is_file():
        raise FileNotFoundError(f"model.pretrained: there is neither a file nor a run {source!r}.")
    try:
        weights: dict[str, Any] = load_state_dict(str(path), weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"model.pretrained: {source} holds no weights: {str(error).splitlines()[0]}") from error
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"model.pretrained: {source} holds no weights: its entries must be tensors by name.")
    return weights


def classes_of(weights: Mapping[str, Tensor], heads: Sequence[str] = ()) -> int:
    """Return how many classes weights tell apart, or 0 if they have no head.

    ``heads`` are names of the last layer, such as timm's configurations give; usual ones are tried after them.
    """
    known = [f"{head}{inner}.weight" for head in heads for inner in ("", ".l", ".linear")]
    return next((len(weights[name]) for name in (*known, *_HEADS) if name in weights), 0)


def start_from(
    source: str,
    build: Callable[[dict[str, Any]], nn.Module],
    convert: Callable[[nn.Module], nn.Module],
    classes: int,
    heads: Sequence[str] = (),
    *,
    fresh_head: bool = False,
) -> nn.Module:
    """Return a network with the weights of ``source``, and a fresh head if its classes are others.

    The weights may be those of the plain network, in any form that timm reads for it: then they are loaded first, and
    the conversion keeps their function. Or they are those of the converted one.

    Args:
        source: see :func:`read_weights`.
        build: makes the plain network from arguments of ``timm.create_model``.
        convert: makes the converted network of the plain one.
        classes: of the network that is returned.
        heads: see :func:`classes_of`.
        fresh_head: start the head afresh though its classes are as many, as they are others.

    Raises:
        ValueError: the weights are neither's; the message names keys that differ.
    """
    weights = read_weights(source)
    theirs = classes_of(weights, heads)
    # timm looks at a source before it looks at weights that it was handed.
    overlay = {"state_dict": dict(weights), "num_classes": theirs, "label_offset": 0, "source": ""}
    try:  # with their own number of classes, as timm is lenient with every key where the numbers differ
        model = build({"num_classes": theirs, "pretrained": True, "pretrained_cfg_overlay": overlay})
    except ValueError as plain:
        model = _filled(convert(build({"num_classes": theirs})), weights, source, plain)
    else:
        model = convert(model)
    if theirs != classes or fresh_head:
        model.reset_classifier(classes)  # type: ignore[operator]
    return model


def load_whole(
    source: str,
    build: Callable[[dict[str, Any]], nn.Module],
    convert: Callable[[nn.Module], nn.Module],
    classes: int,
    *,
    fresh_head: bool = False,
) -> nn.Module:
    """Do what :func:`start_from` does, for models that timm does not know.

    Without ``fresh_head`` the head must be of as many classes. It is the weights whose shape goes by their number.
    """
    weights = read_weights(source)
    heads = _class_dependent(build, classes) if fresh_head else []
    theirs = next((len(weights[name]) for name in heads if name in weights), classes)
    given = {"num_classes": theirs}
    try:
        model = convert(_filled(build(given), weights, source, None))
    except ValueError as plain:
        model = _filled(convert(build(given)), weights, source, plain)
    if not fresh_head:
        return model
    fresh = convert(build({"num_classes": classes}))
    fresh.load_state_dict({key: value for key, value in model.state_dict().items() if key not in heads}, strict=False)
    return fresh


def _class_dependent(build: Callable[[dict[str, Any]], nn.Module], classes: int) -> list[str]:
    """Return the names of the weights whose shape goes by the number of classes."""
    with torch.device("meta"):
        one, other = (build({"num_classes": count}).state_dict() for count in (classes, classes + 1))
    return [name for name, value in one.items() if value.shape != other[name].shape]


def _filled(model: nn.Module, weights: Mapping[str, Tensor], source: str, cause: Exception | None) -> nn.Module:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"model.pretrained: {source} does not fit {type(model).__name__}: {error}") from cause
    return model
