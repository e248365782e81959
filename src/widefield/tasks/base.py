"""What a task is: how a batch becomes a loss, and how a model is judged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from torchmetrics import MetricCollection

Batch = dict[str, Any]
"""What a loader gives: ``image`` float32 (N, C, H, W), and what else the task needs. Entries it does not know stay."""


class Labelled(Protocol):
    """A data set that names the classes of its labels."""

    @property
    def classes(self) -> Sequence[str]:
        """Return the names; a label is an index into them."""


class Task(ABC):
    """A kind of work: what the training loop needs to know of it, and no more.

    The loop calls :meth:`loss` with a model in training mode, and, with a model in evaluation mode and without
    gradients, ``metrics.update(**task.outputs(model, batch))`` on one ``metrics = task.metrics()`` for all batches.

    Attributes:
        headline: name of the metric by which checkpoints are ranked; one of those of :meth:`metrics`.
        higher_is_better: whether a larger headline is the better one.
        model_args: what the task decides about ``timm.create_model``, such as ``{"num_classes": 10}``.
    """

    headline: str
    higher_is_better: bool
    model_args: Mapping[str, Any]

    @classmethod
    @abstractmethod
    def for_data(cls, dataset: Labelled, **options: Any) -> Task:
        """Build the task for a data set; ``options`` are the other arguments of the constructor."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the training loss of a batch, a scalar with gradients; leaves the batch as it is."""

    @abstractmethod
    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return the keyword arguments of the metrics' ``update``, each (N, ...) for N images."""

    @abstractmethod
    def metrics(self) -> MetricCollection:
        """Return fresh metrics, each a scalar, that do not synchronise by themselves (``sync_on_compute=False``)."""
