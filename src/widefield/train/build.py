"""Recipe -> model, and the folder of a run -> trained model."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import timm
from torch import nn

from widefield import _checks
from widefield.train import checkpoint
from widefield.train.pretrained import load_whole, start_from
from widefield.train.recipe import CONVERSIONS, ConversionSpec, ModelSpec, Recipe
from widefield.train.recipe_io import load_recipe

TORCHVISION = "torchvision:"
_AUXILIARY = ("googlenet", "inception_v3")
"""Networks of torchvision that in training give several outputs, unless told not to."""


def build_model(recipe: Recipe, model_args: Mapping[str, Any]) -> nn.Module:
    """Build the model of a recipe, converted where the recipe says so.

    Args:
        recipe: read for ``model`` and ``conversion``.
        model_args: what the task decides, such as ``{"num_classes": 10}`` (``Task.model_args``).

    Raises:
        ValueError: unknown model; an argument that the task decides, or that the model refuses; nothing to convert.
        TypeError: an argument that the model or the conversion does not have.
    """
    spec = recipe.model

    def converted(model: nn.Module) -> nn.Module:
        return _converted(model, recipe.conversion) if recipe.conversion else model

    if isinstance(spec.pretrained, str):
        fresh = dataclasses.replace(spec, pretrained=False)
        parts = spec.pretrained, lambda given: create_model(fresh, given), converted, model_args["num_classes"]
        if spec.name.startswith(TORCHVISION):
            return load_whole(*parts)
        config = timm.models.get_pretrained_cfg(spec.name)
        heads = getattr(config, "classifier", None) or ()
        return start_from(*parts, [heads] if isinstance(heads, str) else heads)
    return converted(create_model(spec, model_args))


def create_model(spec: ModelSpec, decided: Mapping[str, Any] = MappingProxyType({})) -> nn.Module:
    """Build ``timm.create_model(spec.name, **spec.args, **decided)``, with timm's weights if ``spec.pretrained``.

    Names that start with ``torchvision:`` stand for models of torchvision, and its default weights.

    Args:
        spec: name and arguments, as the user wrote them.
        decided: further arguments, which the user must not give.

    Raises:
        ValueError: unknown model; an argument that is decided, or that the model refuses.
        TypeError: an argument that the model does not have.
    """
    import widefield.models  # noqa: F401 (registers ours in timm)

    name = spec.name
    for key in decided:
        if key in spec.args:
            raise ValueError(f"model.args.{key} is decided by the task ({decided[key]!r}); leave it out.")
    if name.startswith(TORCHVISION):
        return _of_torchvision(spec, decided)
    known = timm.list_models()
    if ":" not in name and name.partition(".")[0] not in known:  # a colon: timm's sources, such as hf-hub:
        raise ValueError(f"model.name: timm knows no model {name!r}.{_checks.did_you_mean(name, known)}")
    try:
        start = {"pretrained": True} if spec.pretrained else {}
        model: nn.Module = timm.create_model(name, **spec.args, **start, **decided)
    except (TypeError, LookupError, AssertionError, RuntimeError) as error:
        raise _refusal(spec, error) from error
    return model


def _of_torchvision(spec: ModelSpec, decided: Mapping[str, Any]) -> nn.Module:
    import torchvision.models as tv

    name = spec.name.removeprefix(TORCHVISION)
    known = tv.list_models(module=tv)
    if name not in known:
        raise ValueError(f"model.name: torchvision knows no model {name!r}.{_checks.did_you_mean(name, known)}")
    given = {"aux_logits": False} if name in _AUXILIARY and not spec.pretrained else {}
    if spec.pretrained and decided:
        raise ValueError(
            f"model.pretrained: torchvision's {name} comes with a head for ImageNet; give a file of weights, or a "
            f"model of timm, which makes a head for other classes."
        )
    try:
        model: nn.Module = tv.get_model(
            name, weights="DEFAULT" if spec.pretrained else None, **{**given, **spec.args, **decided}
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"torchvision cannot build {name!r} with model.args {spec.args}: {error}.") from error
    return model


def _refusal(spec: ModelSpec, error: Exception) -> Exception:
    """Return what to raise for arguments that timm or the model choked on."""
    name, args = spec.name, spec.args
    unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if unknown is None or unknown[2] not in args:
        return ValueError(f"timm cannot build {name!r} with model.args {args}: {type(error).__name__}: {error}.")
    taker, key = unknown.groups()
    module = sys.modules[timm.models.model_entrypoint(name).__module__] if timm.is_model(name) else None
    known = inspect.signature(getattr(module, taker)).parameters if hasattr(module, taker) else ()
    return TypeError(
        f"model.args.{key}: {name} has no such argument.{_checks.did_you_mean(key, known)} It takes those of {taker}."
    )


def _converted(model: nn.Module, conversion: ConversionSpec) -> nn.Module:
    from widefield import surgery

    config = getattr(surgery, CONVERSIONS[conversion.kind])
    known = [field.name for field in dataclasses.fields(config)]
    for key in conversion.args:
        if key not in known:
            raise TypeError(
                f"conversion.args.{key}: {config.__name__} has no such argument.{_checks.did_you_mean(key, known)} "
                f"It takes {', '.join(known)}."
            )
    return surgery.convert(model, config(**conversion.args), conversion.where)


def load_trained(run: str | Path, which: str = "best") -> nn.Module:
    """Return the trained model of a run, on the CPU and in evaluation mode.

    Its weights are the moving average if the run kept one.

    Args:
        run: the run's folder, ``runs/NAME``.
        which: ``"best"`` by the task's headline metric, or ``"last"``.

    Raises:
        FileNotFoundError: the folder has no such checkpoint.
        ValueError: the weights do not fit the model, which happens if the code of the model has changed since.
    """
    chosen = checkpoint.chosen(Path(run), which)
    recipe = load_recipe(run)
    # The stored weights replace whatever others the recipe started from: do not fetch or read those.
    args = {key: value for key, value in recipe.model.args.items() if key not in ("pretrained", "checkpoint_path")}
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, args=args, pretrained=False))
    model = build_model(recipe, chosen.meta["model_args"])
    checkpoint.load_weights(chosen.weights, model)
    return model.eval()
