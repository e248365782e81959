"""Run models and read their outputs: their tensors, the main one, and how to wrap a model to return it."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

MEANT = ("logits", "out")
"""Names of a model's main tensor: "logits" in Hugging Face's outputs, torchvision's GoogLeNet and Inception, and "out"
in torchvision's segmentation models."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for one block; each module gets its own mode back."""
    modes: list[tuple[Any, bool]] = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def aligned_corners(model: object) -> bool:
    """Return a model's ``align_corners``: whether its logits are resized with aligned corners; False if it has none."""
    return bool(getattr(model, "align_corners", False))


def tensors(output: Any) -> list[Tensor]:
    """Return the tensors of an output in order: alone, or in tuples, mappings and dataclasses."""
    return [tensor for _, tensor in _parts(output, "")]


def meant(output: Any) -> Tensor | None:
    """Return the main tensor of an output, or None if it is ambiguous.

    It is the output itself, the entry with the first name in :data:`MEANT` that exists, or the only tensor.
    """
    named = {name: value for name, _, value in _entries(output)}
    for name in MEANT:
        one = named.get(name)
        if isinstance(one, Tensor):
            return one
    found = tensors(output)
    return found[0] if len(found) == 1 else None


def place_of_meant(output: Any) -> int | None:
    """Return the index in :func:`tensors` of the tensor that :func:`meant` returns, or None."""
    one = meant(output)
    return next((index for index, tensor in enumerate(tensors(output)) if tensor is one), None)


def described(output: Any) -> str:
    """Return an output's description: "(2, 5)" for a tensor, else for example "dict with ['masks'] (2, 5, 8, 8)"."""
    if isinstance(output, Tensor):
        return str(tuple(output.shape))
    parts = [f"{path} {tuple(tensor.shape)}" for path, tensor in _parts(output, "")]
    more = f" and {len(parts) - 6} more" if len(parts) > 6 else ""
    kind = type(output).__name__
    return f"{kind} with {', '.join(parts[:6])}{more}" if parts else f"{kind} without a tensor"


def wrapping(output: Any) -> str:
    """Return a sentence on how to wrap a model with this output; empty if there is nothing to choose.

    It shows the first tensor of shape (N, classes), or else the first tensor.
    """
    parts = _parts(output, "")
    if isinstance(output, Tensor) or not parts:
        return ""
    shown = next((path for path, tensor in parts if tensor.ndim == 2), parts[0][0])
    return (
        " Wrap the model in a module that returns one tensor: class Wrapped(torch.nn.Module), whose forward is "
        f"return self.model(images){shown}."
    )


def exchanged(output: Any, old: Tensor, new: Tensor) -> Any:
    """Return a copy of an output with one of its tensors replaced, at any depth."""
    if output is old:
        return new
    if isinstance(output, Tensor):
        return output
    if isinstance(output, MutableMapping):
        twin = copy.copy(output)
        twin.update({key: exchanged(value, old, new) for key, value in output.items()})
        return twin
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        values = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
        return dataclasses.replace(output, **{key: exchanged(value, old, new) for key, value in values.items()})
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*(exchanged(value, old, new) for value in output))
    if isinstance(output, (tuple, list)):
        return type(output)(exchanged(value, old, new) for value in output)
    return output


def plainly(model: nn.Module, x: Tensor) -> nn.Module:
    """Return a model whose output holds only tensors, tuples, lists and dicts, which tracers understand.

    This is the model itself if it already does so. Of other outputs only the tensors are kept, by name if they have
    names, or else in a tuple.

    Args:
        model: in evaluation mode.
        x: images that the model runs on.
    """
    with torch.no_grad():
        output = model(x.clone())  # models may change their input in place
    return model if _is_plain(output) or not tensors(output) else _Plainly(model).eval()


class _Plainly(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return _plain(self.model(images))


def _plain(output: Any) -> Any:
    entries = [(name, value) for name, _, value in _entries(output) if isinstance(value, Tensor) or tensors(value)]
    if not entries:
        return output
    values = [value if isinstance(value, Tensor) else _plain(value) for _, value in entries]
    if all(name is not None for name, _ in entries):
        return {name: value for (name, _), value in zip(entries, values, strict=True)}
    return tuple(values)


def _is_plain(output: Any) -> bool:
    if type(output) in (tuple, list):
        return all(map(_is_plain, output))
    if type(output) in (dict, OrderedDict):
        return all(map(_is_plain, output.values()))
    return isinstance(output, Tensor)


def _parts(output: Any, path: str) -> list[tuple[str, Tensor]]:
    """Return (path in code, tensor) for every tensor in an output."""
    if isinstance(output, Tensor):
        return [(path, output)]
    return [part for _, step, value in _entries(output) for part in _parts(value, path + step)]


def _entries(output: Any) -> Iterator[tuple[str | None, str, Any]]:
    """Yield (name or None, step in code, value) for each entry of an output; nothing for tensors and plain values."""
    if isinstance(output, Tensor):
        return
    if isinstance(output, Mapping):
        yield from ((str(key), f"[{key!r}]", value) for key, value in output.items())
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        names = [field.name for field in dataclasses.fields(output)]
        yield from ((name, f".{name}", getattr(output, name)) for name in names)
    elif isinstance(output, tuple) and hasattr(output, "_fields"):
        yield from ((name, f".{name}", getattr(output, name)) for name in output._fields)
    elif isinstance(output, (tuple, list)):
        yield from ((None, f"[{index}]", value) for index, value in enumerate(output))
    elif (leaves := tree_leaves(output)) and leaves[0] is not output:
        yield from ((None, f"[{index}]", value) for index, value in enumerate(leaves))
