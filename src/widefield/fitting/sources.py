"""Make the settings of a fit from a recipe, a run, the name of a model, or the folder of a fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from widefield.data import SampleSet
from widefield.fitting.spec import FitSpec, is_fit
from widefield.train import checkpoint, run_data
from widefield.train.networks import TORCHVISION, is_model
from widefield.train.recipe import Recipe
from widefield.train.recipe_io import SHIPPED, load_recipe
from widefield.train.run_folder import recipe_hash

_BASE = SHIPPED / "_fit.yaml"


SETTINGS = tuple(field.name for field in dataclasses.fields(FitSpec) if field.name != "recipe")
"""Arguments of :class:`FitSpec` that :func:`widefield.fit` takes."""


def spec_of(
    source: FitSpec | Recipe | str | Path,
    data: str | None,
    overrides: Sequence[str],
    settings: Mapping[str, Any],
) -> FitSpec:
    """Return the settings of a fit; arguments and errors as of :func:`widefield.fit`."""
    words = [*overrides, *(["--data.name", data] if data is not None else [])]
    if isinstance(source, (FitSpec, Recipe)):
        if words:
            raise ValueError(f"overrides and data are for recipes by name; change the {type(source).__name__} itself.")
        return dataclasses.replace(source, **settings) if isinstance(source, FitSpec) else FitSpec(source, **settings)
    if not isinstance(source, (str, Path)):
        raise TypeError(
            f"fit takes a recipe or the name of a model, so that every phase can be repeated; got "
            f"{type(source).__name__}. Register your network in timm, and name it in a recipe."
        )
    if is_fit(source):
        found = FitSpec.load(source)
        if words:
            raise ValueError(f"{source} is a fit, which is continued as it was: leave out {words[0]}.")
        return dataclasses.replace(found, **{**settings, "out": found.folder})
    recipe = _recipe(source, words)
    finished = not words and "unchanged" not in settings and _is_finished(Path(source).expanduser(), recipe)
    return FitSpec(
        recipe, **{**({"unchanged": str(Path(source).expanduser().absolute())} if finished else {}), **settings}
    )


def check_unchanged(spec: FitSpec, train: SampleSet, val: SampleSet) -> None:
    """Raise ValueError unless ``spec.unchanged`` is a finished run of the recipe, on the same data."""
    folder = Path(str(spec.unchanged)).expanduser()
    if not _is_finished(folder, spec.recipe):
        raise ValueError(
            f"unchanged: {spec.unchanged} is not a finished run of this recipe, and only such a run had the same "
            "budget. Leave it out to train the unchanged network."
        )
    changed = run_data.changes(run_data.read(folder), run_data.record(train, val))
    if changed:
        raise ValueError(f"unchanged: the data of {spec.unchanged} have changed since: {'; '.join(changed)}.")


def _recipe(source: str | Path, words: Sequence[str]) -> Recipe:
    """Return the recipe of a file, a run or a name; or one for fine-tuning a model by name."""
    try:
        return load_recipe(source, words)
    except FileNotFoundError:
        name = str(source)
        if not is_model(name):
            raise
    if not any(word.partition("=")[0] in ("--data.name", "--data") for word in words):
        raise ValueError(f"{name} is a model: say what it shall learn, such as --data.name digits.")
    short = name.removeprefix(TORCHVISION).partition(".")[0].replace("/", "_")
    named = [] if any(word.partition("=")[0] == "--name" for word in words) else ["--name", short]
    return load_recipe(_BASE, ["--model.name", name, *named, *words])


def _is_finished(folder: Path, recipe: Recipe) -> bool:
    """Return whether a folder holds a finished run of a recipe."""
    if not (folder / "config.yaml").is_file():
        return False
    found = checkpoint.checkpoints(folder / "checkpoints")
    if not found or found[-1].metrics is None or found[-1].meta.get("recipe") != recipe_hash(recipe):
        return False
    last = found[-1]
    return last.step >= recipe.max_steps if recipe.max_steps else last.meta["epoch"] + 1 >= (recipe.epochs or 0)
