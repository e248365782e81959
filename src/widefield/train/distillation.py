"""Build the teacher that a recipe distills from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from widefield.data import SampleSet
from widefield.tasks import Task
from widefield.train import run_data
from widefield.train.model import build_model
from widefield.train.networks import create_model
from widefield.train.recipe import ModelSpec
from widefield.train.recipe_io import load_recipe

Statistics = tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation of each channel, for pixels in [0, 1]."""


class Teacher(nn.Module):
    """A trained classifier that answers images as a data set prepares them; it is never trained.

    Args:
        model: the classifier.
        own: the statistics that its images are normalized by.
        given: those of the data set.
        autocast: makes the context in which it computes.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, model: nn.Module, own: Statistics, given: Statistics, autocast: Callable[[], AbstractContextManager[None]]
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self._autocast = autocast
        (mean, std), (given_mean, given_std) = (torch.tensor(pair, dtype=torch.float64) for pair in (own, given))
        self.register_buffer("scale", (given_std / std).float()[:, None, None])
        self.register_buffer("shift", ((given_mean - mean) / std).float()[:, None, None])

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, float32 (N, K), of images (N, C, H, W)."""
        with self._autocast():
            logits: Tensor = self.model(images * self.scale + self.shift)
        return logits.float()


def build_teacher(
    source: str, task: Task, train_set: SampleSet, autocast: Callable[[], AbstractContextManager[None]]
) -> Teacher:
    """Return the teacher that a recipe names.

    Args:
        source: the folder of a run, or the name of a model of timm, or of torchvision with ``torchvision:``.
        task: that of the student.
        train_set: the student's images.
        autocast: as of `Teacher`.

    Raises:
        ValueError: the run's classes are others, the model does not give an output for each class, or the images are
            not normalized or not of one size.
        FileNotFoundError: the folder holds no finished run.
    """
    shape = train_set.image_shape
    if shape is None:
        raise ValueError("distillation needs images of one size, and the mean and deviation of their pixels.")
    folder = Path(source).expanduser()
    if folder.is_dir():
        model, own = _of_run(folder, task, train_set)
    else:
        model = create_model(ModelSpec(source, pretrained=True))
        config = getattr(model, "pretrained_cfg", {})
        own = config.get("mean", train_set.mean), config.get("std", train_set.std)
    try:
        task.check(model, shape)
    except ValueError as error:
        raise ValueError(f"distillation.teacher: {source} does not fit: {error}") from error
    return Teacher(model, own, (train_set.mean, train_set.std), autocast)


def _of_run(folder: Path, task: Task, train_set: SampleSet) -> tuple[nn.Module, Statistics]:
    about = run_data.read(folder)
    if about.classes != tuple(train_set.classes):
        raise ValueError(
            f"distillation.teacher: the run in {folder} has other classes than the data ({len(about.classes)} and "
            f"{len(train_set.classes)}, or in another order): train a teacher on these data."
        )
    recipe = load_recipe(folder)
    model = dataclasses.replace(recipe.model, pretrained=str(folder))
    return build_model(dataclasses.replace(recipe, model=model), task, about.classes), (about.mean, about.std)
