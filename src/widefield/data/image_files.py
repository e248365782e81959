"""Provide the base classes of sets of encoded images: transforms, and the handling of broken files."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from widefield.data import transforms
from widefield.data.base import LabeledImages, MultiLabelImages, Sample, SquareImages, seeded
from widefield.data.class_map import alike
from widefield.data.corrupt import CorruptFiles
from widefield.data.decoding import CorruptImageError, decoding_options, read
from widefield.data.listing import Skipped
from widefield.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Augmentation


class EncodedImages(SquareImages):
    """Images in files of any size, decoded when they are needed, with labels of any kind.

    Samples: ``image`` float32 (3, size, size), the label, and with ``names`` the file's ``name``, str. Train images get
    a random crop, flip, ``auto_augment`` or ``color_jitter``, and random erasing; val images are resized and cropped.
    Each split ignores the options of the other, so one set of options serves both.

    Args:
        split: ``"train"`` or ``"val"``.
        size: side of the images in pixels.
        seed: seed of the augmentation.
        names: give each sample its file's ``name``, without folders; ImageNet-ReaL looks labels up by it.
        corrupt: how to treat a file that cannot be fully decoded: ``"refuse"`` raises OSError, ``"skip"`` warns once
            per file and leaves it out of its batch. Errors of the system, such as a missing file, are always raised.
        max_corrupt: largest fraction of the split that may be skipped, from 0 to 1; beyond it OSError lists the files.
            Files are counted over all workers and epochs of a process.
        exif_orientation: rotate images by their EXIF orientation, as viewers do; False reads them as they are stored,
            as timm and torchvision do.
        max_pixels: refuse files with more pixels; None means Pillow's limit, twice ``PIL.Image.MAX_IMAGE_PIXELS``
            (178,956,970).
        mean: mean of each of the 3 channels for pixels in [0, 1].
        std: standard deviation of each of the 3 channels.
        crop_pct: val: side of the crop relative to the resized image, in (0, 1]; None means 0.875.
        crop_mode: val: ``"center"`` resizes the shorter side to size / crop_pct and crops, ``"squash"`` resizes both
            sides to it and crops, ``"border"`` resizes the longer side to it and pads or crops.
        augmentation: train: the arguments of `widefield.data.transforms.Augmentation`, such as ``auto_augment`` and
            ``hflip``. ``interpolation`` applies to both splits.

    Raises:
        ValueError: an argument is out of range.
        TypeError: an argument is of the wrong type.
    """

    further = tuple(option.name for option in fields(Augmentation))

    def __init__(
        self,
        split: str,
        *,
        size: int = 224,
        seed: int = 0,
        names: bool = False,
        corrupt: str = "refuse",
        max_corrupt: float = 0.01,
        exif_orientation: bool = True,
        max_pixels: int | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        crop_pct: float | None = None,
        crop_mode: str = "center",
        **augmentation: Any,
    ) -> None:
        super().__init__(split, size, seed)
        self.names = bool(names)
        self._corrupt = CorruptFiles(corrupt, max_corrupt)
        self.decoding = decoding_options(exif_orientation, max_pixels)
        self.mean, self.std = transforms.statistics(mean, std)
        drawn = Augmentation(**augmentation)
        # Both are built, so that a wrong option of one split is also reported for the other.
        built = {
            "train": transforms.training(size, self.mean, self.std, drawn),
            "val": transforms.evaluation(
                size, self.mean, self.std, interpolation=drawn.interpolation, crop_pct=crop_pct, crop_mode=crop_mode
            ),
        }
        self._transform = built[split]

    def _keep(self, classes: Sequence[str], count: int, skipped: Skipped | None = None) -> None:
        """Store the subclass's class names, the number of images, and the files that it left out."""
        self.classes = tuple(classes)
        self.skipped = skipped or Skipped()
        self._count = count
        self._corrupt.expect(count, self.split)

    def found(self) -> str:
        """Return one line: images, classes, classes without images, and what was left out and why."""
        empty = np.flatnonzero(self._images_by_class() == 0)
        without = f" ({len(empty):,} without images, such as {self.classes[empty[0]]!r})" if len(empty) else ""
        same = alike(self.classes)
        return f"{super().found()}{without}{self.skipped.clause()}{f'; warning:{same}' if same else ''}"

    @abstractmethod
    def _images_by_class(self) -> NDArray[np.int64]:
        """Return the number of images of each class, (K,)."""

    @abstractmethod
    def _label(self, index: int) -> Sample:
        """Return the entries of sample ``index`` that are its label."""

    @abstractmethod
    def _open(self, index: int) -> str | BinaryIO:
        """Return the path of image ``index``, or a file with its bytes; raises OSError."""

    @abstractmethod
    def _name(self, index: int) -> str:
        """Return the path of image ``index`` for messages; it may name a file inside an archive."""

    def _file_name(self, index: int) -> str:
        return Path(self._name(index)).name

    def __len__(self) -> int:
        return self._count

    def sample(self, index: int) -> Sample | None:
        """Return sample ``index``, or None for a corrupt file under ``corrupt="skip"``.

        Raises:
            OSError: the file cannot be opened or read or, under ``corrupt="refuse"``, is corrupt; the message names it.
            CorruptImagesError: more files are corrupt than ``max_corrupt`` allows; the message lists them.
            MemoryError: the image does not fit into memory.
        """
        try:
            picture = read(self._open(index), self._name(index), **self.decoding)
        except CorruptImageError as error:
            self._corrupt.report(index, error, self._name)
            return None
        with seeded(self.key(index)):
            image = self._transform(picture)
        sample: Sample = {"image": image, **self._label(index)}
        if self.names:
            sample["name"] = self._file_name(index)
        return sample


class ImageFiles(EncodedImages, LabeledImages):
    """Images in files of any size, with one label each; samples, options and errors are those of `EncodedImages`.

    The label of a sample is ``label``, int.
    """

    def _hold(self, classes: Sequence[str], labels: NDArray[np.int64], skipped: Skipped | None = None) -> None:
        """Store the subclass's class names, the label of each image, (N,), and the files that it left out."""
        self.labels = labels
        self._keep(classes, len(labels), skipped)

    def _images_by_class(self) -> NDArray[np.int64]:
        return np.bincount(self.labels, minlength=len(self.classes))

    def _identity(self) -> Iterable[bytes]:
        yield self.labels.astype("<i8").tobytes()

    def _label(self, index: int) -> Sample:
        return {"label": int(self.labels[index])}


class MultiLabelFiles(EncodedImages, MultiLabelImages):
    """Images in files of any size, each of any number of classes; samples and options are those of `EncodedImages`.

    The label of a sample is ``present``, bool (K,).
    """

    present: NDArray[np.bool_]

    def _hold(
        self, classes: Sequence[str], root: Path, files: Sequence[str], present: NDArray[np.bool_], skipped: Skipped
    ) -> None:
        """Store class names, images by their paths below ``root``, their classes (N, K), and what was left out."""
        self.present = present
        self.place = str(root)
        self._files = np.array([os.fsencode(name) for name in files])  # an array for the sake of workers
        self._keep(classes, len(files), skipped)

    def _images_by_class(self) -> NDArray[np.int64]:
        counts: NDArray[np.int64] = self.present.sum(0)
        return counts

    def found(self) -> str:
        """Return one line: images, classes, mean number of classes of an image, and what was left out and why."""
        return f"{super().found()}; {self.present.sum(1).mean():.1f} classes per image"

    def _identity(self) -> Iterable[bytes]:
        yield repr(self.classes).encode()
        yield np.packbits(self.present, axis=1).tobytes()
        yield from self._files

    def _open(self, index: int) -> str:
        return self._name(index)

    def _name(self, index: int) -> str:
        return str(Path(self.place, os.fsdecode(self._files[index])))

    def name(self, index: int) -> str:
        """Return the path of image ``index``."""
        return self._name(index)

    def _label(self, index: int) -> Sample:
        return {"present": torch.from_numpy(self.present[index].copy())}
