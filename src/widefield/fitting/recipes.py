"""Derive the recipes of a fit's training phases from the user's: of the probe, and of the networks with chosen sizes.

They are plain recipes: ``widefield train`` runs each of them by itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from widefield.fitting.groups import Assignment, Groups
from widefield.fitting.spec import FitSpec
from widefield.train.recipe import ConversionSpec, Recipe, ScheduleSpec

PROBE, PLAIN, UNCHANGED = "probe", "plain", "unchanged"
START = "start.safetensors"
"""The probe's weights at the chosen sizes, from which settling starts."""
_LENGTHS = ("decay_epochs", "cooldown_epochs")


def probe_recipe(spec: FitSpec, groups: Groups, steps_per_epoch: int) -> Recipe:
    """Return the recipe of the network that learns all sizes."""
    sizes: dict[tuple[int, ...], list[str]] = {}
    for group in groups:
        sizes.setdefault(group.sizes, []).extend(layer.name for layer in group.layers)
    count = len(groups)  # stages of different conversions must differ, or they would always draw the same size
    added = [
        ConversionSpec("elastic", where, {"kernel_sizes": list(key), "stage": count * place})
        for place, (key, where) in enumerate(sizes.items())
    ]
    recipe = replace(_converted(spec.recipe, added), name=PROBE, output=str(spec.folder), compile=False)
    return shortened(recipe, spec.shares()[0], steps_per_epoch)


def plain_recipe(spec: FitSpec, assignment: Assignment, groups: Groups, steps_per_epoch: int) -> Recipe:
    """Return the recipe that fine-tunes the plain network of an assignment from the probe's weights."""
    recipe = resized(spec.recipe, assignment, groups)
    args = {key: value for key, value in recipe.model.args.items() if key != "checkpoint_path"}
    model = replace(recipe.model, args=args, pretrained=str(spec.folder / START))
    recipe = replace(recipe, name=PLAIN, output=str(spec.folder), model=model)
    return shortened(recipe, spec.shares()[1], steps_per_epoch)


def unchanged_recipe(spec: FitSpec) -> Recipe:
    """Return the user's recipe, in the fit's folder."""
    return replace(spec.recipe, name=UNCHANGED, output=str(spec.folder))


def resized(recipe: Recipe, assignment: Assignment, groups: Groups) -> Recipe:
    """Return a recipe with the sizes of an assignment; groups that are missing keep theirs."""
    sizes: dict[int, list[str]] = {}
    for group in groups:
        size = assignment.get(group.name, group.own)
        if size != group.own:
            sizes.setdefault(size, []).extend(layer.name for layer in group.layers)
    added = [ConversionSpec("resize", where, {"kernel_size": size}) for size, where in sorted(sizes.items())]
    return _converted(recipe, added)


def shortened(recipe: Recipe, length: int, steps_per_epoch: int) -> Recipe:
    """Return a recipe for ``length`` epochs, or steps if the recipe counts steps.

    The schedule is the same over a shorter time: its warm-up and decays keep their share of the run.
    """
    whole = recipe.max_steps or recipe.epochs or 0
    share = length / whole
    schedule = recipe.schedule
    args: dict[str, Any] = dict(schedule.args)
    for key in _LENGTHS:
        if key in args:
            args[key] = max(1, round(args[key] * share)) if args[key] else 0
    if "decay_milestones" in args:
        args["decay_milestones"] = sorted({max(1, round(mark * share)) for mark in args["decay_milestones"]})
    schedule = replace(schedule, args=args, **_warmup(schedule, share, steps_per_epoch))
    if recipe.max_steps:
        every = recipe.evaluate_every and min(recipe.evaluate_every, length)
        return replace(recipe, schedule=schedule, max_steps=length, evaluate_every=every)
    return replace(recipe, schedule=schedule, epochs=length)


def _warmup(schedule: ScheduleSpec, share: float, steps_per_epoch: int) -> dict[str, Any]:
    """Return the warm-up of a shorter run; that of a ratio must not vanish."""
    steps = schedule.warmup_steps if schedule.warmup_steps is not None else schedule.warmup_epochs * steps_per_epoch
    if not steps:
        return {}
    shorter = max(1, round(steps * share))
    if schedule.warmup_epochs and not shorter % steps_per_epoch:
        return {"warmup_epochs": shorter // steps_per_epoch}
    return {"warmup_epochs": 0, "warmup_steps": shorter}


def _converted(recipe: Recipe, added: list[ConversionSpec]) -> Recipe:
    """Return a recipe with further conversions after its own."""
    if not added:
        return recipe
    if recipe.conversion is None:
        return replace(recipe, conversion=added[0], more_conversions=added[1:])
    return replace(recipe, more_conversions=[*recipe.more_conversions, *added])
