"""Loaders whose order of samples is a function of (seed, epoch) alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from widefield.train.interrupt import ignore_signals


class EpochSampler(Sampler[int]):
    """A shuffle of ``range(length)`` that is a function of (seed, epoch), from any position on.

    Attributes:
        start: how many samples of the epoch to leave out, as they were used before the run was interrupted; they are
            not loaded.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed = length, seed
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length - self.start

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        return iter(order[self.start :].tolist())


def train_loader(dataset: Dataset[Any], batch_size: int, workers: int, seed: int) -> DataLoader[Any]:
    """Return a loader of whole shuffled batches; its ``sampler`` is an :class:`EpochSampler`."""
    length = len(dataset)  # type: ignore[arg-type]  # torch leaves __len__ out of Dataset; ours have it
    return _loader(dataset, batch_size, workers, sampler=EpochSampler(length, seed), drop_last=True)


def val_loader(dataset: Dataset[Any], batch_size: int, workers: int) -> DataLoader[Any]:
    """Return a loader of all samples in order; the last batch may be smaller."""
    return _loader(dataset, batch_size, workers)


def _loader(dataset: Dataset[Any], batch_size: int, workers: int, **options: Any) -> DataLoader[Any]:
    from widefield.data import collate

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
