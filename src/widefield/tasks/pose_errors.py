"""Say why key points are wrong: too far off, of the wrong side, of another person, or missed.

Paper: Ronchi, Perona, "Benchmarking and Error Diagnosis in Multi-Instance Pose Estimation", ICCV 2017, section 4.1.
Where a key point is near several true ones, the nearest decides, as in the published code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from widefield._coco.curves import Bools, Floats, Ints
from widefield._coco.keypoints import overall, similarities
from widefield.report import Report
from widefield.tasks.metric_names import percent

MATCHED = 0.1
"""Least object keypoint similarity of a pose and the person that it is compared with."""
NEAR, GOOD = 0.5, 0.85
"""Similarity from which a key point is near a true one, and from which it is as good as an annotator's."""
KINDS = {
    "good": f"within {GOOD} of the true key point",
    "jitter": f"near the true key point, similarity {NEAR} to {GOOD}",
    "inversion": "near the same person's key point of the other side",
    "swap": "near such a key point of another person",
    "miss": "near none of them",
}
"""Kind of key point -> what it is."""


class ImagePeople(NamedTuple):
    """The M people in an image.

    Attributes:
        keypoints: (M, K, 3), x and y in pixels, and the visibility; 0 without a label.
        labels: (M,), classes.
        areas: (M,) in square pixels.
        boxes: (M, 4), x1, y1, x2, y2.
        crowd: (M,), groups of people.
    """

    keypoints: Floats
    labels: Ints
    areas: Floats
    boxes: Floats
    crowd: Bools

    @property
    def labeled(self) -> Bools:
        """Return which key points have a label, (M, K)."""
        found: Bools = self.keypoints[..., 2] > 0
        return found

    def some(self, rows: Bools) -> ImagePeople:
        """Return the people of some rows, (M,)."""
        return ImagePeople(
            self.keypoints[rows], self.labels[rows], self.areas[rows], self.boxes[rows], self.crowd[rows]
        )

    def similarities(self, points: Floats, sigmas: Floats) -> Floats:
        """Return how similar key points of poses (D, K, 2) are to those of the people, (D, M, K)."""
        return similarities(points, self.keypoints, self.areas, self.boxes, sigmas)


def count_errors(points: Floats, labels: Ints, people: ImagePeople, sigmas: Floats, swapped: Ints) -> Ints:
    """Count key points of each kind in an image.

    Poses, best first, each take the free person of their class with the largest object keypoint similarity, from
    ``MATCHED`` on. The labeled key points of these people are counted.

    Args:
        points: of the poses, (D, K, 2), best first.
        labels: of the poses, (D,).
        people: of the image. Crowds, and people without a labeled key point, are left out.
        sigmas, swapped: of the skeleton, (K,).

    Returns:
        (K, 5) by ``KINDS``.
    """
    counts = np.zeros((len(sigmas), len(KINDS)), np.int64)
    real = ~people.crowd & people.labeled.any(1)
    people = people.some(real)
    if not len(people.labels) or not len(points):
        return counts
    turned = people._replace(keypoints=people.keypoints[:, swapped])
    own = people.similarities(points, sigmas)
    alike = np.where(labels[:, None] == people.labels, overall(own, people.labeled), -1.0)
    near_own = np.where(people.labeled, own, -1.0)
    near_other = np.where(turned.labeled, turned.similarities(points, sigmas), -1.0)
    either = np.maximum(near_own, near_other)
    free = np.ones(len(people.labels), np.bool_)
    every = np.arange(len(people.labels))
    for pose, values in enumerate(alike):
        person = int(np.where(free, values, -1.0).argmax())
        if not free[person] or values[person] < MATCHED:
            continue
        free[person] = False
        others = either[pose, every != person].max(0, initial=-1.0)
        found = _kinds(near_own[pose, person], near_other[pose, person], others)
        labeled = np.flatnonzero(people.labeled[person])
        counts[labeled, found[labeled]] += 1
    return counts


def _kinds(own: Floats, inverted: Floats, others: Floats) -> Ints:
    """Return the kind of each key point (K,) from its similarities to true ones; -1 without a label."""
    best = np.maximum(np.maximum(own, inverted), others)
    near = np.where(own == best, np.where(own >= GOOD, 0, 1), np.where(inverted == best, 2, 3))
    return np.where(best < NEAR, 4, near)


@dataclass(frozen=True, eq=False)
class PoseErrors(Report):
    """How many key points are good, and how many are wrong in which way.

    Attributes:
        keypoints: names of the K key points.
        counts: int64 (K, 5), by key point and kind: good, jitter, inversion, swap, miss.
    """

    keypoints: tuple[str, ...]
    counts: Ints

    @property
    def shares(self) -> dict[str, float]:
        """Return the fraction of all key points by kind; NaN without any."""
        total = int(self.counts.sum())
        return {
            name: int(n) / total if total else float("nan") for name, n in zip(KINDS, self.counts.sum(0), strict=True)
        }

    def summary(self) -> str:
        """Return the shares in percent as one line."""
        parts = ", ".join(f"{name} {percent(share, 1)}" for name, share in self.shares.items())
        return f"{int(self.counts.sum()):,} key points of poses that were found: {parts}"

    def rows(self) -> list[dict[str, str]]:
        """Return one row per key point, and one for all: the share of each kind."""
        lines = [*zip(self.keypoints, self.counts, strict=True), ("all", self.counts.sum(0))]
        return [
            {"key point": name, "compared": f"{int(line.sum()):,}"}
            | {kind: percent(int(n) / max(int(line.sum()), 1), 1) for kind, n in zip(KINDS, line, strict=True)}
            for name, line in lines
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return everything in JSON types."""
        return {
            "kinds": list(KINDS),
            "counts": {n: line.tolist() for n, line in zip(self.keypoints, self.counts, strict=True)},
        }
