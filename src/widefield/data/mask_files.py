"""Provide the base class of segmentation sets of image files with label files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from widefield import _checks
from widefield.data import transforms
from widefield.data.base import Sample, seeded
from widefield.data.corrupt import CorruptFiles
from widefield.data.decoding import CorruptImageError, LabelError, decoding_options, read
from widefield.data.labels import LabelFormat
from widefield.data.pairs import Pairs
from widefield.data.segmentation import Color, SegmentationSet
from widefield.data.transforms import IMAGENET_MEAN, IMAGENET_STD, JointAugmentation


class SegmentationFiles(SegmentationSet):
    """Images and label images in files of any size, decoded when they are needed.

    Samples: those of `SegmentationSet`, and with ``names`` the image's ``name``, str: its path below the set's root.
    Train images get a random resize, crop, flip and distortion of colors; the mask follows them. Val images are resized
    and keep their aspect ratio; their masks keep the size of the file. Each split ignores the options of the other.

    Args:
        split: ``"train"`` or ``"val"``.
        size: train: (height, width) of the crop in pixels; one number stands for a square.
        test_scale: val: (longer side, shorter side) of the rectangle that images are fitted into; None means ``scale``,
            and the size of the file if that is None, too.
        seed: seed of the augmentation.
        names: give each sample its ``name``.
        corrupt: how to treat an image or label image that cannot be fully decoded: ``"refuse"`` raises OSError,
            ``"skip"`` warns once per file and leaves the pair out of its batch. Label images that can be decoded, but
            are wrong, are always refused.
        max_corrupt: largest fraction of the split that may be skipped, from 0 to 1.
        exif_orientation: rotate images by their EXIF orientation; label images are never rotated.
        max_pixels: refuse files with more pixels; None means Pillow's limit.
        mean: mean of each of the 3 channels for pixels in [0, 1].
        std: standard deviation of each of the 3 channels.
        augmentation: the arguments of `widefield.data.transforms.JointAugmentation`, such as ``scale``, ``ratio`` and
            ``hflip``.

    Raises:
        ValueError: an argument is out of range.
        TypeError: an argument is of the wrong type.
    """

    further = tuple(option.name for option in fields(JointAugmentation))

    def __init__(
        self,
        split: str,
        *,
        size: int | Sequence[int] = 512,
        test_scale: Sequence[int] | None = None,
        seed: int = 0,
        names: bool = False,
        corrupt: str = "refuse",
        max_corrupt: float = 0.01,
        exif_orientation: bool = True,
        max_pixels: int | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        **augmentation: Any,
    ) -> None:
        from widefield.data import joint  # torchvision.transforms.v2 is slow to import

        super().__init__(split, seed)
        self.crop_size = _checks.pair("size", size)
        self.names = bool(names)
        self._corrupt = CorruptFiles(corrupt, max_corrupt)
        self.decoding = decoding_options(exif_orientation, max_pixels)
        self.mean, self.std = transforms.statistics(mean, std)
        _checks.known_arguments(type(self).__name__, augmentation, self.further)
        drawn = JointAugmentation(**augmentation)
        self._train = joint.training(self.crop_size, self.mean, self.std, drawn)
        self.test_scale = transforms.rectangle("test_scale", drawn.scale if test_scale is None else test_scale)
        self._val = joint.evaluation(self.test_scale, self.mean, self.std, antialias=drawn.antialias)

    def _hold(self, pairs: Pairs, classes: Sequence[str], palette: Sequence[Color], form: LabelFormat) -> None:
        """Store the subclass's files, class names and colors, and how it reads label images."""
        self.classes, self.palette = tuple(classes), tuple(palette)
        self._form = form
        self.place = str(pairs.root)
        self.skipped = pairs.skipped
        # Arrays: workers would slowly copy a list of a million strings, because reading one changes its reference
        # count.
        self._images = np.array([os.fsencode(path) for path in pairs.images])
        self._labels = np.array([os.fsencode(path) for path in pairs.labels])
        self._corrupt.expect(len(self), self.split)

    def found(self) -> str:
        """Return one line: images and classes of the split, and what was left out and why."""
        return f"{super().found()}{self.skipped.clause()}"

    def _identity(self) -> Iterable[bytes]:
        yield from self._images
        yield from self._labels
        yield repr(self.classes).encode()

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        """Return the path of image ``index``."""
        return str(Path(self.place, os.fsdecode(self._images[index])))

    def label_name(self, index: int) -> str:
        """Return the path of the label image of image ``index``."""
        return str(Path(self.place, os.fsdecode(self._labels[index])))

    def sample(self, index: int) -> Sample | None:
        """Return sample ``index``, or None for a corrupt file under ``corrupt="skip"``.

        Raises:
            OSError: a file cannot be opened or read or, under ``corrupt="refuse"``, is corrupt; the message names it.
            CorruptImagesError: more files are corrupt than ``max_corrupt`` allows; the message lists them.
            LabelError: the label image has another size than its image, other values than those of the classes, or
                pixels of another form; the message names it and says what to do.
            MemoryError: the image does not fit into memory.
        """
        from torchvision.transforms.functional import pil_to_tensor

        from widefield.data import joint

        try:
            picture = read(self.name(index), **self.decoding)
            labels = self._form.read(self.label_name(index), max_pixels=self.decoding["max_pixels"])
        except CorruptImageError as error:
            self._corrupt.report(index, error, self.name)
            return None
        self._check_size(index, picture, labels)
        image, mask = pil_to_tensor(picture), torch.from_numpy(labels)
        if self.split == "train":
            with seeded(self.key(index)):
                sample = joint.apply(self._train, {"image": image, "mask": mask})
        else:
            sample = {**joint.apply(self._val, {"image": image}), "mask": mask}
        sample["mask"] = sample["mask"].long()
        if self.names:
            sample["name"] = os.fsdecode(self._images[index])
        return sample

    def _check_size(self, index: int, picture: Image.Image, labels: NDArray[np.uint8]) -> None:
        height, width = labels.shape
        if picture.size == (width, height):
            return
        turned = picture.size == (height, width) and self.decoding["exif_orientation"]
        hint = " If the image was rotated by its EXIF orientation, set exif_orientation: false." if turned else ""
        raise LabelError(
            f"the label image {self.label_name(index)} is {width} x {height} pixels, and its image {self.name(index)} "
            f"is {picture.width} x {picture.height}. Each pixel of the image needs a label: draw the label image at "
            f"the size of the image, or resize it without interpolation (nearest).{hint}"
        )
