"""Read folders of images, one folder per class: ``root/train/<class>/*.jpg`` and ``root/val/<class>/*.jpg``.

Classes and files are in the order of torchvision's ``ImageFolder``, and timm's ``create_transform`` builds the
transforms. A set therefore behaves as in timm's scripts, except that its augmentation is bitwise reproducible and
hidden folders and files are left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from widefield.data.base import SPLITS
from widefield.data.class_map import alike, classes_of, listed, shown
from widefield.data.image_files import ImageFiles
from widefield.data.listing import IMAGE_ENDINGS, Skipped, folders_in, images_in, is_hidden, is_image

_LAYOUT = "Expected root/train/<class>/<image> and root/val/<class>/<image>."


class Folder(ImageFiles):
    """Images in class folders, ``root/train/<class>/*.jpg`` and ``root/val/<class>/*.jpg``.

    Classes are the sorted names of the folders, or those of ``class_map``. For val only, ``root`` may also be the
    folder of the classes itself. Images may be at any depth in a class's folder. Links to folders and files are
    followed. Names that start with a dot, ``__MACOSX`` and ``@eaDir`` are left out.

    Args:
        split: ``"train"`` or ``"val"``.
        root: the folder that holds ``train`` and ``val``.
        class_map: ``"integer"`` for folders named by class index, as in ImageNet-V2, or a text file with one folder
            name per line in the order of the classes, or ``name index`` on all lines. With it the splits may differ in
            classes.
        options: those of `ImageFiles`, such as ``size``, ``auto_augment`` and ``corrupt``.

    Raises:
        FileNotFoundError: ``root``, its split or the images of a class are missing; the message shows the layout.
        ValueError: train and val differ in classes, the class map lacks one, or an argument is out of range.
        TypeError: an argument is unknown or of the wrong type.
    """

    needs: ClassVar[dict[str, str]] = {"root": "the folder that holds train and val"}

    def __init__(self, split: str, *, root: str | Path, class_map: str | Path | None = None, **options: Any) -> None:
        super().__init__(split, **options)
        root = Path(root).expanduser()
        directory = _directory(root, split)
        splits = [root / name for name in SPLITS if directory != root and (root / name).is_dir()]
        if class_map is None:
            _check_same_classes(splits)
        found = {name for folder in (directory, *splits) for name in folders_in(folder)}
        skipped = Skipped()
        files = {name: images_in(directory / name, skipped) for name in folders_in(directory, skipped)}
        _check_none_empty(directory, files)
        images = sum(map(len, files.values()))
        classes, indices = classes_of(sorted(found), class_map, images)
        labels = np.repeat([indices[name] for name in files], [len(paths) for paths in files.values()])
        self._hold(classes, labels, skipped)
        self.place = str(directory)
        # An array: workers would slowly copy a list of a million strings, because reading one changes its reference
        # count.
        start = len(os.path.join(self.place, ""))  # noqa: PTH118 (a Path drops the separator)
        self._files = np.array([os.fsencode(path[start:]) for paths in files.values() for path in paths])

    def _identity(self) -> Iterable[bytes]:
        yield from super()._identity()
        yield from self._files

    def _open(self, index: int) -> str:
        return self._name(index)

    def _name(self, index: int) -> str:
        return str(Path(self.place, os.fsdecode(self._files[index])))


def _directory(root: Path, split: str) -> Path:
    """Return the folder that holds the classes of ``split``; raises FileNotFoundError."""
    if not root.is_dir():
        raise FileNotFoundError(f"root is not a folder: {str(root)!r}. {_LAYOUT}")
    directory = root / split
    if split == "val" and not any((root / name).is_dir() for name in SPLITS) and _holds_images(root):
        directory = root
    if not directory.is_dir():
        found = ", ".join(repr(name) for name in folders_in(root)[:10]) or "no folders"
        raise FileNotFoundError(f"{str(root)!r} has no folder {split!r}; it holds {found}. {_LAYOUT}")
    if not folders_in(directory):
        raise FileNotFoundError(f"{str(directory)!r} holds no class folders. {_LAYOUT}")
    return directory


def _holds_images(root: Path) -> bool:
    """Return whether the first folder in ``root`` holds an image, so that it is a class and not a split."""
    first = [path.name for name in folders_in(root)[:1] for path in (root / name).iterdir()]
    return any(is_image(name) and not is_hidden(name) for name in first)


def _check_none_empty(directory: Path, files: Mapping[str, Sequence[str]]) -> None:
    empty = [name for name, paths in files.items() if not paths]
    if empty:
        raise FileNotFoundError(
            f"{str(directory)!r} has no image of {listed(empty)}. Remove folders that are not classes, or add images: "
            f"files with one of the endings {', '.join(IMAGE_ENDINGS)}."
        )


def _check_same_classes(splits: list[Path]) -> None:
    if len(splits) < 2:
        return
    classes = {folder.name: set(folders_in(folder)) for folder in splits}
    if classes["train"] != classes["val"]:
        only = [
            f"only in {name}: {', '.join(map(shown, sorted(classes[name] - classes[other])))}"
            for name, other in (SPLITS, SPLITS[::-1])
            if classes[name] - classes[other]
        ]
        raise ValueError(
            f"train and val in {str(splits[0].parent)!r} must have the same classes; {'; '.join(only)}. Add or remove "
            f"those folders.{alike(classes['train'] ^ classes['val'])}"
        )
