"""Read images in tar files without extraction: webdataset's layout, and tar files of class folders."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from widefield.data._kept import folder_for
from widefield.data._stores import Files, LocalFiles, files_at
from widefield.data._tar_index import tar_index
from widefield.data.class_map import INTEGER, check_count, classes_of
from widefield.data.decoding import CorruptImageError
from widefield.data.image_files import ImageFiles
from widefield.data.listing import Skipped


class Shards(ImageFiles):
    """Images in uncompressed tar files with random access: shuffled and resumed as in `Folder`, without extraction.

    The layout is detected from the files:

    - webdataset: ``key.jpg`` next to ``key.cls``, which holds the index of the class, or ``key.json`` with an entry
      ``label_key``. Classes are named by their index.
    - class folders: ``<class>/<image>`` in any number of tar files, or one tar file ``<class>.tar`` per class, or tar
      files of those, as ImageNet is published. Classes are the sorted names, or those of ``class_map``.

    The headers of all tar files are read once, about a minute for a million images, and kept in a hidden file that is
    rebuilt when a tar file changes. A tar file is opened for each image: no open file is kept, or shared with forked
    workers.

    With a URL as root, an image is a request for a range of bytes. The headers stand between the images, so that the
    first use reads the tar files once as a whole, several at a time, and keeps the index on this machine.

    Args:
        split: ``"train"`` or ``"val"``.
        root: the folder that holds the tar files, or a URL of fsspec such as ``"s3://bucket/imagenet"``.
        train: glob under ``root`` for the training files, such as ``"imagenet1k-train-*.tar"``. Braces stand for
            numbers or words: ``"train-{0000..1023}.tar"``. Over http, where nothing can be listed, they are needed.
        val: glob for the validation files, such as ``"imagenet1k-validation-*.tar"``.
        class_map: class folders: as of `Folder`. Webdataset: a text file with the names of the classes.
        label_key: the entry of ``key.json`` that holds the label, if there is no ``key.cls``.
        index: folder for the hidden file; None means ``root``, or ``$XDG_CACHE_HOME/widefield/data`` for a URL. If it
            cannot be written, each process reads the headers again, with a warning.
        storage: options of the URL's file system, such as ``{"anon": True}``; credentials are refused, because recipes
            and runs are shared.
        options: those of `ImageFiles`, such as ``size``, ``auto_augment`` and ``corrupt``.

    Raises:
        FileNotFoundError: ``root`` or the tar files are missing, or hold no image.
        ModuleNotFoundError: the package for the protocol of a URL is not installed.
        OSError: a tar file cannot be read, is incomplete or is compressed.
        ValueError: labels are missing, not integers or beyond the class map, or an argument is out of range.
        TypeError: an argument is unknown or of the wrong type.
    """

    needs: ClassVar[dict[str, str]] = {"root": "the folder that holds the tar files, or its URL"}
    reads_urls: ClassVar[bool] = True

    def __init__(
        self,
        split: str,
        *,
        root: str | Path,
        train: str = "train/*.tar",
        val: str = "val/*.tar",
        class_map: str | Path | None = None,
        label_key: str = "label",
        index: str | Path | None = None,
        storage: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(split, **options)
        if not isinstance(label_key, str):
            raise TypeError(f"label_key must be the name of an entry; got {label_key!r}.")
        self._source = files_at(root, storage)
        if isinstance(self._source, LocalFiles) and not self._source.root.is_dir():
            raise FileNotFoundError(f"root is not a folder: {self._source.place!r}.")
        own = self._source.root if isinstance(self._source, LocalFiles) else None
        store = folder_for(index, own)
        self._tars = _tars(self._source, split, {"train": train, "val": val}[split])
        self._index = tar_index(self._source, self._tars, label_key, store)
        skipped = Skipped({reason: (int(count), first) for reason, count, first in self._index.skipped.tolist()})
        if not len(self._index.names):
            first = self._source.of(self._tars[0])
            raise FileNotFoundError(f"no image in {len(self._tars)} tar files, {first} among them.{skipped.sentence()}")
        self._hold(*self._classes(class_map), skipped)
        self.place = self._source.place

    def _classes(self, class_map: str | Path | None) -> tuple[tuple[str, ...], NDArray[np.int64]]:
        """Return the names of the classes and the labels of the images."""
        labels, images = self._index.labels, len(self._index.names)
        if len(self._index.classes):
            folders = self._index.classes.tolist()
            classes, indices = classes_of(folders, class_map, images)
            return classes, np.array([indices[name] for name in folders], dtype=np.int64)[labels]
        largest = int(labels.max())
        what = f"the label of {self._name(int(labels.argmax()))}"
        if class_map is None or class_map == INTEGER:
            check_count(largest, 0, images, what)
            return tuple(str(label) for label in range(largest + 1)), labels
        classes, _ = classes_of((), class_map, images)
        if largest >= len(classes):
            raise ValueError(
                f"the class map {str(class_map)!r} ends before label {largest}, which is in the data: {what}."
            )
        return classes, labels

    def _identity(self) -> Iterable[bytes]:
        yield from super()._identity()
        yield from (bytes(name) for name in self._index.names)

    def _open(self, index: int) -> io.BytesIO:
        size = int(self._index.sizes[index])
        try:
            content = self._source.read(self._tars[self._index.tars[index]], int(self._index.offsets[index]), size)
        except OSError as error:
            if isinstance(self._source, LocalFiles):
                raise
            raise type(error)(f"cannot read the image {self._name(index)}: {error}") from error
        if len(content) < size:  # the file was truncated after its headers were read
            raise CorruptImageError(f"cannot read the image {self._name(index)}: the tar file ends before it does.")
        return io.BytesIO(content)

    def _name(self, index: int) -> str:
        name = bytes(self._index.names[index]).decode("utf-8", "surrogateescape")
        return f"{self._source.of(self._tars[self._index.tars[index]])}/{name}"


def _tars(files: Files, split: str, pattern: str) -> list[str]:
    """Return the tar files of a split, by pattern and then by name."""
    if not isinstance(pattern, str):
        raise TypeError(f"{split} must be a glob such as 'imagenet-{split}-*.tar'; got {pattern!r}.")
    found: list[str] = []
    for each in expanded(pattern):
        try:
            there = files.matching(each)
        except (ValueError, NotImplementedError) as error:  # an empty pattern, or an absolute one
            raise ValueError(f"{split} must be a glob under root, such as '{split}/*.tar'; got {pattern!r}.") from error
        if not there:
            raise FileNotFoundError(
                f"no file in {files.place!r} is named {each!r}; it holds {_there(files)}. Set the option {split} to a "
                f"glob that fits, such as 'imagenet-{split}-*.tar'."
            )
        found += there
    return list(dict.fromkeys(found))


def _there(files: Files) -> str:
    """Return some tar files in words, for a message."""
    there = files.matching("**/*.tar")
    return f"{', '.join(there[:5])}{' and more' if len(there) > 5 else ''}" if there else "no tar files"


def expanded(pattern: str) -> list[str]:
    """Return the patterns that the braces of one stand for, in order.

    ``{000..011}`` is twelve numbers of three digits, and ``{a,b}`` two words; there may be several braces, but none in
    another. Raises ValueError for a range that counts down.
    """
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [_choices(part, pattern) if place % 2 else [part] for place, part in enumerate(parts)]
    return ["".join(words) for words in itertools.product(*choices)]


def _choices(inside: str, pattern: str) -> list[str]:
    span = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if span is None:
        return inside.split(",")
    first, last = span.groups()
    if int(first) > int(last):
        raise ValueError(f"{{{inside}}} in {pattern!r} counts down: write {{{last}..{first}}}.")
    width = len(first) if first.startswith("0") else 0
    return [str(number).zfill(width) for number in range(int(first), int(last) + 1)]


def divided(place: str) -> tuple[str, str]:
    """Return the root and the glob below it of a path or URL that names tar files, such as ``data/val-*.tar``.

    The glob begins at the first part with wildcards or braces, or is the name of a single tar file. It is empty if
    ``place`` is a folder. Folders on this machine may have such characters in their names; in URLs "?" is none.
    """
    scheme, mark, path = place.rpartition("://")
    parts = path.split("/")
    heads = () if scheme else range(1, len(parts) + 1)
    there = max((k for k in heads if Path("/".join(parts[:k])).expanduser().is_dir()), default=0)
    special = set("*[{" if scheme else "*?[{")
    first = next((k for k in range(there, len(parts)) if special & set(parts[k])), len(parts))
    if there < first == len(parts) and parts[-1].endswith(".tar"):
        first -= 1
    return scheme + mark + ("/".join(parts[:first]) or "/" * path.startswith("/")), "/".join(parts[first:])
