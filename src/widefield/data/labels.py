"""Turn label images into masks: which value or color stands for which class, and what is wrong with a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from widefield import _checks
from widefield._pixels import IGNORED
from widefield.data.class_map import listed
from widefield.data.decoding import LabelError, Pixels, read_labels
from widefield.data.segmentation import Color, default_palette

FORMS = ("index", "palette", "color")
"""What label images hold: gray values, indices of a palette, or colors."""
MOST_CLASSES = 255
_UNKNOWN = -1
_LARGEST = 65_535


@dataclass(frozen=True)
class LabelFormat:
    """Which value or color of a label image stands for which class.

    Args:
        values: value in the files -> class, or 255 for pixels that are ignored. With the form ``"color"`` the values
            are colors, as ``red * 65536 + green * 256 + blue``.
        form: one of `FORMS`.
        hint: sentence for the message about other values.
    """

    values: Mapping[int, int]
    form: str = "index"
    hint: str = "Correct the file."

    def __post_init__(self) -> None:
        table: NDArray[np.int16]
        if self.form == "color":
            keys = np.array(sorted(self.values))
            table = np.array([self.values[key] for key in keys.tolist()], dtype=np.int16)
        else:
            keys = np.arange(max(256, 1 + max(self.values)))
            table = np.full(len(keys), _UNKNOWN, dtype=np.int16)
            table[list(self.values)] = list(self.values.values())
        object.__setattr__(self, "_keys", keys)
        object.__setattr__(self, "_table", table)

    def read(self, path: str | Path, *, max_pixels: int | None = None) -> NDArray[np.uint8]:
        """Return the class at each pixel, (H, W), 255 where it is ignored.

        Raises:
            LabelError: the file holds pixels of another form, or values that stand for no class.
            CorruptImageError, UnsupportedImageError, OSError, MemoryError: see `widefield.data.decoding.read`.
        """
        pixels = read_labels(path, form=self.form, max_pixels=max_pixels)
        found = self._classes(pixels)
        if (found == _UNKNOWN).any():
            raise LabelError(self._wrong(path, pixels, found == _UNKNOWN))
        return found.astype(np.uint8)

    def _classes(self, pixels: Pixels) -> NDArray[np.int16]:
        keys: NDArray[Any] = self._keys  # type: ignore[attr-defined]
        table: NDArray[np.int16] = self._table  # type: ignore[attr-defined]
        if self.form == "color":
            numbers = _numbers(pixels)
            places = np.searchsorted(keys, numbers).clip(max=len(keys) - 1)
            return np.where(keys[places] == numbers, table[places], _UNKNOWN).astype(np.int16)
        if pixels.dtype == np.uint8:
            return np.take(table, pixels)  # a third of the time of table[pixels]
        inside = (pixels >= 0) & (pixels < len(table))
        return np.where(inside, table[np.where(inside, pixels, 0)], _UNKNOWN).astype(np.int16)

    def _wrong(self, path: str | Path, pixels: Pixels, wrong: NDArray[np.bool_]) -> str:
        share = f"{wrong.mean():.1%} of the pixels" if wrong.mean() >= 0.001 else f"{wrong.sum():,} pixels"
        if self.form == "color":
            colors = [tuple(color) for color in np.unique(pixels[wrong], axis=0).tolist()]
            return f"the label image {path} has colors that stand for no class: {listed(colors)} ({share}). {self.hint}"
        values = np.unique(pixels[wrong].astype(np.int64)).tolist()
        return (
            f"the label image {path} has values that stand for no class: {listed(values)} ({share}). Values of "
            f"classes: {_spans(v for v, c in self.values.items() if c != IGNORED)}; ignored: "
            f"{_spans(v for v, c in self.values.items() if c == IGNORED)}. {self.hint}"
        )


def _numbers(colors: NDArray[Any]) -> NDArray[np.int64]:
    """Return colors (..., 3) as ``red * 65536 + green * 256 + blue``."""
    numbers: NDArray[np.int64] = colors.astype(np.int64) @ np.array([65536, 256, 1])
    return numbers


def _spans(values: Iterable[int]) -> str:
    """Return integers as spans, such as ``0 to 18, 255``, or ``none``."""
    spans: list[list[int]] = []
    for value in sorted(values):
        if spans and value == spans[-1][1] + 1:
            spans[-1][1] = value
        else:
            spans.append([value, value])
    return ", ".join(f"{low}" if low == high else f"{low} to {high}" for low, high in spans) or "none"


def values_of(
    count: int,
    *,
    reduce_zero_label: bool = False,
    ignore_index: int | Sequence[int] | None = None,
    values: Sequence[int] | None = None,
) -> dict[int, int]:
    """Return value in the label files -> class, or 255 for pixels that are ignored.

    Args:
        count: number of classes.
        reduce_zero_label: the value 0 means no class and is ignored, and the values from 1 are the classes.
        ignore_index: the value, or the values, of pixels to ignore, even if they are of a class; default: 255, unless
            it is of a class.
        values: the value of each class; default: 0, 1, 2 and so on. Not with ``reduce_zero_label``.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range, or a value stands for two classes.
    """
    if _checks.boolean("reduce_zero_label", reduce_zero_label) and values is not None:
        raise ValueError("values already says which value each class has: leave out reduce_zero_label.")
    if values is None:
        known = {int(reduce_zero_label) + index: index for index in range(count)}
    else:
        known = _known(count, values)
    if ignore_index is None:
        ignored = [] if IGNORED in known else [IGNORED]
    else:
        given = ignore_index if isinstance(ignore_index, (list, tuple)) else [ignore_index]
        ignored = [_checks.integer("ignore_index", value, minimum=0, maximum=_LARGEST) for value in given]
    if reduce_zero_label:
        ignored.append(0)
    return known | dict.fromkeys(ignored, IGNORED)


def _known(count: int, values: Sequence[int]) -> dict[int, int]:
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"values must be a list with the value of each class; got {values!r}.")
    if len(values) != count:
        raise ValueError(f"values must have one entry per class: {count}; got {len(values)}, {list(values)!r}.")
    known = {
        _checks.integer("every entry of values", value, minimum=0, maximum=_LARGEST): index
        for index, value in enumerate(values)
    }
    if len(known) < count:
        raise ValueError(f"values has an entry twice, so two classes would look the same; got {list(values)!r}.")
    return known


def colors_of(palette: Sequence[Color], ignore_color: object = None) -> dict[int, int]:
    """Return color -> class, or 255 for ``ignore_color``, with colors as ``red * 65536 + green * 256 + blue``.

    Raises TypeError or ValueError for a wrong color, or one that stands for two classes.
    """
    colors = [int(_numbers(np.array(color))) for color in palette]
    for number, color in enumerate(colors):
        if color in colors[:number]:
            raise ValueError(
                f"the palette has the color {tuple(palette[number])} twice, so colors do not identify the classes. "
                f"Give each class a color of its own."
            )
    known = {color: index for index, color in enumerate(colors)}
    if ignore_color is not None:
        known[int(_numbers(np.array(check_color("ignore_color", ignore_color))))] = IGNORED
    return known


def check_color(name: str, value: object) -> Color:
    """Return ``value`` as (red, green, blue), each from 0 to 255; raises TypeError or ValueError."""
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        raise TypeError(f"{name} must be a color [red, green, blue]; got {value!r}.")
    red, green, blue = (_checks.integer(f"every entry of {name}", v, minimum=0, maximum=255) for v in value)
    return red, green, blue


def class_names(classes: object, palette: object = None) -> tuple[tuple[str, ...], tuple[Color, ...]]:
    """Return the names and the colors of classes.

    Args:
        classes: a list of names, or a text file with one class per line, ``name`` or ``name,red,green,blue``.
        palette: a list of colors, which replaces that of the file; default: `default_palette`.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError, ValueError: there are no classes, more than 255, two of the same name, or a wrong color.
    """
    colors: list[Any] = []
    if isinstance(classes, (str, Path)):
        names, colors = _read_classes(Path(classes).expanduser())
    elif isinstance(classes, Sequence) and all(isinstance(name, str) for name in classes):
        names = list(classes)
    else:
        raise TypeError(f"classes must be a list of names, or a text file with one per line; got {classes!r}.")
    if not 1 <= len(names) <= MOST_CLASSES:
        raise ValueError(f"classes must be from 1 to {MOST_CLASSES}, as 255 marks ignored pixels; got {len(names)}.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"classes has {listed(twice)} more than once.")
    if palette is not None:
        if not isinstance(palette, (list, tuple)) or len(palette) != len(names):
            raise ValueError(f"palette must have one color per class: {len(names)}; got {palette!r}.")
        colors = list(palette)
    checked = [check_color(f"the color of {name!r}", color) for name, color in zip(names, colors, strict=False)]
    return tuple(names), tuple(checked) or default_palette(len(names))


def _read_classes(path: Path) -> tuple[list[str], list[Any]]:
    if not path.is_file():
        raise FileNotFoundError(
            f"classes must be a list of names, or a text file with one per line; there is no file {str(path)!r}."
        )
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    rows = [line.rsplit(",", 3) for line in lines if line]
    if rows and all(len(row) == 4 and all(word.strip().isdecimal() for word in row[1:]) for row in rows):
        return [row[0].strip() for row in rows], [[int(word) for word in row[1:]] for row in rows]
    return [line for line in lines if line], []


def published(name: str) -> tuple[tuple[str, ...], tuple[Color, ...]]:
    """Return the names and colors of a published set's classes, in the official order."""
    return class_names(Path(__file__).parent / "classes" / f"{name}.csv")
