"""Read folders of images, one folder per class: ``root/train/<class>/*.jpg`` and ``root/val/<class>/*.jpg``.

Classes and files are in the order of torchvision's ``ImageFolder``, and timm's ``create_transform`` builds the
transforms. A set therefore behaves as in timm's scripts, except that its augmentation is bitwise reproducible and
hidden folders and files are left out.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np

from widefield.data._class_folders import check_same_classes, local_split
from widefield.data._remote_folders import Listed, remote_split
from widefield.data._stores import LocalFiles, files_at
from widefield.data.class_map import classes_of
from widefield.data.image_files import ImageFiles


class Folder(ImageFiles):
    """Images in class folders, ``root/train/<class>/*.jpg`` and ``root/val/<class>/*.jpg``.

    Classes are the sorted names of the folders, or those of ``class_map``. For val only, ``root`` may also be the
    folder of the classes itself. Images may be at any depth in a class's folder. Links to folders and files are
    followed. Names that start with a dot, ``__MACOSX`` and ``@eaDir`` are left out.

    With a URL as root, an image is one request. Folders are listed once; the list is kept on this machine, and made
    again when the class folders change, as far as the store shows it, or with ``refresh``.

    Args:
        split: ``"train"`` or ``"val"``.
        root: the folder that holds ``train`` and ``val``, or a URL of fsspec such as ``"s3://bucket/pets"``.
        class_map: ``"integer"`` for folders named by class index, as in ImageNet-V2, or a text file with one folder
            name per line in the order of the classes, or ``name index`` on all lines. With it the splits may differ in
            classes.
        listing: URLs: a text file with the path of an image per line, relative to ``root``, such as
            ``train/cat/1.jpg``; itself a path relative to ``root``, or a URL. It is read instead of listing folders.
            Over http, where nothing can be listed, it is needed.
        index: URLs: folder for the list of files; None means ``$XDG_CACHE_HOME/widefield/data``.
        refresh: URLs: list the folders even if their list is kept.
        storage: options of the URL's file system, such as ``{"anon": True}``; credentials are refused, because recipes
            and runs are shared.
        options: those of `ImageFiles`, such as ``size``, ``auto_augment`` and ``corrupt``.

    Raises:
        FileNotFoundError: ``root``, its split or the images of a class are missing; the message shows the layout.
        ModuleNotFoundError: the package for the protocol of a URL is not installed.
        OSError: the URL cannot be read; it was tried several times.
        ValueError: train and val differ in classes, the class map lacks one, or an argument is out of range.
        TypeError: an argument is unknown or of the wrong type.
    """

    needs: ClassVar[dict[str, str]] = {"root": "the folder that holds train and val, or its URL"}
    reads_urls: ClassVar[bool] = True

    def __init__(
        self,
        split: str,
        *,
        root: str | Path,
        class_map: str | Path | None = None,
        listing: str | None = None,
        index: str | Path | None = None,
        refresh: bool = False,
        storage: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(split, **options)
        source = files_at(root, storage)
        if isinstance(source, LocalFiles):
            if listing is not None or index is not None or refresh:
                raise ValueError(f"listing, index and refresh are for URLs, and root is a folder: {source.place!r}.")
            found = local_split(source.root, split)
        else:
            found = remote_split(Listed(source, listing, index, refresh), split)
        if class_map is None:
            check_same_classes(source.place, found.names)
        named = set(found.counts).union(*found.names.values())
        classes, indices = classes_of(sorted(named), class_map, len(found.files))
        labels = np.repeat([indices[name] for name in found.counts], list(found.counts.values()))
        self._hold(classes, labels, found.skipped)
        self.place = source.of(found.directory) if found.directory else source.place
        # An array: workers would slowly copy a list of a million strings, because reading one changes its reference
        # count.
        self._files = found.files
        self._remote = None if isinstance(source, LocalFiles) else source
        self._directory = found.directory

    def _identity(self) -> Iterable[bytes]:
        yield from super()._identity()
        yield from self._files

    def _open(self, index: int) -> str | BinaryIO:
        if self._remote is None:
            return self._name(index)
        try:
            return io.BytesIO(self._remote.whole(self._path(index)))
        except OSError as error:
            raise type(error)(f"cannot read the image {self._name(index)}: {error}") from error

    def _path(self, index: int) -> str:
        name = os.fsdecode(self._files[index])
        return f"{self._directory}/{name}" if self._directory else name

    def _name(self, index: int) -> str:
        if self._remote is None:
            return str(Path(self.place, os.fsdecode(self._files[index])))
        return self._remote.of(self._path(index))
