"""Read any images with label images: two folders, or a CSV file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from widefield import _checks
from widefield._pixels import IGNORED
from widefield.data.decoding import CorruptImageError, LabelError
from widefield.data.labels import FORMS, LabelFormat, class_names, colors_of, values_of
from widefield.data.listing import Skipped
from widefield.data.mask_files import SegmentationFiles
from widefield.data.pairs import Pairs, check_files, csv_rows, pair_up, part_of
from widefield.data.segmentation import Color

_LAYOUT = "Set images and labels to the folders' names below root; {split} stands for the name of the split."
_COLUMNS = ("image", "mask")
_PROBED = 8  # label images read when a set is built


class Masks(SegmentationFiles):
    """Images with label images in two folders, or listed in a CSV file.

    An image and its label image have the same path below their folders, apart from suffix and ending:
    ``images/train/a/1.jpg`` and ``masks/train/a/1.png``. The first label images are read when the set is built, so that
    a wrong option is reported at once.

    Args:
        split: ``"train"`` or ``"val"``.
        root: folder that all other paths are relative to.
        classes: names of the classes in the order of their values, or a text file with one class per line, ``name`` or
            ``name,red,green,blue``. At most 255.
        palette: color of each class, [red, green, blue]; default: the file's, or `default_palette`.
        images, labels: folders of the images and of the label images; ``{split}`` stands for the name of the split.
            Default: ``images/{split}`` and ``masks/{split}``, and with ``val_fraction`` ``images`` and ``masks``.
        image_suffix, label_suffix: what the names of the files end in before the ending, such as ``_leftImg8bit`` and
            ``_gtFine_labelTrainIds``; other files are left out.
        csv: file with the columns ``image`` and ``mask``, paths relative to ``root``, and optionally ``split``.
            Replaces the folders.
        train, val: names of the two splits in folders and in the CSV file.
        val_fraction: fraction of the images that make up val, for data without splits. The choice depends on the names
            of the images only.
        label_format: ``"index"``: label images are gray, and each value is a class. ``"palette"``: also the indices of
            a palette. ``"color"``: each color of ``palette`` is a class.
        values: the value of each class in the label images, such as [0, 255]; default: 0, 1, 2 and so on.
        reduce_zero_label: the value 0 means no class and is ignored, and the values from 1 are the classes.
        ignore_index: value, or values, of pixels that are ignored; default: 255, unless it is of a class.
        ignore_color: color of pixels that are ignored, for ``label_format: color``.
        options: those of `SegmentationFiles`, such as ``size``, ``scale`` and ``hflip``.

    Raises:
        FileNotFoundError: a folder, an image or a label image is missing.
        LabelError: one of the first label images is wrong; see `SegmentationFiles.sample`.
        ValueError, TypeError: an argument is out of range, unknown, or of the wrong type.
    """

    needs: ClassVar[dict[str, str]] = {
        "root": "the folder of images and label images",
        "classes": "the names of the classes in the order of their values, or a text file with one per line",
    }

    def __init__(
        self,
        split: str,
        *,
        root: str | Path,
        classes: Sequence[str] | str | Path,
        palette: Sequence[Color] | None = None,
        images: str | None = None,
        labels: str | None = None,
        image_suffix: str = "",
        label_suffix: str = "",
        csv: str | Path | None = None,
        train: str = "train",
        val: str = "val",
        val_fraction: float = 0.0,
        label_format: str = "index",
        values: Sequence[int] | None = None,
        reduce_zero_label: bool = False,
        ignore_index: int | Sequence[int] | None = None,
        ignore_color: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(split, **options)
        folder = Path(root).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(f"root is not a folder: {str(folder)!r}. {_LAYOUT}")
        fraction = _checks.number("val_fraction", val_fraction, maximum=1)
        part = {"train": train, "val": val}
        if csv is None:
            inner = "" if fraction else "/{split}"
            places = [images or f"images{inner}", labels or f"masks{inner}"]
            _check_places(places, fraction)
            filled = [place.replace("{split}", part[split]) for place in places]
            pairs = pair_up(
                folder, *filled, image_suffix=image_suffix, label_suffix=label_suffix, layout=_LAYOUT
            )  # fmt: skip
        else:
            pairs = _read_csv(folder, folder / csv, part, split, fraction)
        pairs = _part_of(pairs, split, fraction) if fraction else pairs
        names, colors = class_names(_below(folder, classes), palette)
        form = _form(label_format, len(names), colors, values, reduce_zero_label, ignore_index, ignore_color)
        self._hold(pairs, names, colors, form)
        self._probe(decided=ignore_index is not None or values is not None)

    def _probe(self, *, decided: bool) -> None:
        """Read the first label images; refuse 0 and 255 for two classes unless the user ``decided`` what 255 is."""
        seen: set[int] = set()
        for index in range(min(_PROBED, len(self))):
            try:
                labels = self._form.read(self.label_name(index), max_pixels=self.decoding["max_pixels"])
            except CorruptImageError:
                continue  # reported when the sample is read
            seen.update(np.unique(labels).tolist())
        if not decided and self._form.form != "color" and len(self.classes) <= 2 and seen == {0, IGNORED}:
            raise LabelError(
                f"the label images, such as {self.label_name(0)}, hold only the values 0 and 255. 255 means ignored "
                f"unless you say otherwise, so one class would have no pixel. If 255 is a class, name both classes and "
                f"set values: [0, 255]. If it marks pixels to ignore, set ignore_index: 255."
            )


def _below(folder: Path, classes: Any) -> Any:
    """Return the path of a file of classes, relative to ``folder`` if there is one, or ``classes`` itself."""
    if isinstance(classes, (str, Path)) and (folder / classes).is_file():
        return folder / classes
    return classes


def _check_places(places: Sequence[str], fraction: float) -> None:
    whole = ["{split}" not in place for place in places]
    if any(whole) and not fraction:
        raise ValueError(
            f"images and labels must name the split, as in 'images/{{split}}'; got {places[0]!r} and {places[1]!r}. If "
            f"the data have no splits, set val_fraction, such as 0.2."
        )
    if not all(whole) and fraction:
        raise ValueError(
            f"val_fraction is for data without splits, but the folders name one: {places[0]!r} and {places[1]!r}. "
            f"Leave out one of the two."
        )


def _form(
    form: str,
    count: int,
    palette: Sequence[Color],
    values: Sequence[int] | None,
    reduce_zero_label: bool,
    ignore_index: int | Sequence[int] | None,
    ignore_color: Sequence[int] | None,
) -> LabelFormat:
    form = _checks.choice("label_format", form, FORMS)
    if form == "color":
        given = {"values": values, "ignore_index": ignore_index, "reduce_zero_label": reduce_zero_label or None}
        unused = [name for name, value in given.items() if value is not None]
        if unused:
            raise ValueError(f"{unused[0]} is for label images of values; with label_format: color set ignore_color.")
        hint = "Correct the file, add the classes of these colors, or set ignore_color."
        return LabelFormat(colors_of(palette, ignore_color), form, hint)
    if ignore_color is not None:
        raise ValueError(f"ignore_color is for label_format: color; with {form!r} set ignore_index.")
    known = values_of(count, reduce_zero_label=reduce_zero_label, ignore_index=ignore_index, values=values)
    hint = (
        "Correct the file, name all classes, set values to the value of each class, or ignore_index to the values of "
        "pixels to leave out."
    )
    return LabelFormat(known, form, hint)


def _read_csv(root: Path, path: Path, part: dict[str, str], split: str, fraction: float) -> Pairs:
    """Return the pairs of a CSV file, those of ``split`` only if it has such a column."""
    if not path.is_file():
        raise FileNotFoundError(f"csv must be a file with the columns image and mask; there is no file {str(path)!r}.")
    columns, rows = csv_rows(path, _COLUMNS, "image,mask, or image,mask,split")
    if ("split" in columns) == bool(fraction):
        raise ValueError(
            f"{str(path)!r} has a column split and val_fraction is set: leave out one of the two."
            if fraction
            else f"{str(path)!r} has no column split: add one, or set val_fraction, such as 0.2."
        )
    skipped, chosen = Skipped(), []
    for line, row in enumerate(rows, 2):
        if not all((row[name] or "").strip() for name in _COLUMNS):
            raise ValueError(f"{str(path)!r} lacks an image or a mask in row {line}: {row!r}.")
        if fraction or (row["split"] or "").strip() == part[split]:
            chosen.append(row)
        elif (row["split"] or "").strip() not in part.values():
            skipped.add("of other splits", row["image"])
    images, labels = ([row[name].strip() for row in chosen] for name in _COLUMNS)
    if not images:
        raise FileNotFoundError(f"{str(path)!r} lists no images of the split {part[split]!r}.")
    check_files(root, images, "images", f"Paths in {str(path)!r} are relative to root.")
    check_files(root, labels, "label images", f"Paths in {str(path)!r} are relative to root.")
    return Pairs(root, images, labels, skipped)


def _part_of(pairs: Pairs, split: str, fraction: float) -> Pairs:
    kept = part_of(pairs.images, split, fraction)
    return replace(pairs, images=[pairs.images[i] for i in kept], labels=[pairs.labels[i] for i in kept])
