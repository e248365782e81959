"""Make loaders whose order of samples depends only on (seed, epoch)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from widefield.data import Sample, SampleSet
from widefield.data.base import labels_of
from widefield.tasks import Batch
from widefield.train.interrupt import ignore_signals


class EpochSampler(Sampler[int]):
    """A shuffle of ``range(length)`` that is a function of (seed, epoch), from any position on.

    With ``repeats`` each image comes that many times in a row (Hoffer et al. 2020, "Augment your batch"). An epoch is
    as long as before, so it holds a part of the images. Visit v of image i is ``i + v * length``.

    With ``groups``, the samples of a step are of one group: the shuffled samples of each group are collected, and
    follow as soon as there are enough for a step. Those left over at the end of the epoch come last, mixed.

    Args:
        length: number of samples.
        seed: first word of the key to every shuffle.
        repeats: how often each image comes in a row.
        groups: number of each sample's group, (length,); None: one group.
        together: number of samples of a step, in all processes and before accumulation.
        shares: probability of each sample, (length,): an epoch is drawn with replacement, and a sample that is drawn
            again comes on another visit, augmented anew; None: each sample comes once.

    Attributes:
        start: how many samples of the epoch to skip, because they were used before an interruption; they are not
            loaded.
    """

    def __init__(
        self,
        length: int,
        seed: int,
        repeats: int = 1,
        groups: NDArray[np.int64] | None = None,
        together: int = 1,
        shares: NDArray[np.float64] | None = None,
    ) -> None:
        self.shares = shares
        self.length, self.seed, self.repeats = length, seed, repeats
        self.groups, self.together = groups, together
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length - self.start

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng((self.seed, self.epoch))
        if self.shares is None:
            order = generator.permutation(self.length)
        else:
            drawn = generator.choice(self.length, self.length, p=self.shares)
            order = drawn + self.length * self.repeats * _times_before(drawn)
        visits = (order[:, None] + self.length * np.arange(self.repeats)).ravel()[: self.length]
        if self.groups is not None:
            visits = visits[_grouped(self.groups[visits % self.length], self.together)]
        return iter(visits[self.start :].tolist())


def _times_before(drawn: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how often the value of each element stands before it."""
    order = np.argsort(drawn, kind="stable")
    starts = np.searchsorted(drawn[order], drawn[order])
    times = np.empty_like(drawn)
    times[order] = np.arange(len(drawn)) - starts
    return times


def class_shares(dataset: SampleSet, power: float) -> NDArray[np.float64]:
    """Return the probability of each sample, (N,), if a class of n images is drawn in proportion to n to a power.

    The power 1 draws all images alike, 0 all classes, and 0.5 is between (Kang et al. 2020, "Decoupling representation
    and classifier for long-tailed recognition", eq. 1).

    Raises:
        ValueError: the set does not say the labels of its images.
    """
    places = labels_of(dataset, "class_sampling", "leave it out")
    counts = np.bincount(places).clip(min=1).astype(np.float64)
    weights = (counts ** (power - 1))[places]
    shares: NDArray[np.float64] = weights / weights.sum()
    return shares


def _grouped(groups: NDArray[np.int64], together: int) -> NDArray[np.int64]:
    """Return an order of the elements of ``groups`` in which as many as possible of one group stand together."""
    blocks, rest = [], []
    for group in np.unique(groups):
        places = np.flatnonzero(groups == group)
        full = len(places) - len(places) % together
        blocks.append(places[:full].reshape(-1, together))
        rest.append(places[full:])
    whole = np.concatenate(blocks)
    whole = whole[np.argsort(whole[:, -1])]  # a block is complete when its last sample comes
    order: NDArray[np.int64] = np.concatenate([whole.ravel(), np.sort(np.concatenate(rest))])
    return order


Collate = Callable[[Sequence[Sample]], Batch]
"""Makes a batch of samples that could all be read: ``Task.collate``."""


def train_loader(
    dataset: SampleSet,
    collate: Collate,
    batch_size: int,
    workers: int,
    seed: int,
    repeats: int = 1,
    processes: int = 1,
    class_sampling: float | None = None,
) -> DataLoader[Any]:
    """Return a loader of full shuffled batches, for ``batches``; its ``sampler`` is an :class:`EpochSampler`.

    If the data set has :meth:`~widefield.data.SampleSet.batch_groups`, the batches of a step in all ``processes`` are
    of one group. With ``class_sampling``, the power of :func:`class_shares`, images are drawn by class.
    """
    reading = _Reading(dataset)
    shares = None if class_sampling is None else class_shares(dataset, class_sampling)
    sampler = EpochSampler(len(reading), seed, repeats, dataset.batch_groups(), batch_size * processes, shares)
    return _loader(reading, collate, batch_size, workers, sampler=sampler, drop_last=True)


def val_loader(dataset: SampleSet, collate: Collate, batch_size: int, workers: int) -> DataLoader[Any]:
    """Return a loader of all samples in order, for ``batches``; the last batch may be smaller."""
    return _loader(_Reading(dataset), collate, batch_size, workers)


def batches(loader: Iterable[Any]) -> Iterator[Batch]:
    """Yield the batches of a loader; raises the OSError of the first sample that could not be read."""
    for batch in loader:
        if isinstance(batch, OSError):
            raise batch
        yield batch


def first_batch(dataset: SampleSet, collate: Collate, indices: Iterable[int], size: int) -> Batch:
    """Return a batch of the first ``size`` readable samples; ``{}`` if none can be read.

    Raises OSError for a sample that cannot be read and may not be left out.
    """
    reading = _Reading(dataset)
    found = itertools.islice((sample for index in indices if (sample := reading[index]) is not None), size)
    return next(batches([_Collating(collate)(list(found))]))


def shut_down(loader: Any) -> None:
    """End the workers of a loader. Python's own SIGTERM at exit would not: workers ignore signals."""
    iterator = loader._iterator
    if iterator is not None:
        iterator._shutdown_workers()
        for worker in iterator._workers:
            worker.kill()  # if it has not ended in time


class _Reading(Dataset[Any]):
    """A data set whose samples know their place, and that returns the OSError of an unreadable one.

    Raised in a worker, the error would arrive as the text of a traceback.
    """

    def __init__(self, dataset: SampleSet) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Sample] | OSError | None:
        visit, index = divmod(index, len(self))
        try:
            with self.dataset.visited(visit) if visit else nullcontext():
                sample = self.dataset[index]
        except OSError as error:
            return error
        return None if sample is None else (self.dataset.place_of(index), sample)


class _Collating:
    """Makes a batch of what :class:`_Reading` gives: the task's batch with ``index``, ``{}``, or the first OSError."""

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, found: Sequence[tuple[int, Sample] | OSError | None]) -> Batch | OSError:
        error = next((one for one in found if isinstance(one, OSError)), None)
        if error is not None:
            return error
        kept = [one for one in found if one is not None and not isinstance(one, OSError)]
        if not kept:
            return {}
        return {**self.collate([sample for _, sample in kept]), "index": torch.tensor([index for index, _ in kept])}


def _loader(dataset: _Reading, collate: Collate, batch_size: int, workers: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_Collating(collate),
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        worker_init_fn=ignore_signals,
        # Its own generator: a loader must not draw from the one that the model's dropout draws from.
        generator=torch.Generator().manual_seed(0),
        **options,
    )
