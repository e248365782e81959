"""Rebuild a model from its history, and compare the result with the model, so that weights in a file fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from widefield import _checks, _history, _timm, dense, tasks
from widefield.dense import Detector
from widefield.surgery.replay import replay
from widefield.surgery.walk import computed
from widefield.train import run_data
from widefield.train.model import build_model
from widefield.train.recipe_io import parse_recipe

_FREE = frozenset({"training", "grad_checkpointing", "drawn", "pretrained_cfg", "default_cfg", "requires_grad"})
"""Attributes of modules that do not change what a model computes in evaluation mode."""
_REFUSED = frozenset({*_timm.FACTORY, "pretrained"})
"""Arguments of timm that read other files."""


def rebuild(history: Mapping[str, Any]) -> nn.Module:
    """Return a model with the structure that a history describes, in evaluation mode; its weights are random.

    The global random generator is left as it was.

    Args:
        history: of `widefield._history.described`.

    Raises:
        ValueError: the origin is unknown, or a step does not fit; the message says what is missing.
    """
    with torch.random.fork_rng(devices=[]):
        model = replay(_built(history["origin"]).eval(), history["steps"])
    return _history.restore(model, history)


def _built(origin: Mapping[str, Any]) -> nn.Module:
    kind = origin["kind"]
    if kind == _history.TIMM:
        return _of_timm(origin["name"], origin["args"])
    if kind == "torchvision":
        return _of_torchvision(origin["name"], origin["args"])
    if kind == "made":
        return _made(origin["name"], origin["args"])
    if kind == "run":
        recipe, found = parse_recipe(origin["recipe"]), run_data.parse(origin["data"])
        return build_model(recipe, tasks.create(recipe.task.name, found, **recipe.task.args))
    raise ValueError(f"the model is made from {kind!r}, which this version of widefield does not know: update it.")


def _of_timm(name: str, args: Mapping[str, Any]) -> nn.Module:
    import widefield.models  # noqa: F401 (registers ours in timm)

    known = timm.list_models()
    if name not in known:
        raise ValueError(
            f"timm {timm.__version__} knows no network {name!r}.{_checks.did_you_mean(name, known, likeness=0.8)} "
            "Import the module that registers it first, or update timm."
        )
    refused = _REFUSED & set(args)
    if refused:
        raise ValueError(f"the file gives {name} the argument {min(refused)!r}, which reads another file.")
    return _timm.create_model(name, dict(args))


def _of_torchvision(name: str, args: Mapping[str, Any]) -> nn.Module:
    import torchvision.models as tv

    if name not in tv.list_models():
        raise ValueError(f"torchvision knows no model {name!r}.{_checks.did_you_mean(name, tv.list_models())}")
    alone = name in tv.list_models(module=tv)
    weights = {"weights": None} if alone else {"weights": None, "weights_backbone": None}
    model: nn.Module = tv.get_model(name, **weights, **args)
    return _history.set_origin(model, "torchvision", name=name, args=args)


def _made(name: str, args: Mapping[str, Any]) -> nn.Module:
    """Call a public class or function of `widefield.dense`, with models in place of their descriptions."""
    make: Any = getattr(dense, name) if name in dense.__all__ else None
    if not (make is dense.feature_maps or (isinstance(make, type) and issubclass(make, nn.Module))):
        raise ValueError(f"widefield.dense has no model {name!r}: the file is of another version of widefield.")
    given: dict[str, Any] = {
        key: rebuild(value["model"]) if isinstance(value, Mapping) and "model" in value else value
        for key, value in args.items()
    }
    model: nn.Module = make(**given)
    return model


def late_rules(model: nn.Module, twin: nn.Module) -> list[dict[str, Any]]:
    """Return steps that give detectors in a rebuilt model the rules of the original, which may be set at any time."""
    steps = []
    for path, part in model.named_modules():
        if isinstance(part, Detector):
            other = next((found for name, found in twin.named_modules() if name == path), None)
            if isinstance(other, Detector) and other.rules != part.rules:
                steps.append({"do": "rules", "rules": _fields(part.rules), **({"inside": path} if path else {})})
    return steps


def differences(model: nn.Module, twin: nn.Module) -> Iterator[str]:
    """Yield how a rebuilt model differs from the original in structure, a clause each; nothing if it does not.

    Compared are the classes and settings of all modules, hooks, and names, shapes and sharing of tensors. Values of
    parameters are not compared.
    """
    ours, theirs = dict(model.named_modules(remove_duplicate=False)), dict(twin.named_modules(remove_duplicate=False))
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        shown = name or "the model"
        if name not in theirs or name not in ours:
            yield f"{shown} is {_kind(ours.get(name))} in the model and {_kind(theirs.get(name))} when rebuilt"
            continue
        mine, other = ours[name], theirs[name]
        if _kind(mine) != _kind(other):
            yield f"{shown} is {_kind(mine)} in the model and {_kind(other)} when rebuilt"
            continue
        yield from (f"{shown}: {clause}" for clause in _settings(mine, other))
    yield from _tensors(model, twin)


def _kind(module: nn.Module | None) -> str:
    if module is None:
        return "absent"
    if isinstance(module, torch.fx.GraphModule):  # each has a class of its own
        return f"a graph ({module.code})"
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _settings(mine: nn.Module, other: nn.Module) -> Iterator[str]:
    if "forward" in vars(mine) and "_orig_mod" not in mine._modules:
        yield "its forward was replaced"
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        counts = len(getattr(mine, hooks)), len(getattr(other, hooks))
        if counts[0] != counts[1]:
            yield f"it has {counts[0]} forward hooks in the model and {counts[1]} when rebuilt"
    first, second = _plain(mine), _plain(other)
    for key in [*first, *(key for key in second if key not in first)]:
        values = first.get(key, "absent"), second.get(key, "absent")
        if values[0] != values[1]:
            yield f"its {key} is {values[0]!r} in the model and {values[1]!r} when rebuilt"


def _plain(module: nn.Module) -> dict[str, Any]:
    """Return the settings of a module that can be compared: numbers, words, sequences of these, configs, functions."""
    found = {}
    for key, value in vars(module).items():
        if key in _FREE or key in _INTERNAL or key in _history.ATTRIBUTES or key == "forward":
            continue
        if _history.is_plain(value):
            found[key] = _history.plain(value)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type) and _history.is_plain(_fields(value)):
            found[key] = _fields(value)
        elif callable(value) and hasattr(value, "__qualname__"):
            found[key] = value.__qualname__
    return found


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


_INTERNAL = frozenset(vars(nn.Module())) | {"_model_args", "_traits", "pretrained_model_args"}
"""Attributes of torch's module class, and what timm knows about arguments."""


def _tensors(model: nn.Module, twin: nn.Module) -> Iterator[str]:
    ours, theirs = dict(tensors_of(model)), dict(tensors_of(twin))
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        shapes = [tuple(found[name].shape) if name in found else "absent" for found in (ours, theirs)]
        if shapes[0] != shapes[1]:
            yield f"{name} is {shapes[0]} in the model and {shapes[1]} when rebuilt"
    if _sharing(ours) != _sharing(theirs):
        yield "other tensors are shared in the model than when rebuilt"
    reason = computed(model)
    if reason is not None:
        yield reason


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield all parameters and buffers by name, shared ones under each name, also buffers that state dicts lack."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _sharing(named: Mapping[str, Tensor]) -> set[frozenset[str]]:
    groups: dict[int, set[str]] = {}
    for name, tensor in named.items():
        groups.setdefault(id(tensor), set()).add(name)
    return {frozenset(group) for group in groups.values() if len(group) > 1}
