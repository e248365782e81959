"""Hold the results of an evaluation of poses: COCO's figures, of each key point, by size, and errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from widefield._coco.curves import Floats, Ints, Tally, mean
from widefield._coco.keypoints import AREAS, MOST
from widefield.report import Report
from widefield.tasks.metric_names import finite, heading, percent
from widefield.tasks.pose_distances import LOOSE, STRICT, Distances, average
from widefield.tasks.pose_errors import PoseErrors

_METRICS = ("ap", "ap50", "ap75", "ap_medium", "ap_large", "ar")
"""Of COCO's figures, those that are metrics."""


@dataclass(frozen=True, eq=False)
class KeypointScores:
    """Results of groups of key points or of people, one entry per group. NaN: nothing is labeled.

    Attributes:
        names: of the groups.
        count: int64 (G,), of the labeled key points, or of the people.
        ap: average precision over similarities from 0.5 to 0.95. That of a key point compares this point alone.
        error: mean distance to the true key points in pixels.
        pck, pck20: fractions of key points within 0.05 and 0.2 of the longer side of the box.
    """

    names: tuple[str, ...]
    count: Ints
    ap: Floats
    error: Floats
    pck: Floats
    pck20: Floats

    def rows(self, title: str, count: str) -> list[dict[str, str]]:
        """Return one row per group."""
        return [
            {
                title: name,
                count: f"{int(self.count[index]):,}",
                "OKS AP": percent(float(self.ap[index])),
                "error": "-" if math.isnan(self.error[index]) else f"{self.error[index]:.2f} px",
                f"PCK@{STRICT}": percent(float(self.pck[index])),
                f"PCK@{LOOSE}": percent(float(self.pck20[index])),
            }
            for index, name in enumerate(self.names)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return everything in JSON types."""
        values = {name: _listed(getattr(self, name)) for name in ("ap", "error", "pck", "pck20")}
        return {"names": list(self.names), "count": self.count.tolist(), **values}


@dataclass(frozen=True, eq=False)
class PoseScores(Report):
    """The results of an evaluation of poses. What is not a number (NaN) has nothing to be measured on.

    Attributes:
        classes: names of the C classes of people or things.
        people: int64 (C,), the number of people that count: those with a labeled key point, without crowds.
        class_ap: OKS AP of each class, float64 (C,).
        figures: COCO's ten: ``ap`` (mean over OKS from 0.5 to 0.95), ``ap50``, ``ap75``, ``ap_medium`` (32^2 to 96^2
            pixels), ``ap_large``, ``ar``, ``ar50``, ``ar75``, ``ar_medium``, ``ar_large``, with at most 20 poses of a
            class in an image.
        distances: ``pck``, ``pck20``, ``auc`` and ``epe``, which compare each pose with the person in its box. They
            need true boxes, so they are NaN with boxes of a detector.
        by_keypoint: results of each key point.
        by_size: results of finer groups of people, by the square root of their area in pixels.
        errors: kinds of errors by key point.
    """

    classes: tuple[str, ...]
    people: Ints
    class_ap: Floats
    figures: dict[str, float]
    distances: dict[str, float]
    by_keypoint: KeypointScores
    by_size: KeypointScores
    errors: PoseErrors

    @classmethod
    def of(
        cls,
        classes: Sequence[str],
        tally: Tally,
        size_bins: Sequence[str],
        distances: Distances,
        groups: Ints,
        errors: PoseErrors,
    ) -> PoseScores:
        """Compute all results.

        Args:
            classes: names of the classes.
            tally: of the matched poses. Its groups are COCO's areas, the size bins, and the key points, each alone.
            size_bins: names of the groups by size.
            distances: of the poses that have a true person.
            groups: (N,), the size bin of these people.
            errors: kinds of errors.
        """
        found = [tally.precision(group) for group in range(tally.objects.shape[1])]
        aps = np.array([mean(group) for group in found])
        sizes = slice(len(AREAS), len(AREAS) + len(size_bins))
        parts = [distances.some(groups == index) for index in range(len(size_bins))]
        pck = [distances.pck(limit) for limit in (STRICT, LOOSE)]
        by_class = found[0].mean((0, 1))
        counts = tally.objects.sum(0)
        return cls(
            classes=tuple(classes),
            people=tally.objects[:, 0],
            class_ap=np.where(by_class < 0, np.nan, by_class),
            figures=_figures(tally, found[: len(AREAS)]),
            distances={
                "pck": average(pck[0]),
                "pck20": average(pck[1]),
                "auc": distances.auc(),
                "epe": distances.epe(),
            },
            by_keypoint=KeypointScores(
                errors.keypoints, counts[sizes.stop :], aps[sizes.stop :], distances.error(), pck[0], pck[1]
            ),
            by_size=KeypointScores(
                tuple(size_bins),
                counts[sizes],
                aps[sizes],
                np.array([part.epe() for part in parts]),
                *(np.array([average(part.pck(limit)) for part in parts]) for limit in (STRICT, LOOSE)),
            ),
            errors=errors,
        )

    def metrics(self) -> dict[str, float]:
        """Return ``oks_ap``, ``oks_ap50``, ``oks_ap75``, ``oks_ap_medium``, ``oks_ap_large``, ``oks_ar``, distances."""
        return {f"oks_{name}": self.figures[name] for name in _METRICS} | self.distances

    def summary(self) -> str:
        """Return the metrics, and the number of people, as one line."""
        numbers = [f"{name} {percent(value)}" for name, value in self.metrics().items() if name != "epe"]
        epe = self.distances["epe"]
        error = "-" if math.isnan(epe) else f"{epe:.2f} px"
        return f"{', '.join(numbers)}, epe {error}; {int(self.people.sum()):,} people"

    def rows(self) -> list[dict[str, str]]:
        """Return one row per key point."""
        return self.by_keypoint.rows("key point", "labeled")

    def size_rows(self) -> list[dict[str, str]]:
        """Return one row per group of people by size."""
        return self.by_size.rows("size", "people")

    def class_rows(self) -> list[dict[str, str]]:
        """Return one row per class."""
        return [
            {"class": name, "people": f"{int(self.people[index]):,}", "OKS AP": percent(float(self.class_ap[index]))}
            for index, name in enumerate(self.classes)
        ]

    def figure_rows(self) -> list[dict[str, str]]:
        """Return one row: COCO's ten figures."""
        return [{heading(name): percent(value) for name, value in self.figures.items()}]

    def error_rows(self) -> list[dict[str, str]]:
        """Return one row per key point, and one for all: kinds of errors."""
        return self.errors.rows()

    def to_dict(self) -> dict[str, Any]:
        """Return everything in JSON types; what is not a number becomes None."""
        return {
            "metrics": {name: finite(value) for name, value in self.metrics().items()},
            "figures": {name: finite(value) for name, value in self.figures.items()},
            "classes": list(self.classes),
            "people": self.people.tolist(),
            "class_ap": _listed(self.class_ap),
            "by_keypoint": self.by_keypoint.to_dict(),
            "by_size": self.by_size.to_dict(),
            "errors": self.errors.to_dict(),
        }


def _figures(tally: Tally, found: Sequence[Floats]) -> dict[str, float]:
    """Return COCO's figures; ``found`` are the precisions of its areas."""
    names = list(AREAS)
    recall = [tally.recall(area, MOST) for area in range(len(names))]
    return {
        "ap": mean(found[0]),
        "ap50": mean(found[0][:1]),
        "ap75": mean(found[0][5:6]),
        **{f"ap_{name}": mean(found[names.index(name)]) for name in names[1:]},
        "ar": mean(recall[0]),
        "ar50": mean(recall[0][:1]),
        "ar75": mean(recall[0][5:6]),
        **{f"ar_{name}": mean(recall[names.index(name)]) for name in names[1:]},
    }


def _listed(values: Floats) -> list[float | None]:
    return [finite(value) for value in values.tolist()]
