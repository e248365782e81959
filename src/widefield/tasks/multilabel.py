"""Define multi-label classification: any number of classes per image, a sigmoid for each, mean average precision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widefield import _checks
from widefield.data import MultiLabelImages, Sample, SampleSet
from widefield.surgery.answers import evaluating
from widefield.tasks.asymmetric_loss import asymmetric_loss
from widefield.tasks.base import Batch, Labeled, training_on
from widefield.tasks.image_classes import ImageClasses, weights_of
from widefield.tasks.metric_names import HEADLINES
from widefield.tasks.predictions import LabelPrediction, Prediction

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

    from widefield.tasks.multilabel_scores import MultiLabelScores

LOSSES = ("binary", "asymmetric")


class MultiLabelClassification(ImageClasses):
    """Classification of images that show any number of classes, by a model from (N, C, H, W) to logits (N, K).

    Batches hold ``image`` float32 (N, C, H, W) and ``present`` bool (N, K), of a set such as `CocoLabels`, `LabelTable`
    or `SceneLabels`. The metrics are ``map``, ``cf1``, ``of1`` (see `MultiLabelScores.metrics`) and ``loss``, the mean
    binary cross-entropy of the classes in nats.

    Args:
        num_classes: number of classes K.
        loss: ``"binary"``, the binary cross-entropy; or ``"asymmetric"`` (Ridnik et al. 2021), which weakens absent
            classes, of which images have many. The loss of an image is the mean over its classes; the paper takes the
            sum, which is K times as large.
        gamma_pos: asymmetric: exponent for present classes; None means 0.
        gamma_neg: asymmetric: exponent for absent classes; None means 4.
        margin: asymmetric: probability below which an absent class has no loss, from 0 to below 1; None means 0.05.
        positive_weights: binary: factor of the loss of each class where it is present, as PyTorch's ``pos_weight``;
            ``"balanced"``: the number of train images without the class for each one with it.
        threshold: probability from which an image is given a class, above 0 and below 1.
        class_names: names of the classes; default: their indices.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range; the message names it.
    """

    headline = HEADLINES["multilabel"]
    higher_is_better = True
    rating = "the geometric mean, over the classes, of the probability of the right answer"

    def __init__(
        self,
        num_classes: int,
        *,
        loss: str = "binary",
        gamma_pos: float | None = None,
        gamma_neg: float | None = None,
        margin: float | None = None,
        positive_weights: str | Sequence[float] | None = None,
        threshold: float = 0.5,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(_checks.integer("num_classes", num_classes), class_names)
        self._loss = _checks.choice("loss", loss, LOSSES)
        given = {"gamma_pos": gamma_pos, "gamma_neg": gamma_neg, "margin": margin}
        unread = [name for name, value in given.items() if value is not None]
        if unread and loss != "asymmetric":
            raise ValueError(f"{unread[0]} is of loss: asymmetric; set it, or leave {unread[0]} out.")
        if positive_weights is not None and loss != "binary":
            raise ValueError("positive_weights are for loss: binary; the asymmetric loss has gamma_pos and gamma_neg.")
        self._gammas = (
            _checks.number("gamma_pos", 0.0 if gamma_pos is None else gamma_pos),
            _checks.number("gamma_neg", 4.0 if gamma_neg is None else gamma_neg),
        )
        self._margin = _checks.number("margin", 0.05 if margin is None else margin, maximum=1.0)
        self.threshold = _checks.number("threshold", threshold, maximum=1.0)
        for name, value in (("margin", self._margin), ("threshold", self.threshold)):
            if value == 1:
                raise ValueError(f"{name} must be below 1, which no probability is above; got {value:g}.")
        if self.threshold == 0:
            raise ValueError("threshold must be above 0; from 0 on, every image is given every class.")
        self._weights = weights_of("positive_weights", positive_weights, self.num_classes)

    @classmethod
    def for_data(cls, dataset: Labeled, **options: Any) -> Self:
        """Build the task for a data set with ``classes``; ``positive_weights: balanced`` counts its labels.

        Raises ValueError for a data set whose images have one label each.
        """
        if isinstance(dataset, SampleSet) and not isinstance(dataset, MultiLabelImages):
            raise ValueError(
                f"the task multilabel needs images with any number of classes, such as those of coco_labels or "
                f"label_table; {type(dataset).__name__} has others. One label per image is the task classification."
            )
        if options.get("positive_weights") == "balanced" and isinstance(dataset, MultiLabelImages):
            options = {**options, "positive_weights": balanced_weights(dataset)}
        return cls(len(dataset.classes), **{"class_names": dataset.classes, **options})

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss of the batch, a scalar."""
        with training_on(batch["image"]):
            logits = model(batch["image"]).float()
        present = batch["present"]
        if self._loss == "asymmetric":
            return asymmetric_loss(logits, present, *self._gammas, self._margin).mean()
        if self._weights == "balanced":
            raise ValueError("positive_weights: balanced needs the train set: build the task with for_data.")
        weight = None if self._weights is None else logits.new_tensor(self._weights)
        return F.binary_cross_entropy_with_logits(logits, present.to(logits), pos_weight=weight)

    def image_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the binary cross-entropy of each image, the mean over its classes, (N,)."""
        return _cross_entropy(model(batch["image"]).float(), batch["present"])

    def blind_loss(self, batches: Iterable[Batch]) -> float:
        """Return the mean entropy of the classes, in nats: the loss of their frequencies as probabilities."""
        present = torch.cat([batch["present"].double().cpu() for batch in batches])
        share = present.mean(0)
        return float((torch.special.entr(share) + torch.special.entr(1 - share)).mean())

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        """Return ``preds`` (N, K), ``target`` bool (N, K) and ``value`` (N,), the cross-entropy of each image."""
        logits = model(batch["image"]).float()
        return {"preds": logits, "target": batch["present"], "value": _cross_entropy(logits, batch["present"])}

    def predict(self, model: nn.Module, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """Return the probability of each class of each image; arguments as of `Task.predict`."""
        with evaluating(model), torch.no_grad():
            probabilities = model(images).float().sigmoid().cpu()
        return [LabelPrediction(row, self.threshold) for row in probabilities]

    def truth(self, sample: Sample) -> LabelPrediction:
        """Return the sample's classes, with probabilities of 1."""
        return LabelPrediction(sample["present"].float(), self.threshold)

    def rate(self, outputs: Mapping[str, Any]) -> Tensor:
        """Return the geometric mean of the probabilities of the right answers of each image, (N,)."""
        return torch.exp(-_cross_entropy(outputs["preds"].double(), outputs["target"]))

    def scores(self, metrics: MetricCollection) -> MultiLabelScores:
        """Return the results of each class."""
        found: Any = dict(metrics.items())["classes"]
        scores: MultiLabelScores = found.scores()
        return scores

    def metrics(self) -> MetricCollection:
        """Return ``loss``, ``map``, ``cf1`` and ``of1``."""
        from torchmetrics import MeanMetric, MetricCollection

        from widefield.tasks.multilabel_scores import MultiLabelMetric

        return MetricCollection(
            {
                "loss": MeanMetric(sync_on_compute=False),
                "classes": MultiLabelMetric(self.class_names, self.threshold, sync_on_compute=False),
            },
            compute_groups=False,
        )


def _cross_entropy(logits: Tensor, present: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, present.to(logits), reduction="none").mean(1)


def balanced_weights(dataset: MultiLabelImages) -> list[float]:
    """Return for each class the number of images without it for each image with it; of none as if one had it.

    Raises ValueError if the set does not say which classes its images show.
    """
    if dataset.present is None:
        raise ValueError(
            f"positive_weights: balanced needs the classes of each image, and {type(dataset).__name__} has no "
            f"`present`: give the weights themselves, one for each class."
        )
    counts = dataset.present.sum(0).clip(min=1)
    weights: list[float] = ((len(dataset.present) - counts).clip(min=1) / counts).tolist()
    return weights
