"""One label per image: cross-entropy with the usual regularisers, judged by top-1 and top-5 accuracy.

Mixup (Zhang et al. 2018), CutMix (Yun et al. 2019) and label smoothing (Szegedy et al. 2016) are timm's, with its
defaults where the recipes of DeiT and ConvNeXt take them.
"""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from widefield import _checks
from widefield.tasks.base import Batch, Labelled, Task, training_on


class Classification(Task):
    """Classification of images; the model maps (N, C, H, W) to logits (N, num_classes).

    Batches hold ``image`` float32 (N, C, H, W) and ``label`` int64 (N,) in [0, num_classes). Metrics: ``top1`` and,
    with more than five classes, ``top5`` (fractions of the images), and ``loss`` (plain cross-entropy in nats, without
    smoothing or mixing).

    Args:
        num_classes: number of classes, at least 2.
        label_smoothing: share of the target spread evenly over all classes, from 0 to 1.
        mixup: alpha of mixup's Beta(alpha, alpha); 0 is off.
        cutmix: alpha of CutMix's; 0 is off.
        mix_prob: probability that a batch is mixed at all.
        switch_prob: probability of CutMix rather than mixup, where both are on.
        mix_mode: what is mixed with one lambda: the ``"batch"``, each ``"pair"``, or each element, ``"elem"``.

    Mixing draws from numpy's global generator, as timm does.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range; the message says which.
    """

    headline = "top1"
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
    ) -> None:
        self.num_classes = _checks.integer("num_classes", num_classes, minimum=2)
        self.model_args = {"num_classes": self.num_classes}
        smoothing = _checks.number("label_smoothing", label_smoothing, maximum=1.0)
        if smoothing == 1:
            raise ValueError("label_smoothing must be below 1; at 1 the targets say nothing of the labels.")
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
        self._criterion = SoftTargetCrossEntropy() if self._mixer else LabelSmoothingCrossEntropy(smoothing)

    @classmethod
    def for_data(cls, dataset: Labelled, **options: Any) -> Self:
        """Build the task for a data set with ``classes``."""
        return cls(len(dataset.classes), **options)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of the batch, a scalar, after mixing and smoothing."""
        image, target = batch["image"], batch["label"]
        if self._mixer:
            image, target = self._mixer(*_even(image, target))
        with training_on(image):
            loss: Tensor = self._criterion(model(image).float(), target)
        return loss

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return ``preds`` (N, num_classes), ``target`` (N,) and ``value`` (N,), the cross-entropy of each image."""
        logits = model(batch["image"]).float()
        label = batch["label"]
        return {"preds": logits, "target": label, "value": F.cross_entropy(logits, label, reduction="none")}

    def metrics(self) -> MetricCollection:
        """Return ``loss``, ``top1`` and, with more than five classes, ``top5``."""
        accuracies = {
            f"top{k}": MulticlassAccuracy(self.num_classes, top_k=k, average="micro", sync_on_compute=False)
            for k in (1, 5)
            if k == 1 or self.num_classes > k
        }
        # Without compute groups: torchmetrics merges metrics whose states agree after the first batch, and top-1 and
        # top-5 do agree there whenever a good model makes no mistake in it.
        return MetricCollection(
            {"loss": MeanMetric(sync_on_compute=False), **accuracies},
            compute_groups=False,
        )


def _even(image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Return copies, as timm mixes in place, of an even length, as it mixes in pairs: an odd batch repeats its last.

    Odd batches come from data sets that leave out unreadable images.
    """
    if len(image) % 2:
        return torch.cat([image, image[-1:]]), torch.cat([label, label[-1:]])
    return image.clone(), label
