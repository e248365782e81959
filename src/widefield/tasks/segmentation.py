"""Define the task of semantic segmentation: a class at every pixel, cross-entropy, mean intersection over union."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate

from widefield import _checks, dense
from widefield._pixels import IGNORED, best_class
from widefield.data import Sample
from widefield.dense.layers import widened
from widefield.surgery.answers import described, meant, wrapping
from widefield.tasks.base import Batch, Labeled, Task, built, entropy_of, training_on, tried
from widefield.tasks.metric_names import HEADLINES
from widefield.tasks.pixel_losses import cross_entropy, dice_loss, hard_pixels
from widefield.tasks.predictions import MaskPrediction, Prediction

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

    from widefield.tasks.confusion import SegmentationScores

MODELS = {"upernet": "UPerNet", "deeplabv3plus": "DeepLabV3Plus", "semantic_fpn": "SemanticFPN", "fcn": "FCN"}
"""Name of a model in recipes -> its class in ``widefield.dense``."""
_ENTRIES = ("image", "mask", "size_group")
_OHEM = ("threshold", "min_kept")
_ONE_PER_PROCESS = (
    " With several processes, one image in each is enough with sync_batchnorm: true. Of the models, semantic_fpn pools "
    "no map to one pixel."
)
_VALUES = 2**26
"""Most values of one map in evaluation, 256 MB in float32. Images of one size share a forward pass up to this."""
_WIDTH = 128
"""Values per pixel that the heads need at least: UPerNet's widest map has 2048 channels at a quarter of the size."""
_ROWS = 256
"""Rows of a band of an image."""


class Segmentation(Task):
    """Semantic segmentation by a model that maps images (N, C, H, W) to logits (N, K, H, W).

    The loss is that of mmsegmentation 1.2.2: the mean cross-entropy of the logits, plus ``auxiliary_weight`` times that
    of the auxiliary logits if the model gives such in training mode. Metrics: ``miou``, ``macc`` and ``aacc``
    (fractions, see :class:`SegmentationScores`), ``loss`` (cross-entropy in nats, the mean over all pixels with a
    class), ``miou_NAME`` for each size group that the data know, and ``boundary_miou`` on request. They are measured at
    the size of each mask, on logits of the images at the size that the data set gives them.

    Batches hold ``image`` float32 (N, C, H, W), ``mask`` int64 (N, H, W) and, if the samples have it, ``size_group``
    uint8 (N, H, W). Each is a list of N tensors if their sizes differ, which is possible in evaluation only.

    Args:
        classes: names of the classes.
        ignore_index: value of mask pixels without a class.
        size_groups: names of the groups of objects by size; empty if sizes are unknown.
        model: which of ``MODELS`` to build on the backbone.
        head_args: further arguments of its class, such as ``{"channels": 256}``.
        auxiliary_weight: factor of the loss of the auxiliary logits.
        class_weights: factor of each class in the cross-entropy, which is then divided by the sum of the pixels'
            weights; see :func:`widefield.tasks.pixel_losses.cross_entropy`. Null: 1.
        avg_non_ignore: leave pixels without a class out of the loss's denominator. Each process then has its own.
        ohem: ``{"threshold": 0.7, "min_kept": 100000}`` trains the main logits on hard pixels only; see
            :func:`hard_pixels`. Null: on all.
        dice: factor of the Dice loss of the main logits, which is added.
        test: how images are segmented in evaluation: ``"whole"`` or ``"slide"``, in windows. See
            :func:`widefield.dense.segment` for this and the next four.
        window: side of the windows in pixels, or (height, width).
        stride: from one window to the next; null: two thirds of ``window``.
        scales: sizes relative to the images; their probabilities are averaged.
        flip: average with the mirror images, too.
        boundary: distance for the boundary IoU as a fraction of the diagonal, such as 0.02; null: do not measure it.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range; the message names it.
    """

    headline = HEADLINES["segmentation"]
    higher_is_better = True
    rating = "its mean IoU, over the classes in its label or its prediction"
    model_args = {"features_only": True}  # noqa: RUF012 (read only, as in the base class)

    def __init__(
        self,
        classes: Sequence[str],
        ignore_index: int = IGNORED,
        size_groups: Sequence[str] = (),
        *,
        model: str = "upernet",
        head_args: Mapping[str, Any] | None = None,
        auxiliary_weight: float = 0.4,
        class_weights: Sequence[float] | None = None,
        avg_non_ignore: bool = False,
        ohem: Mapping[str, Any] | None = None,
        dice: float = 0.0,
        test: str = "whole",
        window: int | Sequence[int] | None = None,
        stride: int | Sequence[int] | None = None,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        boundary: float | None = None,
    ) -> None:
        self.classes, self.size_groups = tuple(classes), tuple(size_groups)
        if len(self.classes) < 2:
            raise ValueError(f"a segmentation task needs at least two classes; got {list(self.classes)}.")
        self.ignore_index = ignore_index
        self._kind = MODELS[_checks.choice("model", model, tuple(MODELS))]
        self._head_args = dict(head_args or {})
        self.auxiliary_weight = _checks.number("auxiliary_weight", auxiliary_weight)
        self._averaging: dict[str, Any] = {
            "ignore_index": ignore_index,
            "class_weights": _weights(class_weights, self.classes),
            "avg_non_ignore": bool(avg_non_ignore),
        }
        self._ohem = None if ohem is None else _mining(ohem)
        self._dice = _checks.number("dice", dice)
        if _checks.choice("test", test, ("whole", "slide")) == "slide" and window is None:
            raise ValueError("test: slide needs a window, such as window: 512.")
        if test == "whole" and (window is not None or stride is not None):
            raise ValueError("window and stride are for test: slide; set that, or leave them out.")
        self._views: dict[str, Any] = {"window": window, "stride": stride, "scales": scales, "flip": bool(flip)}
        dense.check_views(**self._views)
        self._boundary = None if boundary is None else _checks.number("boundary", boundary, maximum=1.0)

    @classmethod
    def for_data(cls, dataset: Labeled, **options: Any) -> Self:
        """Build the task for a data set with ``classes`` and, if it has them, ``ignore_index`` and ``size_groups``."""
        ignored, groups = getattr(dataset, "ignore_index", IGNORED), getattr(dataset, "size_groups", ())
        return cls(dataset.classes, ignored, groups, **options)

    def model(self, backbone: nn.Module) -> nn.Module:
        """Return the model named by the option ``model`` on this backbone."""
        return built(getattr(dense, self._kind), backbone, self.classes, self._head_args)

    def check(self, model: nn.Module, shape: tuple[int, int, int]) -> None:
        """Raise ValueError unless a model gives a logit for each class at every pixel."""
        output = tried(model, shape)
        logits = meant(output)
        if logits is None or logits.ndim != 4:
            raise ValueError(f"it gives no logits (N, classes, H, W); it gives {described(output)}.{wrapping(output)}")
        if logits.shape[1] != len(self.classes):
            raise ValueError(f"it gives {logits.shape[1]} maps, and the data have {len(self.classes)} classes.")

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Return ``image``, ``mask`` and ``size_group`` of the samples: stacked, or in lists if sizes differ."""
        entries = {name: [sample[name] for sample in samples] for name in _ENTRIES if name in samples[0]}
        return {
            name: default_collate(found) if len({tuple(one.shape) for one in found}) == 1 else found
            for name, found in entries.items()
        }

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of the batch, a scalar."""
        image, mask = batch["image"], batch["mask"]
        if not isinstance(image, Tensor) or not isinstance(mask, Tensor):
            raise ValueError(
                "the images of a training batch differ in size: let the data set crop or pad them to one size."
            )
        with training_on(image, _ONE_PER_PROCESS):
            answer = model(image)
        out, auxiliary = answer if isinstance(answer, tuple) else (answer, None)
        logits = _at(out, mask, model)
        chosen = None if self._ohem is None else hard_pixels(logits, mask, ignore_index=self.ignore_index, **self._ohem)
        loss = cross_entropy(logits, mask, chosen=chosen, **self._averaging)
        if self._dice:
            loss = loss + self._dice * dice_loss(logits, mask, ignore_index=self.ignore_index)
        if auxiliary is not None:  # with weight 0, too: distributed training needs a gradient for every parameter
            loss = loss + self.auxiliary_weight * cross_entropy(_at(auxiliary, mask, model), mask, **self._averaging)
        return loss

    def image_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of each image's pixels, (N,); 0 without a pixel that has a class."""
        values: Tensor = self.outputs(model, batch)["value"]
        return values

    def blind_loss(self, batches: Iterable[Batch]) -> float:
        """Return the entropy of the pixels' classes, in nats."""
        masks = (mask for batch in batches for mask in batch["mask"])
        return entropy_of((mask[mask != self.ignore_index] for mask in masks), len(self.classes))

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        """Return what the metrics take, each entry with one element for each of the N images.

        ``preds`` and ``target``: classes, int64 (H, W) in lists; ``size_group``, if the batch has it; ``value`` and
        ``weight``: the mean cross-entropy of each image's pixels, and their number.
        """
        images, masks = list(batch["image"]), list(batch["mask"])
        preds: list[Tensor] = []
        values: list[Tensor] = []
        for chunk in self._chunks(images, masks):
            labels = torch.stack(masks[chunk])
            scores = dense.segment(model, torch.stack(images[chunk]), size=tuple(labels.shape[1:]), **self._views)
            preds += best_class(scores)
            values.append(self._totals(scores, labels))
        weight = torch.stack([(mask != self.ignore_index).sum() for mask in masks])
        found = {"preds": preds, "target": masks, "value": torch.cat(values) / weight.clamp(min=1), "weight": weight}
        return {**found, "size_group": list(batch["size_group"])} if "size_group" in batch else found

    def predict(self, model: nn.Module, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """Return the class of each pixel at the size of each file, by the same rules as in evaluation."""
        found: list[Prediction] = []
        for image, size in zip(images, sizes, strict=True):
            if self._gives_shares:
                mask = best_class(dense.segment(model, image[None], size=size, **self._views))
            else:
                corners = bool(getattr(model, "align_corners", False))
                logits = dense.segment(model, image[None], **self._views)
                mask = dense.largest_at(logits, size, align_corners=corners)
            found.append(_mask_prediction(mask[0], len(self.classes)))
        return found

    def truth(self, sample: Sample) -> Prediction:
        """Return the sample's mask."""
        return _mask_prediction(sample["mask"], len(self.classes))

    def rate(self, outputs: Mapping[str, Any]) -> Tensor:
        """Return the mean IoU of each image over the classes in its mask or its prediction; NaN without any pixel."""
        from widefield.tasks.confusion import Confusion

        rated = []
        for mine, true in zip(outputs["preds"], outputs["target"], strict=True):
            counts = Confusion(self.classes, (), self.ignore_index).to(mine.device)
            counts.update([mine], [true])
            rated.append(counts.scores().iou.nanmean())
        return torch.stack(rated)

    def metrics(self) -> MetricCollection:
        """Return the metrics: one count of pixels, which gives all fractions, and ``loss``."""
        from torchmetrics import MeanMetric, MetricCollection

        from widefield.tasks.confusion import Confusion

        counts = Confusion(self.classes, self.size_groups, self.ignore_index, self._boundary, sync_on_compute=False)
        return MetricCollection(
            {"confusion": counts, "loss": MeanMetric(sync_on_compute=False)},
            compute_groups=False,
        )

    def scores(self, metrics: MetricCollection) -> SegmentationScores:
        """Return the counts in updated metrics of :meth:`metrics`: per class, by size, and the confusion matrix."""
        counts: Any = metrics["confusion"]
        found: SegmentationScores = counts.scores()
        return found

    def _chunks(self, images: Sequence[Tensor], masks: Sequence[Tensor]) -> Iterator[slice]:
        """Yield the images to evaluate together: neighbors of one size with masks of one size, as memory permits."""
        width, scale = max(len(self.classes), _WIDTH), max(self._views["scales"]) ** 2
        sizes = [(image.shape, mask.shape) for image, mask in zip(images, masks, strict=True)]
        start = 0
        for (image, mask), same in itertools.groupby(sizes):
            end = start + len(list(same))
            pixels = max(image[1] * image[2] * scale, mask[0] * mask[1])
            count = max(int(_VALUES / (width * pixels)), 1)
            yield from (slice(first, min(first + count, end)) for first in range(start, end, count))
            start = end

    def _totals(self, scores: Tensor, masks: Tensor) -> Tensor:
        """Return the sum of the cross-entropy over each image's pixels, (N,); of bands of rows, which bounds memory."""
        totals = scores.new_zeros(len(scores))
        for band, labels in zip(scores.split(_ROWS, 2), masks.split(_ROWS, 1), strict=True):
            least = torch.finfo(band.dtype).tiny  # a probability may round to 0
            logs = band.clamp(min=least).log() if self._gives_shares else band.log_softmax(1)
            losses = F.nll_loss(logs, labels, ignore_index=self.ignore_index, reduction="none")
            totals += losses.sum((1, 2))
        return totals

    @property
    def _gives_shares(self) -> bool:
        """Return whether there are several views, so that their mean is of probabilities."""
        return len(self._views["scales"]) > 1 or self._views["flip"]


def _mask_prediction(mask: Tensor, classes: int) -> MaskPrediction:
    return MaskPrediction(mask.to("cpu", torch.uint8 if classes <= 256 else torch.int32))


def _at(logits: Tensor, mask: Tensor, model: nn.Module) -> Tensor:
    """Return logits in float32 or wider, resized to the mask."""
    logits = widened(logits)
    if logits.shape[2:] == mask.shape[1:]:
        return logits
    corners = bool(getattr(model, "align_corners", False))
    return F.interpolate(logits, mask.shape[1:], mode="bilinear", align_corners=corners)


def _weights(value: Any, classes: Sequence[str]) -> list[float] | None:
    if value is None:
        return None
    if not isinstance(value, (tuple, list)) or len(value) != len(classes):
        raise ValueError(f"class_weights must be {len(classes)} numbers, one for each class; got {value!r}.")
    return [_checks.number("every entry of class_weights", weight) for weight in value]


def _mining(value: Mapping[str, Any]) -> dict[str, Any]:
    for key in value:
        if key not in _OHEM:
            near = _checks.did_you_mean(key, _OHEM)
            raise ValueError(f"ohem has no option {key!r}.{near} It takes {', '.join(_OHEM)}.")
    threshold = value.get("threshold")
    return {
        "threshold": None if threshold is None else _checks.number("ohem.threshold", threshold, maximum=1.0),
        "min_kept": _checks.integer("ohem.min_kept", value.get("min_kept", 100_000)),
    }
