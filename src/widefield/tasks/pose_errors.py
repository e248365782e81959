"""Say why key points are wrong: too far off, of the wrong side, of another person, or missed.

Paper: Ronchi, Perona, "Benchmarking and Error Diagnosis in Multi-Instance Pose Estimation", ICCV 2017, section 4.1.
Where a key point is near several true ones, the nearest decides, as in the published code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from widefield._coco.curves import Bools, Floats, Ints
from widefield._coco.keypoints import overall, similarities
from widefield.report import Report

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


def count_errors(
    points: Floats, labels: Ints, people: Floats, kinds: Ints, areas: Floats, boxes: Floats, crowd: Bools,
    *, sigmas: Floats, swapped: Ints,
) -> Ints:  # fmt: skip
    """Count key points of each kind in an image.

    Poses, best first, each take the free person of their class with the largest object keypoint similarity, from
    ``MATCHED`` on. The labeled key points of these people are counted.

    Args:
        points, labels: of the poses, (D, K, 2), (D,), best first.
        people, kinds, areas, boxes, crowd: of the people, (M, K, 3), (M,), (M,), (M, 4), (M,).
        sigmas, swapped: of the skeleton, (K,).

    Returns:
        (K, 5) by ``KINDS``.
    """
    counts = np.zeros((len(sigmas), len(KINDS)), np.int64)
    real = ~crowd & (people[..., 2] > 0).any(1)
    people, kinds, areas, boxes = people[real], kinds[real], areas[real], boxes[real]
    if not len(people) or not len(points):
        return counts
    turned = people[:, swapped]
    own, other = (similarities(points, one, areas, boxes, sigmas) for one in (people, turned))
    alike = np.where(labels[:, None] == kinds, overall(own, people[..., 2] > 0), -1.0)
    near_own = np.where(people[..., 2] > 0, own, -1.0)
    near_other = np.where(turned[..., 2] > 0, other, -1.0)
    either = np.maximum(near_own, near_other)
    free = np.ones(len(people), np.bool_)
    every = np.arange(len(people))
    for pose, values in enumerate(alike):
        person = int(np.where(free, values, -1.0).argmax())
        if not free[person] or values[person] < MATCHED:
            continue
        free[person] = False
        others = either[pose, every != person].max(0, initial=-1.0)
        found = _kinds(near_own[pose, person], near_other[pose, person], others)
        labeled = np.flatnonzero(people[person, :, 2] > 0)
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
        parts = ", ".join(f"{name} {_percent(share)}" for name, share in self.shares.items())
        return f"{int(self.counts.sum()):,} key points of poses that were found: {parts}"

    def rows(self) -> list[dict[str, str]]:
        """Return one row per key point, and one for all: the share of each kind."""
        lines = [*zip(self.keypoints, self.counts, strict=True), ("all", self.counts.sum(0))]
        return [
            {"key point": name, "compared": f"{int(line.sum()):,}"}
            | {kind: _percent(int(n) / max(int(line.sum()), 1)) for kind, n in zip(KINDS, line, strict=True)}
            for name, line in lines
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return everything in JSON types."""
        return {
            "kinds": list(KINDS),
            "counts": {n: line.tolist() for n, line in zip(self.keypoints, self.counts, strict=True)},
        }


def _percent(value: float) -> str:
    return "-" if np.isnan(value) else f"{100 * value:.1f}%"
