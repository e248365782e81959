"""Say why detections are wrong, and how much average precision each reason costs.

Paper: Bolya, Foley, Hays, Hoffman, "TIDE: A General Toolbox for Identifying Object Detection Errors", ECCV 2020. The
types are those of section 2.2, and where a detection fits several, the first that its published code tries applies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from widefield._coco.curves import Bools, Floats, Ints, Tally, mean, ordered, precisions
from widefield.report import Report

FOREGROUND, BACKGROUND = 0.5, 0.1
"""Intersection over union from which a detection finds an object, and up to which it has nothing to do with it."""
CONFUSION_SCORE = 0.3
"""Least score of detections that count in the confusion between classes."""
ERRORS = {
    "classification": "on an object of another class",
    "localization": f"overlaps an object of its class by {BACKGROUND} to {FOREGROUND}",
    "both": f"overlaps an object of another class by {BACKGROUND} to {FOREGROUND}",
    "duplicate": "on an object of its class that a better detection has found",
    "background": f"overlaps no object by more than {BACKGROUND}",
    "missed": "an object without a detection that an error of the first two types could have put right",
}
"""Type of error -> what it is."""

RIGHT, CLASSIFICATION, LOCALIZATION, BOTH, DUPLICATE, BACKDROP, IGNORED = range(7)
"""Kinds of detections in `ImageErrors`: right, the first five of ``ERRORS``, and those that do not count."""


@dataclass(frozen=True, eq=False)
class DetectionTally(Tally):
    """The matched detections of all images with their errors.

    Attributes:
        errors: uint8 (D,), see :class:`ImageErrors`.
        targets: (D,), likewise.
        missed: (K,), the number of objects that no detection comes near.
    """

    errors: NDArray[np.uint8]
    targets: Ints
    missed: Ints


class ImageErrors(NamedTuple):
    """Why each detection of an image is right or wrong.

    Attributes:
        kinds: uint8 (D,): ``RIGHT``, one of the errors, or ``IGNORED``.
        targets: (D,): the label that the detection has when its error is corrected; -1 if it is then left out.
        missed: bool (M,): objects that are missed.
        found: bool (M,): objects that a right detection finds.
    """

    kinds: NDArray[np.uint8]
    targets: Ints
    missed: Bools
    found: Bools


def classify(overlaps: Floats, labels: Ints, object_labels: Ints, crowd: Bools, limit: int = 100) -> ImageErrors:
    """Return the error of each detection of an image.

    Args:
        overlaps: (D, M) of the detections, best first; see `widefield._coco.matching`.
        labels, object_labels: (D,) and (M,).
        crowd: (M,). Detections in a crowd region of their class are ignored.
        limit: number of detections that are used; the others are ignored.
    """
    kinds = np.full(len(labels), IGNORED, np.uint8)
    targets = np.full(len(labels), -1, np.int64)
    same = labels[:, None] == object_labels[None]
    own = np.where(same & ~crowd, overlaps, 0.0)
    other = np.where(~same & ~crowd, overlaps, 0.0)
    in_crowd: Bools = np.where(same & crowd, overlaps, 0.0).max(1, initial=0.0) >= FOREGROUND
    found = _find(own, kinds[:limit])
    wrong = np.flatnonzero((kinds[:limit] == IGNORED) & ~in_crowd[:limit])
    kinds[wrong], places = _errors(own[wrong], other[wrong])
    mending = np.flatnonzero(places >= 0)
    mending = mending[~found[places[mending]]]
    usable = found.copy()
    mended, first = np.unique(places[mending], return_index=True)  # of several for one object, the best is corrected
    targets[wrong[mending[first]]], usable[mended] = object_labels[mended], True
    return ImageErrors(kinds, targets, ~usable & ~crowd, found)


def _find(own: Floats, kinds: NDArray[np.uint8]) -> Bools:
    """Mark the right detections, best first, and return which objects (M,) they find."""
    found = np.zeros(own.shape[1], np.bool_)
    for index in np.flatnonzero((own[: len(kinds)] >= FOREGROUND).any(1)):
        free = np.where(found, 0.0, own[index])
        place = len(free) - 1 - int(free[::-1].argmax())  # of equals the last, as in COCO's evaluation
        if free[place] >= FOREGROUND:
            kinds[index], found[place] = RIGHT, True
    return found


def _errors(own: Floats, other: Floats) -> tuple[NDArray[np.uint8], Ints]:
    """Return the errors of detections that find nothing, and the objects by which they are corrected, or -1.

    Args:
        own, other: (D, M) overlaps with objects of their class, and of other classes.
    """
    if not own.shape[1]:
        return np.full(len(own), BACKDROP, np.uint8), np.full(len(own), -1, np.int64)
    best, far = own.argmax(1), other.argmax(1)
    near, beside = own.max(1), other.max(1)
    cases = [
        (near >= BACKGROUND) & (near < FOREGROUND),
        beside >= FOREGROUND,
        near >= FOREGROUND,
        beside <= BACKGROUND,
    ]
    kinds = np.select(cases, [LOCALIZATION, CLASSIFICATION, DUPLICATE, BACKDROP], BOTH).astype(np.uint8)
    return kinds, np.select(cases[:2], [best, far], -1)


@dataclass(frozen=True, eq=False)
class DetectionErrors(Report):
    """How many errors of each type there are, and how much average precision at IoU 0.5 is gained without them.

    Attributes:
        ap50: average precision at IoU 0.5.
        gains: by type of error, the rise of ``ap50`` if these errors alone are corrected; at least 0.
        counts: number of errors by type.
        without_false_positives: rise of ``ap50`` if all wrong detections come after the right ones.
        without_misses: rise of ``ap50`` if only the objects that are found count.
    """

    ap50: float
    gains: dict[str, float]
    counts: dict[str, int]
    without_false_positives: float
    without_misses: float

    @classmethod
    def of(cls, tally: DetectionTally) -> DetectionErrors:
        """Correct the errors of each type, and measure again."""
        kinds, labels, scores = tally.errors, tally.labels, tally.scores
        objects = tally.objects[:, 0]
        right = kinds == RIGHT
        base = kinds != IGNORED

        def ap(keep: Bools, labels: Ints, right: Bools, objects: Ints) -> float:
            return _ap50(labels[keep], scores[keep], right[keep], objects, tally.objects[:, 0])

        start = ap(base, labels, right, objects)
        gains, counts = {}, {}
        for code, name in enumerate(ERRORS, start=CLASSIFICATION):
            if name == "missed":
                counts[name] = int(tally.missed.sum())
                better = ap(base, labels, right, objects - tally.missed)
            else:
                wrong = kinds == code
                mended = wrong & (tally.targets >= 0)
                counts[name] = int(wrong.sum())
                better = ap(base & (~wrong | mended), np.where(mended, tally.targets, labels), right | mended, objects)
            gains[name] = max(better - start, 0.0)
        found = np.bincount(labels[right], minlength=len(objects))
        perfect = _ap50(labels[right], scores[right], right[right], objects, objects)
        return cls(start, gains, counts, perfect - start, ap(base, labels, right, found) - start)

    def summary(self) -> str:
        """Return the gains in percentage points, and their number, as one line."""
        parts = (f"{name} {100 * gain:.1f} ({self.counts[name]:,})" for name, gain in self.gains.items())
        return f"AP50 {100 * self.ap50:.1f}; points lost by errors of each type (and their number): {', '.join(parts)}"

    def rows(self) -> list[dict[str, str]]:
        """Return one row per type of error."""
        return [
            {"error": name, "what": ERRORS[name], "errors": f"{self.counts[name]:,}", "AP50": f"+{100 * gain:.2f}"}
            for name, gain in self.gains.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return everything in JSON types."""
        values = {
            "ap50": self.ap50,
            **self.gains,
            "without_false_positives": self.without_false_positives,
            "without_misses": self.without_misses,
        }
        known = {name: None if np.isnan(value) else value for name, value in values.items()}
        ends = ("ap50", "without_false_positives", "without_misses")
        return {
            **{name: known[name] for name in ends},
            "gains": {name: known[name] for name in self.gains},
            "counts": self.counts,
        }


def _ap50(labels: Ints, scores: Floats, right: Bools, objects: Ints, true: Ints) -> float:
    """Return the mean average precision over the classes that have objects (``true``, (K,)).

    A class without an object left in ``objects`` (K,) has 0.
    """
    found = np.full(len(objects), -1.0)
    for label, rows in enumerate(ordered(labels, scores, len(objects))):
        if true[label]:
            hits = right[rows, None]
            found[label] = precisions(hits, np.ones_like(hits), int(objects[label])).mean() if objects[label] else 0.0
    return mean(found)


def confused(
    overlaps: Floats, labels: Ints, scores: Floats, object_labels: Ints, crowd: Bools, classes: int
) -> NDArray[np.int64]:
    """Count which class the object under each detection has.

    Detections of at least ``CONFUSION_SCORE``, best first, each take the free object with the largest overlap, of any
    class, if it reaches ``FOREGROUND``. Detections in a crowd region are left out.

    Returns:
        (K + 1, K + 1) by (true class, predicted class). The last row counts detections without an object, the last
        column objects without a detection.
    """
    counts = np.zeros((classes + 1, classes + 1), np.int64)
    free = np.where(crowd, 0.0, overlaps)
    for index in np.flatnonzero(scores >= CONFUSION_SCORE):
        place = int(free[index].argmax()) if free.shape[1] else 0
        if free.shape[1] and free[index, place] >= FOREGROUND:
            counts[object_labels[place], labels[index]] += 1
            free[:, place] = -1.0
        elif not (crowd & (overlaps[index] >= FOREGROUND)).any():
            counts[classes, labels[index]] += 1
    taken = (free == -1.0).any(0) if len(free) else np.zeros(len(object_labels), np.bool_)
    counts[:, classes] += np.bincount(object_labels[~taken & ~crowd], minlength=classes + 1)
    return counts


def mistakes(confusion: NDArray[np.int64], classes: Sequence[str]) -> list[dict[str, str]]:
    """Return one row per class with objects: how many are found, missed, and taken for which other class most."""
    rows = []
    for index, name in enumerate(classes):
        line = confusion[index]
        total = int(line.sum())
        if total:
            wrong = line[:-1].copy()
            wrong[index] = 0
            most = int(wrong.argmax())
            rows.append(
                {
                    "class": name,
                    "found": f"{100 * int(line[index]) / total:.1f}%",
                    "no detection": f"{100 * int(line[-1]) / total:.1f}%",
                    "mistaken for": classes[most] if wrong[most] else "-",
                    "in": f"{100 * int(wrong[most]) / total:.1f}%" if wrong[most] else "-",
                }
            )
    return rows
