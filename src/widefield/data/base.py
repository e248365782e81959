"""Provide the base classes of data sets: seeded samples, labeled images, and their collation into batches.

The randomness of a sample is a function of (seed, epoch, index) alone. It does not depend on the number of loader
workers, on the samples read before, or on the global generators. A run that resumes in the middle of an epoch
therefore sees exactly the images it would have seen.
"""

from __future__ import annotations

import hashlib
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, default_collate, get_worker_info

from widefield import _checks
from widefield.data.listing import counted

Sample = dict[str, Any]
"""One sample by entry, such as ``image`` float32 (C, H, W) and ``label`` int."""

SPLITS = ("train", "val")


class SampleSet(Dataset[Sample | None], ABC):
    """A map-style data set with reproducible randomness; a subclass defines ``__len__`` and ``sample``.

    Samples may hold anything: images of any size, masks, boxes, texts. A set of images with one label each is
    a `LabeledImages`; with any number of classes each, a `MultiLabelImages`.

    Attributes:
        split: ``"train"`` or ``"val"``.
        seed: first word of the key to every random choice.
        classes: names of the classes that labels point to; empty if there are none.
        mean: mean of each channel for pixels in [0, 1], subtracted from every image; empty if the samples are not
            normalized images.
        std: standard deviation of each channel, which every image is divided by.
        image_size: side of the images in pixels, if all are squares of one size, else None.
    """

    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    image_size: int | None = None
    place = ""
    """Location of the files, for messages; empty for sets without files."""
    needs: ClassVar[dict[str, str]] = {}
    """Required option -> description of its value, for the message about a missing option."""
    further: ClassVar[tuple[str, ...]] = ()
    """Options that the constructor takes as ``**options`` without passing them to its base class."""
    reads_urls: ClassVar[bool] = False
    """Whether the option ``root`` may be a URL."""
    _visit = 0

    def __init__(self, split: str, seed: int) -> None:
        self.split = _checks.choice("split", split, SPLITS)
        self.seed = _checks.integer("seed", seed, minimum=0, maximum=2**32 - 1)
        # In shared memory, so that workers that outlive an epoch (persistent_workers) see new values.
        self._epoch = shared(torch.zeros((), dtype=torch.int64))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        shared(self._epoch)  # a copied or unpickled set reaches its workers as well

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, from 0, that seeds the next samples; call it before iterating over a loader.

        Raises TypeError or ValueError unless ``epoch`` is an integer of at least 0.
        """
        self._epoch.fill_(_checks.integer("epoch", epoch, minimum=0))

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def sample(self, index: int) -> Sample | None:
        """Return sample ``index``, an int in [0, len(self)), or None to leave it out of its batch."""

    def __getitem__(self, index: int) -> Sample | None:
        return self.sample(range(len(self))[index])  # range knows negative indices and raises IndexError

    def place_of(self, index: int) -> int:
        """Return the place of a sample in the data set that this one is a shard of; default: ``index`` itself."""
        return index

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """Return (C, H, W) of the images, or None if they differ in size."""
        size = self.image_size
        return (len(self.mean), size, size) if self.mean and size else None

    def batch_groups(self) -> NDArray[np.int64] | None:
        """Return a group for each sample, from 0, (N,): the train batches of a step hold samples of one group.

        None, the default: any samples. Sets of images of any size return whether images are wide or tall, because
        batches of both need more padding.
        """
        return None

    def fingerprint(self) -> str:
        """Return a hash of the names and labels of the split's samples; pixels are not read.

        The hash stays the same when the files move to another folder unchanged. A generated or embedded set is
        identified by its number of samples.
        """
        return hashlib.sha256(b"\0".join([str(len(self)).encode(), *self._identity()])).hexdigest()

    def _identity(self) -> Iterable[bytes]:
        """Yield the bytes that identify this set's samples: names relative to its root, and labels."""
        return ()

    def found(self) -> str:
        """Return one line: the number of samples, where they are, their classes, and what was left out and why."""
        where = f" in {self.place}" if self.place else ""
        classes = f", {counted(len(self.classes), 'class', 'classes')}" if self.classes else ""
        return f"{self.split}: {counted(len(self), 'image')}{where}{classes}"

    @contextmanager
    def visited(self, visit: int) -> Iterator[None]:
        """Augment the samples taken in this block as on another visit in the same epoch; 0 is the first."""
        self._visit = visit
        try:
            yield
        finally:
            self._visit = 0

    def key(self, index: int) -> tuple[int, ...]:
        """Return the key of one sample's randomness, for ``seeded``: (seed, epoch, index), or with a later visit."""
        key = self.seed, int(self._epoch), index
        return (*key, self._visit) if self._visit else key


class SquareImages(SampleSet):
    """Square images of one size, of named classes."""

    image_size: int

    def __init__(self, split: str, size: int, seed: int) -> None:
        super().__init__(split, seed)
        self.image_size = _checks.integer("size", size)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return (C, H, W) of the images."""
        return len(self.mean), self.image_size, self.image_size


class LabeledImages(SquareImages):
    """Square images of one size with one label each; a subclass defines ``__len__``, ``sample`` and the attributes.

    Samples: ``image`` float32 (C, image_size, image_size), normalized by ``mean`` and ``std``; ``label`` int, an index
    into ``classes``; any further entries of the set.
    """

    labels: Any = None
    """Label of each image, a sequence of N integers, without reading images; None if they are not known."""


class MultiLabelImages(SquareImages):
    """Square images of one size, each with any number of classes, or none of them.

    Samples: ``image`` float32 (C, image_size, image_size), normalized by ``mean`` and ``std``; ``present`` bool (K,):
    which of the K ``classes`` the image shows; any further entries of the set.
    """

    present: NDArray[np.bool_] | None = None
    """Which classes each image shows, (N, K), without reading images; None if it is not known."""


def check_classes(dataset: LabeledImages) -> None:
    """Raise ValueError for a data set with one class, on which a classifier cannot be trained."""
    if len(dataset.classes) < 2:
        where = f" in {dataset.place!r}" if dataset.place else ""
        named = f"only the class {dataset.classes[0]!r}" if dataset.classes else "no classes"
        raise ValueError(f"the {dataset.split} split{where} has {named}; a classifier needs at least two.")


def labels_of(dataset: SampleSet, reader: str, instead: str) -> NDArray[np.int64]:
    """Return the label of each image of a set, int64 (N,), without reading images.

    Args:
        dataset: the images.
        reader: the option that needs the labels, for the message.
        instead: what to do if there are none, likewise.

    Raises:
        ValueError: the set has no attribute ``labels``, or it is None.
    """
    labels = getattr(dataset, "labels", None)
    if labels is None:
        name = type(dataset).__name__
        raise ValueError(f"{reader} needs the label of each image, and {name} has no `labels`: {instead}.")
    return np.asarray(labels, dtype=np.int64)


def summarize(*datasets: SampleSet) -> str:
    """Return one line per data set; see `SampleSet.found`."""
    return "\n".join(dataset.found() for dataset in datasets)


def shared(values: torch.Tensor) -> torch.Tensor:
    """Move ``values`` to memory shared with worker processes, and return it."""
    values.share_memory_()
    return values


@contextmanager
def seeded(key: Sequence[int]) -> Iterator[None]:
    """Seed the global CPU generators of python, numpy and torch from ``key`` for one block, and restore them after.

    The transforms of timm and torchvision draw from these generators. ``key`` holds non-negative integers.
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence(key).generate_state(3).tolist()
    random.seed(words[0])
    np.random.seed(words[1])
    torch.default_generator.manual_seed(words[2])  # torch.manual_seed would reseed every GPU as well
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def collate(samples: Sequence[Sample | None]) -> Sample:
    """Stack samples into a batch: ``image`` (N, C, H, W), ``label`` int64 (N,), and so on for the other entries.

    ``None`` samples (skipped images) are dropped; a batch of only such samples is ``{}``.
    """
    kept = [sample for sample in samples if sample is not None]
    batch: Sample = default_collate(kept) if kept else {}
    return batch


def padded(images: Sequence[torch.Tensor], size: Sequence[int]) -> torch.Tensor:
    """Return images (C, h, w) as one tensor (N, C, H, W), with zeros on the right and at the bottom.

    In a loader's worker it is in memory shared with the main process, as that of ``default_collate``, so that it is
    written once.

    Args:
        images: at least one, of one dtype and number of channels.
        size: (H, W), at least that of each image.
    """
    first = images[0]
    shape = (len(images), first.shape[0], *size)
    if get_worker_info() is None:
        batch = first.new_empty(shape)
    else:
        storage = torch.UntypedStorage._new_shared(math.prod(shape) * first.element_size())
        batch = first.new_empty(0).set_(storage).view(shape)
    for place, image in zip(batch, images, strict=True):
        height, width = image.shape[1:]
        place[:, :height, :width] = image
        place[:, height:] = 0
        place[:, :height, width:] = 0
    return batch


def normalize(image: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Return (``image`` - ``mean``) / ``std`` by channel for images float32 (..., C, H, W) in [0, 1]."""
    return (image - image.new_tensor(mean)[:, None, None]) / image.new_tensor(std)[:, None, None]
