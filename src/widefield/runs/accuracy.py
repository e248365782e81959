"""Measure a finished model on a data set: the metrics of its task, single images, and throughput."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from widefield import _checks, bench
from widefield.data import SampleSet
from widefield.data.listing import counted
from widefield.report import Report
from widefield.surgery.answers import evaluating
from widefield.tasks import Batch, Prediction, Task
from widefield.tasks.metric_names import finite
from widefield.train.evaluation import Share, measure
from widefield.train.loaders import batches, shut_down, val_loader
from widefield.train.pictures import evenly
from widefield.train.recipe import PRECISIONS

_TIMINGS, _BUDGET = 10, 5.0
"""Of the throughput: the number of timings, and the seconds for all of them; there are at least two."""


@dataclass(frozen=True, eq=False)
class Example:
    """An evaluated image, with its label and what the model predicts.

    Attributes:
        index: its place in the data set.
        name: its file, or its place again for sets without files.
        rating: how good the prediction is, as the task rates it; see ``Evaluation.rating``.
        image: the image as the model sees it.
        truth: the label.
        prediction: what the model predicts.
        rated: the rating as text.
    """

    index: int
    name: str
    rating: float
    image: Image.Image
    truth: Prediction | None
    prediction: Prediction
    rated: str


@dataclass(frozen=True, eq=False)
class EachImage:
    """What was measured of each of N images, in the order of the data set.

    Attributes:
        places: of the images in the data set, int64 (N,).
        ratings: how good the predictions are, as the task rates them, float64 (N,).
        parts: numbers whose mean is the task's headline, float64 (N,), such as 1 for a right class; None: it is no such
            mean.
    """

    places: NDArray[np.int64]
    ratings: NDArray[np.float64]
    parts: NDArray[np.float64] | None


@dataclass(frozen=True)
class Evaluation(Report):
    """Metrics of a model on a data set, and how they were measured."""

    metrics: dict[str, float]
    """The task's metrics: accuracies are fractions of the images, the loss is in nats."""
    images: int
    """Number of evaluated images, or crops of a pose model; unreadable ones may have been left out."""
    seconds: float
    """Wall-clock time for reading and evaluating all images."""
    size: int | tuple[int, int] | None
    """Side of the images in pixels; (height, width) if they are not square; None if they differ."""
    batch_size: int
    """Images per batch in each process."""
    mixed_precision: str
    channels_last: bool
    device: str
    processes: int
    forward: bench.Row | None = None
    """Seconds of a forward pass on one batch that is already on the device; None: not measured."""
    scores: Report | None = None
    """Results with more than scalars, such as those of each class; None if the task has none."""
    examples: tuple[Example, ...] = ()
    """The images with the best and the worst predictions, best first, if asked for."""
    spread: tuple[Example, ...] = ()
    """Images spread evenly over the data, likewise, of tasks that show pictures during training."""
    rating: str = ""
    """What the rating of an image is, as the end of a sentence."""
    each: EachImage | None = None
    """What was measured of each image, if examples were asked for."""

    def summary(self) -> str:
        """Return the number of images, and how they were evaluated."""
        size = "x".join(map(str, self.size)) if isinstance(self.size, tuple) else self.size
        sides = "" if size is None else f" of {size} pixels"
        speed = "" if self.images_per_second is None else f", {self.images_per_second:.4g} images per second"
        return f"{counted(self.images, 'image')}{sides}, on {self.device}, in {self.seconds:.1f} s{speed}"

    def rows(self) -> list[dict[str, str]]:
        """Return one row with the metrics."""
        return [{name: f"{value:.4g}" for name, value in self.metrics.items()}] if self.metrics else []

    def _repr_html_(self) -> str:
        """Return the metrics and the scores, such as those of each class, which Jupyter displays."""
        return super()._repr_html_() + ("" if self.scores is None else self.scores._repr_html_())

    @property
    def images_per_second(self) -> float | None:
        """Return the median throughput of the model alone, or None if it was not measured."""
        return None if self.forward is None else self.batch_size / self.forward.p50

    def to_dict(self) -> dict[str, Any]:
        """Return everything in JSON types, except examples; a metric that is not finite becomes None."""
        found = dataclasses.asdict(dataclasses.replace(self, scores=None, examples=(), spread=(), each=None))
        for name in ("examples", "spread", "scores", "rating", "each"):
            del found[name]
        found["metrics"] = {name: finite(value) for name, value in self.metrics.items()}
        to_dict = getattr(self.scores, "to_dict", None)
        scores = {"scores": to_dict()} if to_dict else {}
        return {**found, **scores, "images_per_second": self.images_per_second}


def evaluate_model(
    model: nn.Module,
    dataset: SampleSet,
    task: Task,
    *,
    batch_size: int = 128,
    workers: int = 4,
    mixed_precision: str = "no",
    channels_last: bool = False,
    device: torch.device | str | None = None,
    throughput: bool = False,
    examples: int = 0,
    progress: Callable[[Iterable[Batch], int], Iterable[Batch]] = lambda found, total: found,
) -> Evaluation:
    """Evaluate a model on all images of a data set, and measure its throughput if asked.

    Under ``accelerate launch`` or ``torchrun`` every process must call this function. Each evaluates its own share of
    the images, and all return the same metrics.

    Args:
        model: moved to the device, and to channels-last order if asked; it stays there. Its mode is restored.
        dataset: the images.
        task: what to measure, such as ``widefield.tasks.create("classification", dataset)``, or
            :class:`widefield.loading.labels.MappedClassification` for a model whose outputs are not the data's classes.
        batch_size: images per batch in each process.
        workers: loader processes of each process; 0: load in the process itself.
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"``: autocast as in training.
        channels_last: keep images and weights in channels-last order.
        device: where to run; default: accelerate's choice, a GPU if there is one.
        throughput: also time the model alone on one batch of random images, of the size of the data's first image if
            they differ; one process only.
        examples: number of best and of worst images to return; 0: none. Tasks that do not rate single images give none.
        progress: wraps the iterable of batches; its second argument is their number.

    Raises:
        ValueError: an option is out of range, the model does not fit the images or the task, there is no image to
            evaluate, or several processes are asked for throughput or for another device than their own.
        OSError: an image cannot be read.
    """
    _checks.integer("batch_size", batch_size)
    _checks.integer("workers", workers, minimum=0)
    _checks.integer("examples", examples, minimum=0)
    _checks.choice("mixed_precision", mixed_precision, PRECISIONS)
    state = processes()
    place = _place(state, device, throughput)
    model.to(place)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    shape = dataset.image_shape or _first_shape(dataset)
    ratings = _Ratings(task)
    rating = {"each": ratings.add} if examples else {}
    share = Share(dataset, state.process_index, state.num_processes)
    loader = val_loader(share, task.collate, batch_size, workers)
    try:
        with _autocast(place, mixed_precision):
            task.check(model, shape)
            started = time.perf_counter()
            found = progress(batches(loader), len(loader))
            measured = measure(model, found, task, place, shares=True, **rating)
            seconds = time.perf_counter() - started
            each = ratings.gathered() if examples else None
            chosen = (ratings.extremes(examples), ratings.spread(task.pictured)) if each else ([], [])
            shown, spread = (tuple(_example(model, dataset, task, place, *one) for one in some) for some in chosen)
            forward = _forward_time(model, (batch_size, *shape), channels_last) if throughput else None
    finally:
        shut_down(loader)
    return Evaluation(
        metrics=measured.metrics,
        images=measured.images,
        seconds=seconds,
        size=_size(dataset.image_shape),
        batch_size=batch_size,
        mixed_precision=mixed_precision,
        channels_last=channels_last,
        device=str(place),
        processes=state.num_processes,
        forward=forward,
        scores=measured.scores,
        examples=shown,
        spread=spread,
        rating=task.rating,
        each=each,
    )


def _size(shape: tuple[int, int, int] | None) -> int | tuple[int, int] | None:
    """Return what `Evaluation.size` is for images of one shape (C, H, W), or of several (None)."""
    if shape is None:
        return None
    _, height, width = shape
    return height if height == width else (height, width)


def _first_shape(dataset: SampleSet) -> tuple[int, int, int]:
    """Return (C, H, W) of the first image that can be read; raises ValueError if there is none."""
    for index in range(len(dataset)):
        sample = dataset[index]
        if sample is not None:
            channels, height, width = sample["image"].shape
            return channels, height, width
    raise ValueError("there is nothing to evaluate: the data set is empty or all of its images were skipped.")


class _Ratings:
    """How good the predictions of all images are, as the task rates them."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.found: list[tuple[int, float, float]] = []
        """Of each image its place in the data set, its rating, and its part of the headline; NaN for none."""

    def add(self, batch: Batch, outputs: dict[str, Any]) -> None:
        """Add the images of a batch."""
        rated = self.task.rate(outputs)
        if rated is not None:
            parts = self.task.headline_parts(outputs)
            own = [math.nan] * len(rated) if parts is None else parts.tolist()
            found = zip(batch["index"].tolist(), rated.tolist(), own, strict=True)
            self.found += [one for one in found if math.isfinite(one[1])]

    def gathered(self) -> EachImage | None:
        """Keep the images of all processes, and return them; None if the task does not rate images."""
        self.found = sorted(gather_object(self.found))
        if not self.found:
            return None
        places, ratings, parts = (np.array(column) for column in zip(*self.found, strict=True))
        return EachImage(places, ratings, None if np.isnan(parts).any() else parts)

    def extremes(self, count: int) -> list[tuple[float, int]]:
        """Return (rating, index in the data set) of the best and the worst images, best first."""
        ordered = sorted(((rating, place) for place, rating, _ in self.found), key=lambda one: (-one[0], one[1]))
        return ordered if len(ordered) <= 2 * count else ordered[:count] + ordered[-count:]

    def spread(self, count: int) -> list[tuple[float, int]]:
        """Return (rating, index in the data set) of images spread evenly over all of them."""
        return [self.found[place][1::-1] for place in evenly(len(self.found), count)]


def _example(
    model: nn.Module, dataset: SampleSet, task: Task, place: torch.device, rating: float, index: int
) -> Example:
    sample = dataset[index]
    if sample is None:  # it could be read before
        raise OSError(f"sample {index} can no longer be read.")
    image, truth = sample["image"], task.truth(sample)
    size = (truth.size if truth else None) or (image.shape[1], image.shape[2])
    batch = {"image": image[None].to(place), "index": torch.tensor([index])}
    with evaluating(model), torch.no_grad():
        (prediction,) = task.predict_batch(model, batch, [size])
    mean, std = (image.new_tensor(values)[:, None, None] for values in (dataset.mean, dataset.std))
    pixels = ((image * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    shown = Image.fromarray(pixels.expand(3, -1, -1).movedim(0, -1).numpy())
    named: Any = getattr(dataset, "name", None)
    name = str(named(index)) if callable(named) else f"image {index}"
    return Example(index, name, rating, shown, truth, prediction, task.rated(rating))


def processes() -> PartialState:
    """Return accelerate's state of the launched processes, CPU processes included, which accelerate alone overlooks."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


def _place(state: PartialState, device: torch.device | str | None, throughput: bool) -> torch.device:
    """Return this process's device; raises ValueError for requests that need a single process."""
    place = torch.device(state.device if device is None else device)
    if state.num_processes == 1:
        return place
    if throughput:
        raise ValueError(f"throughput needs a single process; there are {state.num_processes}.")
    if place.type != state.device.type:
        raise ValueError(f"accelerate chooses the device of each of several processes; leave out {str(device)!r}.")
    return torch.device(state.device)


def _autocast(device: torch.device, mixed_precision: str) -> Any:
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast(device.type, dtypes[mixed_precision]) if mixed_precision in dtypes else nullcontext()


def _forward_time(model: nn.Module, shape: tuple[int, ...], channels_last: bool) -> bench.Row:
    first = next(model.parameters(), torch.empty(0))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    # Its own generator: an evaluation during training must not change the global one.
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(first).contiguous(memory_format=layout)
    with evaluating(model), torch.no_grad():
        return bench.measure(
            {"forward": lambda: model(images)}, repeats=_TIMINGS, warmup=2, device=first.device, budget_s=_BUDGET
        )["forward"]
