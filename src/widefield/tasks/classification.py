"""Define the classification task: one label per image, cross-entropy, top-1 and top-5 accuracy.

Mixup (Zhang et al. 2018), CutMix (Yun et al. 2019) and label smoothing (Szegedy et al. 2016) are timm's. Their
defaults are those of the recipes of DeiT and ConvNeXt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from widefield import _checks
from widefield.surgery.answers import described, evaluating, wrapping
from widefield.tasks.base import Batch, Labeled, Task, entropy_of, training_on
from widefield.tasks.headlines import HEADLINES
from widefield.tasks.predictions import ClassPrediction, Prediction

LOSSES = ("cross_entropy", "binary")


class Classification(Task):
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

    Mixing draws from numpy's global generator, as timm does.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range; the message names it.
    """

    headline = HEADLINES["classification"]
    higher_is_better = True

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
    ) -> None:
        self.num_classes = _checks.integer("num_classes", num_classes, minimum=2)
        self.model_args = {"num_classes": self.num_classes}
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
        self._criterion: nn.Module
        if _checks.choice("loss", loss, LOSSES) == "binary":
            self._criterion = BinaryCrossEntropy(0.0 if self._mixer else smoothing)  # the mixer smooths
        else:
            self._criterion = SoftTargetCrossEntropy() if self._mixer else LabelSmoothingCrossEntropy(smoothing)

    @classmethod
    def for_data(cls, dataset: Labeled, **options: Any) -> Self:
        """Build the task for a data set with ``classes``."""
        return cls(len(dataset.classes), **options)

    def check(self, model: nn.Module, shape: tuple[int, int, int]) -> None:
        """Raise ValueError unless a model gives a logit for each class."""
        outputs = count_outputs(model, shape)
        if outputs != self.num_classes:
            raise ValueError(f"it gives {outputs} outputs, and the task needs {self.num_classes}, one for each class.")

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss of the batch after mixing and smoothing, a scalar."""
        image, target = batch["image"], batch["label"]
        if self._mixer:
            image, target = self._mixer(*_even(image, target))
        with training_on(image):
            loss: Tensor = self._criterion(model(image).float(), target)
        return loss

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

    def metrics(self) -> MetricCollection:
        """Return ``loss``, ``top1`` and, with more than five classes, ``top5``."""
        accuracies = {
            f"top{k}": MulticlassAccuracy(self.num_classes, top_k=k, average="micro", sync_on_compute=False)
            for k in (1, 5)
            if k == 1 or self.num_classes > k
        }
        # Without compute groups: torchmetrics merges metrics whose states agree after the first batch. Top-1 and top-5
        # agree there if the model makes no mistake.
        return MetricCollection(
            {"loss": MeanMetric(sync_on_compute=False), **accuracies},
            compute_groups=False,
        )


def _even(image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Return copies of an even length, because timm mixes in place and in pairs.

    A batch of odd length, from a data set that leaves out unreadable images, repeats its last image.
    """
    if len(image) % 2:
        return torch.cat([image, image[-1:]]), torch.cat([label, label[-1:]])
    return image.clone(), label


def count_outputs(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """Return how many logits a model gives for an image, from one forward pass in evaluation mode.

    Args:
        model: left in its mode.
        shape: (C, H, W) of the image.

    Raises:
        ValueError: the model refuses such images, or does not return one vector per image.
    """
    first = next(model.parameters(), torch.empty(0))
    image = torch.zeros(1, *shape, device=first.device, dtype=first.dtype)
    try:
        with evaluating(model), torch.no_grad():
            logits = model(image)
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{type(model).__name__} refuses images of {'x'.join(map(str, shape))} (channels, height, width): {reason}"
        ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ValueError(
            f"{type(model).__name__} gives no logits (N, classes) for images; it gives {described(logits)}."
            f"{wrapping(logits)}"
        )
    return logits.shape[1]
