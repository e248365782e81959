"""Build networks of timm or torchvision from name and arguments; an argument without effect is an error."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import timm
import torch
from timm.models import _builder, model_entrypoint, split_model_name_tag
from torch import nn

from widefield import _checks, _history, _timm
from widefield.train.recipe import ModelSpec

TORCHVISION = "torchvision:"
"""Prefix of the names of torchvision's models."""
HEAD = "num_classes"
"""The argument of timm and torchvision that sizes a network's head."""
_AUXILIARY = ("googlenet", "inception_v3")
"""Networks of torchvision that return several outputs in training unless ``aux_logits`` is off."""
_BUILDER = ("features_only", "feature_cls", "out_indices", "pruned", "device", "dtype")
"""Arguments that timm reads between its factory and the model's class."""
_NONSENSE = "no_such_argument"


def is_model(name: str) -> bool:
    """Return whether timm, or with the prefix ``torchvision:`` torchvision, has a classifier of this name."""
    import widefield.models  # noqa: F401 (registers ours in timm)

    if name.startswith(TORCHVISION):
        import torchvision.models as tv

        return name.removeprefix(TORCHVISION) in tv.list_models(module=tv)
    return name.partition(".")[0] in timm.list_models()


def create_model(spec: ModelSpec, decided: Mapping[str, Any] = MappingProxyType({})) -> nn.Module:
    """Build ``timm.create_model(spec.name, **spec.args, **decided)``, with timm's weights if ``spec.pretrained``.

    Unlike timm's function it passes arguments that are None: ``ls_init_value=None`` builds a ConvNeXt without layer
    scale. Names that start with ``torchvision:`` are models of torchvision, with its default weights.

    Args:
        spec: name and arguments from the user.
        decided: further arguments, which the user must not give.

    Raises:
        ValueError: the model is unknown; an argument is decided already, or the model refuses it.
        TypeError: the model does not have an argument, or ignores it.
        FileNotFoundError: a file of weights among the arguments does not exist.
    """
    import widefield.models  # noqa: F401 (registers ours in timm)

    for key in decided:
        if key in spec.args:
            raise ValueError(f"model.args.{key} is decided by the task ({decided[key]!r}); leave it out.")
    if spec.name.startswith(TORCHVISION):
        return _of_torchvision(spec, decided)
    return _of_timm(spec, decided)


def _of_timm(spec: ModelSpec, decided: Mapping[str, Any]) -> nn.Module:
    name, known = spec.name, timm.list_models()
    if ":" not in name and name.partition(".")[0] not in known:  # a colon: timm's sources, such as hf-hub:
        raise ValueError(f"model.name: timm knows no model {name!r}.{_checks.did_you_mean(name, known)}")
    start = {"pretrained": True} if spec.pretrained else {}
    file = spec.args.get("checkpoint_path")
    if isinstance(file, str) and not Path(file).is_file():
        raise FileNotFoundError(f"model.args.checkpoint_path: there is no file {file!r}.")
    try:
        with _filtered() as dropped:
            model = _timm.create_model(name, {**spec.args, **start, **decided})
    except (TypeError, LookupError, AssertionError, RuntimeError, AttributeError) as error:
        raise _refusal(spec, error) from error
    except FileNotFoundError as error:  # timm's error has no text
        raise FileNotFoundError(f"the file of weights in model.args {spec.args} does not exist.") from error
    for key in dropped:
        if key in decided:
            raise ValueError(f"model.name: {name} has no head for {key}={decided[key]!r}; use a classifier.")
        if key in spec.args:
            raise TypeError(f"model.args.{key}: {name} accepts and ignores this argument; leave it out.")
    if ":" not in name:
        entry = model_entrypoint(split_model_name_tag(name)[0])
        _check_heeded(spec, model, entry, lambda args: _timm.create_model(name, {**args, **decided}))
    return model


@contextmanager
def _filtered() -> Iterator[list[str]]:
    """Yield a list that collects the names of the arguments that timm drops in the block."""
    dropped: list[str] = []
    original = getattr(_builder, "_filter_kwargs", None)  # a private function, which another timm may not have
    if original is None:
        yield dropped
        return

    def recorded(kwargs: dict[str, Any], names: Iterable[str] | None) -> None:
        dropped.extend(key for key in names or () if key in kwargs)
        original(kwargs, names)

    _builder._filter_kwargs = recorded
    try:
        yield dropped
    finally:
        _builder._filter_kwargs = original


def _of_torchvision(spec: ModelSpec, decided: Mapping[str, Any]) -> nn.Module:
    import torchvision.models as tv

    name = spec.name.removeprefix(TORCHVISION)
    known = tv.list_models(module=tv)
    if name not in known and name in tv.list_models():
        raise ValueError(
            f"model.name: torchvision's {name!r} is not an image classifier, and only those are built by name. Build "
            "it in Python, and pass it to widefield's functions, which take any module."
        )
    if name not in known:
        raise ValueError(f"model.name: torchvision knows no model {name!r}.{_checks.did_you_mean(name, known)}")
    given = {"aux_logits": False} if name in _AUXILIARY and not spec.pretrained else {}
    if spec.pretrained and decided:
        raise ValueError(
            f"model.pretrained: torchvision's {name} comes with a head for ImageNet; give a file of weights, or a "
            f"model of timm, which makes a head for other classes."
        )

    def build(args: Mapping[str, Any], weights: str | None = None) -> nn.Module:
        model: nn.Module = tv.get_model(name, weights=weights, **{**given, **args, **decided})
        return model

    try:
        model = build(spec.args, "DEFAULT" if spec.pretrained else None)
    except (TypeError, ValueError) as error:
        raise ValueError(f"torchvision cannot build {name!r} with model.args {spec.args}: {error}.") from error
    _check_heeded(spec, model, tv.get_model_builder(name), build)
    return _history.set_origin(model, "torchvision", name=name, args={**given, **spec.args, **decided})


def _refusal(spec: ModelSpec, error: Exception) -> Exception:
    """Return the error for arguments that timm or the model refused."""
    name, args = spec.name, spec.args
    unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if unknown is None or unknown[2] not in args:
        return ValueError(
            f"timm cannot build {name!r} with model.args {args}: {type(error).__name__}: {str(error).rstrip('.')}."
        )
    taker, key = unknown.groups()
    module = sys.modules[model_entrypoint(name).__module__] if timm.is_model(name) else None
    known = inspect.signature(getattr(module, taker)).parameters if hasattr(module, taker) else ()
    return TypeError(
        f"model.args.{key}: {name} has no such argument.{_checks.did_you_mean(key, known)} It takes those of {taker}."
    )


def _check_heeded(
    spec: ModelSpec, model: nn.Module, entry: Callable[..., Any], build: Callable[[Mapping[str, Any]], nn.Module]
) -> None:
    """Raise TypeError for an argument that was accepted and ignored.

    Some classes accept any keyword and read a few. An argument that is in no signature on the way is read only if a
    made-up argument in its place is refused.
    """
    if not spec.args:
        return
    named = {*_timm.FACTORY, *_BUILDER, *_parameters(type(model), entry)}
    ignored = [key for key in spec.args if key not in named]
    if not ignored:
        return
    heeded = {key: value for key, value in spec.args.items() if key not in (*ignored, "checkpoint_path")}
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            build({**heeded, _NONSENSE: True})
    except TypeError as error:
        if _NONSENSE in str(error):
            return
    except (NotImplementedError, RuntimeError):  # the model computes with values, after it has read its arguments
        pass
    raise TypeError(
        f"model.args.{ignored[0]}: {spec.name} accepts and ignores this argument; leave it out."
        f"{_checks.did_you_mean(ignored[0], named)}"
    )


def _parameters(cls: type, entry: Callable[..., Any]) -> Iterator[str]:
    """Yield the argument names of a model's class, its bases, and the builders in its entry point's module."""
    makers: list[Any] = [vars(base)["__init__"] for base in cls.__mro__ if "__init__" in vars(base)]
    module = inspect.getmodule(inspect.unwrap(entry))
    makers += [f for f in vars(module).values() if inspect.isfunction(f) and f.__module__ == module.__name__]  # type: ignore[union-attr]
    for maker in makers:
        parameters = inspect.signature(maker).parameters.values()
        if maker.__name__ == "__init__" or any(p.kind is p.VAR_KEYWORD for p in parameters):
            yield from (p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
