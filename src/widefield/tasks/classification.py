"""Define the classification task: one label per image, cross-entropy, top-1 and top-5 accuracy.

Mixup (Zhang et al. 2018), CutMix (Yun et al. 2019) and label smoothing (Szegedy et al. 2016) are timm's. Their
defaults are those of the recipes of DeiT and ConvNeXt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from widefield import _checks
from widefield.data import MultiLabelImages, Sample, SampleSet
from widefield.data.base import labels_of
from widefield.surgery.answers import evaluating
from widefield.tasks.base import Batch, Labeled, entropy_of, sum_of, training_on
from widefield.tasks.image_classes import ImageClasses, weights_of
from widefield.tasks.metric_names import HEADLINES
from widefield.tasks.predictions import ClassPrediction, Prediction

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

    from widefield.tasks.class_scores import ClassificationScores

LOSSES = ("cross_entropy", "binary")


class Classification(ImageClasses):
    """Classification of images by a model that maps (N, C, H, W) to logits (N, num_classes).

    Batches hold ``image`` float32 (N, C, H, W) and ``label`` int64 (N,) in [0, num_classes). The metrics are ``top1``
    and, with more than five classes, ``top5`` (fractions of the images), and ``loss`` (plain cross-entropy in nats,
    without smoothing or mixing).

    Args:
        num_classes: number of classes, at least 2.
        label_smoothing: share of the target spread evenly over all classes, from 0 to 1.
        mixup: alpha of mixup's Beta(alpha, alpha); 0 is off.
        cutmix: alpha of CutMix's; 0 is off.
        mix_prob: probability that a batch is mixed.
        switch_prob: probability of CutMix instead of mixup, if both are on.
        mix_mode: what shares one lambda: the ``"batch"``, each ``"pair"``, or each element, ``"elem"``.
        loss: ``"cross_entropy"``, or ``"binary"``: the mean binary cross-entropy of all classes (Wightman et al. 2021,
            "ResNet strikes back"). It is the loss that is trained; the metric stays cross-entropy.
        class_weights: weight of each class in the cross-entropy that is trained, as in PyTorch's ``weight``;
            ``"balanced"``: in inverse proportion to the class's number of train images, 1 on average over the images.
        class_names: names of the classes, for the results of each class; default: their indices.

    Mixing draws from numpy's global generator, as timm does.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range; the message names it.
    """

    headline = HEADLINES["classification"]
    higher_is_better = True
    rating = "the probability of the true class"
    _teacher: Callable[[Tensor], Tensor] | None = None

    def __init__(
        self,
        num_classes: int,
        *,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mix_prob: float = 1.0,
        switch_prob: float = 0.5,
        mix_mode: str = "batch",
        loss: str = "cross_entropy",
        class_weights: str | Sequence[float] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(_checks.integer("num_classes", num_classes, minimum=2), class_names)
        smoothing = _checks.number("label_smoothing", label_smoothing, maximum=1.0)
        if smoothing == 1:
            raise ValueError("label_smoothing must be below 1; at 1 the targets no longer depend on the labels.")
        mixup, cutmix = _checks.number("mixup", mixup), _checks.number("cutmix", cutmix)
        mixer = Mixup(
            mixup_alpha=mixup,
            cutmix_alpha=cutmix,
            prob=_checks.number("mix_prob", mix_prob, maximum=1.0),
            switch_prob=_checks.number("switch_prob", switch_prob, maximum=1.0),
            mode=_checks.choice("mix_mode", mix_mode, ("batch", "pair", "elem")),
            label_smoothing=smoothing,
            num_classes=self.num_classes,
        )
        self._mixer = mixer if mixup or cutmix else None
        self._smoothing = smoothing
        self._weights = weights_of("class_weights", class_weights, self.num_classes)
        if self._weights is not None and loss == "binary":
            raise ValueError("class_weights are for loss: cross_entropy; the binary loss has none.")
        self._criterion: nn.Module
        if _checks.choice("loss", loss, LOSSES) == "binary":
            self._criterion = BinaryCrossEntropy(0.0 if self._mixer else smoothing)  # the mixer smooths
        else:
            self._criterion = SoftTargetCrossEntropy() if self._mixer else LabelSmoothingCrossEntropy(smoothing)

    @classmethod
    def for_data(cls, dataset: Labeled, **options: Any) -> Self:
        """Build the task for a data set with ``classes``; ``class_weights: balanced`` counts its labels.

        Raises ValueError for a data set whose images have several labels.
        """
        if isinstance(dataset, MultiLabelImages):
            raise ValueError(
                f"the task classification needs images with one label each, and those of {type(dataset).__name__} have "
                f"any number: use the task multilabel."
            )
        if options.get("class_weights") == "balanced" and isinstance(dataset, SampleSet):
            options = {**options, "class_weights": balanced_weights(dataset)}
        return cls(len(dataset.classes), **{"class_names": dataset.classes, **options})

    def learn_from(
        self, teacher: Callable[[Tensor], Tensor], *, weight: float, temperature: float = 1.0, hard: bool = False
    ) -> None:
        """Add a teacher's answers to the loss, which becomes (1 - weight) * loss + weight * the teacher's.

        That is the Kullback-Leibler divergence of the student's probabilities from the teacher's, both at the
        temperature, times its square (Hinton et al. 2015, sec. 2); or, with ``hard``, the cross-entropy with the
        teacher's class (Touvron et al. 2021, DeiT, eq. 3). The teacher sees mixed images as the student does.

        Raises:
            ValueError: the loss is binary, so the probabilities of the classes do not depend on each other.
        """
        if isinstance(self._criterion, BinaryCrossEntropy):
            raise ValueError("distillation needs loss: cross_entropy; the binary loss has no probabilities to compare.")
        self._teacher, self._share, self._temperature, self._hard = teacher, weight, temperature, hard

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss of the batch after mixing and smoothing, a scalar."""
        return sum_of(self._parts(model, batch))

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Return ``loss``; with a teacher ``labels`` and ``teacher``, whose sum it is."""
        return super().losses(model, batch) if self._teacher is None else self._parts(model, batch)

    def _parts(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        image, target = batch["image"], batch["label"]
        if self._mixer:
            image, target = self._mixer(*_even(image, target))
        with training_on(image):
            logits = model(image).float()
        loss: Tensor = self._criterion(logits, target) if self._weights is None else self._weighted(logits, target)
        if self._teacher is None:
            return {"loss": loss}
        return {"labels": (1 - self._share) * loss, "teacher": self._share * self._taught(logits, self._teacher(image))}

    def _taught(self, logits: Tensor, answer: Tensor) -> Tensor:
        """Return the mean loss of the batch with a teacher's logits, a scalar."""
        if self._hard:
            return F.cross_entropy(logits, answer.argmax(1))
        mine, its = ((x / self._temperature).log_softmax(1) for x in (logits, answer))
        return F.kl_div(mine, its, reduction="batchmean", log_target=True) * self._temperature**2

    def _weighted(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross-entropy with class weights for labels (N,), or for shares (N, num_classes)."""
        if self._weights == "balanced":
            raise ValueError("class_weights: balanced needs the train set: build the task with for_data.")
        weight = logits.new_tensor(self._weights)
        if target.ndim == 1:
            return F.cross_entropy(logits, target, weight, label_smoothing=self._smoothing)
        return F.cross_entropy(logits, target, weight, reduction="none").sum() / (target @ weight).sum()

    def image_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the cross-entropy of each image, (N,), without mixing and smoothing."""
        return F.cross_entropy(model(batch["image"]).float(), batch["label"], reduction="none")

    def blind_loss(self, batches: Iterable[Batch]) -> float:
        """Return the entropy of the labels, in nats."""
        return entropy_of((batch["label"] for batch in batches), self.num_classes)

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        """Return ``preds`` (N, num_classes), ``target`` (N,) and ``value`` (N,), the cross-entropy of each image."""
        logits = model(batch["image"]).float()
        label = batch["label"]
        return {"preds": logits, "target": label, "value": F.cross_entropy(logits, label, reduction="none")}

    def predict(self, model: nn.Module, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """Return the probabilities of each image's classes; arguments as of `Task.predict`."""
        with evaluating(model), torch.no_grad():
            probabilities = model(images).float().softmax(1).cpu()
        return [ClassPrediction(row) for row in probabilities]

    def truth(self, sample: Sample) -> ClassPrediction:
        """Return the sample's label, with a probability of 1."""
        return ClassPrediction(F.one_hot(torch.tensor(sample["label"]), self.num_classes).float())

    def rate(self, outputs: Mapping[str, Any]) -> Tensor:
        """Return the probability of each image's true class, (N,)."""
        shares = outputs["preds"].double().softmax(1)
        rated: Tensor = shares.gather(1, outputs["target"][:, None])[:, 0]
        return rated

    def headline_parts(self, outputs: Mapping[str, Any]) -> Tensor:
        """Return whether the first prediction of each image is its class, 0 or 1, (N,)."""
        right: Tensor = outputs["preds"].argmax(1) == outputs["target"]
        return right.double()

    def scores(self, metrics: MetricCollection) -> ClassificationScores | None:
        """Return which classes were predicted for the images of each class; None for very many classes."""
        counts: Any = dict(metrics.items()).get("counts")
        found: ClassificationScores | None = None if counts is None else counts.scores()
        return found

    def metrics(self) -> MetricCollection:
        """Return ``loss``, ``top1`` and, with more than five classes, ``top5``, and the counts of :meth:`scores`."""
        from torchmetrics import MeanMetric, MetricCollection
        from torchmetrics.classification import MulticlassAccuracy

        from widefield.tasks.class_scores import MOST_CLASSES, ClassCounts

        accuracies = {
            f"top{k}": MulticlassAccuracy(self.num_classes, top_k=k, average="micro", sync_on_compute=False)
            for k in (1, 5)
            if k == 1 or self.num_classes > k
        }
        counts = {"counts": ClassCounts(self.class_names, sync_on_compute=False)}
        # Without compute groups: torchmetrics merges metrics whose states agree after the first batch. Top-1 and top-5
        # agree there if the model makes no mistake.
        return MetricCollection(
            {
                "loss": MeanMetric(sync_on_compute=False),
                **accuracies,
                **(counts if self.num_classes <= MOST_CLASSES else {}),
            },
            compute_groups=False,
        )


def _even(image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Return copies of an even length, because timm mixes in place and in pairs.

    A batch of odd length, from a data set that leaves out unreadable images, repeats its last image.
    """
    if len(image) % 2:
        return torch.cat([image, image[-1:]]), torch.cat([label, label[-1:]])
    return image.clone(), label


def balanced_weights(dataset: SampleSet) -> list[float]:
    """Return the weight of each class that makes all classes count alike: N / (K n) for n of N images, of K classes.

    A class without images gets the weight of one with one image.

    Raises:
        ValueError: the set does not say the labels of its images.
    """
    labels = labels_of(dataset, "class_weights: balanced", "give the weights themselves, one for each class")
    counts = np.bincount(labels, minlength=len(dataset.classes))
    weights: list[float] = (len(labels) / (len(counts) * counts.clip(min=1))).tolist()
    return weights
