"""Hold the results of an evaluation of detections: figures of COCO, of each class, by object size, and errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from widefield._coco.curves import Floats, Ints, mean
from widefield._coco.matching import AREAS
from widefield.report import Report
from widefield.tasks.detection_errors import CONFUSION_SCORE, DetectionErrors, DetectionTally, mistakes
from widefield.tasks.metric_names import finite, heading, percent

AVERAGE_PRECISIONS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
"""The figures that are metrics."""


@dataclass(frozen=True, eq=False)
class KindScores:
    """Results of boxes, or of masks. What is not a number (NaN) has no objects.

    Attributes:
        figures: COCO's twelve: ``ap`` (mean over IoU from 0.5 to 0.95), ``ap50``, ``ap75``, ``ap_small`` (below 32^2
            pixels), ``ap_medium``, ``ap_large`` (above 96^2), and the average recall by the number of detections of a
            class in an image, ``ar1``, ``ar10``, ``ar100``, and by size, ``ar_small``, ``ar_medium``, ``ar_large``.
        ap: of each class, float64 (K,).
        ap50: of each class at IoU 0.5, float64 (K,).
        ap_by_size: of the finer groups of objects by size, float64 (B,).
        class_ap_by_size: likewise of each class, float64 (B, K).
        errors: why detections are wrong.
    """

    figures: dict[str, float]
    ap: Floats
    ap50: Floats
    ap_by_size: Floats
    class_ap_by_size: Floats
    errors: DetectionErrors

    @classmethod
    def of(cls, tally: DetectionTally, most: int) -> KindScores:
        """Compute the results of matched detections; ``most`` is the largest number of one class in an image."""
        found = [tally.precision(area) for area in range(tally.objects.shape[1])]
        names = list(AREAS)
        figures = {"ap": mean(found[0]), "ap50": mean(found[0][:1]), "ap75": mean(found[0][5:6])}
        figures |= {f"ap_{name}": mean(found[names.index(name)]) for name in names[1:]}
        figures |= {f"ar{count}": mean(tally.recall(0, count)) for count in dict.fromkeys((1, 10, most))}
        figures |= {f"ar_{name}": mean(tally.recall(names.index(name))) for name in names[1:]}
        finer = found[len(names) :]
        return cls(
            figures=figures,
            ap=_by_class(found[0]),
            ap50=_by_class(found[0][:1]),
            ap_by_size=np.array([mean(group) for group in finer]),
            class_ap_by_size=np.stack([_by_class(group) for group in finer]),
            errors=DetectionErrors.of(tally),
        )


@dataclass(frozen=True, eq=False)
class DetectionScores(Report):
    """The results of an evaluation of detections.

    Attributes:
        classes: names of the K classes.
        kinds: results of boxes, ``"box"``, and of masks, ``"mask"``, if the model gives masks.
        objects: int64 (K,), the number of objects of each class, without crowd regions.
        size_bins: names of the B finer groups of objects by size.
        objects_by_size: int64 (B, K), the number of objects.
        confusion: int64 (K + 1, K + 1) by (true class, predicted class) of the detections with a score of at least
            0.3, by boxes. The last row counts detections without an object, the last column objects without one.
    """

    classes: tuple[str, ...]
    kinds: dict[str, KindScores]
    objects: Ints
    size_bins: tuple[str, ...]
    objects_by_size: Ints
    confusion: Tensor

    @classmethod
    def of(
        cls,
        classes: Sequence[str],
        tallies: Mapping[str, DetectionTally],
        size_bins: Sequence[str],
        confusion: Tensor,
        most: int,
    ) -> DetectionScores:
        """Compute all results of matched detections by kind."""
        counts = next(iter(tallies.values())).objects
        kinds = {name: KindScores.of(tally, most) for name, tally in tallies.items()}
        finer = counts[:, len(AREAS) :].T
        return cls(tuple(classes), kinds, counts[:, 0], tuple(size_bins), finer, confusion)

    def metrics(self) -> dict[str, float]:
        """Return ``box_ap``, ``box_ap50``, ``box_ap75``, ``box_ap_small``, ... and, with masks, ``mask_ap``, ..."""
        return {
            f"{kind}_{name}": scores.figures[name] for kind, scores in self.kinds.items() for name in AVERAGE_PRECISIONS
        }

    def summary(self) -> str:
        """Return the metrics in percent, and the number of objects, as one line."""
        numbers = ", ".join(f"{name} {percent(value)}" for name, value in self.metrics().items())
        return f"{numbers}; {int(self.objects.sum()):,} objects of {len(self.classes)} classes"

    def rows(self) -> list[dict[str, str]]:
        """Return one row per class: objects and average precision."""
        return [
            {"class": name, "objects": f"{int(self.objects[index]):,}"}
            | {
                f"{kind} {title}": percent(float(values[index]))
                for kind, scores in self.kinds.items()
                for title, values in (("AP", scores.ap), ("AP50", scores.ap50))
            }
            for index, name in enumerate(self.classes)
        ]

    def figure_rows(self) -> list[dict[str, str]]:
        """Return one row per kind: COCO's twelve figures."""
        return [
            {"of": kind} | {heading(name): percent(value) for name, value in scores.figures.items()}
            for kind, scores in self.kinds.items()
        ]

    def size_rows(self) -> list[dict[str, str]]:
        """Return one row per finer group of objects by size: objects and average precision."""
        return [
            {"size": name, "objects": f"{int(self.objects_by_size[index].sum()):,}"}
            | {f"{kind} AP": percent(float(scores.ap_by_size[index])) for kind, scores in self.kinds.items()}
            for index, name in enumerate(self.size_bins)
        ]

    def mistake_rows(self) -> list[dict[str, str]]:
        """Return one row per class with objects: found, missed, and the class that it is mistaken for most."""
        return mistakes(self.confusion.numpy(), self.classes)

    def to_dict(self) -> dict[str, Any]:
        """Return everything in JSON types; what is not a number becomes None."""
        return {
            "metrics": {name: finite(value) for name, value in self.metrics().items()},
            "classes": list(self.classes),
            "objects": self.objects.tolist(),
            "size_bins": list(self.size_bins),
            "objects_by_size": self.objects_by_size.sum(1).tolist(),
            "confusion": self.confusion.tolist(),
            "confusion_score": CONFUSION_SCORE,
            **{
                kind: {
                    "figures": {name: finite(value) for name, value in scores.figures.items()},
                    "ap": [finite(value) for value in scores.ap.tolist()],
                    "ap50": [finite(value) for value in scores.ap50.tolist()],
                    "ap_by_size": [finite(value) for value in scores.ap_by_size.tolist()],
                    "errors": scores.errors.to_dict(),
                }
                for kind, scores in self.kinds.items()
            },
        }


def _by_class(precision: Floats) -> Floats:
    """Return the mean over thresholds and recalls (T, R, K) of each class, (K,); NaN without objects."""
    found: Floats = precision.mean((0, 1))
    return np.where(found < 0, np.nan, found)
