"""Read COCO's annotations of objects as labels of whole images, for multi-label classification."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from widefield.data.coco import CocoReader
from widefield.data.image_files import MultiLabelFiles


class CocoLabels(MultiLabelFiles):
    """Images with the classes of the objects in a file in COCO's form.

    An image shows a class if it has an object of it, or a crowd of them. Images without objects are kept. Files,
    classes and the checks of entries are those of `Coco`.

    Args:
        split: ``"train"`` or ``"val"``.
        root: the folder that holds the files.
        annotations: path of the file of annotations, from ``root``; ``{split}`` is the name of the split.
        images: folder of the images, from ``root``. The files' ``file_name`` are paths in it.
        train, val: names of the splits.
        categories: names of the classes to read, in this order. None: all, in the order of their ids.
        repair: leave out entries that cannot be right, and images without a file, instead of raising an error.
        options: those of `EncodedImages`, such as ``size``, ``auto_augment`` and ``corrupt``.

    Raises:
        FileNotFoundError: the file of annotations is missing.
        AnnotationError: the file of annotations is damaged, or an entry cannot be right; see `Coco`.
        ValueError, TypeError: an argument is out of range, unknown, or of the wrong type.
    """

    needs: ClassVar[dict[str, str]] = {"root": "the folder that holds the images and the annotations"}

    def __init__(
        self,
        split: str,
        *,
        root: str | Path,
        annotations: str = "annotations/instances_{split}2017.json",
        images: str = "{split}2017",
        train: str = "train",
        val: str = "val",
        categories: Sequence[str] | None = None,
        repair: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(split, **options)
        part = {"train": train, "val": val}[split]
        reader = CocoReader(root, annotations, images, part, repair=repair, decoding=self.decoding)
        index, classes = reader.read(categories)
        present = np.zeros((len(index), len(classes)), np.bool_)
        present[np.repeat(np.arange(len(index)), index.counts), index.labels] = True
        reader.skipped.include(reader.flaws.found)
        self._hold(classes, reader.root, [os.fsdecode(name) for name in index.names], present, reader.skipped)
