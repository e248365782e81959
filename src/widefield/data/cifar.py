"""CIFAR-10 and CIFAR-100 (A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009).

60,000 colour images of 32x32 pixels, read from the files that its author publishes; nothing is fetched. Training images
are augmented as He et al. 2016 do for CIFAR (section 4.2), whom GMConv follows (section IV-A): four pixels of padding,
a random crop, a flip.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from widefield import _checks
from widefield.data import transforms
from widefield.data._cifar_files import CIFAR10, CIFAR100, Files, read_files
from widefield.data.base import LabeledImages, Sample, seeded

_SIDE = 32


class Cifar(LabeledImages):
    """What `Cifar10` and `Cifar100` share: images kept as bytes; ``val`` is the test part, as papers use it.

    Samples: ``image`` float32 (3, size, size), ``label`` int.

    Args:
        split: ``"train"``, 50,000 images, or ``"val"``, 10,000.
        root: the extracted folder, its archive (.tar.gz), or a folder that holds one of them.
        version: which of the published files: ``"binary"``, plain bytes, or ``"python"``, which is pickled and
            therefore only read when asked for: by a reader that makes arrays, lists and texts, and nothing else.
        size: side of the images in pixels; after the crop of a train image, others are resized.
        seed: seed of the augmentation.
        padding: train: pixels of black added on each side before the random crop of 32x32.
        hflip: train: probability of a horizontal flip.
        mean: mean of each of the 3 channels for pixels in [0, 1]; None means that of the train split.
        std: standard deviation of each channel; None means that of the train split.
        interpolation: ``"bilinear"`` or ``"bicubic"``, for ``size`` and ``auto_augment``.
        auto_augment, color_jitter, re_prob, re_mode, re_count: train: as of `ImageFiles`.

    Raises:
        FileNotFoundError: the files are not there; the message says what was looked for.
        OSError: a file cannot be read.
        ValueError: a file has not the images or labels that it should, or an argument is out of range.
        TypeError: an argument is of the wrong kind.
    """

    needs: ClassVar[dict[str, str]] = {"root": "the folder or archive of the original files"}
    _files: ClassVar[Files]
    statistics: ClassVar[tuple[tuple[float, ...], tuple[float, ...]]]
    """Mean and standard deviation of each channel over all pixels of the train split."""

    def __init__(
        self,
        split: str,
        *,
        root: str | Path,
        version: str = "binary",
        size: int = _SIDE,
        seed: int = 0,
        padding: int = 4,
        hflip: float = 0.5,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        interpolation: str = "bicubic",
        auto_augment: str | None = None,
        color_jitter: float = 0.0,
        re_prob: float = 0.0,
        re_mode: str = "pixel",
        re_count: int = 1,
    ) -> None:
        super().__init__(split, size, seed)
        self.mean, self.std = transforms.statistics(
            self.statistics[0] if mean is None else mean, self.statistics[1] if std is None else std
        )
        interpolation = _checks.choice("interpolation", interpolation, ("bilinear", "bicubic"))
        padding = _checks.integer("padding", padding, minimum=0)

        from torchvision.transforms import InterpolationMode, RandomCrop, Resize

        resize = [] if size == _SIDE else [Resize((size, size), InterpolationMode(interpolation))]
        built = {
            "train": transforms.training(
                size,
                self.mean,
                self.std,
                interpolation=interpolation,
                hflip=hflip,
                auto_augment=auto_augment,
                color_jitter=color_jitter,
                re_prob=re_prob,
                re_mode=re_mode,
                re_count=re_count,
                crop=[RandomCrop(_SIDE, padding=padding), *resize],
            ),
            "val": transforms.evaluation(size, self.mean, self.std, interpolation=interpolation, crop_pct=1.0),
        }
        self._transform = built[split]
        self.classes, pixels, self._labels = read_files(
            Path(root).expanduser(), self._files, _checks.choice("version", version, ("binary", "python")), split
        )
        self._pixels = np.ascontiguousarray(pixels.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1))

    def __len__(self) -> int:
        return len(self._labels)

    def sample(self, index: int) -> Sample:
        """Return sample ``index``; its tensors are the caller's own."""
        picture = Image.fromarray(self._pixels[index])
        with seeded(self.key(index)):
            image = self._transform(picture)
        return {"image": image, "label": int(self._labels[index])}


# Means and deviations are over all pixels of the train split.


class Cifar10(Cifar):
    """Ten classes of 6,000 images; see `Cifar`."""

    _files = CIFAR10
    statistics = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Cifar100(Cifar):
    """A hundred classes of 600 images; see `Cifar`. The labels are the fine ones."""

    _files = CIFAR100
    statistics = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
