"""Derive the recipes of a fit's training phases from the user's: of the probe, and of the networks with chosen sizes.

They are plain recipes: ``widefield train`` runs each of them by itself.
"""

from __future__ import annotations

from dataclasses import replace

from widefield.fitting.groups import Assignment, Groups
from widefield.fitting.spec import FitSpec
from widefield.train.recipe import ConversionSpec, Recipe

PROBE, PLAIN, UNCHANGED = "probe", "plain", "unchanged"
START = "start.safetensors"
"""The probe's weights at the chosen sizes, from which settling starts."""


def probe_recipe(spec: FitSpec, groups: Groups) -> Recipe:
    """Return the recipe of the network that learns all sizes.

    A network without weights gets elastic convolutions without any, too: crops of a random kernel have nothing in
    common, and steps at one size would undo those at another.
    """
    model = spec.recipe.model
    init = "preserve" if model.pretrained or model.args.get("checkpoint_path") else "random"
    sizes: dict[tuple[int, ...], list[str]] = {}
    for group in groups:
        sizes.setdefault(group.sizes, []).extend(layer.name for layer in group.layers)
    count = len(groups)  # stages of different conversions must differ, or they would always draw the same size
    added = [
        ConversionSpec("elastic", where, {"kernel_sizes": list(key), "stage": count * place, "init": init})
        for place, (key, where) in enumerate(sizes.items())
    ]
    recipe = replace(_converted(spec.recipe, added), name=PROBE, output=str(spec.folder), compile=False)
    return part_of(recipe, 0, spec.shares()[0])


def plain_recipe(spec: FitSpec, assignment: Assignment, groups: Groups) -> Recipe:
    """Return the recipe that fine-tunes the plain network of an assignment from the probe's weights."""
    recipe = resized(spec.recipe, assignment, groups)
    args = {key: value for key, value in recipe.model.args.items() if key != "checkpoint_path"}
    model = replace(recipe.model, args=args, pretrained=str(spec.folder / START))
    recipe = replace(recipe, name=PLAIN, output=str(spec.folder), model=model)
    return part_of(recipe, *spec.shares())


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


def part_of(recipe: Recipe, before: int, length: int) -> Recipe:
    """Return a recipe for a part of the training, in epochs, or steps if the recipe counts steps.

    The parts share one schedule: the rate goes on where the part before left it.

    Args:
        recipe: of the whole training.
        before: what the parts before do.
        length: of this part.
    """
    whole = recipe.max_steps or recipe.epochs or 0
    old = recipe.schedule
    schedule = replace(old, before=old.before + before, after=old.after + whole - before - length)
    if recipe.max_steps:
        every = recipe.evaluate_every and min(recipe.evaluate_every, length)
        return replace(recipe, schedule=schedule, max_steps=length, evaluate_every=every)
    return replace(recipe, schedule=schedule, epochs=length)


def _converted(recipe: Recipe, added: list[ConversionSpec]) -> Recipe:
    """Return a recipe with further conversions after its own."""
    if not added:
        return recipe
    if recipe.conversion is None:
        return replace(recipe, conversion=added[0], more_conversions=added[1:])
    return replace(recipe, more_conversions=[*recipe.more_conversions, *added])
