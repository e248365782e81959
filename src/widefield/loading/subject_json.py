"""Describe a model and the images that it expects in JSON types, and read such a description."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from torch import nn

from widefield import _history
from widefield.loading.subjects import Subject
from widefield.loading.weights import Weights
from widefield.train import run_data
from widefield.train.recipe import Recipe
from widefield.train.recipe_io import parse_recipe, recipe_text

_PAIRS = ("test_scale",)
"""Preprocessing options that are tuples."""


def attach(subject: Subject, **more: Any) -> Subject:
    """Attach what a subject knows to its model, in JSON types, and return the subject.

    Functions that get the model alone find it there: copies keep it.
    """
    _history.set_about(subject.model, {"name": subject.name, "subject": subject_content(subject), **more})
    return subject


def subject_content(subject: Subject) -> dict[str, Any]:
    """Return a model's task, images, classes and recipe in JSON types."""
    found: dict[str, Any] = _history.plain(
        {
            "work": subject.work,
            "size": subject.size,
            "mean": subject.mean,
            "std": subject.std,
            "preprocessing": dict(subject.preprocessing),
            "test_crop_pct": subject.test_crop_pct,
            "weights": dataclasses.asdict(subject.weights),
            "classes": list(subject.classes) if subject.trained_on is None else None,
            "data": dataclasses.asdict(subject.trained_on) if subject.trained_on else None,
            "recipe": recipe_text(subject.recipe) if subject.recipe else None,
        }
    )
    return found


def without_places(recipe: Recipe) -> Recipe:
    """Return a recipe without the folders of the machine that it ran on: paths of data keep their last part."""
    args = {key: _last(value) for key, value in recipe.data.args.items()}
    spec = dataclasses.replace(recipe.model, pretrained=bool(recipe.model.pretrained), args=_names(recipe.model.args))
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, args=args), model=spec, output="runs")


def _names(args: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _last(value) for key, value in args.items()}


def _last(value: Any) -> Any:
    return PurePath(value).name if isinstance(value, str) and PurePath(value).is_absolute() else value


def subject_from(content: Mapping[str, Any], model: nn.Module, name: str) -> Subject:
    """Return the subject that a file describes.

    Args:
        content: of the file.
        model: built and loaded.
        name: how to call it.
    """
    given = content["subject"]
    options = {key: tuple(v) if key in _PAIRS and v else v for key, v in given["preprocessing"].items()}
    found = run_data.parse(given["data"]) if given["data"] else None
    return Subject(
        name,
        model,
        given["size"],
        tuple(given["mean"]),
        tuple(given["std"]),
        Weights(**given["weights"]),
        options,
        given["test_crop_pct"],
        parse_recipe(given["recipe"]) if given["recipe"] else None,
        found,
        given["work"],
        tuple(given["classes"] or ()),
    )
