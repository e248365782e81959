"""Load the trained model from the folder of a finished run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import nn

from widefield import _checks, _history, masking, tasks
from widefield.loading.inputs import SQUARE
from widefield.loading.subject_json import attach, without_places
from widefield.loading.subjects import Subject
from widefield.loading.weights import Weights
from widefield.train import checkpoint, run_data
from widefield.train.checkpoint import Checkpoint
from widefield.train.model import build_model
from widefield.train.recipe import Recipe
from widefield.train.recipe_io import load_recipe, recipe_text
from widefield.train.run_data import RunData

KINDS = ("ema", "model")
"""Weights in a checkpoint: the moving average, and the trained weights themselves."""


def load_trained(run: str | Path, which: str = "best", weights: str | None = None) -> nn.Module:
    """Return the trained model of a run, on the CPU and in evaluation mode.

    Args:
        run: the run's folder, ``runs/NAME``.
        which: ``"best"`` by the task's headline metric, or ``"last"``.
        weights: ``"ema"`` for the moving average, ``"model"`` for the trained weights; default: the moving average if
            the run kept one.

    Raises:
        FileNotFoundError: the folder has no such checkpoint.
        ValueError: the run kept no moving average. Or the weights do not fit the model, because the model's code has
            changed since.
    """
    return trained_subject(Path(run).expanduser(), which, weights).model


def trained_subject(folder: Path, which: str = "best", weights: str | None = None) -> Subject:
    """Return the model of a run with the images that it expects; arguments and errors as of :func:`load_trained`."""
    chosen = checkpoint.chosen(folder, which)
    file = weights_of(chosen, weights)
    whole, about = load_recipe(folder), read_run_data(folder)
    # The stored weights replace the ones that the recipe started from: do not fetch or read those.
    args = {key: value for key, value in whole.model.args.items() if key not in ("pretrained", "checkpoint_path")}
    recipe = dataclasses.replace(whole, model=dataclasses.replace(whole.model, args=args, pretrained=False))
    model = build_model(recipe, tasks.create(recipe.task.name, about, **recipe.task.args))
    checkpoint.load_weights(file, model)
    if _history.origin(model) is None:
        _history.set_origin(model, "run", recipe=recipe_text(without_places(recipe)), data=dataclasses.asdict(about))
    trained = {"step": chosen.step, "metrics": chosen.metrics, "headline": chosen.meta.get("headline")}
    loaded = Weights("run", f"{file.stem}, {which} (step {chosen.step})")
    return attach(_subject(model.eval(), whole, about, loaded), trained=trained)


_READING = (
    "antialias",
    "interpolation",
    "crop_pct",
    "crop_mode",
    "corrupt",
    "max_corrupt",
    "exif_orientation",
    "max_pixels",
)
"""Options of a run's data set that also apply to other image files."""
_USUAL_SIZE = 224
"""Side of the images for a run whose own differ in size."""


def _subject(model: nn.Module, recipe: Recipe, about: RunData, weights: Weights) -> Subject:
    reading = {key: value for key, value in recipe.data.args.items() if key in _READING}
    # A detector knows objects of the size that they have at its test scale, not in small crops.
    sides = (about.test_scale if recipe.task.name == "detection" else None) or about.crop_size or (_USUAL_SIZE,)
    return Subject(
        recipe.name,
        model,
        about.size or min(sides),
        about.mean,
        about.std,
        weights,
        {**reading, **({} if recipe.task.name in SQUARE else {"test_scale": about.test_scale})},
        recipe=recipe,
        trained_on=about,
        work=recipe.task.name,
    )


def examined(model: nn.Module) -> nn.Module:
    """Return a model as analyses and exports take it: of masked pre-training the encoder alone."""
    return masking.Encoder(model) if isinstance(model, masking.MaskedAutoencoder) else model


def weights_of(chosen: Checkpoint, weights: str | None = None) -> Path:
    """Return the file of a checkpoint's weights; arguments and errors as of :func:`load_trained`."""
    if weights is None:
        return chosen.weights
    file = chosen.path / f"{_checks.choice('weights', weights, KINDS)}.safetensors"
    if not file.is_file():
        raise ValueError(
            f"the run in {chosen.path.parents[1]} keeps no moving average; take the trained weights (--weights model)."
        )
    return file


def weights_in(run: str | Path, which: str = "best") -> list[str]:
    """Return which of ``KINDS`` a run's checkpoint holds; arguments and errors as of :func:`load_trained`."""
    chosen = checkpoint.chosen(Path(run).expanduser(), which)
    return [kind for kind in KINDS if (chosen.path / f"{kind}.safetensors").is_file()]


def read_run_data(run: str | Path) -> RunData:
    """Return class names, image size, normalization and number of images of a run, without opening its data.

    Args:
        run: the run's folder, ``runs/NAME``.

    Raises:
        FileNotFoundError: it is not the folder of a run.
        ValueError: its ``data.json`` cannot be read.
    """
    return run_data.read(Path(run).expanduser())
