"""Folders of images, one folder per class: ``root/train/<class>/*.jpg`` and ``root/val/<class>/*.jpg``.

Files and classes are found by torchvision's ``ImageFolder``, transforms are built by timm's ``create_transform``: a
set behaves here as it does in timm's scripts, except that its augmentation repeats to the bit.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from widefield import _checks
from widefield.data.loading import SPLITS, ImageSet, Sample, seeded, shared

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# What Pillow raises on broken bytes; OSErrors of the system are told apart by their errno.
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

_LAYOUT = "Expected root/train/<class>/<image> and root/val/<class>/<image>."


class Folder(ImageSet):
    """Images in class folders, ``root/train/<class>/*.jpg`` and ``root/val/<class>/*.jpg``.

    Samples: ``image`` float32 (3, size, size), ``label`` int. Classes are the folders' names in sorted order. Train
    images get a random crop, flip, ``auto_augment`` or ``color_jitter``, and random erasing; val images are resized
    and centre-cropped. Each split ignores the options of the other, so one set of options serves both.

    Args:
        split: ``"train"`` or ``"val"``.
        root: the folder that holds ``train`` and ``val``.
        size: side of the images in pixels.
        seed: seed of the augmentation.
        corrupt: what to do with a file that cannot be decoded in full: ``"refuse"`` raises OSError, ``"skip"`` warns
            once per file and leaves it out of its batch. What the system refuses (a missing file, a permission) is an
            error in either case.
        mean: mean of each of the 3 channels for pixels in [0, 1].
        std: standard deviation of each of the 3 channels.
        interpolation: ``"bilinear"``, ``"bicubic"``, or ``"random"`` of the two (then val uses bicubic).
        crop_pct: val: side of the crop relative to the resized image, in (0, 1]; None means 0.875.
        scale: train: range of the random crop's area relative to the image.
        ratio: train: range of the random crop's aspect ratio.
        hflip: train: probability of a horizontal flip.
        auto_augment: train: timm's policy, such as ``"rand-m9-mstd0.5-inc1"``; None means none. Where it is given,
            timm leaves ``color_jitter`` out.
        color_jitter: train: strength of brightness, contrast and saturation jitter; 0 means none.
        re_prob: train: probability of random erasing.
        re_mode: train: what erased pixels become: ``"const"``, ``"rand"`` or ``"pixel"``.
        re_count: train: largest number of erased rectangles.

    Raises:
        FileNotFoundError: ``root``, its split or a class's images are missing; the message gives the layout.
        ValueError: train and val differ in classes, or an argument is out of range.
        TypeError: an argument is of the wrong kind.
    """

    def __init__(
        self,
        split: str,
        *,
        root: str | Path,
        size: int = 224,
        seed: int = 0,
        corrupt: str = "refuse",
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        interpolation: str = "bicubic",
        crop_pct: float | None = None,
        scale: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
        auto_augment: str | None = None,
        color_jitter: float = 0.4,
        re_prob: float = 0.0,
        re_mode: str = "pixel",
        re_count: int = 1,
    ) -> None:
        super().__init__(split, size, seed)
        self.corrupt = _checks.choice("corrupt", corrupt, ("refuse", "skip"))
        self.mean, self.std = _floats("mean", mean, 3), _floats("std", std, 3)
        if min(self.std) == 0:
            raise ValueError(f"std must be positive in every channel; got {self.std}.")
        interpolation = _checks.choice("interpolation", interpolation, ("bilinear", "bicubic", "random"))
        if crop_pct is not None and _checks.number("crop_pct", crop_pct, maximum=1) == 0:
            raise ValueError(f"crop_pct must be above 0; got {crop_pct!r}.")
        if not isinstance(auto_augment, str | None):
            raise TypeError(f"auto_augment must be the name of a policy or None; got {auto_augment!r}.")
        train_only: dict[str, Any] = {
            "scale": _floats("scale", scale, 2),
            "ratio": _floats("ratio", ratio, 2),
            "hflip": _checks.number("hflip", hflip, maximum=1),
            "auto_augment": auto_augment,
            "color_jitter": _checks.number("color_jitter", color_jitter) or None,
            "re_prob": _checks.number("re_prob", re_prob, maximum=1),
            "re_mode": _checks.choice("re_mode", re_mode, ("const", "rand", "pixel")),
            "re_count": _checks.integer("re_count", re_count),
        }

        directory = _checked_layout(Path(root).expanduser(), split)

        from timm.data import create_transform
        from torchvision.datasets import ImageFolder

        files = ImageFolder(directory)
        self.classes = tuple(files.classes)
        self._files: list[tuple[str, int]] = files.samples
        if split == "train":
            options = {**train_only, "interpolation": interpolation}
        else:
            options = {
                "crop_pct": crop_pct,
                "interpolation": "bicubic" if interpolation == "random" else interpolation,
            }
        try:
            self._transform = create_transform(
                size, is_training=split == "train", mean=self.mean, std=self.std, **options
            )
        except (AssertionError, ValueError) as error:  # timm asserts that it knows the policy
            raise ValueError(
                f"timm cannot build auto_augment={auto_augment!r}: {error}. Write a policy such as "
                f"'rand-m9-mstd0.5-inc1', or None."
            ) from error
        # In shared memory, so that a file is warned of once among all workers and epochs.
        self._warned = shared(torch.zeros(len(self._files), dtype=torch.bool))

    def __len__(self) -> int:
        return len(self._files)

    def sample(self, index: int) -> Sample | None:
        """Return sample ``index``, or None for a corrupt file under ``corrupt="skip"``.

        Raises, naming the file, OSError for one that cannot be opened or read and, under ``corrupt="refuse"``, for a
        corrupt one; MemoryError where the picture does not fit.
        """
        path, label = self._files[index]
        try:
            picture = read(path)
        except CorruptImageError as error:
            self._report(index, path, error)
            return None
        with seeded(self.key(index)):
            image: torch.Tensor = self._transform(picture)
        return {"image": image, "label": label}

    def _report(self, index: int, path: str, error: CorruptImageError) -> None:
        if self.corrupt == "refuse":
            raise CorruptImageError(
                f'{error} Repair or delete the file, or pass corrupt="skip" to leave such images out.'
            ) from error.__cause__
        if not self._warned[index]:
            self._warned[index] = True
            warnings.warn(f"{error} It is left out; repair or delete it.", stacklevel=2)


class CorruptImageError(OSError):
    """A file is there, can be opened, and is no whole image."""


def read(path: str | Path) -> Image.Image:
    """Return the image in a file, as RGB, decoded to the last byte.

    Raises:
        CorruptImageError: it cannot be decoded in full.
        OSError: the system refuses to open or read it.
        MemoryError: the picture does not fit. All three name the file.
    """
    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except MemoryError as error:
        raise MemoryError(f"out of memory while reading the image {path}.") from error
    except _BROKEN as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's, not Pillow's
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise CorruptImageError(f"cannot read the image {path}: {type(error).__name__}: {error}.") from error


def _checked_layout(root: Path, split: str) -> Path:
    """Return ``root/split`` after checking that it is there and that both splits have the same classes."""
    if not root.is_dir():
        raise FileNotFoundError(f"root is not a folder: {str(root)!r}. {_LAYOUT}")
    if not (root / split).is_dir():
        found = ", ".join(repr(name) for name in _folders(root)[:10]) or "no folders"
        raise FileNotFoundError(f"{str(root)!r} has no folder {split!r}; it holds {found}. {_LAYOUT}")
    classes = {name: set(_folders(root / name)) for name in SPLITS if (root / name).is_dir()}
    if not classes[split]:
        raise FileNotFoundError(f"{str(root / split)!r} holds no class folders. {_LAYOUT}")
    if len(classes) == len(SPLITS) and classes["train"] != classes["val"]:
        only = [
            f"only in {name}: {', '.join(sorted(classes[name] - classes[other]))}"
            for name, other in (SPLITS, SPLITS[::-1])
            if classes[name] - classes[other]
        ]
        raise ValueError(
            f"train and val in {str(root)!r} must have the same classes; {'; '.join(only)}. Add or remove those "
            f"folders."
        )
    return root / split


def _folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir())


def _floats(name: str, values: object, length: int) -> tuple[float, ...]:
    """Return ``values`` as a tuple of ``length`` non-negative floats; raises TypeError or ValueError."""
    if not isinstance(values, (tuple, list)) or len(values) != length:
        raise TypeError(f"{name} must be a sequence of {length} numbers; got {values!r}.")
    return tuple(_checks.number(f"every entry of {name}", value) for value in values)
