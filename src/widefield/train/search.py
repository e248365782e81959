"""Try steps of a recipe to find its learning rate or its batch size; nothing is written."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from widefield import _checks, report
from widefield.report import Report
from widefield.tasks import Batch
from widefield.train.engine import trial
from widefield.train.loaders import batches
from widefield.train.recipe import Recipe
from widefield.train.run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SMOOTH = 0.9
"""Of the running mean of the losses."""
_BLOWN_UP = 4.0
"""Where the loss is this many times the lowest, the test ends."""


@dataclass(frozen=True)
class LearningRates(Report):
    """The losses of a run whose learning rate grows at every step (Smith 2017, sec. 3.3, "LR range test").

    Attributes:
        rates: learning rate of each step.
        losses: loss of each step, as a running mean without bias.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def steepest(self) -> float | None:
        """Return the rate at which the loss falls fastest over the logarithm of the rate; None if it never falls."""
        if len(self.losses) < 3:
            return None
        slopes = [
            (after - before) / (math.log(high) - math.log(low))
            for before, after, low, high in zip(self.losses, self.losses[2:], self.rates, self.rates[2:], strict=False)
        ]
        lowest = min(range(len(slopes)), key=slopes.__getitem__)
        return self.rates[lowest + 1] if slopes[lowest] < 0 else None

    @property
    def largest(self) -> float | None:
        """Return a tenth of the rate with the lowest loss: where it still falls, with a margin. None as above."""
        return None if self.steepest is None else self.rates[self.losses.index(min(self.losses))] / 10

    def summary(self) -> str:
        """Return the rates that the test suggests."""
        span = f"{len(self.rates)} steps, learning rates {self.rates[0]:.3g} to {self.rates[-1]:.3g}"
        if self.steepest is None:
            return f"{span}: the loss never falls. Start at lower rates, or look at the data and the model."
        return (
            f"{span}: the loss falls fastest at {self.steepest:.3g} and is lowest at {10 * (self.largest or 0):.3g}. "
            f"Try optimizer.lr between {min(self.steepest, self.largest or 0):.2g} and "
            f"{max(self.steepest, self.largest or 0):.2g}; a short test knows no schedule and no regularization."
        )

    def rows(self) -> list[dict[str, str]]:
        """Return about ten of the steps."""
        kept = range(0, len(self.rates), max(1, len(self.rates) // 10))
        return [{"learning rate": f"{self.rates[k]:.3g}", "loss": f"{self.losses[k]:.4g}"} for k in kept]

    def to_dict(self) -> dict[str, object]:
        """Return everything in JSON types."""
        return {**dataclasses.asdict(self), "steepest": self.steepest, "largest": self.largest}

    def drawings(self) -> dict[str, Figure]:
        """Return the figure of :meth:`draw`, by caption."""
        return {"Loss over the learning rate; dotted: where it falls fastest, and a tenth of the lowest.": self.draw()}

    def draw(self) -> Figure:
        """Draw the loss over the learning rate."""
        figure = report.curves({"loss": (self.rates, self.losses)}, "learning rate", "loss (running mean)")
        axis = figure.axes[0]
        axis.set_xscale("log")
        for rate in (self.steepest, self.largest):
            if rate is not None:
                axis.axvline(rate, color="0.5", linewidth=0.8, linestyle=":")
        return figure


def find_learning_rate(
    recipe: Recipe, *, lowest: float = 1e-6, highest: float = 1.0, steps: int = 100
) -> LearningRates:
    """Train a recipe for some steps at growing learning rates, without its schedule, and return the losses.

    Every group's rate keeps its ratio to the others. The test ends early where the loss is four times the lowest one,
    or not finite.

    Args:
        recipe: its ``optimizer.lr``, schedule and sparsity are ignored.
        lowest, highest: first and last learning rate; they grow by the same factor at each step.
        steps: number of steps.

    Raises what :func:`train` raises before its first step.
    """
    lowest = _checks.number("lowest", lowest)
    highest = _checks.number("highest", highest)
    if not 0 < lowest < highest:
        raise ValueError(f"lowest must be above 0 and below highest; got {lowest} and {highest}.")
    _checks.integer("steps", steps, minimum=3)
    recipe = dataclasses.replace(recipe, nonfinite="skip", sparsity=None)
    with trial(recipe) as run:
        learner = run.learner
        scales = [group["lr"] / learner.lr for group in learner.optimizer.param_groups]
        rates: list[float] = []
        losses: list[float] = []
        mean = 0.0
        learner.train()
        for number, group in enumerate(_groups(run, steps)):
            rate = lowest * (highest / lowest) ** (number / (steps - 1))
            for part, scale in zip(learner.optimizer.param_groups, scales, strict=True):
                part["lr"] = rate * scale
            loss = float(run.accelerator.reduce(learner.step(group, number + 1, scheduled=False).loss, "mean"))
            mean = _SMOOTH * mean + (1 - _SMOOTH) * loss
            smooth = mean / (1 - _SMOOTH ** (number + 1))
            if not math.isfinite(smooth) or (losses and smooth > _BLOWN_UP * min(losses)):
                break
            rates.append(rate)
            losses.append(smooth)
    if not losses:
        raise ValueError(
            f"the first loss is {loss}, at a learning rate of {lowest:.3g}: look at the model and the data."
        )
    return LearningRates(tuple(rates), tuple(losses))


def _groups(run: Run, steps: int) -> Iterator[Sequence[Batch]]:
    """Yield the batches of each of some steps, epoch after epoch."""
    given, size = 0, run.recipe.accumulate
    for epoch in range(steps):
        run.train_set.set_epoch(epoch)
        run.train_batches.set_epoch(epoch)
        group: list[Batch] = []
        for batch in batches(run.train_batches):
            group += [batch] if batch else []
            if len(group) == size:
                yield group
                group, given = [], given + 1
                if given == steps:
                    return


def find_batch_size(recipe: Recipe, *, largest: int = 4096) -> int:
    """Return the largest batch size, of powers of two, at which steps of a recipe fit into a GPU's memory.

    Each size is tried with two steps, the second of which holds the optimizer's state. Leave some memory to a
    long run: images of several sizes, and evaluation, may need more.

    Args:
        recipe: its ``batch_size`` is ignored. ``optimizer.lr_base_size`` scales the learning rate with the size.
        largest: largest size to try.

    Raises:
        ValueError: the recipe trains on a CPU, whose memory does not end with an error; not even one image fits; or
            what :func:`train` raises before its first step.
    """
    _checks.integer("largest", largest)
    with trial(dataclasses.replace(recipe, batch_size=1)) as run:
        if run.accelerator.device.type == "cpu":
            raise ValueError("a batch size can be searched on a GPU only: a CPU gives no error to go by.")
        images = len(run.sampler) // (recipe.accumulate * run.accelerator.num_processes)
    best = 0
    for size in sizes_that_fit(lambda size: _two_steps(recipe, size), min(largest, images)):
        best = size
    if not best:
        raise ValueError("not even a batch of one image fits: use smaller images, or gradient_checkpointing: true.")
    return best


def sizes_that_fit(attempt: Callable[[int], None], largest: int) -> Iterator[int]:
    """Yield 1, 2, 4 and so on up to ``largest``, as long as an attempt with the size does not run out of memory."""
    size = 1
    while size <= largest:
        try:
            attempt(size)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            return
        finally:
            clear_device_cache(garbage_collection=True)
        yield size
        size *= 2


def _two_steps(recipe: Recipe, size: int) -> None:
    with trial(dataclasses.replace(recipe, batch_size=size, sparsity=None)) as run:
        run.learner.train()
        for number, group in enumerate(_groups(run, 2)):
            float(run.learner.step(group, number + 1).loss)  # waits for the device
