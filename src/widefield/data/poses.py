"""Provide the base class of sets for top-down pose estimation: one crop for each person, with its key points."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from widefield import _checks
from widefield.data import crops, transforms
from widefield.data.base import Sample, SampleSet, normalize
from widefield.data.listing import Skipped, counted
from widefield.data.object_index import AnnotationError, ObjectIndex
from widefield.data.pose_augmentation import CropSampler
from widefield.data.skeleton import Skeleton
from widefield.data.transforms import IMAGENET_MEAN, IMAGENET_STD, PoseAugmentation

_POSES = 0x706F7365  # separates the crops' random streams from others of the same key


@dataclass(frozen=True)
class BoxList:
    """Boxes to estimate poses in, N in all, in the order of their files."""

    files: NDArray[np.int64]
    """Place of each box's file in the index, (N,)."""
    boxes: NDArray[np.float32]
    """(left, top, right, bottom) in pixels of the file, (N, 4)."""
    scores: NDArray[np.float32]
    """From 0 to 1; 1 for true boxes; NaN where the box stands for a file without boxes, (N,)."""
    labels: NDArray[np.int64]
    """(N,)."""
    areas: NDArray[np.float32]
    """In pixels of the file, (N,)."""
    people: NDArray[np.int64]
    """Place in the index of the person of a true box; -1 for others, (N,)."""


class PoseSet(SampleSet):
    """People, or things of any kind, in crops of one size; a subclass defines `pixels` and calls ``_hold``.

    Points are in pixel indices: the center of the top left pixel is (0, 0), as published code reads COCO's key points.
    Boxes are edges in continuous pixels, as in `widefield.data.DetectionSet`.

    Samples, for K key points:

    - ``image`` float32 (3, H, W): the crop, normalized by ``mean`` and ``std``.
    - ``keypoints`` float32 (K, 3): x and y in pixels of the crop, and the visibility: 0 without a label (then x and y
      are 0), 1 covered, 2 visible. A key point may be outside the crop.
    - ``affine`` float64 (2, 3): the matrix from pixels of the file to pixels of the crop. It mirrors in flipped crops.
    - ``label`` int64 (): an index into ``classes``.
    - ``box`` float32 (4,): the box in pixels of the file. ``box_score`` float32 (): 1 for true boxes, or the detector's
      score. NaN: the detector has no box in a file with people; the sample only brings ``people``.
    - ``area`` float32 (): of the person, or of a detector's box, in pixels of the file.
    - ``truth`` float32 (K, 3): the person's key points in pixels of the file; 0 for a detector's boxes.
    - ``image_id`` int64 (): place of the file among the set's files. ``size`` int64 (2,): its (height, width).
    - any further entries of the set.

    Val samples also have all people of their file, in the first sample of each file; M is 0 in the others, so that a
    metric sees every person once:

    - ``people`` float32 (M, K, 3), ``people_boxes`` float32 (M, 4), ``people_area`` float32 (M,), ``people_labels``
      int64 (M,).
    - ``people_crowd`` bool (M,): crowd regions.

    Train crops are of people with a labeled key point, without crowd regions, and are augmented. With true boxes, val
    crops are of the same kind.

    Args:
        split: ``"train"`` or ``"val"``.
        crop_size: (height, width) of the crops in pixels, or the side of a square.
        padding: factor on the sides of a box.
        udp: align the centers of the corner pixels; for models trained with this convention. See
            `widefield.data.crops`.
        augment: False: train crops are like those of val.
        seed: seed of the augmentation.
        mean: mean of each of the 3 channels for pixels in [0, 1].
        std: standard deviation of each of the 3 channels.
        augmentation: the arguments of `widefield.data.transforms.PoseAugmentation`, such as ``rotate_factor``.

    Attributes:
        skeleton: the key points.
        index: the people of all files.
        boxes: those of the samples.

    Raises:
        ValueError: an argument is out of range.
        TypeError: an argument is of the wrong type.
    """

    further = tuple(option.name for option in fields(PoseAugmentation))
    skeleton: Skeleton
    index: ObjectIndex
    boxes: BoxList

    def __init__(
        self,
        split: str,
        *,
        crop_size: int | Sequence[int] = (256, 192),
        padding: float = crops.PADDING,
        udp: bool = False,
        augment: bool = True,
        seed: int = 0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        **augmentation: Any,
    ) -> None:
        super().__init__(split, seed)
        self.crop_size = _checks.pair("crop_size", crop_size, minimum=2)
        self.padding = _checks.number("padding", padding)
        if not self.padding:
            raise ValueError("padding must be above 0; got 0. Published results use 1.25.")
        self.udp = _checks.boolean("udp", udp)
        self.mean, self.std = transforms.statistics(mean, std)
        _checks.known_arguments(type(self).__name__, augmentation, self.further)
        self._augmentation = PoseAugmentation(**augmentation)  # its options are checked in both splits
        self._augments = _checks.boolean("augment", augment) and split == "train"

    @abstractmethod
    def pixels(self, file: int) -> Tensor | None:
        """Return the image of a file as it is stored, uint8 (3, H, W), or None to leave out its samples.

        Args:
            file: its place among the set's files, as in ``image_id``.
        """

    def _hold(
        self,
        index: ObjectIndex,
        classes: Sequence[str],
        skeleton: Skeleton,
        *,
        place: str = "",
        found: BoxList | None = None,
        skipped: Skipped | None = None,
    ) -> None:
        """Store the subclass's people, and choose the boxes of the split.

        Args:
            index: people with key points.
            classes: names of the labels.
            skeleton: of the key points.
            place: of the files, for messages.
            found: a detector's boxes, sorted by file, in place of the true ones.
            skipped: what was left out so far.

        Raises:
            AnnotationError: there are no samples.
            ValueError: the index has no key points.
        """
        if index.keypoints is None:
            raise ValueError("a PoseSet needs an index with key points; its keypoints are None.")
        self.classes, self.skeleton, self.place, self.index = tuple(classes), skeleton, place, index
        self._keypoints = index.keypoints
        self._ignored = index.crowd | ~(self._keypoints[..., 2] > 0).any(1)
        self.skipped = skipped or Skipped()
        self.boxes = self._true_boxes() if found is None else self._with_empty(found)
        if not len(self):
            where = f" in {place}" if place else ""
            raise AnnotationError(
                f"the {self.split} split{where} has no people with a labeled key point.{self.skipped.sentence()}"
            )
        self._sampler = CropSampler(self._augmentation, skeleton, self.crop_size, self.padding, udp=self.udp)

    def _true_boxes(self) -> BoxList:
        """Return the boxes of the people with a labeled key point, without crowd regions."""
        index = self.index
        files = np.repeat(np.arange(len(index)), index.counts)
        rest = ~index.crowd
        for reason, left_out in (
            ("crowd regions", index.crowd),
            ("without a labeled key point", rest & self._ignored),
            ("without area", ~self._ignored & (index.areas <= 0)),
        ):
            if left_out.any():
                row = int(left_out.argmax())
                name = f"{index.object_ids[row]} of image {index.ids[files[row]]}"
                self.skipped.reasons[reason] = int(left_out.sum()), name
        rows = np.flatnonzero(~self._ignored & (index.areas > 0))
        return BoxList(
            files=files[rows],
            boxes=index.boxes[rows],
            scores=np.ones(len(rows), np.float32),
            labels=index.labels[rows].astype(np.int64),
            areas=index.areas[rows],
            people=rows,
        )

    def _with_empty(self, found: BoxList) -> BoxList:
        """Return a detector's boxes, and one without a score for each file that has people and no box."""
        index = self.index
        files = np.repeat(np.arange(len(index)), index.counts)
        lacking = np.setdiff1d(files[~self._ignored], found.files)
        count = len(lacking)
        whole = np.zeros((count, 4), np.float32)
        whole[:, 2:] = index.sizes[lacking][:, ::-1]
        added = BoxList(
            files=lacking,
            boxes=whole,
            scores=np.full(count, np.nan, np.float32),
            labels=np.zeros(count, np.int64),
            areas=whole[:, 2] * whole[:, 3],
            people=np.full(count, -1, np.int64),
        )
        order = np.argsort(np.concatenate([found.files, added.files]), kind="stable")
        joined = {
            field.name: np.concatenate([getattr(found, field.name), getattr(added, field.name)])[order]
            for field in fields(BoxList)
        }
        return BoxList(**joined)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return (C, H, W) of the crops."""
        return len(self.mean), *self.crop_size

    def found(self) -> str:
        """Return one line: people, images, key points and classes of the split, and what was left out and why."""
        one, many = ("person", "people") if self.classes == ("person",) else ("object", "objects")
        where = f" in {self.place}" if self.place else ""
        boxes = int((self.boxes.people >= 0).sum())
        held = np.isfinite(self.boxes.scores)  # the others stand for files without boxes
        given = counted(boxes, one, many) if boxes else f"{counted(int(held.sum()), 'box', 'boxes')} of a detector"
        files = counted(len(np.unique(self.boxes.files[held])), "image")
        return (
            f"{self.split}: {given} in {files}{where}, {counted(len(self.skeleton), 'key point')}, "
            f"{counted(len(self.classes), 'class', 'classes')}{self.skipped.clause()}"
        )

    def _identity(self) -> Iterable[bytes]:
        index = self.index
        yield from index.names
        for values in (index.ids, index.starts, index.labels, index.boxes, index.crowd, index.areas, self._keypoints):
            yield values.tobytes()
        for field in fields(BoxList):
            yield getattr(self.boxes, field.name).tobytes()
        yield repr((self.classes, self.skeleton)).encode()

    def __len__(self) -> int:
        return len(self.boxes.files)

    def name(self, index: int) -> str:
        """Return the path of the file of sample ``index``, or the number of its image if there is no file."""
        file = int(self.boxes.files[index])
        stored = os.fsdecode(self.index.names[file])
        return str(Path(self.place, stored)) if stored else str(self.index.ids[file])

    def image_id(self, index: int) -> int:
        """Return the number of sample ``index``'s image in the file of annotations, or its place in a generated set."""
        return int(self.index.ids[self.boxes.files[index]])

    def sample(self, index: int) -> Sample | None:
        """Return sample ``index``, or None if its image is left out."""
        file, row = int(self.boxes.files[index]), int(self.boxes.people[index])
        image = self.pixels(file)
        if image is None:
            return None
        box = self.boxes.boxes[index]
        truth = np.zeros((len(self.skeleton), 3), np.float32) if row < 0 else self._keypoints[row]
        if self._augments:
            generator = np.random.default_rng((_POSES, *self.key(index)))
            matrix, flipped = self._sampler.draw(generator, box.astype(float), truth.astype(float), image.shape[2])
        else:
            center, scale = crops.crop_box(torch.from_numpy(box), self.crop_size, self.padding)
            matrix, flipped = crops.crop_matrix(center, scale, self.crop_size, udp=self.udp), False
        crop = crops.warp(image, matrix[None], self.crop_size)[0]
        own = torch.from_numpy(truth.copy())
        sample = {
            "image": normalize(crop / 255, self.mean, self.std),
            "keypoints": self._in_crop(own, matrix, flipped),
            "affine": matrix,
            "label": torch.tensor(self.boxes.labels[index]),
            "box": torch.from_numpy(box.copy()),
            "box_score": torch.tensor(self.boxes.scores[index]),
            "area": torch.tensor(self.boxes.areas[index]),
            "truth": own,
            "image_id": torch.tensor(file),
            "size": torch.from_numpy(self.index.sizes[file].astype(np.int64)),
        }
        return {**sample, **self._people(index)} if self.split == "val" else sample

    def _in_crop(self, keypoints: Tensor, matrix: Tensor, flipped: bool) -> Tensor:
        """Return key points (K, 3) of the file as those of the crop."""
        if flipped:
            keypoints = keypoints[list(self.skeleton.swapped)]
        points, visibility = keypoints[:, :2], keypoints[:, 2:]
        moved = crops.apply_matrix(points.double(), matrix).float()
        return torch.cat([torch.where(visibility > 0, moved, 0.0), visibility], 1)

    def _people(self, index: int) -> Sample:
        """Return the people of a sample's file, or none if an earlier sample has them."""
        files = self.boxes.files
        file = int(files[index])
        first, last = self.index.starts[file : file + 2].tolist()
        rows = slice(first, last if not index or files[index - 1] != file else first)
        arrays: dict[str, NDArray[Any]] = {
            "people": self._keypoints[rows],
            "people_boxes": self.index.boxes[rows],
            "people_area": self.index.areas[rows],
            "people_labels": self.index.labels[rows].astype(np.int64),
            "people_crowd": self.index.crowd[rows],
        }
        return {name: torch.from_numpy(values.copy()) for name, values in arrays.items()}
