"""Compute COCO's metrics of poses: average precision by object keypoint similarity (OKS), PCK, AUC, end-point error.

Figures equal those of pycocotools on the same poses, to the last digit. The poses of a file come in several samples,
which may be in different batches and processes. Poses and people are therefore kept, and matched at the end, file by
file. Metrics do not depend on how samples are batched or spread over processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from widefield import _checks
from widefield._coco import matching
from widefield._coco.curves import Bools, Floats, Ints, Tally
from widefield._coco.keypoints import AREAS, MOST, distinct, overall, pose_areas
from widefield.data.skeleton import Skeleton
from widefield.tasks import sizes
from widefield.tasks.pose_distances import Distances
from widefield.tasks.pose_errors import KINDS, ImagePeople, PoseErrors, count_errors
from widefield.tasks.pose_scores import PoseScores
from widefield.tasks.records import RecordMetric, Records


@dataclass(frozen=True, eq=False)
class FoundPoses:
    """The poses in N crops, on the CPU.

    Attributes:
        points: (N, K, 2), x and y in pixels of the file.
        scores: (N,), of the poses. NaN: the crop stands for no box, so its pose is not counted.
        boxes: (N, 4), x1, y1, x2, y2 in pixels of the file.
        areas: (N,), of the crops in square pixels of the file, at which poses are compared with each other.
        labels: int64 (N,), classes.
        images: int64 (N,), the place of the file among the files of the data.
    """

    points: Tensor
    scores: Tensor
    boxes: Tensor
    areas: Tensor
    labels: Tensor
    images: Tensor

    def __len__(self) -> int:
        return len(self.points)


@dataclass(frozen=True, eq=False)
class People:
    """All people in a file, or none: then they come with another sample.

    Attributes:
        keypoints: (M, K, 3), x and y in pixels of the file, and the visibility: 0 without a label, 1 hidden, 2 visible.
        boxes: (M, 4), x1, y1, x2, y2.
        areas: (M,) in square pixels.
        labels: int64 (M,), classes.
        crowd: bool (M,): groups of people, which do not count, and which any number of poses may match.
    """

    keypoints: Tensor
    boxes: Tensor
    areas: Tensor
    labels: Tensor
    crowd: Tensor

    def __len__(self) -> int:
        return len(self.keypoints)


@dataclass(frozen=True, eq=False)
class TruePoses:
    """What N poses are compared with, on the CPU.

    Attributes:
        keypoints: (N, K, 3), those of the person in each box; visibility 0 everywhere for boxes of a detector.
        areas: (N,), of these people in square pixels.
        people: all people of the file, with one sample of each file.
    """

    keypoints: Tensor
    areas: Tensor
    people: Sequence[People]


class PoseMetric(RecordMetric[PoseScores]):
    """Average precision and recall of poses by OKS, PCK, AUC and EPE; ``compute`` gives the main figures by name.

    In each file, poses that are much like a better one of their class are dropped, and the best 20 of a class are
    matched to people. PCK, AUC and EPE compare every pose with the person in its box, as mmpose does.

    Args:
        classes: names of the C classes of people or things.
        skeleton: the K key points; sigmas set how fast the similarity falls with the distance.
        nms_threshold: OKS above which a pose is dropped; 1 keeps all.
        size_bins: edges between the finer groups of people, square roots of areas in pixels, rising.
        options: of torchmetrics' Metric.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range; the message names it.
    """

    def __init__(
        self,
        classes: Sequence[str],
        skeleton: Skeleton,
        *,
        nms_threshold: float = 0.9,
        size_bins: Sequence[float] = sizes.OCTAVES,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.classes, self.skeleton = tuple(classes), skeleton
        self.nms_threshold = _checks.number("nms_threshold", nms_threshold, maximum=1.0)
        self.size_bins = sizes.checked(size_bins)
        self._sigmas = np.array(skeleton.sigmas, np.float64)
        count = len(skeleton.names)
        place = [("image", "<i8"), ("index", "<i8"), ("label", "<i4"), ("box", "<f8", (4,)), ("area", "<f8")]
        pose = [("points", "<f8", (count, 2)), ("score", "<f8"), ("truth", "<f8", (count, 3)), ("size", "<f8")]
        self.add_records("poses", np.dtype([*place, *pose]))
        self.add_records("people", np.dtype([*place, ("keypoints", "<f8", (count, 3)), ("crowd", "?")]))

    def update(self, preds: FoundPoses, target: TruePoses, index: Tensor | None = None) -> None:
        """Add the poses of N crops.

        Args:
            preds: the poses.
            target: what they are compared with.
            index: int64 (N,), the places of the samples in the data set; they decide the order of poses with equal
                scores. None: the order in which they come.
        """
        places = self.places(len(preds), index)
        poses = self._filled("poses", len(preds), image=preds.images, label=preds.labels, box=preds.boxes,
                             area=preds.areas, points=preds.points, score=preds.scores, truth=target.keypoints,
                             size=target.areas)  # fmt: skip
        poses["index"] = places
        self.keep("poses", poses)
        for place, image, one in zip(places, preds.images.tolist(), target.people, strict=True):
            people = self._filled("people", len(one), label=one.labels, box=one.boxes, area=one.areas,
                                  keypoints=one.keypoints, crowd=one.crowd)  # fmt: skip
            people["image"], people["index"] = image, place
            self.keep("people", people)

    def _filled(self, name: str, count: int, **columns: Tensor) -> Records:
        records = np.zeros(count, self._formats[name])
        for column, values in columns.items():
            records[column] = (values.double() if values.is_floating_point() else values).cpu().numpy()
        return records

    def _scores(self) -> PoseScores:
        poses, people = _by_image(self.kept("poses")), _by_image(self.kept("people"))
        poses = poses[~np.isnan(poses["score"])]
        files = np.unique(np.concatenate([poses["image"], people["image"]]))
        matched = [self._matched(one, all_of) for one, all_of in zip(
            _split(poses, files), _split(people, files), strict=True)]  # fmt: skip
        owned = (poses["truth"][..., 2] > 0).any(1)
        distances = Distances.of(poses["points"][owned], poses["truth"][owned], poses["box"][owned])
        groups = np.searchsorted(np.array(self.size_bins) ** 2, poses["size"][owned], side="right")
        names, counts = self.skeleton.names, np.zeros((len(self._sigmas), len(KINDS)), np.int64)
        errors = PoseErrors(names, sum((one.errors for one in matched), counts))
        return PoseScores.of(self.classes, self._tally(matched), sizes.names(self.size_bins), distances, groups, errors)

    def _tally(self, matched: Sequence[_Matched]) -> Tally:
        groups = len(AREAS) + len(self.size_bins) + 1 + len(self._sigmas)
        shape = (0, len(matching.THRESHOLDS), groups)
        objects = np.zeros((len(self.classes), groups), np.int64)
        for one in matched:
            np.add.at(objects, one.kinds, one.matches.objects)
        labels = np.concatenate([np.zeros(0, np.int64), *(one.labels for one in matched)])
        return Tally(
            labels=labels,
            scores=np.concatenate([np.zeros(0), *(one.scores for one in matched)]),
            ranks=np.concatenate([np.zeros(0, np.int64), *(matching.ranks_in_class(one.labels) for one in matched)]),
            right=np.concatenate([np.zeros(shape, np.bool_), *(one.matches.right for one in matched)]),
            counted=np.concatenate([np.zeros(shape, np.bool_), *(one.matches.counted for one in matched)]),
            objects=objects,
        )

    def _matched(self, poses: Records, people: Records) -> _Matched:
        """Match the poses of a file."""
        points, scores, areas, classes = (poses[name] for name in ("points", "score", "area", "label"))
        poses = poses[distinct(points, scores, areas, classes, self._sigmas, self.nms_threshold)]
        poses = poses[matching.ranks_in_class(poses["label"].astype(np.int64)) < MOST]
        labels, points = poses["label"].astype(np.int64), poses["points"]
        known = ImagePeople(
            people["keypoints"], people["label"].astype(np.int64), people["area"], people["box"], people["crowd"]
        )
        alike, labeled = known.similarities(points, self._sigmas), known.labeled
        limits = np.concatenate([np.array(list(AREAS.values())), sizes.ranges(self.size_bins)])
        own = np.concatenate([np.repeat(overall(alike, labeled)[..., None], len(limits), 2), alike], 2)
        own[labels[:, None] != known.labels] = -1.0
        unlabeled = np.concatenate([np.repeat(~labeled.any(1, keepdims=True), len(limits), 1), ~labeled], 1)
        ignored = unlabeled | known.crowd[:, None] | self._outside(known.areas, limits)
        matches = matching.assign(own, ignored, self._outside(pose_areas(points), limits), known.crowd)
        errors = count_errors(points, labels, known, self._sigmas, np.array(self.skeleton.swapped))
        return _Matched(labels, poses["score"], known.labels, matches, errors)

    def _outside(self, areas: Floats, limits: Floats) -> Bools:
        """Return which areas (n,) are outside of limits (G, 2), and of the groups of key points, which have none."""
        beyond = (areas[:, None] < limits[:, 0]) | (areas[:, None] > limits[:, 1])
        return np.concatenate([beyond, np.zeros((len(areas), len(self._sigmas)), np.bool_)], 1)


class _Matched(NamedTuple):
    """The poses of a file, best first, and its people."""

    labels: Ints
    scores: Floats
    kinds: Ints
    matches: matching.Matches
    errors: Ints


def _by_image(records: Records) -> Records:
    """Return records by file, and those of a file by sample."""
    records = records[np.argsort(records["index"], kind="stable")]
    return records[np.argsort(records["image"], kind="stable")]


def _split(records: Records, files: Ints) -> list[Records]:
    """Return the records of each file."""
    return np.split(records, np.searchsorted(records["image"], files[1:])) if len(files) else []
