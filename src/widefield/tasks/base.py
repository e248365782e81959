"""Define the interface of a task: its model, batches, loss and metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from widefield.data import Sample
from widefield.report import Report
from widefield.surgery.answers import evaluating
from widefield.tasks.predictions import Prediction

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

Batch = dict[str, Any]
"""A batch by entry, as ``Task.collate`` makes it. The training loop adds ``index`` int64 (N,): the samples' places in
the data set."""


@contextmanager
def training_on(image: Tensor, hint: str = "") -> Iterator[None]:
    """Explain PyTorch's error about a batch norm that is trained on a batch of one.

    Args:
        image: the batch, (N, C, H, W).
        hint: a further sentence for the message.

    Raises:
        ValueError: a batch norm got one value per channel, such as one image with a one-pixel map.
    """
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            f"a batch of {len(image)} is too small to train a batch norm whose map has one pixel ({error}). Set a "
            f"batch_size of at least 2, and leave out a last batch of one: drop_last=True in a loader of your own."
            f"{hint}"
        ) from error


def sum_of(losses: Mapping[str, Tensor]) -> Tensor:
    """Return the sum of losses; that of a single one is the loss itself."""
    first, *rest = losses.values()
    return torch.stack([first, *rest]).sum() if rest else first


def built(
    model: Callable[..., nn.Module], backbone: nn.Module, classes: Sequence[str], head_args: Mapping[str, Any]
) -> nn.Module:
    """Return a dense model on a backbone, with an output for each class.

    Args:
        model: its class.
        backbone: the recipe's network.
        classes: names of the classes.
        head_args: further arguments of the class, from the recipe.

    Raises:
        TypeError: the class refuses its arguments.
    """
    try:
        return model(backbone, len(classes), **head_args)
    except TypeError as error:
        raise TypeError(f"task.args.head_args: {model.__name__} refuses {dict(head_args)}: {error}") from error


def tried(model: nn.Module, shape: tuple[int, int, int]) -> Any:
    """Return what a model gives for a black image, from one forward pass in evaluation mode.

    Args:
        model: left in its mode.
        shape: (C, H, W) of the image.
    """
    first = next(model.parameters(), torch.empty(0))
    with evaluating(model), torch.no_grad():
        return model(torch.zeros(1, *shape, device=first.device, dtype=first.dtype))


class Labeled(Protocol):
    """A data set that names the classes of its labels, or a run's record of one."""

    @property
    def classes(self) -> Sequence[str]:
        """Return the names; a label is an index into them."""


class Task(ABC):
    """A kind of work. The training loop knows these methods and nothing else about it.

    The loop collates samples with :meth:`collate`, calls :meth:`losses` with a model in training mode and, with a model
    in evaluation mode and without gradients, ``metrics.update(**task.outputs(model, batch))`` on one
    ``metrics = task.metrics()`` for all batches.

    Attributes:
        headline: name of the metric that ranks checkpoints; one of those of :meth:`metrics`.
        higher_is_better: whether a larger headline is better.
        model_args: arguments of ``timm.create_model`` that the task decides, such as ``{"num_classes": 10}`` or
            ``{"features_only": True}``.
        rating: what :meth:`rate` measures, as the end of a sentence; empty if images are not rated.
        pictured: number of validation images of which the loop shows :meth:`pictures` in TensorBoard.
    """

    headline: str
    higher_is_better: bool
    model_args: Mapping[str, Any] = MappingProxyType({})
    rating: str = ""
    pictured: int = 0

    @classmethod
    @abstractmethod
    def for_data(cls, dataset: Labeled, **options: Any) -> Task:
        """Build the task for a data set; ``options`` are the constructor's other arguments."""

    def model(self, backbone: nn.Module) -> nn.Module:
        """Return the model to train, built from a backbone; default: the backbone itself.

        Args:
            backbone: the recipe's network, built with ``model_args`` and converted.
        """
        return backbone

    def check(self, model: nn.Module, shape: tuple[int, int, int]) -> None:  # noqa: B027 (most tasks accept any model)
        """Raise ValueError if a model does not fit the task.

        Args:
            model: in any mode, which is left as it was.
            shape: (C, H, W) of the images.
        """

    def remark(self, model: nn.Module, shape: tuple[int, int, int]) -> str:
        """Return a line about a model that is shown before training; default: none, "". Arguments as of :meth:`check`.

        The model is left as it was.
        """
        return ""

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Return samples as a batch; default: every entry stacked, as PyTorch's ``default_collate`` does.

        Args:
            samples: at least one. Unreadable ones have been dropped.
        """
        batch: Batch = default_collate(list(samples))
        return batch

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the training loss of a batch, a scalar with gradients; leaves the batch unchanged."""

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Return the parts of :meth:`loss` by name, scalars whose sum it is; default: ``loss`` alone.

        The loop logs several parts next to their sum. The names must be the same for every batch.
        """
        return {"loss": self.loss(model, batch)}

    def learn_from(
        self, teacher: Callable[[Tensor], Tensor], *, weight: float, temperature: float = 1.0, hard: bool = False
    ) -> None:
        """Add a teacher's answers to the loss; default: the task has no such loss.

        Args:
            teacher: images (N, C, H, W) -> logits, without gradients.
            weight: its share in the loss.
            temperature: divides the logits of both.
            hard: learn the class that it says instead of its probabilities.

        Raises:
            ValueError: the task cannot learn from a teacher.
        """
        raise ValueError(f"distillation is for classification; {type(self).__name__} has no such loss.")

    def image_losses(self, model: nn.Module, batch: Batch) -> Tensor | None:
        """Return the loss of each sample, (N,), without augmentation of the batch; default: None, there is none.

        Args:
            model: in evaluation mode.
            batch: of the val split.
        """
        return None

    def blind_loss(self, batches: Iterable[Batch]) -> float | None:
        """Return the mean of :meth:`image_losses` of the best answer that is the same for all images.

        It is what a model knows that has not looked at an image; default: None, it is not known.

        Args:
            batches: of the val split.
        """
        return None

    @abstractmethod
    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        """Return the keyword arguments of the metrics' ``update``: tensors (N, ...) or lists of N entries."""

    def counted(self, outputs: Mapping[str, Any]) -> int:
        """Return how many samples of a batch count as evaluated, from its :meth:`outputs`; default: all, N."""
        return len(next(iter(outputs.values())))

    def predict(self, model: nn.Module, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """Return what a model predicts for each image, in the form in which it is drawn.

        Args:
            model: in evaluation mode.
            images: float32 (N, C, H, W), prepared as for evaluation.
            sizes: (height, width) of each image's file, to which masks are resized.

        Raises:
            TypeError: the task does not define predictions.
        """
        raise TypeError(f"the task {type(self).__name__} has no predictions to draw: define its method predict.")

    def predict_batch(self, model: nn.Module, batch: Batch, sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """Return what :meth:`predict` does for a batch of a data set; default: from its images alone.

        Args:
            model, sizes: as of :meth:`predict`.
            batch: with ``index``.
        """
        return self.predict(model, batch["image"], sizes)

    def pictures(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Return pictures by name, uint8 (3, H, W), that show what a model makes of a batch; default: none.

        Args:
            model: in evaluation mode.
            batch: the same images in every call.
        """
        return {}

    def truth(self, sample: Sample) -> Prediction | None:
        """Return a sample's label in the form of a prediction, to draw them side by side; None if it has none."""
        return None

    def rate(self, outputs: Mapping[str, Any]) -> Tensor | None:
        """Return how good each image's prediction is, float64 (N,), larger being better; default: None, not rated.

        Args:
            outputs: what :meth:`outputs` returned.
        """
        return None

    def headline_parts(self, outputs: Mapping[str, Any]) -> Tensor | None:
        """Return numbers of the images whose mean is the headline, float64 (N,); default: None, it is no such mean.

        Args:
            outputs: what :meth:`outputs` returned.
        """
        return None

    def rated(self, rating: float) -> str:
        """Return one of the values of :meth:`rate` as text; default: as a share, in percent."""
        return f"{100 * rating:.1f} %"

    def scores(self, metrics: MetricCollection) -> Report | None:
        """Return a result with more than scalars, such as one row per class; default: None.

        Args:
            metrics: those of :meth:`metrics`, updated, and summed over all processes.
        """
        return None

    @abstractmethod
    def metrics(self) -> MetricCollection:
        """Return fresh metrics that do not synchronize by themselves (``sync_on_compute=False``).

        Each gives a scalar, or a mapping of names to scalars.
        """


def entropy_of(classes: Iterable[Tensor], count: int) -> float:
    """Return the entropy of the classes' frequencies in nats: the cross-entropy of the best constant prediction.

    Args:
        classes: int64 tensors of any shape, from 0 to ``count`` - 1.
        count: number of classes.
    """
    counts = sum((torch.bincount(x.flatten().cpu(), minlength=count) for x in classes), torch.zeros(count)).double()
    return float(torch.special.entr(counts / counts.sum().clamp(min=1)).sum())
