"""What a task is: how a batch becomes a loss, and how a model is judged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn
from torchmetrics import MetricCollection

Batch = dict[str, Any]
"""What a loader gives: ``image`` float32 (N, C, H, W), and what else the task needs. Entries it does not know stay."""


@contextmanager
def training_on(image: Tensor) -> Iterator[None]:
    """Explain, in place of PyTorch's sentence, that a batch norm cannot be trained on a batch of one.

    Args:
        image: the batch, (N, C, H, W).

    Raises ValueError: a batch norm got one value per channel, as of one image with a map of one pixel.
    """
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            f"a batch of {len(image)} is too small to train a batch norm whose map has one pixel ({error}). Set a "
            f"batch_size of at least 2, and leave out a last batch of one: drop_last=True in a loader of your own."
        ) from error


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
