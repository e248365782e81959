"""Read COCO's annotations of objects (Lin et al. 2014), those in the same form, and LVIS (Gupta et al. 2019)."""

from __future__ import annotations

import gc
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray

from widefield import _checks
from widefield.data.base import Sample
from widefield.data.listing import Skipped
from widefield.data.object_files import ObjectFiles, filled, names_of
from widefield.data.object_index import (
    AnnotationError,
    Box,
    Flaws,
    IndexBuilder,
    ObjectIndex,
    brief,
    compact,
    compact_keypoints,
    is_size,
    missing_files,
    stored_sizes,
)

_LISTS = ("images", "annotations", "categories")
_FEDERATED = {"not_exhaustive": "not_exhaustive_category_ids", "negative": "neg_category_ids"}
"""Entry of LVIS's samples -> key of LVIS's images."""


class Coco(ObjectFiles):
    """Images with objects from a file in COCO's form: boxes, classes, crowd regions and masks.

    The defaults are COCO 2017's layout: ``root/annotations/instances_{split}2017.json`` and ``root/{split}2017/*.jpg``.
    Any other file of this form is read by naming it. Classes are in the order of the ids of their categories. Images
    without objects are kept.

    Masks are polygons or run lengths, compressed or not, and are rasterized exactly as pycocotools does.

    Samples: those of `ObjectFiles`. If the file has LVIS's lists for each image, also ``not_exhaustive`` int64 (A,):
    the classes of which not every object has a box, and ``negative`` int64 (B,): the classes that the image surely
    lacks.

    Args:
        split: ``"train"`` or ``"val"``.
        root: the folder that holds the files.
        annotations: path of the file of annotations, from ``root``; ``{split}`` is the name of the split.
        images: folder of the images, from ``root``. The files' ``file_name`` are paths in it.
        train, val: names of the splits.
        categories: names of the classes to read, in this order; objects of others are left out. None: all, in the order
            of their ids.
        options: those of `ObjectFiles`, such as ``masks``, ``repair`` and ``scale``.

    Raises:
        FileNotFoundError: the file of annotations is missing.
        AnnotationError: the file of annotations is damaged, or an entry cannot be right: it names an image or a
            category that is not there, its image file is missing, its id is taken, its box is outside the image or has
            no area, its polygon has two points, or a value is of the wrong type. The message names the file and the
            entry.
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
        **options: Any,
    ) -> None:
        super().__init__(split, **options)
        part = {"train": train, "val": val}[split]
        reader = CocoReader(
            root, annotations, images, part, repair=self.repair, decoding=self.decoding, masks=self.has_masks
        )
        index, classes = reader.read(categories)
        self._federated = reader.federated(len(index))
        self._hold(index, classes, reader.root, reader.skipped, reader.flaws.found)

    def image_id(self, index: int) -> int:
        """Return the id of image ``index`` in the file of annotations."""
        return int(self.index.ids[self.rows[index]])

    def _further(self, row: int) -> Sample:
        return {
            name: torch.from_numpy(values[starts[row] : starts[row + 1]].copy())
            for name, (starts, values) in self._federated.items()
        }


class Lvis(Coco):
    """LVIS v1: 100,170 images of COCO for train, 19,809 for val, 1,203 classes of very different frequency.

    The files are ``root/lvis_v1_{split}.json``, and the images of COCO 2017 in ``root/train2017`` and ``root/val2017``.

    Args:
        split: ``"train"`` or ``"val"``.
        root: the folder that holds the files.
        annotations: see `Coco`.
        images: folder that holds the folders ``train2017`` and ``val2017``, from ``root``.
        options: those of `Coco`.

    Raises:
        FileNotFoundError, AnnotationError, ValueError, TypeError: as of `Coco`.
    """

    def __init__(
        self,
        split: str,
        *,
        root: str | Path,
        annotations: str = "lvis_v1_{split}.json",
        images: str = "",
        **options: Any,
    ) -> None:
        super().__init__(split, root=root, annotations=annotations, images=images, **options)


@contextmanager
def without_collection() -> Iterator[None]:
    """Suspend the garbage collector, which would walk over millions of new objects that hold no cycles."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class CocoReader:
    """Reads one file; its entries are checked in the order of the file.

    Args:
        root: the set's folder.
        annotations: path of the file from there; ``{split}`` is the name of the split.
        images: folder of the images from there; likewise.
        split: name of the split.
        repair: leave out or mend entries that cannot be right, instead of raising an error.
        decoding: options of `widefield.data.decoding.read`.
        masks: read the masks of objects.
        keypoints: number of key points of an object; 0: they are not read.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: a path is not a text, or ``repair`` is not a truth value.
    """

    def __init__(
        self,
        root: str | Path,
        annotations: str,
        images: str,
        split: str,
        *,
        repair: bool,
        decoding: Mapping[str, Any],
        masks: bool = False,
        keypoints: int = 0,
    ) -> None:
        self.root, self.decoding = Path(root).expanduser(), decoding
        self.path = self.root / filled("annotations", annotations, split)
        self.folder = filled("images", images, split)
        self.flaws = Flaws(str(self.path), repair)
        if not self.path.is_file():
            raise FileNotFoundError(
                f"there is no file of annotations {str(self.path)!r}. Name it by the option annotations, from root: "
                f"annotations: {'person_keypoints' if keypoints else 'instances'}_{{split}}.json."
            )
        self.builder = IndexBuilder(self.flaws, masks=masks, keypoints=keypoints)
        self.skipped = Skipped()
        self._rows: dict[int, int] = {}  # id of an image -> its place
        self._gone: set[int] = set()  # ids of images that were left out
        self._seen: set[str] = set()  # files of images, of those that several images name
        self._labels: dict[int, int] = {}  # id of a category -> class
        self._other: set[int] = set()  # ids of categories that are not read
        self._lists: dict[str, list[list[int]]] = {name: [] for name in _FEDERATED}

    def read(self, categories: Sequence[str] | None) -> tuple[ObjectIndex, tuple[str, ...]]:
        """Return the objects and the names of the classes.

        Args:
            categories: names of the classes to read, in this order; None: all.

        Raises:
            AnnotationError: the file is damaged, or an entry cannot be right.
            TypeError, ValueError: ``categories`` are not different names, or the file lacks one.
        """
        chosen = None if categories is None else names_of("categories", categories)
        with without_collection():
            content = self._parsed()
            classes = self.read_categories(content["categories"], chosen)
            self._read_images(content["images"])
            self._read_objects(content["annotations"])
            del content  # before the arrays are sorted, which takes memory
        return self.builder.build(), classes

    def place(self, image: Any) -> int | None:
        """Return the place of an image in the index by its number; None if the file does not list it."""
        return self._rows.get(image) if is_id(image) else None

    def label(self, category: Any) -> int | None:
        """Return the class of a category by its number; None if it is not read."""
        return self._labels.get(category) if is_id(category) else None

    def federated(self, count: int) -> dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Return the (first places, classes) of LVIS's lists by entry; empty if the file has none."""
        found = {}
        for name, lists in self._lists.items():
            if any(lists):
                starts = np.concatenate([[0], np.cumsum([len(one) for one in lists])]).astype(np.int64)
                found[name] = starts, np.array([label for one in lists for label in one], np.int64)
        return found

    def _parsed(self) -> dict[str, list[Any]]:
        """Return the three lists of the file."""
        name = self.flaws.file
        content = loaded(self.path, self._compacted)
        if not isinstance(content, dict):
            raise AnnotationError(
                f"{name} holds {kind_of(content)} where COCO's form has an object with the lists {', '.join(_LISTS)}."
            )
        for key in _LISTS:
            if not isinstance(content.get(key), list):
                what = f"{key} is {kind_of(content[key])}" if key in content else f"it has no {key}"
                raise AnnotationError(f"{name} is not in COCO's form: {what}, where a list is needed.")
        if not content["categories"] or not content["images"]:
            lacking = "categories" if not content["categories"] else "images"
            raise AnnotationError(f"{name} has no {lacking}: the list is empty.")
        return content

    def _compacted(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Replace the lists of an entry by arrays while the file is parsed: a third of the memory in all."""
        if self.builder.keypoints and "keypoints" in entry:
            entry["keypoints"] = compact_keypoints(entry["keypoints"])
        outline = entry.get("segmentation")
        if isinstance(outline, list):
            entry["segmentation"] = [compact(polygon) for polygon in outline] if self.builder.masks else None
        return entry

    def read_categories(self, entries: list[Any], chosen: Sequence[str] | None) -> tuple[str, ...]:
        """Set the class of each category's id and return the classes; categories are never repaired."""
        names: dict[int, str] = {}
        for place, entry in enumerate(entries):
            where = f"{self.flaws.file}: categories[{place}]"
            if not isinstance(entry, dict) or type(entry.get("id")) is not int or not _is_name(entry.get("name")):
                raise AnnotationError(f"{where} must have an integer id and a name; it is {brief(entry)}.")
            if entry["id"] in names or entry["name"] in names.values():
                raise AnnotationError(f"{where} has the id or the name of an earlier category: {brief(entry)}.")
            names[entry["id"]] = entry["name"]
        classes = chosen if chosen is not None else [names[identity] for identity in sorted(names)]
        for name in classes:
            if name not in names.values():
                near = _checks.did_you_mean(name, names.values())
                raise ValueError(f"categories: {self.flaws.file} has no category {name!r}.{near}")
        labels = {name: label for label, name in enumerate(classes)}
        self._labels = {identity: labels[name] for identity, name in names.items() if name in labels}
        self._other = set(names) - set(self._labels)
        return tuple(classes)

    def _read_images(self, entries: list[Any]) -> None:
        """Add the images whose files are there; if flaws are repaired, those whose files have the right size.

        They are sorted by their ids: pycocotools measures them in this order, on which equal scores depend.
        """
        names = [self._file_of(entry) if isinstance(entry, dict) else None for entry in entries]
        given = [name for name in names if name is not None]
        gone = missing_files(self.root, given)
        there = [name for name in given if name not in gone] if self.flaws.repair else []
        sizes = stored_sizes(self.root, there, self.decoding)
        repeated = {name for name, count in Counter(given).items() if count > 1}
        for place in sorted(range(len(entries)), key=lambda place: _id_of(entries[place])):
            self._read_image(place, entries[place], names[place], gone, sizes, repeated)

    def _read_image(
        self,
        place: int,
        entry: Any,
        name: str | None,
        gone: set[str],
        sizes: Mapping[str, tuple[int, int]],
        repeated: set[str],
    ) -> None:
        identity = entry.get("id") if isinstance(entry, dict) else None
        if not is_id(identity):
            what = f"must have an integer id; it is {brief(entry)}"
            self.flaws.report(f"images[{place}]", what, "images without an id")
            return
        where = f"image {identity}"
        if identity in self._rows or identity in self._gone:
            self.flaws.report(
                f"images[{place}]", f"has the id of an earlier image: {identity}", "images with a used id"
            )
            return
        self._gone.add(identity)  # until it is added
        if name is None:
            what = f"must have a file_name or coco_url; it is {brief(entry)}"
            self.flaws.report(where, what, "images without a file name")
            return
        height, width = entry.get("height"), entry.get("width")
        if not is_size(height, width):
            what = f"({name}) has no valid size: width {brief(width)}, height {brief(height)}"
            self.flaws.report(where, what, "images without a size")
            return
        if name in gone:
            what = f"has no file: {str(self.root / name)!r} is missing"
            self.flaws.report(where, what, "images without a file")
            return
        if sizes.get(name, (height, width)) != (height, width):
            self.flaws.report(where, f"has a file of another size: {sizes[name]}", "images of another size than stated")
            return
        if name in repeated:
            if name in self._seen:
                what = f"has the file of an earlier image: {str(self.root / name)!r}"
                self.flaws.report(where, what, "images with a used file")
                return
            self._seen.add(name)
        lists = {key: self._classes_of(where, entry, source) for key, source in _FEDERATED.items()}
        for key, found in lists.items():
            self._lists[key].append(found)
        self._gone.discard(identity)
        self._rows[identity] = self.builder.add_image(name, height, width, identity)

    def _file_of(self, entry: Mapping[str, Any]) -> str | None:
        """Return the path of an image from the root, or None; LVIS has only addresses."""
        name, address = entry.get("file_name"), entry.get("coco_url")
        if not _is_name(name):
            if not _is_name(address):
                return None
            name = "/".join(str(address).split("/")[-2:])
        return f"{self.folder}/{name}" if self.folder else str(name)

    def _classes_of(self, where: str, entry: Mapping[str, Any], key: str) -> list[int]:
        """Return one of LVIS's lists of categories as classes."""
        given = entry.get(key, [])
        if not isinstance(given, list) or not all(is_id(one) and self._knows(one) for one in given):
            what = f"has {key} that are not ids of categories: {brief(given)}"
            self.flaws.report(where, what, f"images with unknown {key}, ignored", mend="ignore it")
            return []
        return [self._labels[one] for one in given if one in self._labels]

    def _knows(self, category: int) -> bool:
        return category in self._labels or category in self._other

    def _read_objects(self, entries: list[Any]) -> None:
        """Add the objects of the images and classes that are read."""
        known: set[int] = set()
        for place, entry in enumerate(entries):
            identity = entry.get("id") if isinstance(entry, dict) else None
            if not is_id(identity):
                what = f"must have an integer id; it is {brief(entry)}"
                self.flaws.report(f"annotations[{place}]", what, "objects without an id")
            elif identity in known:
                what = f"has the id of an earlier one: {identity}"
                self.flaws.report(f"annotations[{place}]", what, "objects with a used id")
            else:
                known.add(identity)
                self._read_object(identity, entry)

    def _read_object(self, identity: int, entry: Mapping[str, Any]) -> None:
        image, category = entry.get("image_id"), entry.get("category_id")

        def where() -> str:
            return f"annotation {identity} of image {brief(image)}"

        row = self.place(image)
        if row is None:
            if not (is_id(image) and image in self._gone):
                self.flaws.report(where(), "is of an image that is not listed", "objects of unknown images")
            else:
                self.skipped.add("objects of images that are left out", where())
            return
        label = self.label(category)
        if label is None:
            if is_id(category) and category in self._other:
                self.skipped.add("objects of other categories", where())
            else:
                self.flaws.report(
                    where(), f"has an unknown category: {brief(category)}", "objects of unknown categories"
                )
            return
        box = edges_of(entry.get("bbox"))
        if box is None:
            what = f"has a bbox that is not four numbers: {brief(entry.get('bbox'))}"
            self.flaws.report(where(), what, "objects without a box of four numbers")
            return
        crowd = entry.get("iscrowd", 0)
        if crowd not in (0, 1):
            what = f"has an iscrowd that is neither 0 nor 1: {brief(crowd)}"
            self.flaws.report(where(), what, "objects with an unknown iscrowd")
            return
        area = entry.get("area")
        if area is not None and not (type(area) in (int, float) and 0 < area < 2**31):
            what = f"has an area that is not a number of pixels above 0: {brief(area)}"
            reason, mend = "areas that are not above 0, replaced by the box's", "take the box's"
            self.flaws.report(where(), what, reason, mend=mend)
            area = None
        outline = entry.get("segmentation")
        keypoints = entry.get("keypoints"), entry.get("num_keypoints")
        self.builder.add(
            row, where, box, label, identity, crowd=bool(crowd), area=area, outline=outline, keypoints=keypoints
        )


def loaded(path: Path, hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Return the content of a JSON file; raises AnnotationError if it is empty or incomplete.

    Args:
        path: the file.
        hook: replaces each object while the file is parsed.
    """
    content = path.read_bytes()
    if not content.strip():
        raise AnnotationError(f"{path} is empty. Download or write it again.")
    try:
        return json.loads(content.decode(json.detect_encoding(content)), object_hook=hook)
    except (ValueError, RecursionError) as error:  # ValueError: JSON's and Unicode's errors
        raise AnnotationError(
            f"{path} is not complete JSON: {error or type(error).__name__}. Download or write it again."
        ) from error


def edges_of(bbox: Any) -> Box | None:
    """Return COCO's (left, top, width, height) as edges, or None if it is of another form."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not {int, float}.issuperset(map(type, bbox)):
        return None
    try:
        left, top, width, height = map(float, bbox)
    except OverflowError:
        return None
    return left, top, left + width, top + height


def _id_of(entry: Any) -> float:
    """Return the id of an image as a key to sort by; entries without one come last."""
    identity = entry.get("id") if isinstance(entry, dict) else None
    return identity if is_id(identity) else math.inf


def is_id(value: Any) -> TypeGuard[int]:
    """Return whether a value can be the number of an entry."""
    return type(value) is int and -(2**63) <= value < 2**63


def _is_name(value: Any) -> bool:
    if not isinstance(value, str) or not value or "\0" in value:
        return False
    try:
        return bool(value.encode())
    except UnicodeEncodeError:  # a half of a pair of surrogates
        return False


def kind_of(value: Any) -> str:
    """Return the kind of a JSON value in words."""
    return {dict: "an object", list: "a list", str: "a text", type(None): "null"}.get(type(value), "a number")
