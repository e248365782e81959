"""Provide CIFAR-10 and CIFAR-100 (A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009).

60,000 color images of 32x32 pixels, read from the files that the author publishes; nothing is downloaded. The training
images are augmented as in He et al. 2016 (section 4.2) and GMConv (section IV-A): four pixels of padding, a random
crop, a flip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from widefield import _checks
from widefield.data import transforms
from widefield.data._cifar_files import CIFAR10, CIFAR100, Files, read_files
from widefield.data.base import LabeledImages, Sample, seeded
from widefield.data.transforms import Augmentation

_SIDE = 32


class Cifar(LabeledImages):
    """The base class of `Cifar10` and `Cifar100`; ``val`` is the test part, as in papers.

    Samples: ``image`` float32 (3, size, size), ``label`` int.

    Args:
        split: ``"train"``, 50,000 images, or ``"val"``, 10,000.
        root: the extracted folder, its archive (.tar.gz), or a folder that holds one of them.
        version: version of the published files: ``"binary"``, plain bytes, or ``"python"``, pickles. An unpickler that
            creates only arrays, lists and strings reads them.
        size: side of the images in pixels; train images are resized after the crop.
        seed: seed of the augmentation.
        padding: train: pixels of black added on each side before the random crop of 32x32.
        mean: mean of each of the 3 channels for pixels in [0, 1]; None means that of the train split.
        std: standard deviation of each channel; None means that of the train split.
        augmentation: train: the arguments of `widefield.data.transforms.Augmentation` without ``scale`` and ``ratio``;
            the default ``color_jitter`` is 0, and ``interpolation`` is ``"bilinear"`` or ``"bicubic"``.

    Raises:
        FileNotFoundError: the files are missing; the message lists their names.
        OSError: a file cannot be read.
        ValueError: a file lacks images or labels, or an argument is out of range.
        TypeError: an argument is unknown or of the wrong type.
    """

    needs: ClassVar[dict[str, str]] = {"root": "the folder or archive of the original files"}
    further = tuple(option.name for option in fields(Augmentation) if option.name not in ("scale", "ratio"))
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
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **augmentation: Any,
    ) -> None:
        super().__init__(split, size, seed)
        self.mean, self.std = transforms.statistics(
            self.statistics[0] if mean is None else mean, self.statistics[1] if std is None else std
        )
        for option in augmentation:
            if option not in self.further:
                raise TypeError(f"CIFAR has no option {option!r}.{_checks.did_you_mean(option, self.further)}")
        drawn = Augmentation(**{"color_jitter": 0.0, **augmentation})
        interpolation = _checks.choice("interpolation", drawn.interpolation, ("bilinear", "bicubic"))
        padding = _checks.integer("padding", padding, minimum=0)

        from torchvision.transforms import InterpolationMode, RandomCrop, Resize

        resize = [] if size == _SIDE else [Resize((size, size), InterpolationMode(interpolation))]
        crop = [RandomCrop(_SIDE, padding=padding), *resize]
        built = {
            "train": transforms.training(size, self.mean, self.std, drawn, crop),
            "val": transforms.evaluation(size, self.mean, self.std, interpolation=interpolation, crop_pct=1.0),
        }
        self._transform = built[split]
        self.classes, pixels, self.labels = read_files(
            Path(root).expanduser(), self._files, _checks.choice("version", version, ("binary", "python")), split
        )
        self._pixels = np.ascontiguousarray(pixels.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1))

    def __len__(self) -> int:
        return len(self.labels)

    def sample(self, index: int) -> Sample:
        """Return sample ``index``; its tensors are copies."""
        picture = Image.fromarray(self._pixels[index])
        with seeded(self.key(index)):
            image = self._transform(picture)
        return {"image": image, "label": int(self.labels[index])}


# Means and deviations are over all pixels of the train split.


class Cifar10(Cifar):
    """Ten classes of 6,000 images; see `Cifar`."""

    _files = CIFAR10
    statistics = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Cifar100(Cifar):
    """A hundred classes of 600 images; see `Cifar`. The labels are the fine ones."""

    _files = CIFAR100
    statistics = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
