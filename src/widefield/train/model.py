"""Build the model of a recipe: a network by name, its initial weights, its conversion, and the task's changes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from torch import nn

from widefield import _checks, surgery
from widefield.tasks import PoseEstimation, Task
from widefield.train import run_data
from widefield.train.networks import HEAD, TORCHVISION, create_model
from widefield.train.pretrained import Assembly, load_whole, start_from, start_from_masked
from widefield.train.recipe import CONVERSIONS, ConversionSpec, Recipe


def build_network(recipe: Recipe, task: Task) -> nn.Module:
    """Build the network of a recipe with fresh weights, converted, before the task makes the model of it.

    The names that ``where`` of a conversion selects are those of its modules. Errors are those of :func:`build_model`.
    """
    fresh = dataclasses.replace(recipe.model, pretrained=False)
    return functools.reduce(_converted, _conversions(recipe), create_model(fresh, task.model_args))


def build_model(recipe: Recipe, task: Task, classes: Sequence[str] | None = None) -> nn.Module:
    """Build the model of a recipe: the network, converted if the recipe says so, and adapted by the task.

    Args:
        recipe: ``model``, ``conversion`` and ``more_conversions`` are used.
        task: decides arguments of the network (``Task.model_args``) and makes the model of it (``Task.model``).
        classes: names of the outputs. If the model starts from a run with other classes, its head starts afresh.

    Raises:
        ValueError: unknown model; an argument that the task decides, or that the model refuses; nothing to convert.
        TypeError: an argument that the model or the conversion does not have.
    """
    spec = recipe.model
    conversions = _conversions(recipe)
    fresh = dataclasses.replace(spec, pretrained=isinstance(spec.pretrained, bool) and spec.pretrained)
    assembly = Assembly(
        build=lambda given: create_model(fresh, {**task.model_args, **given}),
        convert=lambda network: functools.reduce(_converted, conversions, network),
        adapt=task.model,
        classes=task.model_args.get(HEAD),
        keypoints=task.skeleton.names if isinstance(task, PoseEstimation) else (),
    )
    if not isinstance(spec.pretrained, str):
        return assembly.whole()
    if spec.args.get("checkpoint_path"):
        raise ValueError(
            f"model.args.checkpoint_path and model.pretrained both name weights to start from "
            f"({spec.args['checkpoint_path']!r}, {spec.pretrained!r}); leave out one of them."
        )
    masked = start_from_masked(spec.pretrained, assembly)
    if masked is not None:
        return masked
    other_classes = _has_other_classes(spec.pretrained, classes)
    if spec.name.startswith(TORCHVISION):
        return load_whole(spec.pretrained, assembly, fresh_head=other_classes)
    config = timm.models.get_pretrained_cfg(spec.name)
    heads = getattr(config, "classifier", None) or ()
    return start_from(spec.pretrained, assembly, [heads] if isinstance(heads, str) else heads, fresh_head=other_classes)


def _conversions(recipe: Recipe) -> list[ConversionSpec]:
    return [*([recipe.conversion] if recipe.conversion else []), *recipe.more_conversions]


def _has_other_classes(source: str, classes: Sequence[str] | None) -> bool:
    """Return whether the weights come from a run with other classes than these."""
    start = Path(source).expanduser()
    return classes is not None and start.is_dir() and run_data.read(start).classes != tuple(classes)


def _converted(model: nn.Module, conversion: ConversionSpec) -> nn.Module:
    return surgery.convert(model, conversion_of(conversion), conversion.where)


def conversion_of(conversion: ConversionSpec) -> Any:
    """Return the configuration in widefield.surgery that a recipe's conversion names.

    Raises:
        TypeError: it has no such argument.
    """
    config = getattr(surgery, CONVERSIONS[conversion.kind])
    known = [field.name for field in dataclasses.fields(config)]
    for key in conversion.args:
        if key not in known:
            raise TypeError(
                f"conversion.args.{key}: {config.__name__} has no such argument.{_checks.did_you_mean(key, known)} "
                f"It takes {', '.join(known)}."
            )
    return config(**conversion.args)
