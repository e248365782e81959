"""Read boxes and polygons in YOLO's text files, with the description of a set that Ultralytics' packages read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml

from widefield.data.listing import Skipped, images_in
from widefield.data.object_files import ObjectFiles
from widefield.data.object_index import AnnotationError, Flaws, IndexBuilder, brief, stored_sizes

_BOX = 5  # words of a line with a class and a box
_POLYGON = 7  # words of a line with a class and the smallest polygon
_MOST = 1.5  # a fraction of the image; larger values are pixels


class Yolo(ObjectFiles):
    """Images with boxes, or polygons, from YOLO's text files.

    ``root/data.yaml`` names the folders of the images and the classes. The objects of ``images/.../a.jpg`` are in
    ``labels/.../a.txt``; without a folder ``images`` in the path, the text file is next to the image. A line is
    ``class x y width height``, the box's center and size, or ``class x0 y0 x1 y1 ...``, a polygon; all are fractions of
    the image. Images without a text file, or with an empty one, have no objects.

    Args:
        split: ``"train"`` or ``"val"``.
        root: the folder that holds the description.
        description: path of the YAML file, from ``root``, with ``train`` and ``val`` (a folder, several, or a text file
            of image paths), ``names`` (a list, or a mapping of numbers to names), and optionally ``path``, the folder
            that these start from.
        options: those of `ObjectFiles`, such as ``masks``, ``repair`` and ``scale``. With ``masks`` every object must
            be a polygon.

    Raises:
        FileNotFoundError: the description or a folder is missing.
        AnnotationError: the description is of another form, or a line of a text file cannot be right. The message names
            the file and the line.
        ValueError, TypeError: an argument is out of range, unknown, or of the wrong type.
    """

    needs: ClassVar[dict[str, str]] = {"root": "the folder that holds data.yaml"}

    def __init__(self, split: str, *, root: str | Path, description: str = "data.yaml", **options: Any) -> None:
        super().__init__(split, **options)
        folder = Path(os.path.abspath(Path(root).expanduser()))  # noqa: PTH100 (without "..", links as they are)
        content = _described(folder / description)
        classes = _names(folder / description, content)
        skipped = Skipped()
        images = _images(folder, folder / description, content, split, skipped)
        flaws = Flaws(str(folder), self.repair)
        builder = IndexBuilder(flaws, masks=self.has_masks)
        sizes = stored_sizes(folder, images, self.decoding)
        labeled = 0
        for place, name in enumerate(images):
            height, width = sizes.get(name, (0, 0))  # without a size it is corrupt, which is reported when it is read
            row = builder.add_image(name, height, width, place)
            labels = label_file(name)
            if (folder / labels).is_file():
                labeled += 1
                if name in sizes:
                    _read(builder, row, folder, labels, len(classes))
        if not labeled:
            raise AnnotationError(
                f"none of the {len(images):,} images of the {split} split has a text file: {label_file(images[0])!r} "
                f"is missing in {str(folder)!r}. Put the text files into a folder labels next to the folder images."
            )
        self._hold(builder.build(), classes, folder, skipped, flaws.found)


def label_file(image: str) -> str:
    """Return the path of the text file of an image: in the folder labels instead of images, or next to the image."""
    bare = os.path.splitext(image)[0] + ".txt"  # noqa: PTH122 (a Path takes minutes for a million)
    parts = bare.split("/")
    places = [place for place, part in enumerate(parts[:-1]) if part == "images"]
    if places:
        parts[places[-1]] = "labels"
    return "/".join(parts)


def _described(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no description {str(path)!r}. Name it by the option description, from root.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise AnnotationError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise AnnotationError(f"{path} must map train, val and names to their values; it holds {brief(content)}.")
    return content


def _names(path: Path, content: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of the classes in the order of their numbers."""
    names = content.get("names")
    if isinstance(names, dict):
        names = [names.get(number) for number in range(len(names))]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise AnnotationError(
            f"{path}: names must be a list of the classes' names, or map the numbers from 0 to them; it is "
            f"{brief(content.get('names'))}."
        )
    if content.get("nc", len(names)) != len(names):
        raise AnnotationError(f"{path}: nc is {brief(content['nc'])}, and there are {len(names)} names.")
    if len(set(names)) < len(names):
        raise AnnotationError(f"{path}: names must differ; they are {brief(names)}.")
    return tuple(names)


def _images(root: Path, path: Path, content: dict[str, Any], split: str, skipped: Skipped) -> list[str]:
    """Return the paths of the images of a split, from ``root`` where they are below it."""
    given = content.get(split)
    places = [given] if isinstance(given, str) else given
    if not isinstance(places, list) or not places or not all(isinstance(place, str) and place for place in places):
        raise AnnotationError(f"{path}: {split} must be a folder, several, or a text file; it is {brief(given)}.")
    start = content.get("path")
    base = root / start if isinstance(start, str) and (root / start).is_dir() else path.parent
    found: list[str] = []
    for place in places:
        # Some tools write ../train/images for a folder next to the description.
        tried = [base / place, base / place.removeprefix("../")]
        here = next((one for one in tried if one.exists()), None)
        if here is None:
            raise FileNotFoundError(f"{path}: {split} names {place!r}, and there is no {str(tried[0])!r}.")
        found += images_in(here, skipped) if here.is_dir() else _listed(here)
    if not found:
        raise FileNotFoundError(
            f"{path}: there are no images of the split {split} in {brief(given)}.{skipped.sentence()}"
        )
    inside = os.path.join(root, "")  # noqa: PTH118 (a Path drops the separator)
    return list(dict.fromkeys(os.path.normpath(name).removeprefix(inside) for name in found))


def _listed(path: Path) -> list[str]:
    """Return the paths in a text file, which are relative to it; raises FileNotFoundError for a missing image."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    paths = [str(path.parent / line.removeprefix("./")) for line in lines]
    for name in paths:
        if not Path(name).is_file():
            raise FileNotFoundError(f"{path} lists an image that is missing: {name!r}.")
    return paths


def _read(builder: IndexBuilder, row: int, root: Path, file: str, classes: int) -> None:
    """Add the objects of a text file."""
    try:
        lines = (root / file).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        builder.flaws.report(file, "is not a text file", "damaged text files")
        return
    seen: set[tuple[str, ...]] = set()
    for number, line in enumerate(lines, 1):
        words = tuple(line.split())
        if not words:
            continue
        where = f"line {number} of {file}"
        if words in seen:
            builder.flaws.report(where, f"repeats an earlier line: {brief(line)}", "repeated lines")
            continue
        seen.add(words)
        _read_line(builder, row, number, where, words, classes)


def _read_line(builder: IndexBuilder, row: int, number: int, where: str, words: Sequence[str], classes: int) -> None:
    try:
        label, *values = map(float, words)
    except ValueError:
        builder.flaws.report(where, f"has words that are not numbers: {brief(' '.join(words))}", "lines of texts")
        return
    if len(words) != _BOX and (len(words) < _POLYGON or len(words) % 2 == 0):
        what = f"has {len(words)} numbers: a class and a box are 5, a class and a polygon of 3 points are 7 or more"
        builder.flaws.report(where, what, "lines that are neither a box nor a polygon")
        return
    if not label.is_integer() or not 0 <= label < classes:
        what = f"has an unknown class: {words[0]}, where the classes are 0 to {classes - 1}"
        builder.flaws.report(where, what, "objects of unknown classes")
        return
    if not all(abs(value) <= _MOST for value in values):  # NaN is not
        what = f"has coordinates that are not fractions of the image: {brief(' '.join(words))}"
        builder.flaws.report(where, what, "objects with coordinates that are not fractions")
        return
    height, width = builder.sizes[row]
    if len(words) == _BOX:
        x, y, w, h = values
        box = (x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height
        builder.add(row, lambda: where, box, int(label), number)
        return
    columns, rows = [x * width for x in values[0::2]], [y * height for y in values[1::2]]
    polygon = [value for corner in zip(columns, rows, strict=True) for value in corner]
    box = min(columns), min(rows), max(columns), max(rows)
    area = abs(sum(columns[i - 1] * rows[i] - columns[i] * rows[i - 1] for i in range(len(rows)))) / 2
    builder.add(row, lambda: where, box, int(label), number, area=area or None, outline=[polygon])
