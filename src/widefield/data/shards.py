"""Read images in tar files without extraction: webdataset's layout, and tar files of class folders."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from widefield.data._tar_index import tar_index
from widefield.data.class_map import INTEGER, check_count, classes_of
from widefield.data.decoding import CorruptImageError
from widefield.data.image_files import ImageFiles
from widefield.data.listing import Skipped, is_hidden


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

    Args:
        split: ``"train"`` or ``"val"``.
        root: the folder that holds the tar files.
        train: glob under ``root`` for the training files, such as ``"imagenet1k-train-*.tar"``.
        val: glob for the validation files, such as ``"imagenet1k-validation-*.tar"``.
        class_map: class folders: as of `Folder`. Webdataset: a text file with the names of the classes.
        label_key: the entry of ``key.json`` that holds the label, if there is no ``key.cls``.
        index: folder for the hidden file; None means ``root``. If it cannot be written, each process reads the headers
            again, with a warning.
        options: those of `ImageFiles`, such as ``size``, ``auto_augment`` and ``corrupt``.

    Raises:
        FileNotFoundError: ``root`` or the tar files are missing, or hold no image.
        OSError: a tar file cannot be read, is incomplete or is compressed.
        ValueError: labels are missing, not integers or beyond the class map, or an argument is out of range.
        TypeError: an argument is unknown or of the wrong type.
    """

    needs: ClassVar[dict[str, str]] = {"root": "the folder that holds the tar files"}

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
        **options: Any,
    ) -> None:
        super().__init__(split, **options)
        if not isinstance(label_key, str):
            raise TypeError(f"label_key must be the name of an entry; got {label_key!r}.")
        root = Path(root).expanduser()
        store = root if index is None else Path(index).expanduser()
        if not store.is_dir():
            raise FileNotFoundError(f"{'root' if index is None else 'index'} is not a folder: {str(store)!r}.")
        self._tars = [str(path) for path in _tars(root, split, {"train": train, "val": val}[split])]
        self._index = tar_index([Path(tar) for tar in self._tars], label_key, store)
        skipped = Skipped({reason: (int(count), first) for reason, count, first in self._index.skipped.tolist()})
        if not len(self._index.names):
            left_out = f" Left out: {skipped}." if skipped else ""
            raise FileNotFoundError(f"no image in {len(self._tars)} tar files, {self._tars[0]} among them.{left_out}")
        self._hold(*self._classes(class_map), skipped)
        self.place = str(root)

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
        with Path(self._tars[self._index.tars[index]]).open("rb", buffering=0) as file:
            file.seek(int(self._index.offsets[index]))
            content = file.read(size)
        if len(content) < size:  # the file was truncated after its headers were read
            raise CorruptImageError(f"cannot read the image {self._name(index)}: the tar file ends before it does.")
        return io.BytesIO(content)

    def _name(self, index: int) -> str:
        name = bytes(self._index.names[index]).decode("utf-8", "surrogateescape")
        return f"{self._tars[self._index.tars[index]]}/{name}"


def _tars(root: Path, split: str, pattern: str) -> list[Path]:
    if not isinstance(pattern, str):
        raise TypeError(f"{split} must be a glob such as 'imagenet-{split}-*.tar'; got {pattern!r}.")
    try:
        found = sorted(path for path in root.glob(pattern) if path.is_file() and not is_hidden(path.name))
    except (ValueError, NotImplementedError) as error:  # an empty pattern, or an absolute one
        raise ValueError(f"{split} must be a glob under root, such as '{split}/*.tar'; got {pattern!r}.") from error
    if not found:
        there = sorted(str(path.relative_to(root)) for path in root.rglob("*.tar") if not is_hidden(path.name))
        listed = f"{', '.join(there[:5])}{' and more' if len(there) > 5 else ''}" if there else "no tar files"
        raise FileNotFoundError(
            f"no file in {str(root)!r} is named {pattern!r}; it holds {listed}. Set the option {split} to a glob that "
            f"fits, such as 'imagenet-{split}-*.tar'."
        )
    return found
