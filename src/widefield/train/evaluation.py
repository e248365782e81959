"""Metrics of a model on a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from widefield.tasks import Batch, Task


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    task: Task,
    device: torch.device | str | None = None,
    *,
    gather: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda outputs: outputs,
) -> dict[str, float]:
    """Return the task's metrics of a model over all batches.

    Args:
        model: run in evaluation mode and without gradients; its mode is as before afterwards.
        batches: such as a DataLoader with ``widefield.data.collate``. Empty batches, ``{}``, are passed over.
        task: what to run and measure.
        device: where to; default: where the model's parameters are.
        gather: collects the outputs of all processes.

    Raises:
        ValueError: there was no image to evaluate.
    """
    device = torch.device(device) if device is not None else next(model.parameters()).device
    metrics = task.metrics().to(device)
    seen = False
    with _evaluating(model), torch.no_grad():
        for batch in batches:
            if batch:
                metrics.update(**gather(task.outputs(model, send_to_device(batch, device))))
                seen = True
    if not seen:
        raise ValueError("there is nothing to evaluate: the data set is empty or all of its images were skipped.")
    return {name: float(value) for name, value in metrics.compute().items()}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes: list[tuple[Any, bool]] = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
