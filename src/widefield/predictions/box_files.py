"""Read the boxes of images from files: COCO's annotations or results, and what ``widefield predict`` writes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from widefield import _checks
from widefield.loading.words import is_path
from widefield.predictions.coco_results import CocoIds, names_by_id, read_ids
from widefield.predictions.image_paths import matched_names
from widefield.tasks import BoxPrediction

Entry = tuple[str, float, tuple[float, float, float, float]]
"""Name of a class, score, and x1, y1, x2, y2."""


class BoxOutsideError(ValueError):
    """A box is outside of its image."""


@dataclass(frozen=True)
class BoxFile:
    """The boxes in a file.

    Attributes:
        source: the file.
        classes: names of the classes.
        entries: boxes by the image's name or, if ``ids`` is given, by its id.
        ids: of the images by name; None if the entries are by name.
    """

    source: str
    classes: tuple[str, ...]
    entries: Mapping[str | int, Sequence[Entry]]
    ids: CocoIds | None = None

    def of(self, name: str, size: tuple[int, int]) -> BoxPrediction:
        """Return the boxes of an image, best first.

        Args:
            name: of its file.
            size: (height, width) of its file.

        Raises:
            ValueError: the file does not know the image.
            BoxOutsideError: a box is outside of it.
        """
        height, width = size
        entries = self.entries if name in self.entries else self.matched([name]).entries
        found = sorted(entries[name], key=lambda one: -one[1])
        for _, _, (x1, y1, x2, y2) in found:
            if x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0:
                raise BoxOutsideError(
                    f"{self.source}: the box {[x1, y1, x2, y2]} (x1, y1, x2, y2) is outside of the image {name!r}, "
                    f"which is {width}x{height}. Are the boxes of images of this size?"
                )
        return BoxPrediction(
            torch.tensor([box for *_, box in found]).view(-1, 4),
            torch.tensor([self.classes.index(one) for one, *_ in found], dtype=torch.int64),
            torch.tensor([score for _, score, _ in found]),
            size=size,
        )

    def matched(self, names: Sequence[str]) -> BoxFile:
        """Return the boxes of these images, by their names.

        Args:
            names: of all images that are asked for. A file may list an image without its folder, if no other image has
                the same name.

        Raises:
            ValueError: the file does not know an image; the message counts them and names the first.
        """
        keys: Mapping[str, str | int]
        if self.ids is None:
            keys = matched_names(names, [str(key) for key in self.entries], self.source)
        elif self.ids.source:
            keys = self.ids.of_images(names).images
        else:
            keys = self._numbers(names)
        return replace(self, entries={name: self.entries.get(key, ()) for name, key in keys.items()}, ids=None)

    def _numbers(self, names: Sequence[str]) -> dict[str, int]:
        """Return the id at the end of each name."""
        found: dict[int, str] = {}
        for name in names:
            digits = PurePosixPath(name).stem.rpartition("_")[2]
            if not digits.isdecimal():
                raise ValueError(
                    f"{self.source} names images by their ids, and the file name {name!r} does not end with one: give "
                    "a COCO file with their names (coco, --coco)."
                )
            other = found.setdefault(int(digits), name)
            if other != name:
                raise ValueError(
                    f"{self.source} names images by their ids, and both {other!r} and {name!r} end with {int(digits)}: "
                    "give a COCO file with their names (coco, --coco)."
                )
        return {name: number for number, name in found.items()}


def is_box_file(word: str | Path) -> bool:
    """Return whether a word is the path of a file with boxes; otherwise it must be the name of a detector.

    Raises FileNotFoundError for a path of a file that is not there.
    """
    path = Path(word).expanduser()
    if path.is_file():
        return True
    if path.is_dir() or not (path.suffix.lower() == ".json" or (path.suffix and is_path(str(word)))):
        return False
    near = [str(other) for other in path.parent.glob("*.json")]
    raise FileNotFoundError(
        f"there is no file of boxes {str(word)!r}: give a JSON file with boxes, the name of a detector, or the folder "
        f"of a run.{_checks.did_you_mean(str(path), near)}"
    )


def read_boxes(path: str | Path, classes: Sequence[str], coco: str | Path | None = None) -> BoxFile:
    """Return the boxes in a JSON file.

    It is one of these:

    - annotations in COCO's form, with ``images``, ``annotations`` and ``categories``; crowd regions are left out;
    - results in COCO's form, a list with ``image_id``, ``category_id``, ``bbox`` (x, y, width, height) and ``score``;
    - ``predict.json``, as ``widefield predict`` writes it for a detector.

    Args:
        path: the file.
        classes: names of the classes that ``category_id`` of results counts, from 1 on, if ``coco`` is not given.
        coco: a COCO file with the names of the images and categories of results. Default: the names of images end with
            their ids, as COCO's do.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has another form, or an entry is wrong; the message names it.
    """
    path = Path(path).expanduser()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError, too
        raise ValueError(f"{path} is not a JSON file with boxes: {error}.") from error
    if isinstance(content, list):
        return _results(path, content, classes, coco)
    if isinstance(content, Mapping) and "annotations" in content:
        return _annotations(path, content)
    if isinstance(content, Mapping) and "images" in content:
        return _predictions(path, content)
    raise ValueError(
        f"{path} holds no boxes: it is neither a list of COCO's results, nor a mapping with images and annotations, "
        "nor a predict.json of a detector."
    )


def _results(path: Path, content: Sequence[Any], classes: Sequence[str], coco: str | Path | None) -> BoxFile:
    ids = read_ids(coco)
    names = {number: name for name, number in ids.categories.items()} or dict(enumerate(classes, start=1))
    entries: dict[str | int, list[Entry]] = {}
    for index, one in enumerate(content):
        where = f"{path}: entry {index}"
        image, category = (_field(where, one, key, int) for key in ("image_id", "category_id"))
        score = _number(f"{where}: score", _field(where, one, "score", (int, float)))
        # Detectors of all of COCO's categories write more of them than are asked for.
        name = names.get(category, f"category {category}")
        entries.setdefault(image, []).append((name, score, _corners(where, one)))
    return BoxFile(str(path), _listed(names.values(), entries), entries, ids)


def _annotations(path: Path, content: Mapping[str, Any]) -> BoxFile:
    images, names = names_by_id(path, content)
    entries: dict[str | int, list[Entry]] = {name: [] for name in images.values()}
    for index, one in enumerate(content["annotations"]):
        where = f"{path}: annotation {index}"
        image, category = (_field(where, one, key, int) for key in ("image_id", "category_id"))
        for kind, number, known in (("image_id", image, images), ("category_id", category, names)):
            if number not in known:
                raise ValueError(f"{where} has the {kind} {number}, which the file does not list.")
        if not one.get("iscrowd"):
            entries[images[image]].append((names[category], 1.0, _corners(where, one)))
    return BoxFile(str(path), _listed(names.values(), entries), entries)


def _predictions(path: Path, content: Mapping[str, Any]) -> BoxFile:
    entries: dict[str | int, list[Entry]] = {}
    for index, image in enumerate(content["images"]):
        where = f"{path}: image {index}"
        if not isinstance(image, Mapping) or "objects" not in image:
            raise ValueError(f"{where} has no objects: the file is not of a detector.")
        own = entries.setdefault(str(_field(where, image, "name", str)), [])
        for number, one in enumerate(image["objects"]):
            here = f"{where}, object {number}"
            score = _number(f"{here}: score", _field(here, one, "score", (int, float)))
            own.append((_field(here, one, "name", str), score, _box(here, _field(here, one, "box", list))))
    return BoxFile(str(path), _listed(content.get("classes", ()), entries), entries)


def _listed(names: Any, entries: Mapping[Any, Sequence[Entry]]) -> tuple[str, ...]:
    """Return the names of all classes, first the given ones."""
    return tuple(dict.fromkeys([*map(str, names), *(name for own in entries.values() for name, *_ in own)]))


def _field(where: str, entry: Any, key: str, kind: Any) -> Any:
    value = entry.get(key) if isinstance(entry, Mapping) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{where} has no valid {key}; it is {_short(entry)}.")
    return value


def _corners(where: str, entry: Mapping[str, Any]) -> tuple[float, float, float, float]:
    """Return x1, y1, x2, y2 of an entry's ``bbox``, which is x, y, width, height."""
    x, y, width, height = _box(where, _field(where, entry, "bbox", list), corners=False)
    return x, y, x + width, y + height


def _box(where: str, box: Sequence[Any], *, corners: bool = True) -> tuple[float, float, float, float]:
    if len(box) != 4:
        raise ValueError(f"{where}: a box must have 4 numbers; got {_short(box)}.")
    first, second, third, fourth = (_number(f"{where}: box", value) for value in box)
    empty = third <= first or fourth <= second if corners else third <= 0 or fourth <= 0
    if empty:
        raise ValueError(f"{where}: a box must have an area; got {_short(box)}.")
    return first, second, third, fourth


def _number(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{where} must be a finite number; got {_short(value)}.")
    return float(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
