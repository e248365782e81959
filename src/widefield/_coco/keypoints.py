"""Compare poses by the rules of COCO's evaluation of key points: object keypoint similarity (OKS).

The numbers are those of pycocotools' ``COCOeval.computeOks``, to the last digit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from widefield._coco.matching import AREAS as _AREAS
from widefield._coco.matching import Bools, Floats, Ints

AREAS: dict[str, tuple[float, float]] = {name: _AREAS[name] for name in ("all", "medium", "large")}
"""Ranges of a person's area in square pixels, with both ends. Small people have no labeled key points in COCO."""
MOST = 20
"""Poses in an image that count, best first."""


def similarities(found: Floats, true: Floats, areas: Floats, boxes: Floats, sigmas: Floats) -> Floats:
    """Return how similar each key point of poses is to that of people, from 0 to 1.

    Args:
        found: (D, K, 2 or more), x and y in pixels.
        true: (M, K, 3), x, y and visibility; a key point with visibility 0 has no label.
        areas: (M,) of the people, in square pixels.
        boxes: (M, 4) of the people, x1, y1, x2, y2. The distance to a key point without a label is that to the box with
            three times the sides around the same center.
        sigmas: (K,), the standard deviation of annotators relative to the square root of the area.

    Returns:
        (D, M, K): exp(-d^2 / (2 area (2 sigma)^2)). Key points that are not finite have similarity 0.
    """
    points = found[:, None, :, :2].astype(np.float64)
    near = boxes[:, :2]
    sides = boxes[:, 2:] - near
    low, high = near - sides, near + sides * 2
    with np.errstate(invalid="ignore", over="ignore"):
        beyond = np.maximum(0.0, low[:, None] - points) + np.maximum(0.0, points - high[:, None])
        gaps = np.where(true[None, :, :, 2:] > 0, points - true[None, :, :, :2], beyond)
        squares = gaps[..., 0] ** 2 + gaps[..., 1] ** 2
        # The order of these divisions decides the last digit.
        exponents = squares / (sigmas * 2) ** 2 / (areas + np.spacing(1))[:, None] / 2
        alike = np.exp(-exponents)
    known: Floats = np.nan_to_num(alike, nan=0.0)
    return known


def overall(alike: Floats, labeled: Bools) -> Floats:
    """Return the object keypoint similarity (D, M): the mean over the labeled key points, or over all without labels.

    Args:
        alike: (D, M, K), see :func:`similarities`.
        labeled: (M, K).
    """
    total = np.zeros(alike.shape[:2])
    for person, known in enumerate(labeled):
        chosen = alike[:, person, known] if known.any() else alike[:, person]
        # A sum over rows in memory adds in the same order as pycocotools' sum of one row.
        total[:, person] = np.ascontiguousarray(chosen).sum(1) / chosen.shape[1]
    return total


def oks(found: Floats, true: Floats, areas: Floats, boxes: Floats, sigmas: Floats) -> Floats:
    """Return the object keypoint similarity of poses and people, (D, M); arguments as of :func:`similarities`."""
    return overall(similarities(found, true, areas, boxes, sigmas), true[..., 2] > 0)


def oks_nms(points: Floats, scores: Floats, areas: Floats, sigmas: Floats, threshold: float) -> Ints:
    """Drop poses that are much like a better one, as mmpose's ``oks_nms``.

    Args:
        points: (D, K, 2) in pixels.
        scores: (D,).
        areas: (D,) in square pixels. Two poses are compared at the mean of their areas.
        sigmas: (K,).
        threshold: poses with a larger similarity than this to a better one are dropped.

    Returns:
        Indices of the poses that are left, best first; those with equal scores in the given order.
    """
    order = np.argsort(-scores, kind="stable")
    kept = []
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        gaps = points[order, :, :2] - points[best, :, :2]
        squares = gaps[..., 0] ** 2 + gaps[..., 1] ** 2
        shared = (areas[best] + areas[order]) / 2 + np.spacing(1)
        alike = np.exp(-(squares / (sigmas * 2) ** 2 / shared[:, None] / 2)).sum(1) / len(sigmas)
        order = order[~(alike > threshold)]
    return np.array(kept, np.int64)


def distinct(points: Floats, scores: Floats, areas: Floats, labels: Ints, sigmas: Floats, threshold: float) -> Ints:
    """Return the indices of the poses in an image that are not much like a better one of their class.

    Args:
        points, scores, areas, sigmas, threshold: as of :func:`oks_nms`.
        labels: (D,), classes.

    Returns:
        Indices, those with better scores first, of all classes; those with equal scores in the given order.
    """
    kept = [np.zeros(0, np.int64)]
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        kept.append(rows[oks_nms(points[rows], scores[rows], areas[rows], sigmas, threshold)])
    found = np.sort(np.concatenate(kept))
    ordered: Ints = found[np.argsort(-scores[found], kind="stable")]
    return ordered


def pose_areas(points: NDArray[np.floating]) -> Floats:
    """Return the areas (D,) of the boxes around the key points (D, K, 2) of poses."""
    sides = points[..., :2].max(1) - points[..., :2].min(1)
    areas: Floats = (sides[:, 0] * sides[:, 1]).astype(np.float64)
    return areas
