"""Provide the handwritten digits of scikit-learn: 1,797 real images of 8x8 pixels, without a download.

Origin: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998
(CC BY 4.0); scikit-learn ships its test part. Any working network reaches over 95 % in seconds. The set is good for
smoke tests and first examples, and too easy to compare designs.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from widefield import _checks
from widefield._extras import need
from widefield.data.base import LabeledImages, Sample, normalize, seeded

_MEAN, _STD = 0.305, 0.376  # of the pixels of the train split, scaled to [0, 1]
_HELD_OUT = 5  # one of this many images of each class is for validation


class Digits(LabeledImages):
    """Handwritten digits 0 to 9; 1,442 for training, 355 for validation, for any seed.

    Samples: ``image`` float32 (channels, size, size), ``label`` int.

    Args:
        split: ``"train"`` or ``"val"``.
        size: side of the images in pixels; the 8x8 originals are resized bilinearly.
        channels: 1, or 3 equal ones for networks that expect RGB.
        augment: shift, rotate and scale the train split slightly (10 % of the side, 10 degrees, 10 %), differently in
            each epoch. The val split is never augmented.
        seed: seed of the augmentation.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong type; the message names it.
    """

    classes = tuple("0123456789")

    def __init__(self, split: str, *, size: int = 32, channels: int = 3, augment: bool = False, seed: int = 0) -> None:
        super().__init__(split, size, seed)
        if _checks.integer("channels", channels) not in (1, 3):
            raise ValueError(f"channels must be 1 or 3; got {channels!r}.")
        self.mean, self.std = (_MEAN,) * channels, (_STD,) * channels
        self.augment = bool(augment) and split == "train"

        need("sklearn")
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        chosen = _held_out(labels) == (split == "val")
        pixels = torch.as_tensor(images[chosen] / 16, dtype=torch.float32).view(-1, 1, 8, 8)
        self._pixels = interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)
        self._images = normalize(self._pixels, (_MEAN,), (_STD,))
        self.labels: list[int] = labels[chosen].tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def sample(self, index: int) -> Sample:
        """Return sample ``index``; its tensors are copies."""
        image = self._moved(index) if self.augment else self._images[index]
        return {"image": image.repeat(len(self.mean), 1, 1), "label": self.labels[index]}

    def _moved(self, index: int) -> torch.Tensor:
        from torchvision.transforms import InterpolationMode, RandomAffine

        move = RandomAffine(
            degrees=10, translate=(0.1, 0.1), scale=(0.9, 1.1), interpolation=InterpolationMode.BILINEAR
        )
        with seeded(self.key(index)):
            moved: torch.Tensor = move(self._pixels[index])  # before normalizing, since the fill value 0 is paper
        return normalize(moved, (_MEAN,), (_STD,))


def _held_out(labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mark every fifth image of each class, in the order of the file, which is grouped by writer."""
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        held[np.flatnonzero(labels == label)[_HELD_OUT - 1 :: _HELD_OUT]] = True
    return held
