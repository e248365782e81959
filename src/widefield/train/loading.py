"""Loaders whose order of samples is a function of (seed, epoch) alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from widefield.data import ImageSet
from widefield.train.interrupt import ignore_signals


class EpochSampler(Sampler[int]):
    """A shuffle of ``range(length)`` that is a function of (seed, epoch), from any position on.

    With ``repeats`` each of a part of the images comes so many times in a row (Hoffer et al. 2020, "Augment your
    batch"), and an epoch is as long as before. Visit v of image i is ``i + v * length``.

    Attributes:
        start: how many samples of the epoch to leave out, as they were used before the run was interrupted; they are
            not loaded.
    """

    def __init__(self, length: int, seed: int, repeats: int = 1) -> None:
        self.length, self.seed, self.repeats = length, seed, repeats
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length - self.start

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        visits = (order[:, None] + self.length * np.arange(self.repeats)).ravel()[: self.length]
        return iter(visits[self.start :].tolist())


def train_loader(dataset: ImageSet, batch_size: int, workers: int, seed: int, repeats: int = 1) -> DataLoader[Any]:
    """Return a loader of whole shuffled batches, for ``batches``; its ``sampler`` is an :class:`EpochSampler`."""
    reading = _Reading(dataset)
    sampler = EpochSampler(len(reading), seed, repeats)
    return _loader(reading, batch_size, workers, sampler=sampler, drop_last=True)


def val_loader(dataset: ImageSet, batch_size: int, workers: int) -> DataLoader[Any]:
    """Return a loader of all samples in order, for ``batches``; the last batch may be smaller."""
    return _loader(_Reading(dataset), batch_size, workers)


def batches(loader: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches of a loader; raises the OSError of the first sample that could not be read, as it was."""
    for batch in loader:
        if isinstance(batch, OSError):
            raise batch
        yield batch


def shut_down(loader: Any) -> None:
    """End the workers of a loader. Python would do so when it exits, by a SIGTERM, which they ignore."""
    iterator = loader._iterator
    if iterator is not None:
        iterator._shutdown_workers()
        for worker in iterator._workers:
            worker.kill()  # one that did not heed the request in time; the others are gone


class _Reading(Dataset[Any]):
    """A data set whose samples know their index, and that returns the OSError of one that could not be read.

    Raised in a worker the error would arrive as a traceback's text.
    """

    def __init__(self, dataset: ImageSet) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        visit, index = divmod(index, len(self))
        try:
            with self.dataset.visited(visit) if visit else nullcontext():
                sample = self.dataset[index]
        except OSError as error:
            return error
        return None if sample is None else {**sample, "index": index}


def collate(samples: Sequence[Any]) -> Any:
    """Stack samples, or return the OSError of the first that could not be read."""
    from widefield.data import collate

    return next((sample for sample in samples if isinstance(sample, OSError)), None) or collate(samples)


def _loader(dataset: _Reading, batch_size: int, workers: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        worker_init_fn=ignore_signals,
        # Its own generator: a loader must not draw from the one that the model's dropout draws from.
        generator=torch.Generator().manual_seed(0),
        **options,
    )
