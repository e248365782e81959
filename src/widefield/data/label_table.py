"""Read images whose classes are listed in a table, CSV or JSON, for multi-label classification."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from widefield import _checks
from widefield.data.class_map import alike, listed, read_class_map
from widefield.data.image_files import MultiLabelFiles
from widefield.data.listing import Skipped
from widefield.data.pairs import check_files, csv_rows, part_of

_COLUMNS = "file,labels or file,labels,split"
_FORMS = 'a list of {"file": ..., "labels": [...], "split": ...}, or an object {FILE: [LABEL, ...]}'


@dataclass(frozen=True)
class _Row:
    """An image of a table."""

    file: str
    labels: tuple[str, ...]
    split: str | None
    where: str
    """The place in the table, for messages."""


class LabelTable(MultiLabelFiles):
    """Images in a folder, with any number of classes each, which a table lists.

    A CSV table has the columns ``file`` (a path relative to ``root``), ``labels`` (names of classes, with ``separator``
    between them; empty: none) and optionally ``split``. A JSON table is a list of such objects, with a list of names as
    ``labels``, or an object of lists by file.

    Args:
        split: ``"train"`` or ``"val"``.
        root: folder that the paths are relative to.
        table: the table, from ``root``: ``.csv`` or ``.json``.
        classes: names of the classes in order, or a text file with one per line. None: all in the table, sorted.
        separator: what is between the labels of a CSV table.
        train, val: names of the two splits in the table.
        val_fraction: fraction of the images that make up val, for tables without splits. The choice depends on the
            names of the images only.
        options: those of `EncodedImages`, such as ``size``, ``auto_augment`` and ``corrupt``.

    Raises:
        FileNotFoundError: the folder, the table or an image is missing.
        ValueError: the table has no such columns, a label that is not among ``classes``, or an image twice; or an
            argument is out of range.
        TypeError: an argument is unknown or of the wrong type.
    """

    needs: ClassVar[dict[str, str]] = {"root": "the folder that the paths in the table are relative to"}

    def __init__(
        self,
        split: str,
        *,
        root: str | Path,
        table: str | Path = "labels.csv",
        classes: Sequence[str] | str | Path | None = None,
        separator: str = ";",
        train: str = "train",
        val: str = "val",
        val_fraction: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(split, **options)
        folder = Path(root).expanduser()
        path = folder / table
        if not isinstance(separator, str) or not separator:
            raise TypeError(f"separator must be a text such as ';'; got {separator!r}.")
        if not path.is_file():
            raise FileNotFoundError(f"there is no table {str(path)!r}. Name it by the option table, from root.")
        rows = list(_rows(path, separator))
        _check_twice(rows, path)
        names = _classes(folder, path, classes, rows)
        chosen, skipped = _of_split(
            rows, path, split, {"train": train, "val": val}, _checks.number("val_fraction", val_fraction, maximum=1)
        )
        check_files(folder, [row.file for row in chosen], "images", f"Paths in {str(path)!r} are relative to root.")
        present = np.zeros((len(chosen), len(names)), np.bool_)
        places = {name: place for place, name in enumerate(names)}
        for number, row in enumerate(chosen):
            present[number, [places[label] for label in row.labels]] = True
        self._hold(names, folder, [row.file for row in chosen], present, skipped)


def _rows(path: Path, separator: str) -> Iterator[_Row]:
    kind = path.suffix.lower()
    if kind == ".json":
        yield from _json_rows(path)
    elif kind == ".csv":
        yield from _csv_rows(path, separator)
    else:
        raise ValueError(f"table must end in .csv or .json; got {str(path)!r}.")


def _csv_rows(path: Path, separator: str) -> Iterator[_Row]:
    columns, rows = csv_rows(path, ("file", "labels"), _COLUMNS)
    for line, row in enumerate(rows, 2):
        where = f"line {line} of {str(path)!r}"
        file, labels = (row["file"] or "").strip(), row["labels"]
        if not file or labels is None:
            raise ValueError(f"{where} lacks a file or labels: {row!r}.")
        names = (name.strip() for name in labels.split(separator))
        part = (row["split"] or "").strip() if "split" in columns else None
        yield _Row(file, tuple(name for name in names if name), part, where)


def _json_rows(path: Path) -> Iterator[_Row]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not a JSON file: {error}.") from error
    if isinstance(content, Mapping):
        content = [{"file": file, "labels": labels} for file, labels in content.items()]
    if not isinstance(content, list):
        raise ValueError(f"{str(path)!r} must be {_FORMS}; it is {type(content).__name__}.")
    for place, entry in enumerate(content):
        where = f"entry {place} of {str(path)!r}"
        file = entry.get("file") if isinstance(entry, Mapping) else None
        labels = entry.get("labels") if isinstance(entry, Mapping) else None
        part = entry.get("split") if isinstance(entry, Mapping) else None
        named = isinstance(labels, list) and all(isinstance(name, str) and name.strip() for name in labels)
        if not isinstance(file, str) or not file or not named or not isinstance(part, str | None):
            raise ValueError(f"{where} is {entry!r}; the file must be {_FORMS}.")
        yield _Row(file, tuple(name.strip() for name in labels or ()), part, where)


def _check_twice(rows: Sequence[_Row], path: Path) -> None:
    if not rows:
        raise ValueError(f"{str(path)!r} lists no images.")
    first: dict[str, _Row] = {}
    for row in rows:
        other = first.setdefault(row.file, row)
        if other is not row:
            raise ValueError(f"{row.where} has the image {row.file!r} of {other.where}: list each image once.")


def _classes(folder: Path, path: Path, classes: Any, rows: Sequence[_Row]) -> tuple[str, ...]:
    """Return the names of the classes; raises ValueError for a label that is not among those given."""
    found = sorted({label for row in rows for label in row.labels})
    if classes is None:
        if not found:
            raise ValueError(f"{str(path)!r} has no labels, and classes are not given.")
        return tuple(found)
    names = _named(folder, classes)
    for row in rows:
        for label in row.labels:
            if label not in names:
                raise ValueError(
                    f"{row.where} has the label {label!r}, which is not among the classes: {listed(names)}."
                    f"{_checks.did_you_mean(label, names)}{alike({label, *names})}"
                )
    return names


def _named(folder: Path, classes: Any) -> tuple[str, ...]:
    """Return the names that the option ``classes`` gives."""
    if isinstance(classes, (str, Path)):
        known = read_class_map(folder / classes)
        return tuple(sorted(known, key=lambda name: known[name]))
    if not isinstance(classes, Sequence) or not classes or not all(isinstance(name, str) for name in classes):
        raise TypeError(f"classes must be a list of names, or a text file with one per line; got {classes!r}.")
    twice = sorted({name for name in classes if list(classes).count(name) > 1})
    if twice:
        raise ValueError(f"classes has {listed(twice)} more than once.")
    return tuple(classes)


def _of_split(
    rows: Sequence[_Row], path: Path, split: str, part: Mapping[str, str], fraction: float
) -> tuple[list[_Row], Skipped]:
    """Return the images of a split, and those of others than train and val as left out."""
    skipped = Skipped()
    divided = [row for row in rows if row.split is not None]
    if divided and fraction:
        raise ValueError(f"{str(path)!r} states splits and val_fraction is set: leave out one of the two.")
    if len(divided) < len(rows) and not fraction:
        lacking = next(row for row in rows if row.split is None)
        raise ValueError(f"{lacking.where} states no split: add a column split, or set val_fraction, such as 0.2.")
    if fraction:
        return [rows[place] for place in part_of([row.file for row in rows], split, fraction)], skipped
    for row in rows:
        if row.split not in part.values():
            skipped.add("of other splits", row.file)
    chosen = [row for row in rows if row.split == part[split]]
    if not chosen:
        named = sorted({row.split or "" for row in rows})
        raise FileNotFoundError(f"{str(path)!r} lists no images of the split {part[split]!r}; it has {listed(named)}.")
    return chosen, skipped
