"""Draw pictures of the same few validation images throughout a run."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from widefield.data import SampleSet
from widefield.surgery.answers import evaluating
from widefield.tasks import Task
from widefield.train.loaders import first_batch

_MOST = 20
"""About how often pictures are drawn in a run: they need disk space."""


def due(finished: int, rounds: int) -> bool:
    """Return whether pictures are drawn after an evaluation: after the first, the last, and some in between.

    Args:
        finished: number of rounds before this one.
        rounds: number of rounds of the run.
    """
    return finished in (0, rounds - 1) or (finished + 1) % max(1, rounds // _MOST) == 0


def evenly(length: int, count: int) -> list[int]:
    """Return at most ``count`` places from 0 to ``length`` - 1, spread evenly."""
    places: list[int] = np.linspace(0, length - 1, min(count, length)).round().astype(int).tolist()
    return places


def draw(model: nn.Module, task: Task, dataset: SampleSet, device: torch.device) -> Mapping[str, Tensor]:
    """Return the task's pictures of ``task.pictured`` images, spread evenly over a data set.

    Images that cannot be read are left out, if the data set allows that.
    """
    places = evenly(len(dataset), task.pictured)
    batch = first_batch(dataset, task.collate, places, len(places))
    if not batch:
        return {}
    with evaluating(model), torch.no_grad():
        return task.pictures(model, send_to_device(batch, device))
