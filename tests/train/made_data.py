"""Generated data sets in the formats of the real ones: noisy images, one color per class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from widefield.data import _cifar_files

WNIDS = ("n01440764", "n01443537", "n01484850")
"""Names of ImageNet's folders: the WordNet identifiers of tench, goldfish and white shark."""


def imagenet(root: Path, *, train: int, val: int, side: int = 48) -> Path:
    """Write ``root/train/WNID/*.JPEG`` and ``root/val/WNID/*.JPEG`` with the given number of images; return root.

    The images are 4:3, about ``side`` pixels high, and differ in size. The first of each split is gray, like some of
    ImageNet's.
    """
    draw = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        assert count >= len(WNIDS), "every class needs an image"
        for index in range(count):
            label = index % len(WNIDS)
            picture = Image.fromarray(_noisy(draw, label, side + index, (side + index) * 4 // 3))
            folder = root / split / WNIDS[label]
            folder.mkdir(parents=True, exist_ok=True)
            (picture if index else picture.convert("L")).save(folder / f"{split}_{index:08d}.JPEG", quality=90)
    return root


def cifar(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the binary version of ``cifar10`` or ``cifar100`` with one image per class in each split; return root.

    During the test, the reader is patched to expect this number of images.
    """
    files = {"cifar10": _cifar_files.CIFAR10, "cifar100": _cifar_files.CIFAR100}[name]
    version = files.versions["binary"]
    folder = root / version.folder
    folder.mkdir(parents=True)
    (folder / version.names).write_text("".join(f"class_{label}\n" for label in range(files.classes)))
    draw = np.random.default_rng(0)
    for split, names in version.splits.items():
        labels = np.arange(files.classes, dtype=np.uint8)
        images = [_noisy(draw, label, 32, 32) for label in range(files.classes)]
        pixels = np.stack([image.transpose(2, 0, 1).ravel() for image in images])
        fine = labels[:, None]
        before = (fine // 5, fine) if files.label_bytes == 2 else (fine,)
        records = np.concatenate([*before, pixels], axis=1)
        for part, file in zip(np.split(records, len(names)), names, strict=True):
            (folder / file).write_bytes(part.tobytes())
        monkeypatch.setitem(files.counts, split, files.classes // len(names))
    return root


def _noisy(draw: np.random.Generator, label: int, height: int, width: int) -> NDArray[np.uint8]:
    color = np.array([label * 53 % 256, label * 101 % 256, label * 197 % 256])
    noisy: NDArray[np.uint8] = (color + draw.normal(0, 20, (height, width, 3))).clip(0, 255).astype(np.uint8)
    return noisy
