"""Folders of images, one folder per class: ``root/train/<class>/*.jpg`` and ``root/val/<class>/*.jpg``.

Files and classes are found by torchvision's ``ImageFolder``, transforms are built by timm's ``create_transform``: a
set behaves here as it does in timm's scripts, except that its augmentation repeats to the bit.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from widefield.data.class_map import classes_of
from widefield.data.image_files import ImageFiles
from widefield.data.loading import SPLITS

_LAYOUT = "Expected root/train/<class>/<image> and root/val/<class>/<image>."


class Folder(ImageFiles):
    """Images in class folders, ``root/train/<class>/*.jpg`` and ``root/val/<class>/*.jpg``.

    Classes are the folders' names in sorted order, or what ``class_map`` says. For val alone, ``root`` may also be
    the folder of the classes itself.

    Args:
        split: ``"train"`` or ``"val"``.
        root: the folder that holds ``train`` and ``val``.
        class_map: ``"integer"`` for folders named by class index, as in ImageNet-V2, or a text file with the name of a
            folder a line, by class index, or ``name index`` on all lines. With it the splits may differ in classes.
        options: those of `ImageFiles`, such as ``size``, ``auto_augment`` and ``corrupt``.

    Raises:
        FileNotFoundError: ``root``, its split or a class's images are missing; the message gives the layout.
        ValueError: train and val differ in classes, the class map lacks one, or an argument is out of range.
        TypeError: an argument is unknown or of the wrong kind.
    """

    needs: ClassVar[dict[str, str]] = {"root": "the folder that holds train and val"}

    def __init__(self, split: str, *, root: str | Path, class_map: str | Path | None = None, **options: Any) -> None:
        super().__init__(split, **options)
        root = Path(root).expanduser()
        directory = _directory(root, split)
        beside = [root / name for name in SPLITS if directory != root and (root / name).is_dir()]
        if class_map is None:
            _check_same_classes(beside)
        found = {name for folder in (directory, *beside) for name in _folders(folder)}
        classes, indices = classes_of(sorted(found), class_map)

        from torchvision.datasets import ImageFolder

        files = ImageFolder(directory)
        of_folder = np.array([indices[name] for name in files.classes], dtype=np.int64)
        self._hold(classes, of_folder[files.targets])
        # An array, as workers would copy a list of a million strings bit by bit by counting references to them.
        self._directory = str(directory)
        start = len(os.path.join(self._directory, ""))  # noqa: PTH118 (a Path drops the separator)
        self._files = np.array([os.fsencode(path[start:]) for path, _ in files.samples])

    def _identity(self) -> Iterable[bytes]:
        yield from super()._identity()
        yield from self._files

    def _open(self, index: int) -> str:
        return self._name(index)

    def _name(self, index: int) -> str:
        return str(Path(self._directory, os.fsdecode(self._files[index])))


def _directory(root: Path, split: str) -> Path:
    """Return the folder that holds the classes of ``split``; raises FileNotFoundError."""
    if not root.is_dir():
        raise FileNotFoundError(f"root is not a folder: {str(root)!r}. {_LAYOUT}")
    directory = root / split
    if split == "val" and not any((root / name).is_dir() for name in SPLITS) and _holds_images(root):
        directory = root
    if not directory.is_dir():
        found = ", ".join(repr(name) for name in _folders(root)[:10]) or "no folders"
        raise FileNotFoundError(f"{str(root)!r} has no folder {split!r}; it holds {found}. {_LAYOUT}")
    if not _folders(directory):
        raise FileNotFoundError(f"{str(directory)!r} holds no class folders. {_LAYOUT}")
    return directory


def _holds_images(root: Path) -> bool:
    """Whether the first folder in ``root`` holds an image itself: a class, and not a data set of its own."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return any(path.suffix.lower() in IMG_EXTENSIONS for name in _folders(root)[:1] for path in (root / name).iterdir())


def _check_same_classes(splits: list[Path]) -> None:
    if len(splits) < 2:
        return
    classes = {folder.name: set(_folders(folder)) for folder in splits}
    if classes["train"] != classes["val"]:
        only = [
            f"only in {name}: {', '.join(sorted(classes[name] - classes[other]))}"
            for name, other in (SPLITS, SPLITS[::-1])
            if classes[name] - classes[other]
        ]
        raise ValueError(
            f"train and val in {str(splits[0].parent)!r} must have the same classes; {'; '.join(only)}. Add or remove "
            f"those folders."
        )


def _folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir())
