"""Collect the objects of a set's images in arrays, and check each entry of an annotation file.

Arrays, because a million Python objects take a gigabyte, and workers would slowly copy it: reading an object changes
its reference count, which writes to its page of memory.
"""

from __future__ import annotations

import math
import os
import reprlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from widefield import _checks
from widefield.data.decoding import read_size
from widefield.data.listing import Skipped
from widefield.data.object_masks import NONE, POLYGONS, RUNS, Outlines, fifths, runs

Box = tuple[float, float, float, float]
"""The edges (left, top, right, bottom) in pixels."""
Part = Sequence[int] | NDArray[np.int32]
"""A polygon in fifths of a pixel, or lengths of runs."""
Entry = Callable[[], str]
"""Gives the name of an entry for messages, such as ``annotation 7 of image 3``; called only if it is needed."""

_SLACK = 1.0  # pixels that a box may pass the border by, as boxes do that count pixels from 0 or 1, or are rounded
_MOST_PIXELS = 2**31
_READERS = 8  # threads that open image files; they wait for the disk
_FARTHEST = 1e8  # pixels of a polygon's corner from the origin
_EMPTY = "has a mask without a pixel in its image"
_LEAST_POLYGON = 6  # coordinates
_VISIBILITIES = {0, 1, 2}
_NOWHERE = array("d", [0, 0, 0])
_UNLABELED = "take it as unlabeled"


class AnnotationError(ValueError):
    """A damaged file of annotations, or an entry that cannot be right; the message names the file and the entry."""


@dataclass
class Flaws:
    """What is wrong with the entries of a file: refused, or repaired and counted.

    Attributes:
        file: name of the file, for messages.
        repair: count the flaws, and leave out or mend the entries, instead of raising an error.
        found: the repaired ones.
    """

    file: str
    repair: bool = False
    found: Skipped = field(default_factory=Skipped)

    def __post_init__(self) -> None:
        _checks.boolean("repair", self.repair)

    def report(self, entry: str, what: str, reason: str, *, mend: str = "leave it out") -> None:
        """Count a flaw, or raise AnnotationError.

        Args:
            entry: name of the entry.
            what: what is wrong, with the value, as the predicate of a sentence.
            reason: the kind of flaw, in the plural, for counting.
            mend: what a repair does.
        """
        if not self.repair:
            raise AnnotationError(f"{self.file}: {entry} {what}. Correct it, or set repair: true to {mend}.")
        self.found.add(reason, entry)


@dataclass(frozen=True)
class ObjectIndex:
    """The objects of N images, in the order of the images; M objects in all."""

    names: NDArray[np.bytes_]
    """Paths of the image files below the set's root, encoded as by ``os.fsencode``, (N,)."""
    ids: NDArray[np.int64]
    """Numbers of the images in the file of annotations, or their places, (N,)."""
    sizes: NDArray[np.int32]
    """(height, width) of each image file, (N, 2)."""
    starts: NDArray[np.int64]
    """The first object of each image, and the number of objects, (N + 1,)."""
    boxes: NDArray[np.float32]
    """(left, top, right, bottom) in pixels of the file, (M, 4)."""
    labels: NDArray[np.int32]
    """(M,)."""
    crowd: NDArray[np.bool_]
    """(M,)."""
    areas: NDArray[np.float32]
    """(M,)."""
    object_ids: NDArray[np.int64]
    """Numbers of the objects in the file of annotations, or their places in their image, (M,)."""
    outlines: Outlines | None
    """None if masks are not read."""
    keypoints: NDArray[np.float32] | None = None
    """(x, y, visibility) of the key points, in pixel indices of the file, (M, K, 3); None if they are not read."""

    def __len__(self) -> int:
        return len(self.names)

    @property
    def counts(self) -> NDArray[np.int64]:
        """Return the number of objects in each image, (N,)."""
        return np.diff(self.starts)


class IndexBuilder:
    """Collects images and their objects, checks them, and makes an `ObjectIndex`.

    Args:
        flaws: takes what is wrong.
        masks: objects must have a mask.
        keypoints: number of key points of an object; 0: they are not read.
    """

    def __init__(self, flaws: Flaws, *, masks: bool, keypoints: int = 0) -> None:
        self.flaws, self.masks, self.keypoints = flaws, masks, keypoints
        self.sizes: list[tuple[int, int]] = []
        self._names: list[bytes] = []
        self._ids = array("q")
        self._images, self._labels, self._object_ids = array("i"), array("i"), array("q")
        self._boxes, self._areas = array("f"), array("f")
        self._crowd, self._kinds, self._points = array("b"), array("B"), array("f")
        self._parts, self._starts, self._values = array("q", [0]), array("q", [0]), array("i")

    def add_image(self, name: str, height: int, width: int, identity: int) -> int:
        """Append an image and return its place."""
        self._names.append(os.fsencode(name))
        self.sizes.append((height, width))
        self._ids.append(identity)
        return len(self._names) - 1

    def add(
        self,
        image: int,
        entry: Entry,
        box: Box,
        label: int,
        identity: int,
        *,
        crowd: bool = False,
        area: float | None = None,
        outline: Any = None,
        keypoints: tuple[Any, Any] = (None, None),
    ) -> None:
        """Append an object, or report why it cannot be right.

        Args:
            image: place of its image.
            entry: its name in messages.
            box: in pixels of the file.
            label: its class.
            identity: its number in the file of annotations, or its place in the image.
            crowd: whether it is a crowd region.
            area: in pixels; None: that of the box.
            outline: COCO's segmentation: a list of polygons, or run lengths. Needed if the set has masks.
            keypoints: COCO's ``keypoints`` and ``num_keypoints``; None: the object has none, or their number is not
                stated.

        Raises:
            AnnotationError: the box, the mask or a key point cannot be right, and flaws are not repaired.
        """
        height, width = self.sizes[image]
        checked = self._checked_box(entry, box, height, width)
        if checked is None:
            return
        kind: int = NONE
        parts: Sequence[Part] = ()
        if self.masks:
            kind, parts = self._checked_outline(entry, outline, height, width)
            if not parts:
                return
        if self.keypoints:
            self._points.extend(array("f", self._checked_keypoints(entry, *keypoints)))
        self._images.append(image)
        self._boxes.extend(checked)
        self._labels.append(label)
        self._crowd.append(crowd)
        self._object_ids.append(identity)
        left, top, right, bottom = checked
        self._areas.append((right - left) * (bottom - top) if area is None else area)
        self._kinds.append(kind)
        for part in parts:
            self._values.extend(part)
            self._starts.append(len(self._values))
        self._parts.append(len(self._starts) - 1)

    def _checked_box(self, entry: Entry, box: Box, height: int, width: int) -> Box | None:
        """Return the box, mended if need be, or None to leave the object out."""
        left, top, right, bottom = box
        if not all(map(math.isfinite, box)):
            self.flaws.report(entry(), f"has a box that is not finite: {_shown(box)}", "objects with NaN in their box")
            return None
        if not (right > left and bottom > top):
            found = f"{right - left:g} x {bottom - top:g} pixels"
            self.flaws.report(entry(), f"has a box without area: {found}", "objects with a box without area")
            return None
        if left >= -_SLACK and top >= -_SLACK and right <= width + _SLACK and bottom <= height + _SLACK:
            return box
        what = f"has a box outside the image: {_shown(box)} in an image of {width} x {height} pixels"
        clipped = max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height))
        if clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
            self.flaws.report(entry(), what, "objects outside their image")
            return None
        self.flaws.report(entry(), what, "boxes that leave their image, clipped", mend="clip it")
        return clipped

    def _checked_outline(self, entry: Entry, outline: Any, height: int, width: int) -> tuple[int, Sequence[Part]]:
        """Return how the mask is stored, and its parts; without parts the object is left out."""
        if isinstance(outline, dict):
            try:
                lengths = runs(outline, height, width)
            except ValueError as error:
                self.flaws.report(entry(), f"has a mask that is damaged: {error}", "objects with damaged run lengths")
                return NONE, []
            if any(lengths[1::2]):
                return RUNS, [lengths]
            self.flaws.report(entry(), _EMPTY, "objects with an empty mask")
            return NONE, []
        if not isinstance(outline, list) or not outline:
            what = f"has no mask: its segmentation is {brief(outline)}"
            self.flaws.report(entry(), f"{what}. Set masks: false for boxes only", "objects without a mask")
            return NONE, []
        parts: list[Part] = []
        empty = True
        for number, polygon in enumerate(outline):
            part = compact(polygon)
            if isinstance(part, array):
                parts.append(part)
                empty = empty and _is_empty(part, height, width)
            else:
                wrong = _wrong_polygon(polygon)
                self.flaws.report(entry(), f"has a polygon (number {number}) {wrong}", "damaged polygons")
        if parts and empty:
            self.flaws.report(entry(), _EMPTY, "objects with an empty mask")
            return NONE, []
        return POLYGONS, parts

    def _checked_keypoints(self, entry: Entry, values: Any, stated: Any) -> Sequence[float]:
        """Return x, y and visibility of each key point in turn."""
        nothing = [0.0] * (3 * self.keypoints)
        if values is None:
            values = nothing
        points = compact_keypoints(values)
        if not isinstance(points, array) or len(points) != len(nothing):
            found = f"{len(points)} of them" if isinstance(points, array) else brief(values)
            what = f"has keypoints that are not 3 x {self.keypoints} numbers: {found}"
            self.flaws.report(entry(), what, "objects with damaged key points, taken as unlabeled", mend=_UNLABELED)
            return nothing
        sound = _VISIBILITIES.issuperset(points[2::3]) and all(abs(value) < _FARTHEST for value in points)
        if not sound:
            self._mend_keypoints(entry, points)
        labeled = sum(visibility > 0 for visibility in points[2::3])
        if sound and stated is not None and (type(stated) is not int or stated != labeled):
            what = f"has a num_keypoints of {brief(stated)}, but {labeled} labeled key points"
            self.flaws.report(entry(), what, "wrong numbers of key points, counted anew", mend="count them")
        return points

    def _mend_keypoints(self, entry: Entry, points: array[float]) -> None:
        """Report the key points that cannot be right, and take their labels away."""
        for place in range(0, len(points), 3):
            x, y, visibility = points[place : place + 3]
            if visibility not in _VISIBILITIES:
                what = f"has a key point (number {place // 3}) with a visibility that is not 0, 1 or 2: {visibility:g}"
                reason = "key points of unknown visibility, taken as unlabeled"
            elif not (abs(x) < _FARTHEST and abs(y) < _FARTHEST):  # NaN is not
                what = f"has a key point (number {place // 3}) that is not at a number of pixels: ({x:g}, {y:g})"
                reason = "key points that are not numbers of pixels, taken as unlabeled"
            else:
                continue
            self.flaws.report(entry(), what, reason, mend=_UNLABELED)
            points[place : place + 3] = _NOWHERE

    def build(self) -> ObjectIndex:
        """Return the index: objects sorted by image, otherwise in the order in which they were added."""
        images = np.frombuffer(self._images, np.int32) if self._images else np.zeros(0, np.int32)
        order = np.argsort(images, kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(images, minlength=len(self._names)))])

        def column(values: Any, kind: Any) -> NDArray[Any]:
            return np.array(values, dtype=kind)[order]

        return ObjectIndex(
            names=np.array(self._names, np.bytes_),
            ids=np.array(self._ids, np.int64),
            sizes=np.array(self.sizes, np.int32).reshape(-1, 2),
            starts=starts.astype(np.int64),
            boxes=np.array(self._boxes, np.float32).reshape(-1, 4)[order],
            labels=column(self._labels, np.int32),
            crowd=column(self._crowd, np.bool_),
            areas=column(self._areas, np.float32),
            object_ids=column(self._object_ids, np.int64),
            outlines=self._outlines(order) if self.masks else None,
            keypoints=self._keypoints(order) if self.keypoints else None,
        )

    def _keypoints(self, order: NDArray[np.int64]) -> NDArray[np.float32]:
        points = np.array(self._points, np.float32).reshape(-1, self.keypoints, 3)[order]
        points[points[..., 2] == 0] = 0
        return points

    def _outlines(self, order: NDArray[np.int64]) -> Outlines:
        parts, starts = np.array(self._parts, np.int64), np.array(self._starts, np.int64)
        values = np.array(self._values, np.int32)
        part_order = _ranges(parts[:-1][order], parts[1:][order])
        lengths = np.diff(starts)[part_order]
        return Outlines(
            kinds=np.array(self._kinds, np.uint8)[order],
            parts=np.concatenate([[0], np.cumsum(np.diff(parts)[order])]).astype(np.int64),
            starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            values=values[_ranges(starts[:-1][part_order], starts[1:][part_order])],
        )


def _ranges(starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the integers from each start to before its end, one range after the other."""
    lengths = ends - starts
    offsets = np.cumsum(lengths) - lengths
    places: NDArray[np.int64] = np.arange(int(lengths.sum())) + np.repeat(starts - offsets, lengths)
    return places


def compact(polygon: Any) -> Any:
    """Return a polygon, a list of coordinates in pixels, as an array of fifths of a pixel; others as they are."""
    return array("i", fifths(polygon)) if isinstance(polygon, list) and _wrong_polygon(polygon) is None else polygon


def compact_keypoints(values: Any) -> Any:
    """Return a list of numbers as an array of floats; others as they are."""
    if not isinstance(values, list) or not {int, float}.issuperset(map(type, values)):
        return values
    try:
        return array("d", values)
    except OverflowError:
        return values


def _wrong_polygon(polygon: Any) -> str | None:
    """Return what is wrong with a polygon, or None."""
    if not isinstance(polygon, list) or not {int, float}.issuperset(map(type, polygon)):
        return f"that is not a list of numbers: {brief(polygon)}"
    if len(polygon) % 2:
        return f"with an odd number of coordinates: {len(polygon)}"
    if len(polygon) < _LEAST_POLYGON:
        return f"with {len(polygon) // 2} points, where at least 3 are needed"
    if not all(abs(value) < _FARTHEST for value in polygon):  # NaN is not
        return f"with a coordinate that is not a number of pixels: {brief(polygon)}"
    return None


def _is_empty(corners: array[int], height: int, width: int) -> bool:
    """Return whether a polygon, in fifths of a pixel, has no pixel in an image: it is outside, or lines only."""
    x, y = corners[0::2], corners[1::2]
    if max(x) <= 0 or max(y) <= 0 or min(x) >= 5 * width or min(y) >= 5 * height:
        return True
    triangles = range(2, len(x))  # those of a fan from the first point
    return all((x[i] - x[0]) * (y[i - 1] - y[0]) == (y[i] - y[0]) * (x[i - 1] - x[0]) for i in triangles)


def is_size(height: Any, width: Any) -> bool:
    """Return whether two values can be the sides of an image in pixels."""
    return all(type(side) is int and side > 0 for side in (height, width)) and height * width < _MOST_PIXELS


def missing_files(root: Path, names: Sequence[str]) -> set[str]:
    """Return those of the paths below ``root`` that are not there; each folder is listed once."""
    there: dict[str, set[str]] = {}
    gone = set()
    for name in names:
        folder, file = os.path.split(name)
        if folder not in there:
            place = root / folder
            there[folder] = set(os.listdir(place)) if place.is_dir() else set()  # noqa: PTH208 (names only)
        if file not in there[folder]:
            gone.add(name)
    return gone


def _shown(box: Box) -> str:
    return "({})".format(", ".join(f"{value:g}" for value in box))


def stored_sizes(root: Path, names: Sequence[str], decoding: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Return (height, width) of image files by name, from their headers; those that cannot be read are left out.

    Args:
        root: their folder.
        names: paths below it.
        decoding: options of `widefield.data.decoding.read_size`.
    """

    def size(name: str) -> tuple[int, int] | None:
        try:
            return read_size(root / name, **decoding)
        except OSError:
            return None  # reported when the image is read

    with ThreadPoolExecutor(_READERS) as pool:
        return {name: found for name, found in zip(names, pool.map(size, names), strict=True) if found is not None}


def brief(value: Any) -> str:
    """Return a value for a message, shortened if it is long or deep."""
    return reprlib.repr(value)
