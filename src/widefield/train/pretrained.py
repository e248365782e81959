"""Read initial weights from a file or a run, and load them into a model in full or not at all."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widefield import dense, masking
from widefield.train import checkpoint
from widefield.train.networks import HEAD

_COMPARED = 8
"""Values by which tensors are compared."""
_HEADS = ("head.fc.weight", "head.weight", "fc.weight", "classifier.weight", "head.l.weight")


def read_weights(source: str) -> dict[str, Tensor]:
    """Return the weights in a file (safetensors, or what torch saved), or the best ones of a run, on the CPU.

    The moving average is preferred if a training script's checkpoint holds one. Only tensors and plain values are
    unpickled.

    Raises:
        FileNotFoundError: there is neither a file nor a run.
        ValueError: the file holds something else.
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
    """Return the number of classes of the head among weights, or 0 if there is none.

    Args:
        weights: a state dict.
        heads: names of the last layer, as in timm's configurations; common names are tried after them.
    """
    known = [f"{head}{inner}.weight" for head in heads for inner in ("", ".l", ".linear")]
    return next((len(weights[name]) for name in (*known, *_HEADS) if name in weights), 0)


@dataclass(frozen=True)
class Assembly:
    """The steps from a network's arguments to the model of a recipe.

    Attributes:
        build: makes the network from arguments that go before the recipe's, such as the size of its head.
        convert: makes the converted network of it; the identity without a conversion.
        adapt: makes the task's model of that; the identity for classification.
        classes: size of the network's head, or None if the task does not decide it.
        keypoints: names of the key points in the order of the heatmaps; empty for other tasks.
    """

    build: Callable[[dict[str, Any]], nn.Module]
    convert: Callable[[nn.Module], nn.Module]
    adapt: Callable[[nn.Module], nn.Module]
    classes: int | None
    keypoints: tuple[str, ...] = ()

    def whole(self) -> nn.Module:
        """Return the model with fresh weights."""
        return self.adapt(self.convert(self.build({})))


def _head(classes: int | None) -> dict[str, Any]:
    return {} if classes is None else {HEAD: classes}


def start_from(source: str, assembly: Assembly, heads: Sequence[str] = (), *, fresh_head: bool = False) -> nn.Module:
    """Return a model of timm with the weights of ``source``, and a fresh head if its classes differ.

    The weights may be those of the plain network, in any form that timm reads: they are loaded before the conversion,
    which keeps their function. Or they are those of the converted network, or of the task's whole model. Weights of a
    plain network may have smaller depthwise kernels, or global filters of another size: see :func:`resized`.

    Segmenters, detectors and pose models also start from OpenMMLab's files (:func:`widefield.dense.load_checkpoint`).
    Without such heads in the file, or with another number of classes or other key points, its backbone, or all but the
    last layers, is loaded.

    Args:
        source: see :func:`read_weights`.
        assembly: how to build the model.
        heads: see :func:`classes_of`.
        fresh_head: start with a fresh head although the number of classes is the same.

    Raises:
        ValueError: the weights fit none of these; the message names keys that differ.
    """
    published = _published(source, assembly, fresh_head) if assembly.classes is None else None
    if published is not None:
        return published
    weights = read_weights(source)
    theirs = None if assembly.classes is None else classes_of(weights, heads)
    given = _head(theirs)
    try:  # with their own number of classes: timm ignores missing keys of any kind if the numbers differ
        model = _plain(weights, assembly, given)
    except ValueError as plain:
        model = assembly.convert(assembly.build(given))
        whole = assembly.adapt(model)
        if whole is not model:
            return _filled_either(model, whole, weights, source, plain)
        model = _filled(model, weights, source, plain)
    else:
        model = assembly.convert(model)
    if theirs != assembly.classes or fresh_head:
        model.reset_classifier(assembly.classes)  # type: ignore[operator]
    return assembly.adapt(model)


def start_from_masked(source: str, assembly: Assembly) -> nn.Module | None:
    """Return a model with the encoder of a file or run of masked pre-training, or None if ``source`` is another.

    A model that goes on with the pre-training also gets its decoder and token.

    Raises:
        ValueError: the encoder or decoder does not fit; the message names keys that differ.
    """
    path = Path(source).expanduser()
    try:
        file = masking.read_pretrained(checkpoint.chosen(path, "best").weights if path.is_dir() else path)
    except (FileNotFoundError, ValueError):
        return None
    if file.has_head:
        return None
    model = assembly.build({})
    try:
        try:
            masking.load_encoder(model, file)
            model = assembly.convert(model)
        except ValueError:
            model = assembly.convert(model)  # the encoder may have been converted, too
            masking.load_encoder(model, file)
        whole = assembly.adapt(model)
        if isinstance(whole, masking.MaskedAutoencoder):
            masking.load_pretrained(whole, file)
    except ValueError as error:
        if file.kind == masking.PLAIN:
            return None
        raise ValueError(f"model.pretrained: {error}") from error
    return whole


def _published(source: str, assembly: Assembly, fresh_head: bool) -> nn.Module | None:
    """Return the task's dense model with the weights of a file of OpenMMLab, or None if model or file are others."""
    try:
        info = dense.inspect_checkpoint(source)
    except (FileNotFoundError, ValueError):
        return None
    if not info.published:
        return None
    model = assembly.adapt(assembly.build({}))
    heads = _heads(info, model, assembly.keypoints)
    if heads is None:
        return None
    has_heads, other = heads
    parts = None if has_heads else "backbone"
    try:
        dense.load_checkpoint(model, source, parts=parts, fresh_classifier=other or fresh_head)
    except ValueError as error:
        raise ValueError(f"model.pretrained: {error}") from error
    body = model.get_submodule("backbone.body")
    converted = assembly.convert(body)
    if converted is body:
        return model
    whole = assembly.adapt(converted)
    whole.load_state_dict(
        {key: value for key, value in model.state_dict().items() if not key.startswith("backbone.body.")}, strict=False
    )
    return whole


def _heads(info: dense.CheckpointInfo, model: nn.Module, keypoints: Sequence[str]) -> tuple[bool, bool] | None:
    """Return whether a file has heads as the model has them, and whether their last layers have other outputs.

    None for models whose files are not read.
    """
    if isinstance(model, dense.HeatmapPose):
        named = info.convention.keypoints if info.convention is not None else None
        renamed = named is not None and bool(keypoints) and tuple(named) != tuple(keypoints)
        return info.pose is not None, renamed or info.num_keypoints != model.num_keypoints
    if isinstance(model, dense.Detector):
        return info.detector is not None, info.num_classes != model.num_classes
    if isinstance(model, dense.Segmenter):
        return "decode_head" in info.parts, info.num_classes != model.num_classes
    return None


def _plain(weights: Mapping[str, Tensor], assembly: Assembly, given: Mapping[str, Any]) -> nn.Module:
    """Return timm's plain network with these weights, resized if they do not fit otherwise; raises ValueError."""

    def loaded(state: Mapping[str, Tensor]) -> nn.Module:
        # timm reads a source before weights that are given to it.
        overlay = {"state_dict": dict(state), "label_offset": 0, "source": "", **given}
        model = assembly.build({**given, "pretrained": True, "pretrained_cfg_overlay": overlay})
        known = _starts(state)
        if known and not known & _starts(model.state_dict()):  # a function of the user's may ignore `pretrained`
            raise ValueError("the network does not take the weights that timm gives it")
        return model

    try:
        return loaded(weights)
    except ValueError:
        try:
            whole = assembly.build({**given, "features_only": False}).state_dict()
        except TypeError:  # the recipe has arguments of a network of features only, such as out_indices
            whole = assembly.build(dict(given)).state_dict()
        fitting = resized(weights, {name: value.shape for name, value in whole.items()})
        if fitting is None:
            raise
        return loaded(fitting)


def _starts(state: Mapping[str, Tensor]) -> set[tuple[float, ...]]:
    """Return the first values of every tensor that is not constant: what stays of weights under another name."""
    firsts = (value.flatten()[:_COMPARED].float() for value in state.values() if value.numel() >= _COMPARED)
    return {tuple(first.tolist()) for first in firsts if bool((first != first[0]).any())}


def resized(weights: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor] | None:
    """Return weights whose depthwise kernels and global filters have a network's sizes.

    Smaller kernels get zeros around them, which keeps their function. Global filters (HorNet) are resized bilinearly
    with aligned corners, which keeps their gains at the same relative frequencies. Both are what the authors'
    segmentation code does, of FocalNet and HorNet.

    Args:
        weights: a state dict.
        shapes: those of the network's entries.

    Returns:
        A new state dict, or None if nothing had to be resized.
    """
    found = dict(weights)
    changed = False
    for name, value in weights.items():
        shape = shapes.get(name)
        if shape is None or value.ndim != 4 or len(shape) != 4 or value.shape == shape:
            continue
        gap = [there - here for there, here in zip(shape, value.shape, strict=True)]
        if name.endswith("complex_weight") and gap[0] == gap[3] == 0:
            planes = value.permute(3, 0, 1, 2)
            planes = F.interpolate(planes, tuple(shape[1:3]), mode="bilinear", align_corners=True)
            found[name], changed = planes.permute(1, 2, 3, 0).contiguous(), True
        elif value.shape[1] == 1 and gap[:2] == [0, 0] and all(rest >= 0 and rest % 2 == 0 for rest in gap[2:]):
            rows, columns = gap[2] // 2, gap[3] // 2
            found[name], changed = F.pad(value, (columns, columns, rows, rows)), True
    return found if changed else None


def _filled_either(
    network: nn.Module, whole: nn.Module, weights: Mapping[str, Tensor], source: str, plain: Exception
) -> nn.Module:
    """Load weights into the task's whole model or, if they do not fit, into the network in it."""
    try:
        return _filled(whole, weights, source, plain)
    except ValueError:
        _filled(network, weights, source, plain)
        return whole


def load_whole(source: str, assembly: Assembly, *, fresh_head: bool = False) -> nn.Module:
    """Do what :func:`start_from` does, for models that timm does not know.

    Without ``fresh_head`` the head must have the same number of classes. The head is found as the weights whose shape
    depends on that number.
    """
    weights = read_weights(source)
    heads = _class_dependent(assembly) if fresh_head else []
    theirs = next((len(weights[name]) for name in heads if name in weights), assembly.classes)
    given = _head(theirs)
    try:
        model = assembly.convert(_filled(assembly.build(given), weights, source, None))
    except ValueError as plain:
        model = _filled(assembly.convert(assembly.build(given)), weights, source, plain)
    if not fresh_head:
        return assembly.adapt(model)
    fresh = assembly.convert(assembly.build({}))
    fresh.load_state_dict({key: value for key, value in model.state_dict().items() if key not in heads}, strict=False)
    return assembly.adapt(fresh)


def _class_dependent(assembly: Assembly) -> list[str]:
    """Return the names of the weights whose shape depends on the number of classes."""
    if assembly.classes is None:
        return []
    with torch.device("meta"):
        sizes = assembly.classes, assembly.classes + 1
        one, other = (assembly.build(_head(size)).state_dict() for size in sizes)
    return [name for name, value in one.items() if value.shape != other[name].shape]


def _filled(model: nn.Module, weights: Mapping[str, Tensor], source: str, cause: Exception | None) -> nn.Module:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"model.pretrained: {source} does not fit {type(model).__name__}: {error}") from cause
    return model
