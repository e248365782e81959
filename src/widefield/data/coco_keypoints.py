"""Read key points in COCO's form (Lin et al. 2014), and the boxes that a detector found in the same images."""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from widefield import _checks
from widefield.data.base import Sample
from widefield.data.coco import CocoReader, edges_of, is_id, kind_of, loaded, without_collection
from widefield.data.corrupt import CorruptFiles
from widefield.data.decoding import CorruptImageError, decoding_options, read
from widefield.data.object_files import check_size, filled
from widefield.data.object_index import AnnotationError, Box, Flaws, ObjectIndex, brief
from widefield.data.poses import BoxList, PoseSet
from widefield.data.skeleton import Skeleton

_FARTHEST = 1e8  # pixels of an edge of a box from the origin
_HIGHEST = 1e8  # score of a box


class CocoKeypoints(PoseSet):
    """People, or things of any kind, with key points from a file in COCO's form.

    The defaults are COCO 2017's layout: ``root/annotations/person_keypoints_{split}2017.json`` and
    ``root/{split}2017/*.jpg``. Any other file of this form is read by naming it, together with its skeleton.

    Samples: those of `PoseSet`, and with ``names`` the image's ``name``, str: its path below ``root``. True boxes are
    cut off at the centers of the image's last pixels, as in mmpose. Key points outside the image are kept.

    Args:
        split: ``"train"`` or ``"val"``.
        root: the folder that holds the files.
        annotations: path of the file of annotations, from ``root``; ``{split}`` is the name of the split.
        images: folder of the images, from ``root``. The files' ``file_name`` are paths in it.
        train, val: names of the splits.
        skeleton: ``"coco"``, ``"scenes"``, or the path of a YAML file; see `Skeleton.load`. The names of its key points
            must be those of the file's categories, if these have names.
        categories: names of the categories to read, in the order of their labels. None: all that have key points, in
            the order of their ids.
        boxes: val: path, from ``root``, of a file of boxes that a detector found, in COCO's form of results. None: true
            boxes.
        min_score: val: leave out boxes of ``boxes`` with a lower score.
        repair: leave out or mend entries that cannot be right, and images whose file is missing or has another size,
            instead of raising an error. `found` counts them. Damaged key points lose their label.
        names: give each sample its ``name``.
        corrupt, max_corrupt, exif_orientation, max_pixels: as of `widefield.data.ObjectFiles`.
        options: those of `PoseSet`, such as ``crop_size``, ``udp`` and ``augment``.

    Raises:
        FileNotFoundError: the file of annotations, of boxes or of the skeleton is missing.
        AnnotationError: a file is damaged, or an entry cannot be right: as of `widefield.data.Coco`, or it has another
            number of key points than the skeleton, a visibility that is not 0, 1 or 2, or a ``num_keypoints`` that is
            not the number of labeled ones. The message names the file and the entry.
        ValueError, TypeError: an argument is out of range, unknown, or of the wrong type.
    """

    needs: ClassVar[dict[str, str]] = {"root": "the folder that holds the images and the annotations"}

    def __init__(
        self,
        split: str,
        *,
        root: str | Path,
        annotations: str = "annotations/person_keypoints_{split}2017.json",
        images: str = "{split}2017",
        train: str = "train",
        val: str = "val",
        skeleton: str | Path | Skeleton = "coco",
        categories: Sequence[str] | None = None,
        boxes: str | None = None,
        min_score: float = 0.0,
        repair: bool = False,
        names: bool = False,
        corrupt: str = "refuse",
        max_corrupt: float = 0.01,
        exif_orientation: bool = True,
        max_pixels: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(split, **options)
        self.names = bool(names)
        self._corrupt = CorruptFiles(corrupt, max_corrupt)
        self.decoding = decoding_options(exif_orientation, max_pixels)
        least = _checks.number("min_score", min_score, maximum=1)
        part = {"train": train, "val": val}[split]
        shape = Skeleton.load(skeleton)
        reader = _Reader(shape, root, annotations, images, part, repair=repair, decoding=self.decoding)
        index, classes = reader.read(categories)
        detected = None
        repaired = [reader.flaws.found]
        if boxes is not None and (file := reader.root / filled("boxes", boxes, part)) and split == "val":
            flaws = Flaws(str(file), repair)
            detected = _detected(file, reader, index, least, flaws)
            repaired.append(flaws.found)
        self.repaired = [one for one in repaired if one]
        self._hold(index, classes, reader.skeleton, place=str(reader.root), found=detected, skipped=reader.skipped)
        self.boxes = _cut(self.boxes, index)
        self._corrupt.expect(len(index), split)
        self._last: tuple[int, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_last": None}

    def found(self) -> str:
        """Return one line: people, images and key points of the split, what was left out, and what was repaired."""
        repaired = ", ".join(map(str, self.repaired))
        return f"{super().found()}{repaired and f'; repaired: {repaired}'}"

    def pixels(self, file: int) -> Tensor | None:
        """Return the image of a file, uint8 (3, H, W), or None for a corrupt one under ``corrupt="skip"``.

        Raises:
            OSError: the file cannot be opened or read or, under ``corrupt="refuse"``, is corrupt; the message names it.
            CorruptImagesError: more files are corrupt than ``max_corrupt`` allows; the message lists them.
            AnnotationError: the image has another size than the annotations say.
            MemoryError: the image does not fit into memory.
        """
        from torchvision.transforms.functional import pil_to_tensor

        if self._last is not None and self._last[0] == file:  # people of one image follow each other in val
            return self._last[1]
        try:
            picture = read(self._path(file), **self.decoding)
        except CorruptImageError as error:
            self._corrupt.report(file, error, self._path)
            return None
        check_size(picture, self.index, file, self.place, self.decoding)
        image: Tensor = pil_to_tensor(picture)
        self._last = file, image
        return image

    def _path(self, file: int) -> str:
        return str(Path(self.place, os.fsdecode(self.index.names[file])))

    def sample(self, index: int) -> Sample | None:
        """Return sample ``index``, or None if its image is left out; raises the errors of `pixels`."""
        sample = super().sample(index)
        if sample is not None and self.names:
            sample["name"] = os.fsdecode(self.index.names[self.boxes.files[index]])
        return sample


class _Reader(CocoReader):
    """Reads a file of key points; its other arguments are those of `CocoReader`."""

    def __init__(self, skeleton: Skeleton, *place: Any, **options: Any) -> None:
        super().__init__(*place, keypoints=len(skeleton), **options)
        self.skeleton = skeleton

    def read_categories(self, entries: list[Any], chosen: Sequence[str] | None) -> tuple[str, ...]:
        """Set the class of each category's id and return the classes: by default, all that have key points."""
        classes = super().read_categories(entries, chosen)
        described = {entry["name"]: entry for entry in entries if isinstance(entry.get("keypoints"), list)}
        if chosen is None and described:
            classes = super().read_categories(entries, [name for name in classes if name in described])
        for name in classes:
            if name in described:
                self._check_names(name, described[name]["keypoints"])
        return classes

    def _check_names(self, category: str, names: list[Any]) -> None:
        if list(map(_plain, names)) == list(map(_plain, self.skeleton.names)):
            return
        raise AnnotationError(
            f"{self.flaws.file}: the category {category!r} has the {len(names)} key points {brief(names)}, and the "
            f"skeleton has the {len(self.skeleton)} key points {brief(list(self.skeleton.names))}. Describe those of "
            f"the file in a YAML file, in the same order, and name it by the option skeleton."
        )


def _plain(name: Any) -> str:
    return str(name).lower().replace(" ", "_").replace("-", "_")


def _detected(path: Path, reader: CocoReader, index: ObjectIndex, least: float, flaws: Flaws) -> BoxList:
    """Return the boxes in a file of results, by image, otherwise in the order of the file.

    Args:
        path: the file: a list of entries with ``image_id``, ``category_id``, ``bbox`` and ``score``.
        reader: has read the file of annotations.
        index: its images.
        least: boxes with a lower score are left out.
        flaws: takes what is wrong.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of boxes {str(path)!r}. Name it by the option boxes, from root.")
    with without_collection():
        entries = loaded(path)
    if not isinstance(entries, list):
        raise AnnotationError(f"{path} holds {kind_of(entries)} where COCO's form of results has a list of boxes.")
    places, labels, boxes, scores = array("q"), array("q"), array("f"), array("f")
    for place, entry in enumerate(entries):
        target = _target_of(place, entry, reader, flaws)
        if target is None:
            continue
        file, label = target
        height, width = index.sizes[file].tolist()
        where = f"box {place} of image {entry['image_id']}"
        box, score = edges_of(entry.get("bbox")), entry.get("score")
        if box is None or not _is_seen(box, height, width):
            what = f"has a bbox without area in its image of {width} x {height} pixels: {brief(entry.get('bbox'))}"
            flaws.report(where, what, "boxes without area in their image")
        elif type(score) not in (int, float) or not abs(score) < _HIGHEST:
            flaws.report(where, f"has a score that is not a number: {brief(score)}", "boxes without a score")
        elif score < least:
            reader.skipped.add("boxes below min_score", where)
        else:
            places.append(file)
            labels.append(label)
            boxes.extend(box)
            scores.append(score)
    if not places:
        why = ", ".join(str(one) for one in (reader.skipped, flaws.found) if one)
        raise AnnotationError(f"{path} has no box in the images of the set.{why and f' Left out: {why}.'}")
    files = np.array(places, np.int64)
    order = np.argsort(files, kind="stable")
    edges = np.array(boxes, np.float32).reshape(-1, 4)[order]
    return BoxList(
        files=files[order],
        boxes=edges,
        scores=np.array(scores, np.float32)[order],
        labels=np.array(labels, np.int64)[order],
        areas=(edges[:, 2] - edges[:, 0]) * (edges[:, 3] - edges[:, 1]),
        people=np.full(len(files), -1, np.int64),
    )


def _target_of(place: int, entry: Any, reader: CocoReader, flaws: Flaws) -> tuple[int, int] | None:
    """Return the place of a box's image in the index, and its class; None if one of them is not read."""
    image, category = (entry.get(key) if isinstance(entry, dict) else None for key in ("image_id", "category_id"))
    if not is_id(image) or not is_id(category):
        what = f"must have an integer image_id and category_id; it is {brief(entry)}"
        flaws.report(f"box {place}", what, "boxes without an image or a category")
        return None
    file, label = reader.place(image), reader.label(category)
    if file is None:
        reader.skipped.add("boxes of other images", f"box {place} of image {image}")
    elif label is None:
        reader.skipped.add("boxes of other categories", f"box {place} of image {image}")
    else:
        return file, label
    return None


def _is_seen(box: Box, height: int, width: int) -> bool:
    """Return whether a box is finite and has area inside an image; a detector's boxes may leave the image."""
    left, top, right, bottom = box
    inside = left < width and top < height and right > 0 and bottom > 0
    return all(abs(edge) < _FARTHEST for edge in box) and left < right and top < bottom and inside


def _cut(boxes: BoxList, index: ObjectIndex) -> BoxList:
    """Return true boxes cut off at the centers of the first and last pixels, unless nothing would remain."""
    last = np.tile(index.sizes[boxes.files][:, ::-1] - 1, 2).astype(np.float32)
    cut = np.clip(boxes.boxes, 0, last)
    kept = (boxes.people >= 0) & (cut[:, 2] > cut[:, 0]) & (cut[:, 3] > cut[:, 1])
    return replace(boxes, boxes=np.where(kept[:, None], cut, boxes.boxes))
