"""Match detections to objects by the rules of COCO's evaluation, image by image.

The rules are those of pycocotools' ``COCOeval.evaluateImg``, and the results are the same to the last digit. As images
are matched at once, boxes and masks need not be kept until the end.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

THRESHOLDS: Floats = np.linspace(0.5, 0.95, 10)
"""Least intersection over union of a match: ten, from 0.5 to 0.95."""
AREAS: dict[str, tuple[float, float]] = {
    "all": (0.0, 1e5**2),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e5**2),
}
"""Ranges of an object's area in square pixels, with both ends."""


def box_areas(boxes: Floats) -> Floats:
    """Return the areas of boxes (M, 4), x1, y1, x2, y2: (M,)."""
    sides = boxes[:, 2:] - boxes[:, :2]
    areas: Floats = sides[:, 0] * sides[:, 1]
    return areas


def box_overlaps(found: Floats, objects: Floats, crowd: Bools) -> Floats:
    """Return the intersection over union of boxes, with the operations of pycocotools in their order.

    Args:
        found: (D, 4), x1, y1, x2, y2.
        objects: (M, 4).
        crowd: (M,). With a crowd region it is the intersection over the area of the detection.

    Returns:
        (D, M).
    """
    # pycocotools stores (x, y, width, height), and computes the far edges from them again.
    sizes, object_sizes = found[:, 2:] - found[:, :2], objects[:, 2:] - objects[:, :2]
    ends, object_ends = sizes + found[:, :2], object_sizes + objects[:, :2]
    near = np.maximum(found[:, None, :2], objects[None, :, :2])
    overlap = np.minimum(ends[:, None], object_ends[None]) - near
    shared = np.where((overlap > 0).all(-1), overlap[..., 0] * overlap[..., 1], 0.0)
    areas, object_areas = sizes[:, 0] * sizes[:, 1], object_sizes[:, 0] * object_sizes[:, 1]
    union = np.where(crowd[None], areas[:, None], areas[:, None] + object_areas[None] - shared)
    return np.divide(shared, union, out=np.zeros_like(shared), where=shared > 0)


def mask_overlaps(found: Tensor, objects: Tensor, crowd: Bools) -> tuple[Floats, Floats]:
    """Return the intersection over union of masks, and the areas of the first ones.

    Only the pixels that the boxes around both masks share are counted.

    Args:
        found: bool (D, H, W).
        objects: bool (M, H, W).
        crowd: (M,). With a crowd region it is the intersection over the area of the detection.

    Returns:
        (D, M) and (D,), in pixels.
    """
    rows, columns = (masks.cpu().numpy() for masks in (found, objects))
    boxes, object_boxes = _bounds(rows), _bounds(columns)
    near = np.maximum(boxes[:, None, :2], object_boxes[None, :, :2])
    far = np.minimum(boxes[:, None, 2:], object_boxes[None, :, 2:])
    shared = np.zeros((len(rows), len(columns)))
    for d, m in np.argwhere((far > near).all(-1)):
        (left, top), (right, bottom) = near[d, m], far[d, m]
        window = slice(top, bottom), slice(left, right)
        shared[d, m] = np.count_nonzero(rows[d][window] & columns[m][window])
    areas, object_areas = mask_areas(rows), mask_areas(columns)
    union = np.where(crowd[None], areas[:, None], areas[:, None] + object_areas[None] - shared)
    return np.divide(shared, union, out=np.zeros_like(shared), where=shared > 0), areas


def mask_areas(masks: Bools) -> Floats:
    """Return the number of pixels of each mask (N, H, W): (N,). ``sum`` would make a number of each pixel."""
    return np.array([np.count_nonzero(mask) for mask in masks], float)


def _bounds(masks: Bools) -> Ints:
    """Return the box around each mask (N, H, W): the edges x1, y1, x2, y2, (N, 4); zeros for an empty mask."""
    bounds = []
    for axis in (1, 2):  # which columns are seen, which rows
        seen = np.asarray(masks.any(axis=axis))
        length = seen.shape[1]
        first = seen.argmax(1) if length else np.zeros(len(seen), np.int64)
        last = length - seen[:, ::-1].argmax(1) if length else first
        bounds.append((first, np.where(seen.any(1), last, first)))
    (left, right), (top, bottom) = bounds
    return np.stack([left, top, right, bottom], 1)


class Matches(NamedTuple):
    """Which detections of an image count, and as what, at each threshold and for each range of areas."""

    right: Bools
    """(D, T, A): the detection is matched to an object of its class that counts."""
    counted: Bools
    """(D, T, A): the detection counts, as right or as wrong."""
    objects: Bools
    """(M, A): the object counts."""


def match(
    overlaps: Floats,
    labels: Ints,
    object_labels: Ints,
    areas: Floats,
    object_areas: Floats,
    crowd: Bools,
    ranges: Floats,
    thresholds: Floats = THRESHOLDS,
) -> Matches:
    """Match detections, best first, each to the free object of its class with the largest overlap.

    An object outside of a range, or a crowd region, does not count, and neither do detections matched to it. They are
    matched to it only if no object that counts is left. A crowd region may be matched many times. Detections without a
    match do not count if their own area is outside of the range.

    Args:
        overlaps: (D, M) of the D detections, best first.
        labels, object_labels: (D,) and (M,).
        areas, object_areas: (D,) and (M,) in square pixels.
        crowd: (M,).
        ranges: (A, 2), smallest and largest area.
        thresholds: (T,).
    """
    low, high = ranges[:, 0], ranges[:, 1]
    ignored = crowd[:, None] | (object_areas[:, None] < low) | (object_areas[:, None] > high)
    beyond = (areas[:, None] < low) | (areas[:, None] > high)
    own = np.where(labels[:, None] == object_labels[None], overlaps, -1.0)
    return assign(own[..., None], ignored, beyond, crowd, thresholds)


def assign(own: Floats, ignored: Bools, beyond: Bools, crowd: Bools, thresholds: Floats = THRESHOLDS) -> Matches:
    """Match detections as :func:`match` does, with objects that are ignored for any reason.

    Args:
        own: overlaps (D, M, A), or (D, M, 1) if they are the same for all A groups. They are -1 between classes.
        ignored: (M, A), objects that do not count.
        beyond: (D, A), detections that do not count without a match.
        crowd: (M,), objects that may be matched many times.
        thresholds: (T,).
    """
    groups = ignored.shape[1]
    shape = (len(own), len(thresholds), groups)
    right = np.zeros(shape, np.bool_)
    counted = np.broadcast_to(~beyond[:, None], shape).copy()
    taken = np.zeros((len(ignored), *shape[1:]), np.bool_)
    reaches = (own >= thresholds.min(initial=1.0)).any(2)
    for index in np.flatnonzero(reaches.any(1)):
        near = np.flatnonzero(reaches[index])
        free = (own[index, near][:, None] >= thresholds[:, None]) & (~taken[near] | crowd[near, None, None])
        chosen = free if len(near) == 1 else _largest(free, own[index, near], ignored[near])
        hidden = ignored[near][:, None]  # (m, 1, A)
        right[index] = (chosen & ~hidden).any(0)
        matched = chosen.any(0)
        counted[index] = np.where(matched, right[index], counted[index])
        taken[near] |= chosen
    return Matches(right, counted, ~ignored)


def _largest(free: Bools, overlaps: Floats, ignored: Bools) -> Bools:
    """Choose one of the free objects (m, T, A) with overlaps (m, A or 1): that with the largest, of equals the last.

    Ignored ones (m, A) are chosen only if there are no others.
    """
    order = np.argsort(overlaps, axis=0, kind="stable")  # of equals, the last one comes last
    ranks = np.empty(order.shape, np.int64)
    np.put_along_axis(ranks, order, np.arange(1, len(order) + 1)[:, None], 0)
    value = (ranks + np.where(ignored, 0, len(order)))[:, None]
    value = np.where(free, value, 0)
    chosen: Bools = (value == value.max(0)) & free
    return chosen


def ranks_in_class(labels: Ints) -> Ints:
    """Return the place of each of these labels (D,) among the equal ones, from 0."""
    order = np.argsort(labels, kind="stable")
    sorted_labels = labels[order]
    starts = np.searchsorted(sorted_labels, sorted_labels)
    places = np.empty(len(labels), np.int64)
    places[order] = np.arange(len(labels)) - starts
    return places
