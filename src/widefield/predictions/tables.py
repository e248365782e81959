"""Write predictions as CSV and as lines of JSON, one image after the other.

A CSV file has a line for each class, object or key point that is listed, so that a table program can filter and sort:

    classification   image, path, rank, label, name, probability, error; multi-label: the classes above the threshold
    segmentation     image, path, label, name, share, error
    detection        image, path, label, name, score, left, top, right, bottom, error
    poses            image, path, pose, label, name, score, left, top, right, bottom,
                     keypoint, x, y, keypoint_score, error
    masked images    image, path, masked, difference, error

An image without an object has a line with empty cells, and one that cannot be read a line with the error. A line of
JSON is an image with all of its prediction but the masks, or its ``path`` and the ``error``.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TextIO, runtime_checkable


class Lost(Protocol):
    """An image that could not be read."""

    def to_dict(self) -> dict[str, Any]:
        """Return its ``path`` and the ``error``."""


@runtime_checkable
class Found(Protocol):
    """An image with a prediction, and how it is listed."""

    name: Any
    path: Any
    prediction: Any
    drawing: Any

    def to_dict(self) -> dict[str, Any]:
        """Return path, name and prediction."""


class CsvTable:
    """Writes images to a CSV file as they come.

    Args:
        file: to write to.
        columns: of the kind of prediction; None: those of the first image. Images that cannot be read wait until the
            columns are known.
    """

    def __init__(self, file: TextIO, columns: tuple[str, ...] | None = None) -> None:
        self._file = file
        self._columns = columns
        self._writer: csv.DictWriter[str] | None = None
        self._waiting: list[Lost] = []

    def add(self, entry: Found | Lost) -> None:
        """Write the lines of an image."""
        if not isinstance(entry, Found):
            self._waiting.append(entry)
            if self._writer is not None:
                self._release()
            return
        self._start(entry.drawing.columns)
        cells = {"image": entry.name, "path": str(entry.path)}
        for line in entry.drawing.entries(entry.prediction) or [{}]:
            self._write({**cells, **line})
        self._file.flush()

    def finish(self) -> None:
        """Write what still waits: without any prediction, the images that could not be read."""
        self._start(())

    def _start(self, columns: Iterable[str]) -> None:
        if self._writer is None:
            chosen = self._columns if self._columns is not None else columns
            names = ["image", "path", *chosen, "error"]
            self._writer = csv.DictWriter(self._file, names, lineterminator="\n")
            self._writer.writeheader()
        self._release()

    def _release(self) -> None:
        for entry in self._waiting:
            self._write(entry.to_dict())
        self._waiting.clear()

    def _write(self, cells: Mapping[str, Any]) -> None:
        if self._writer is not None:
            self._writer.writerow({key: _cell(value) for key, value in cells.items()})


def _cell(value: Any) -> Any:
    """Return a number with enough digits for its precision."""
    return f"{value:.6g}" if isinstance(value, float) else value


class JsonLines:
    """Writes images as lines of JSON as they come."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def add(self, entry: Found | Lost) -> None:
        """Write the line of an image."""
        self._file.write(json.dumps(entry.to_dict(), ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def finish(self) -> None:
        """Nothing waits."""


def csv_text(entries: Iterable[Found | Lost]) -> str:
    """Return images as CSV."""
    return _text(CsvTable, entries)


def lines_text(entries: Iterable[Found | Lost]) -> str:
    """Return images as lines of JSON."""
    return _text(JsonLines, entries)


def _text(kind: type[CsvTable] | type[JsonLines], entries: Iterable[Found | Lost]) -> str:
    buffer = io.StringIO()
    table = kind(buffer)
    for entry in entries:
        table.add(entry)
    table.finish()
    return buffer.getvalue()
