"""Compute metrics of a model over batches, and one process's shard of a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from accelerate.utils import reduce, send_to_device
from torch import nn

from widefield.data import Sample, SampleSet
from widefield.report import Report
from widefield.surgery.answers import evaluating
from widefield.tasks import Batch, Task


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    task: Task,
    device: torch.device | str | None = None,
    *,
    shares: bool = False,
) -> dict[str, float]:
    """Return the task's metrics of a model over all batches.

    Args:
        model: run in evaluation mode and without gradients; its mode is restored afterwards.
        batches: such as a DataLoader with ``collate_fn=task.collate``. Empty batches, ``{}``, are skipped.
        task: what to run and measure.
        device: where to run; default: where the model's parameters are.
        shares: the batches are one process's share of the images, and all processes call this function: the metrics
            then cover all images. Shares may differ in length.

    Raises:
        ValueError: there was no image to evaluate.
    """
    return measure(model, batches, task, device, shares=shares).metrics


class Measured(NamedTuple):
    """Metrics of a model over batches."""

    metrics: dict[str, float]
    images: int
    scores: Report | None
    """Results with more than scalars, such as those of each class; None if the task has none."""


def measure(
    model: nn.Module,
    batches: Iterable[Batch],
    task: Task,
    device: torch.device | str | None = None,
    *,
    shares: bool = False,
    each: Callable[[Batch, dict[str, Any]], None] = lambda batch, outputs: None,
) -> Measured:
    """Return what :func:`evaluate` does, the number of images, and the task's scores.

    ``each`` is called with every batch and its outputs.
    """
    device = torch.device(device) if device is not None else next(model.parameters()).device
    metrics, images, samples = task.metrics().to(device), 0, 0
    with evaluating(model), torch.no_grad():
        for batch in batches:
            if batch:
                outputs = task.outputs(model, send_to_device(batch, device))
                metrics.update(**outputs)
                each(batch, outputs)
                images += task.counted(outputs)
                samples += len(next(iter(outputs.values())))
    if shares:  # at the end instead of after each batch: shares and batches with unreadable images differ in length
        for metric in metrics.values():
            metric.sync()
        images, samples = reduce(torch.tensor([images, samples], device=device), "sum").tolist()
    if not samples:
        raise ValueError("there is nothing to evaluate: the data set is empty or all of its images were skipped.")
    scores = task.scores(metrics)  # first: compute() undoes the synchronization
    return Measured({name: float(value) for name, value in metrics.compute().items()}, images, scores)


class Share(SampleSet):
    """One process's shard of a data set: every k-th sample."""

    def __init__(self, whole: SampleSet, process: int, processes: int) -> None:
        super().__init__(whole.split, whole.seed)
        self._whole, self._indices = whole, range(process, len(whole), processes)

    def __len__(self) -> int:
        return len(self._indices)

    def sample(self, index: int) -> Sample | None:
        """Return sample ``index`` of the shard."""
        return self._whole[self._indices[index]]

    def place_of(self, index: int) -> int:
        """Return the place of sample ``index`` in the whole data set."""
        return self._indices[index]
