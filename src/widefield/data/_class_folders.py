"""Find the images in class folders, and check that the splits have the same classes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from widefield.data.base import SPLITS
from widefield.data.class_map import alike, listed, shown
from widefield.data.listing import IMAGE_ENDINGS, Skipped, folders_in, images_in, is_hidden, is_image

LAYOUT = "Expected root/train/<class>/<image> and root/val/<class>/<image>."


@dataclass(frozen=True)
class FolderSplit:
    """The images of one split, by class and then in torchvision's order."""

    directory: str
    """Path of the folder that holds the classes below the root; empty: it is the root."""
    counts: Mapping[str, int]
    """Class -> number of images, in sorted order."""
    files: NDArray[np.bytes_]
    """Path of each image below ``directory``, (N,)."""
    names: Mapping[str, Set[str]]
    """Split -> its classes, for all splits that there are below the root."""
    skipped: Skipped = field(default_factory=Skipped)


def local_split(root: Path, split: str) -> FolderSplit:
    """Return the images of a split in a folder of this machine; raises FileNotFoundError."""
    if not root.is_dir():
        raise FileNotFoundError(f"root is not a folder: {str(root)!r}. {LAYOUT}")
    directory = split
    if split == "val" and not any((root / name).is_dir() for name in SPLITS) and _holds_images(root):
        directory = ""
    place = root / directory
    if not place.is_dir():
        raise no_split(str(root), split, folders_in(root))
    if not folders_in(place):
        raise FileNotFoundError(f"{str(place)!r} holds no class folders. {LAYOUT}")
    names = {name: set(folders_in(root / name)) for name in SPLITS if directory and (root / name).is_dir()}
    skipped = Skipped()
    files = {name: images_in(place / name, skipped) for name in folders_in(place, skipped)}
    check_none_empty(str(place), {name: len(paths) for name, paths in files.items()})
    start = len(os.path.join(str(place), ""))  # noqa: PTH118 (a Path drops the separator)
    paths: NDArray[Any] = np.array([os.fsencode(path[start:]) for paths in files.values() for path in paths])
    return FolderSplit(directory, {name: len(paths) for name, paths in files.items()}, paths, names, skipped)


def no_split(root: str, split: str, folders: list[str]) -> FileNotFoundError:
    """Return the error about a root without the folder of a split."""
    found = ", ".join(repr(name) for name in folders[:10]) or "no folders"
    return FileNotFoundError(f"{root!r} has no folder {split!r}; it holds {found}. {LAYOUT}")


def _holds_images(root: Path) -> bool:
    """Return whether the first folder in ``root`` holds an image, so that it is a class and not a split."""
    first = [path.name for name in folders_in(root)[:1] for path in (root / name).iterdir()]
    return any(is_image(name) and not is_hidden(name) for name in first)


def check_none_empty(place: str, counts: Mapping[str, int]) -> None:
    """Raise FileNotFoundError for classes without an image."""
    empty = [name for name, count in counts.items() if not count]
    if empty:
        raise FileNotFoundError(
            f"{place!r} has no image of {listed(empty)}. Remove folders that are not classes, or add images: "
            f"files with one of the endings {', '.join(IMAGE_ENDINGS)}."
        )


def check_same_classes(root: str, classes: Mapping[str, Set[str]]) -> None:
    """Raise ValueError if train and val differ in classes."""
    if len(classes) == 2 and classes["train"] != classes["val"]:
        only = [
            f"only in {name}: {', '.join(map(shown, sorted(classes[name] - classes[other])))}"
            for name, other in (SPLITS, SPLITS[::-1])
            if classes[name] - classes[other]
        ]
        raise ValueError(
            f"train and val in {root!r} must have the same classes; {'; '.join(only)}. Add or remove "
            f"those folders.{alike(classes['train'] ^ classes['val'])}"
        )
