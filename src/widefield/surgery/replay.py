"""Repeat the steps of a model's history on a freshly built model, so that the weights of the changed one fit.

The functions of this room decide from weights, images and example inputs. The steps name what was decided, so that
repeating them needs none of these. The numbers of the repeated model mean nothing: its weights are loaded next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from widefield import _history
from widefield.nn import DepthwiseConv2d
from widefield.nn.fusing import fold_norm
from widefield.nn.gmconv import DynamicGMConv2d
from widefield.surgery.conversions import Conversion
from widefield.surgery.elastic import choose_sizes
from widefield.surgery.folding import without_norm
from widefield.surgery.plain import as_torch, with_numbers
from widefield.surgery.trim_kernels import crop_kernels
from widefield.surgery.walk import merge, replace

Step = Mapping[str, Any]


def replay(model: nn.Module, steps: Iterable[Step]) -> nn.Module:
    """Return a model after these steps, in evaluation mode; it is changed in place.

    Args:
        model: as it was before the first step.
        steps: of `widefield._history.steps`.

    Raises:
        ValueError: a step does not fit the model, or is of a kind that this version does not know.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for number, step in enumerate(steps):
            model = _repeated(model.eval(), number, step)
    return model.eval()


def _repeated(model: nn.Module, number: int, step: Step) -> nn.Module:
    do, path = str(step["do"]), str(step.get("inside", ""))
    if do == _history.UNKNOWN:
        raise ValueError(f"step {number}: {step['why']}.")
    if do not in _KINDS:
        raise ValueError(f"step {number} is {do!r}, which this version of widefield does not know: update widefield.")
    part = model
    try:
        if path:
            part = model.get_submodule(path)
        changed = _KINDS[do](part, step)
        if not path:
            return changed
        if changed is not part:
            model.set_submodule(path, changed)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"step {number}, {do!r}, does not fit this {type(part).__name__}: {type(error).__name__}: {error}"
        ) from error
    return model


def _convert(model: nn.Module, step: Step) -> nn.Module:
    kinds = {kind.__name__: kind for kind in Conversion.__subclasses__() if _history.is_ours(kind)}
    modules = dict(model.named_modules())
    chosen: dict[nn.Module, nn.Module] = {}
    for group in step["groups"]:
        config: Any = kinds[group["config"]]
        conversion = config(**group["args"])
        chosen |= {modules[name]: conversion.replacement(modules[name]) for name in group["layers"]}
    return replace(model, chosen)


def _fuse(model: nn.Module, step: Step) -> nn.Module:
    modules = dict(model.named_modules())
    return replace(model, {modules[name]: merge(modules[name], method) for name, method in step["layers"]})


def _reparameterize(model: nn.Module, step: Step) -> nn.Module:
    modules: dict[str, Any] = dict(model.named_modules())
    replacements: dict[nn.Module, nn.Module] = {}
    for name, method, norm in step["merged"]:
        module = modules[name]
        merged = merge(module, method) if norm is None else module.fuse(modules[norm])
        if merged is not module:
            replacements[module] = with_numbers(merged) if isinstance(module, DepthwiseConv2d) else merged
        if norm is not None:
            replacements[modules[norm]] = without_norm(modules[norm])
    model = replace(model, replacements).eval()
    modules, replacements = dict(model.named_modules()), {}
    for name, norm in step["folded"]:
        replacements[modules[name]] = fold_norm(modules[name], modules[norm])
        replacements[modules[norm]] = without_norm(modules[norm])
    model = replace(model, replacements)
    modules = dict(model.named_modules())
    return replace(model, {modules[name]: as_torch(modules[name], called=True) for name in step["plain"]})


def _trim(model: nn.Module, step: Step) -> nn.Module:
    sizes = {name: tuple((rows, columns) for rows, columns in given) for name, given in step["sizes"].items()}
    return crop_kernels(model, sizes, inplace=True)


def _specialize(model: nn.Module, step: Step) -> nn.Module:
    modules: dict[str, Any] = dict(model.named_modules())
    return replace(model, {modules[name]: _static(modules[name]) for name in step["layers"]})


def _static(layer: Any) -> nn.Module:
    """Return a routed layer as one convolution, for any routing."""
    shape = layer.kernel_size if isinstance(layer, DynamicGMConv2d) else (len(layer.kernel_sizes),)
    made: nn.Module = layer.collapse(torch.full(tuple(shape), 1 / math.prod(shape)))
    return made


def _choose_sizes(model: nn.Module, step: Step) -> nn.Module:
    choose_sizes(model, step["sizes"])
    return model


def _set(model: nn.Module, step: Step) -> nn.Module:
    """Set the eps of norms: published weights need that of the code they were trained with."""
    if step["attribute"] not in SETTABLE:
        raise ValueError(f"{step['attribute']!r} cannot be set; there are {', '.join(SETTABLE)}.")
    for name in step["layers"]:
        setattr(model.get_submodule(name), step["attribute"], step["value"])
    return model


def _rules(model: nn.Module, step: Step) -> nn.Module:
    """Set which boxes become detections."""
    detector: Any = model
    detector.rules = type(detector.rules)(**step["rules"])
    return model


SETTABLE = ("eps",)
"""Attributes that a step may set."""

_KINDS: Mapping[str, Callable[[nn.Module, Step], nn.Module]] = {
    "convert": _convert,
    "fuse_layers": _fuse,
    "reparameterize": _reparameterize,
    "trim": _trim,
    "specialize": _specialize,
    "choose_sizes": _choose_sizes,
    "set": _set,
    "rules": _rules,
}
"""What a step does -> how it is repeated."""
