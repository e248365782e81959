"""Measure multi-label classification: average precision of each class, and F1 at a threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from widefield.report import Report
from widefield.tasks.metric_names import finite, percent
from widefield.tasks.records import RecordMetric


@dataclass(frozen=True, eq=False)
class MultiLabelScores(Report):
    """The results of an evaluation of a multi-label classifier.

    Attributes:
        classes: names of the K classes.
        average_precision: float64 (K,): area under the precision-recall curve, as scikit-learn computes it. NaN: no
            image shows the class.
        counts: int64 (K, 3): images that show the class and are given it, that show it, and that are given it.
        images: number of images.
        threshold: probability from which an image is given a class.
    """

    classes: tuple[str, ...]
    average_precision: Tensor
    counts: Tensor
    images: int
    threshold: float

    @property
    def recall(self) -> Tensor:
        """Return the share of the images of each class that are given it, float64 (K,). NaN: no image shows it."""
        return self.counts[:, 0].double() / self.counts[:, 1]

    @property
    def precision(self) -> Tensor:
        """Return the share of right ones among the images that are given a class, float64 (K,). NaN: none is."""
        return self.counts[:, 0].double() / self.counts[:, 2]

    @property
    def f1(self) -> Tensor:
        """Return the harmonic mean of precision and recall, float64 (K,). NaN: no image shows or is given the class."""
        right, shown, given = self.counts.double().unbind(1)
        return 2 * right / (shown + given)

    def metrics(self) -> dict[str, float]:
        """Return ``map``, ``cf1`` and ``of1``.

        - ``map``: mean of :attr:`average_precision` over the classes that images show.
        - ``cf1``: harmonic mean of precision and recall, each averaged over these classes; the precision of a class
          that is never given is 0.
        - ``of1``: the same of all decisions at once.

        They are NaN without an image that shows a class.
        """
        known = self.counts[:, 1] > 0
        right, shown, given = (int(total) for total in self.counts.sum(0))
        if not bool(known.any()):
            return dict.fromkeys(("map", "cf1", "of1"), math.nan)
        precision, recall = float(self.precision[known].nan_to_num(0.0).mean()), float(self.recall[known].mean())
        return {
            "map": float(self.average_precision[known].mean()),
            "cf1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
            "of1": 2 * right / (shown + given),
        }

    def summary(self) -> str:
        """Return the metrics, and the classes with the lowest average precision, as one line."""
        found = self.metrics()
        weakest = ", ".join(f"{row['class']} {row['AP']}" for row in self.weakest(3))
        return (
            f"mAP {percent(found['map'], 1)} of {self.images:,} images; from a probability of {self.threshold:g}: CF1 "
            f"{percent(found['cf1'], 1)}, OF1 {percent(found['of1'], 1)}; lowest AP: {weakest}"
        )

    def rows(self) -> list[dict[str, str]]:
        """Return one row per class: images, average precision, and at the threshold precision, recall and F1."""
        return [self._row(index) for index in range(len(self.classes))]

    def weakest(self, count: int) -> list[dict[str, str]]:
        """Return the :meth:`rows` of the ``count`` classes with the lowest average precision, lowest first."""
        order = self.average_precision.nan_to_num(2.0).argsort(stable=True).tolist()
        return [self._row(index) for index in order[:count]]

    def _row(self, index: int) -> dict[str, str]:
        named = {
            "AP": self.average_precision, "precision": self.precision, "recall": self.recall, "F1": self.f1,
        }  # fmt: skip
        shares = {name: percent(float(values[index]), 1) for name, values in named.items()}
        return {"class": self.classes[index], "images": str(int(self.counts[index, 1])), **shares}

    def to_dict(self) -> dict[str, Any]:
        """Return everything in JSON types; what is not a number becomes None."""
        named = {
            "average_precision": self.average_precision, "precision": self.precision, "recall": self.recall,
            "f1": self.f1,
        }  # fmt: skip
        return {
            "metrics": {name: finite(value) for name, value in self.metrics().items()},
            "classes": list(self.classes),
            **{name: [finite(x) for x in values.tolist()] for name, values in named.items()},
            "images": self.counts[:, 1].tolist(),
            "given": self.counts[:, 2].tolist(),
            "threshold": self.threshold,
        }


class MultiLabelMetric(RecordMetric[MultiLabelScores]):
    """Keeps the probabilities and the classes of all images, 5 bytes for a class of an image.

    Args:
        classes: names of the classes.
        threshold: probability from which an image is given a class.
        options: of torchmetrics' Metric.
    """

    def __init__(self, classes: Sequence[str], threshold: float, **options: Any) -> None:
        super().__init__(**options)
        self.classes, self.threshold = tuple(classes), threshold
        size = (len(self.classes),)
        self.add_records("images", np.dtype([("logits", "<f4", size), ("present", "?", size)]))

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add N images: logits (N, K), and which classes they show, bool (N, K)."""
        self._found = None
        records = np.empty(len(preds), self._formats["images"])
        records["logits"], records["present"] = preds.float().cpu().numpy(), target.cpu().numpy()
        self.keep("images", records)

    def _scores(self) -> MultiLabelScores:
        from torchmetrics.functional.classification import binary_average_precision

        records = self.kept("images")
        logits, present = (torch.from_numpy(records[name].copy()) for name in ("logits", "present"))
        probabilities = logits.double().sigmoid()  # in float32 many would be 1, and their order lost
        precision = torch.full((len(self.classes),), math.nan, dtype=torch.float64)
        for label in present.any(0).nonzero()[:, 0].tolist():  # of the other classes it would be 0, with a warning
            precision[label] = binary_average_precision(probabilities[:, label], present[:, label].long())
        given = probabilities >= self.threshold
        counts = torch.stack([(given & present).sum(0), present.sum(0), given.sum(0)], 1)
        return MultiLabelScores(self.classes, precision, counts, len(records), self.threshold)
