"""Metrics of a model on a data set, and its throughput."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, reduce, send_to_device
from torch import Tensor, nn

from widefield import _checks, bench
from widefield.data import ImageSet, Sample
from widefield.surgery.answers import described, wrapping
from widefield.tasks import Batch, Task
from widefield.train import loading
from widefield.train.recipe import PRECISIONS

_TIMINGS, _BUDGET = 10, 5.0
"""Of the throughput: how many, and seconds for all of them, two at least."""


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
        model: run in evaluation mode and without gradients; its mode is as before afterwards.
        batches: such as a DataLoader with ``widefield.data.collate``. Empty batches, ``{}``, are passed over.
        task: what to run and measure.
        device: where to; default: where the model's parameters are.
        shares: whether the batches are one process's share of the images, and all processes call this: the metrics are
            those of all images, then. Shares may differ in length.

    Raises:
        ValueError: there was no image to evaluate.
    """
    device = torch.device(device) if device is not None else next(model.parameters()).device
    return _measured(model, batches, task, device, shares)[0]


def _measured(
    model: nn.Module, batches: Iterable[Batch], task: Task, device: torch.device, shares: bool
) -> tuple[dict[str, float], int]:
    """Return the metrics over all batches, and the number of images in these."""
    metrics, images = task.metrics().to(device), 0
    with _evaluating(model), torch.no_grad():
        for batch in batches:
            if batch:
                outputs = task.outputs(model, send_to_device(batch, device))
                metrics.update(**outputs)
                images += len(next(iter(outputs.values())))
    if shares:  # at the end rather than batch by batch: shares, and batches with unreadable images, differ in length
        for metric in metrics.values():
            metric.sync()
        images = int(reduce(torch.tensor(images, device=device), "sum"))
    if not images:
        raise ValueError("there is nothing to evaluate: the data set is empty or all of its images were skipped.")
    return {name: float(value) for name, value in metrics.compute().items()}, images


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes: list[tuple[Any, bool]] = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@dataclass(frozen=True)
class Evaluation:
    """What a model came to on a data set, and how that was measured."""

    metrics: dict[str, float]
    """Of the task: accuracies are shares of the images, the loss is in nats."""
    images: int
    """How many were judged; those that cannot be read may have been left out."""
    seconds: float
    """Wall clock, of reading and judging all images."""
    size: int
    """Side of the images in pixels."""
    batch_size: int
    """Images at a time in each process."""
    mixed_precision: str
    channels_last: bool
    device: str
    processes: int
    forward: bench.Row | None = None
    """Seconds of the model on one batch that is on the device already; None: not measured."""

    @property
    def images_per_second(self) -> float | None:
        """Return the median throughput of the model alone, or None if it was not measured."""
        return None if self.forward is None else self.batch_size / self.forward.p50

    def to_dict(self) -> dict[str, Any]:
        """Return everything in types that JSON can hold; a metric that is not a number is None."""
        found = dataclasses.asdict(self)
        found["metrics"] = {name: value if math.isfinite(value) else None for name, value in self.metrics.items()}
        return {**found, "images_per_second": self.images_per_second}


def evaluate_model(
    model: nn.Module,
    dataset: ImageSet,
    task: Task,
    *,
    batch_size: int = 128,
    workers: int = 4,
    mixed_precision: str = "no",
    channels_last: bool = False,
    device: torch.device | str | None = None,
    throughput: bool = False,
    progress: Callable[[Iterable[Batch], int], Iterable[Batch]] = lambda found, total: found,
) -> Evaluation:
    """Judge a model on all images of a data set, and time it if asked.

    Under ``accelerate launch`` or ``torchrun`` every process is to call this; each judges a share of the images, none
    is judged twice, and all return the same metrics.

    Args:
        model: goes to the device, and into channels-last order if asked, and stays so. Its mode is left as it was.
        dataset: what to judge it on.
        task: how, such as ``widefield.tasks.create("classification", dataset)``, or
            :class:`widefield.train.labels.Judged` for a model with other outputs than the data's classes.
        batch_size: images at a time in each process.
        workers: loader processes of each process; 0: load in the process itself.
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"``: autocast as in training.
        channels_last: whether to keep images and weights in channels-last order.
        device: where to; default: what accelerate chooses, a GPU if there is one.
        throughput: also time the model alone on one batch of random images, in one process.
        progress: wraps the batches, of which there are as many as its second argument says, to show how far it is.

    Raises:
        ValueError: an option is out of range, the model refuses images of this size, there is no image to judge, or
            several processes are to measure throughput or to use another device than theirs.
        OSError: an image cannot be read.
    """
    _checks.integer("batch_size", batch_size)
    _checks.integer("workers", workers, minimum=0)
    _checks.choice("mixed_precision", mixed_precision, PRECISIONS)
    state = processes()
    place = torch.device(state.device if device is None else device)
    if state.num_processes > 1:
        if throughput:
            raise ValueError(f"throughput is a matter of one process; there are {state.num_processes}.")
        if place.type != state.device.type:
            raise ValueError(f"accelerate gives each of several processes its device; leave out {str(device)!r}.")
        place = state.device
    model.to(place)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    channels, size = len(dataset.mean), dataset.image_size
    loader = loading.val_loader(Share(dataset, state.process_index, state.num_processes), batch_size, workers)
    try:
        with _autocast(place, mixed_precision):
            count_outputs(model, channels, size)
            started = time.perf_counter()
            found = progress(loading.batches(loader), len(loader))
            metrics, images = _measured(model, found, task, place, shares=True)
            seconds = time.perf_counter() - started
            forward = _forward_time(model, (batch_size, channels, size, size), channels_last) if throughput else None
    finally:
        loading.shut_down(loader)
    return Evaluation(
        metrics=metrics,
        images=images,
        seconds=seconds,
        size=size,
        batch_size=batch_size,
        mixed_precision=mixed_precision,
        channels_last=channels_last,
        device=str(place),
        processes=state.num_processes,
        forward=forward,
    )


def processes() -> PartialState:
    """Return what accelerate knows of the processes that were launched together; by itself it overlooks CPUs."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


def count_outputs(model: nn.Module, channels: int, size: int) -> int:
    """Return how many logits a model gives for an image of (channels, size, size), by one forward pass.

    Raises ValueError if it refuses such images, or gives something else than a vector for each.
    """
    first = next(model.parameters(), torch.empty(0))
    image = torch.zeros(1, channels, size, size, device=first.device, dtype=first.dtype)
    try:
        with _evaluating(model), torch.no_grad():
            logits = model(image)
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{type(model).__name__} refuses images of {channels}x{size}x{size} (channels, height, width): {reason}"
        ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ValueError(
            f"{type(model).__name__} gives no logits (N, classes) for images; it gives {described(logits)}."
            f"{wrapping(logits)}"
        )
    return logits.shape[1]


def _autocast(device: torch.device, mixed_precision: str) -> Any:
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast(device.type, dtypes[mixed_precision]) if mixed_precision in dtypes else nullcontext()


def _forward_time(model: nn.Module, shape: tuple[int, ...], channels_last: bool) -> bench.Row:
    first = next(model.parameters(), torch.empty(0))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    # Its own generator: whoever evaluates while training keeps the global one as it is.
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(first).contiguous(memory_format=layout)
    with _evaluating(model), torch.no_grad():
        return bench.measure(
            {"forward": lambda: model(images)}, repeats=_TIMINGS, warmup=2, device=first.device, budget_s=_BUDGET
        )["forward"]


class Share(ImageSet):
    """Every so many-th sample of a data set: that of one process."""

    def __init__(self, whole: ImageSet, process: int, processes: int) -> None:
        super().__init__(whole.split, whole.image_size, whole.seed)
        self.classes, self.mean, self.std = whole.classes, whole.mean, whole.std
        self._whole, self._indices = whole, range(process, len(whole), processes)

    def __len__(self) -> int:
        return len(self._indices)

    def sample(self, index: int) -> Sample | None:
        """Return sample ``index`` of the share."""
        return self._whole[self._indices[index]]
