"""Read Hugging Face data sets with timm's reader and the optional package ``datasets``."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
from numpy.typing import NDArray

from widefield.data.class_map import LARGEST_INDEX, check_count
from widefield.data.decoding import CorruptImageError
from widefield.data.image_files import ImageFiles


class HuggingFace(ImageFiles):
    """A data set of the Hugging Face hub, or a folder of its file formats (parquet, images with metadata).

    ``datasets`` downloads sets that are not in the cache. Code that comes with a set is never run. Only sets with
    random access are supported, not streams. The set names the classes; otherwise their names are their indices.

    Args:
        split: ``"train"`` or ``"val"``.
        path: name on the hub, such as ``"timm/mini-imagenet"``, or a folder.
        train: the set's own name for the training split; slices such as ``"train[:90%]"`` work.
        val: the set's own name for the validation split.
        image_key: name of the column that holds the images.
        label_key: name of the column that holds the indices of the classes.
        cache: folder for downloads; None means the package's own.
        options: those of `ImageFiles`, such as ``size``, ``auto_augment`` and ``corrupt``.

    Raises:
        ModuleNotFoundError: the package ``datasets`` is not installed.
        OSError: there is no such data set, or it cannot be downloaded.
        ValueError: it lacks the split, the columns or labels, or an argument is out of range.
        TypeError: an argument is unknown or of the wrong type.
    """

    needs: ClassVar[dict[str, str]] = {"path": "a name on the Hugging Face hub, or a folder"}

    def __init__(
        self,
        split: str,
        *,
        path: str | Path,
        train: str = "train",
        val: str = "validation",
        image_key: str = "image",
        label_key: str = "label",
        cache: str | Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__(split, **options)
        spec = importlib.util.find_spec("datasets")
        if spec is None or spec.origin is None:  # origin is None for a plain folder named datasets
            raise ModuleNotFoundError("Hugging Face data sets need the package datasets: pip install datasets.")

        from timm.data.readers.reader_hfds import ReaderHfds

        self._path, self._part = str(path), {"train": train, "val": val}[split]
        try:
            self._reader = ReaderHfds(
                self._path,
                root=None if cache is None else str(cache),
                split=self._part,
                input_key=image_key,
                target_key=label_key,
            )
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"cannot read the split {self._part!r} of {self._path!r}: {error} Its names are set by the options "
                f"train, val, image_key and label_key."
            ) from error
        labels = self._labels_of(label_key)
        if self._reader.dataset[0][image_key] is None:  # the package adds an empty column for a missing one
            raise ValueError(f"{self._path!r} has no column {image_key!r} of images. Set image_key.")
        named = sorted(self._reader.class_to_idx, key=self._reader.class_to_idx.__getitem__)
        largest = int(labels.max())
        what = f"the label of {self._name(int(labels.argmax()))}"
        if named and largest >= len(named):
            raise ValueError(f"{what} is {largest}, but {self._path!r} names only {len(named)} classes.")
        check_count(largest, len(named), len(labels), what)
        self._hold(named or [str(label) for label in range(largest + 1)], labels)
        self.place = self._path

    def _labels_of(self, key: str) -> NDArray[np.int64]:
        table = self._reader.dataset
        if key not in table.column_names:
            raise ValueError(
                f"{self._path!r} has no column {key!r} of labels, label_key; it has {', '.join(table.column_names)}."
            )
        labels = table[key][:]
        if not labels:
            raise ValueError(f"the split {self._part!r} of {self._path!r} is empty.")
        wrong = [row for row, label in enumerate(labels) if type(label) is not int or not 0 <= label <= LARGEST_INDEX]
        if wrong:
            got, row = labels[wrong[0]], wrong[0]
            hint = " -1 marks images without a label, as in test splits." if got == -1 else ""
            hint = " Dataset.class_encode_column makes indices of names." if isinstance(got, str) else hint
            raise ValueError(
                f"the column {key!r} of {self._path!r} must hold the index of a class, from 0; got {got!r} in row "
                f"{row} of {self._part!r}, and {len(wrong) - 1:,} more.{hint}"
            )
        return np.array(labels, dtype=np.int64)

    def _open(self, index: int) -> BinaryIO:
        try:
            file: BinaryIO = self._reader[index][0]
        except (TypeError, AssertionError) as error:  # timm assumes that there is an image
            raise CorruptImageError(f"cannot read the image {self._name(index)}: the row has none.") from error
        return file

    def _name(self, index: int) -> str:
        return f"{self._path}/{self._part}/{index}"

    def _file_name(self, index: int) -> str:
        return Path(self._reader.filename(index) or str(index)).name
