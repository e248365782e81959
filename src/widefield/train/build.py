"""Recipe -> model, and the folder of a run -> trained model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from torch import nn

from widefield import _checks
from widefield.train import checkpoint, run_data
from widefield.train.networks import TORCHVISION, create_model
from widefield.train.pretrained import load_whole, start_from
from widefield.train.recipe import CONVERSIONS, ConversionSpec, Recipe
from widefield.train.recipe_io import load_recipe


def build_model(recipe: Recipe, model_args: Mapping[str, Any], classes: Sequence[str] | None = None) -> nn.Module:
    """Build the model of a recipe, converted where the recipe says so.

    Args:
        recipe: read for ``model`` and ``conversion``.
        model_args: what the task decides, such as ``{"num_classes": 10}`` (``Task.model_args``).
        classes: names of the outputs. Where the model starts from a run of other classes, its head starts afresh.

    Raises:
        ValueError: unknown model; an argument that the task decides, or that the model refuses; nothing to convert.
        TypeError: an argument that the model or the conversion does not have.
    """
    spec = recipe.model

    def converted(model: nn.Module) -> nn.Module:
        return _converted(model, recipe.conversion) if recipe.conversion else model

    if isinstance(spec.pretrained, str):
        if spec.args.get("checkpoint_path"):
            raise ValueError(
                f"model.args.checkpoint_path and model.pretrained both name weights to start from "
                f"({spec.args['checkpoint_path']!r}, {spec.pretrained!r}); leave out one of them."
            )
        fresh = dataclasses.replace(spec, pretrained=False)
        parts = spec.pretrained, lambda given: create_model(fresh, given), converted, model_args["num_classes"]
        if spec.name.startswith(TORCHVISION):
            return load_whole(*parts, fresh_head=_other_classes(spec.pretrained, classes))
        config = timm.models.get_pretrained_cfg(spec.name)
        heads = getattr(config, "classifier", None) or ()
        named = [heads] if isinstance(heads, str) else heads
        return start_from(*parts, named, fresh_head=_other_classes(spec.pretrained, classes))
    return converted(create_model(spec, model_args))


def _other_classes(source: str, classes: Sequence[str] | None) -> bool:
    """Return whether weights come from a run that tells apart other classes than these."""
    start = Path(source).expanduser()
    before = run_data.run_data(start).classes if classes is not None and start.is_dir() else None
    return before is not None and before != tuple(classes or ())


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
    try:
        return _with_weights(recipe, chosen)
    except ValueError:
        # A run whose data.json is gone looks like an older one, whose arguments that are None were dropped.
        as_written = load_recipe(Path(run).expanduser() / "config.yaml")
        if as_written.model == recipe.model:
            raise
        return _with_weights(as_written, chosen)


def _with_weights(recipe: Recipe, chosen: checkpoint.Checkpoint) -> nn.Module:
    # The stored weights replace whatever others the recipe started from: do not fetch or read those.
    args = {key: value for key, value in recipe.model.args.items() if key not in ("pretrained", "checkpoint_path")}
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, args=args, pretrained=False))
    model = build_model(recipe, chosen.meta["model_args"])
    checkpoint.load_weights(chosen.weights, model)
    return model.eval()
