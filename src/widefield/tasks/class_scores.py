"""Count which classes are predicted for the images of each class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from widefield._intervals import wilson
from widefield.report import Report
from widefield.tasks.metric_names import finite, percent

MOST_CLASSES = 4096
"""Classifiers of more classes are not counted by pairs of classes: of 21,841, these would take 3.8 GB."""


@dataclass(frozen=True, eq=False)
class ClassificationScores(Report):
    """The counts of an evaluation of a classifier.

    Attributes:
        classes: names of the K classes.
        confusion: int64 (K, K): images by (true class, predicted class).
    """

    classes: tuple[str, ...]
    confusion: Tensor

    @property
    def accuracy(self) -> Tensor:
        """Return the share of each class's images that are predicted as such (recall), float64 (K,).

        NaN: the class has no image.
        """
        return self.confusion.diagonal().double() / self.confusion.sum(1)

    @property
    def precision(self) -> Tensor:
        """Return the share of each class's predictions that are right, float64 (K,). NaN: it was never predicted."""
        return self.confusion.diagonal().double() / self.confusion.sum(0)

    def intervals(self) -> Tensor:
        """Return 95 % intervals of :attr:`accuracy`, float64 (K, 2): Wilson's score intervals (1927)."""
        return torch.from_numpy(wilson(self.confusion.diagonal().numpy(), self.confusion.sum(1).numpy()))

    def metrics(self) -> dict[str, float]:
        """Return ``top1``, and ``class_mean``: the mean accuracy of the classes that have images."""
        right, count = int(self.confusion.diagonal().sum()), int(self.confusion.sum())
        return {"top1": right / count if count else math.nan, "class_mean": float(self.accuracy.nanmean())}

    def summary(self) -> str:
        """Return the accuracy over all images, its mean over classes, and the weakest classes, as one line."""
        found = self.metrics()
        weakest = ", ".join(f"{row['class']} {row['accuracy']}" for row in self.weakest(3))
        count = int(self.confusion.sum())
        return (
            f"top-1 {percent(found['top1'], 1)} of {count:,} images; "
            f"mean over classes {percent(found['class_mean'], 1)}; lowest: {weakest}"
        )

    def rows(self) -> list[dict[str, str]]:
        """Return one row per class: accuracy with its interval, precision, and the class it is mistaken for most."""
        return [self._row(index) for index in range(len(self.classes))]

    def weakest(self, count: int) -> list[dict[str, str]]:
        """Return the :meth:`rows` of the ``count`` classes with the lowest accuracy, lowest first."""
        order = self.accuracy.nan_to_num(2.0).argsort(stable=True).tolist()
        return [self._row(index) for index in order[:count]]

    def _row(self, index: int) -> dict[str, str]:
        count, (low, high) = int(self.confusion[index].sum()), self.intervals()[index].tolist()
        others = self.confusion[index].clone()
        others[index] = 0
        missed = int(others.max())
        return {
            "class": self.classes[index],
            "images": str(count),
            "accuracy": percent(float(self.accuracy[index]), 1),
            "95 %": f"{100 * low:.1f} to {100 * high:.1f}" if count else "-",
            "precision": percent(float(self.precision[index]), 1),
            "mistaken for": self.classes[int(others.argmax())] if missed else "-",
            "in": percent(missed / count, 1) if missed else "-",
        }

    def to_dict(self) -> dict[str, Any]:
        """Return everything in JSON types; what is not a number becomes None."""
        named = {"accuracy": self.accuracy, "precision": self.precision}
        return {
            "metrics": {name: finite(value) for name, value in self.metrics().items()},
            "classes": list(self.classes),
            **{name: [finite(x) for x in values.tolist()] for name, values in named.items()},
            "confusion": self.confusion.tolist(),
        }


class ClassCounts(Metric):
    """Count images by true and predicted class. It adds no number to the metrics: ``compute`` gives none.

    Args:
        classes: names of the classes.
        options: of torchmetrics' Metric.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, classes: Sequence[str], **options: Any) -> None:
        super().__init__(**options)
        self.classes = tuple(classes)
        self.add_state("counts", torch.zeros((len(classes),) * 2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count N images from their logits (N, K) and true classes (N,)."""
        size = len(self.classes)
        pairs = target * size + preds.argmax(1)
        self.counts += torch.bincount(pairs, minlength=size * size).view(size, size)

    def compute(self) -> dict[str, Tensor]:
        """Return nothing; :meth:`scores` has the counts."""
        return {}

    def scores(self) -> ClassificationScores:
        """Return the counts so far, on the CPU."""
        return ClassificationScores(self.classes, self.counts.cpu())


class AnyOf(Metric):
    """The fraction of samples with an allowed class among the first ``top_k``; samples that allow none do not count."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    hits: Tensor
    counted: Tensor

    def __init__(self, top_k: int = 1, **options: Any) -> None:
        super().__init__(**options)
        self.top_k = top_k
        self.add_state("hits", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("counted", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, allowed: Tensor) -> None:
        """Add logits (N, classes) and the correct classes, bool (N, classes)."""
        first = preds.topk(self.top_k, dim=1).indices
        self.hits += allowed.gather(1, first).any(1).sum()
        self.counted += allowed.any(1).sum()

    def compute(self) -> Tensor:
        """Return the fraction; NaN if no sample counted."""
        return self.hits / self.counted
