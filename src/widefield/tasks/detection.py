"""Define the task of object detection and instance segmentation: boxes, classes and masks of objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from widefield import _checks, dense
from widefield.data import Sample
from widefield.data.base import padded
from widefield.dense.anchors import DIVISOR
from widefield.dense.detector import Detections, Detector, Targets
from widefield.surgery.answers import evaluating
from widefield.tasks.base import Batch, Labeled, Task, built, sum_of, training_on
from widefield.tasks.detection_scores import DetectionScores
from widefield.tasks.metric_names import HEADLINES
from widefield.tasks.predictions import BoxPrediction, Prediction
from widefield.tasks.sizes import OCTAVES, RELATIVE_OCTAVES

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

MODELS = {
    "faster_rcnn": "FasterRCNN",
    "mask_rcnn": "MaskRCNN",
    "cascade_rcnn": "CascadeRCNN",
    "retinanet": "RetinaNet",
    "fcos": "FCOS",
}
"""Name of a model in recipes -> its class in ``widefield.dense``."""
_LISTS = ("boxes", "labels", "crowd", "area")


class Detection(Task):
    """Object detection by a model of ``widefield.dense``, with or without masks of the objects.

    The loss is the sum of the model's losses, each of which is logged under its name. Metrics are COCO's: ``box_ap``
    (mean over IoU from 0.5 to 0.95), ``box_ap50``, ``box_ap75``, ``box_ap_small`` (below 32^2 pixels),
    ``box_ap_medium``, ``box_ap_large`` (above 96^2), and with a model that gives masks ``mask_ap``, ... They are
    measured at the size of each file. All other results are in :class:`DetectionScores`.

    With several processes, losses are divided by counts that are averaged over the processes, so that the gradients of
    two are those of one with all images. The samplers of anchors and RoIs draw other random numbers in each.

    Batches hold ``image`` float32 (N, C, H, W), padded by zeros on the right and at the bottom to a multiple of 32;
    ``image_size`` int64 (N, 2), the (height, width) of each image without its padding; ``size`` int64 (N, 2), that of
    its file; and lists of N tensors: ``boxes``, ``labels``, ``crowd``, ``area``, and ``masks`` if the model gives
    masks.

    Args:
        classes: names of the classes of objects, without a background.
        model: which of ``MODELS`` to build on the backbone.
        head_args: further arguments of its class, such as ``{"norm_eval": true}``.
        size_bins: edges between the finer groups of objects by size, square roots of areas in pixels; null: octaves
            from 8 to 512.
        relative_sizes: the edges are in units of the square root of the image's area; octaves from 1/64 to 1/2.
        max_per_image: number of detections of one class in one image that are measured.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range; the message names it.
    """

    headline = HEADLINES["detection"]
    higher_is_better = True
    rating = "the average precision of its boxes alone, over IoU from 0.5 to 0.95 and the classes in its label"
    model_args = {"features_only": True}  # noqa: RUF012 (read only, as in the base class)

    def __init__(
        self,
        classes: Sequence[str],
        *,
        model: str = "faster_rcnn",
        head_args: Mapping[str, Any] | None = None,
        size_bins: Sequence[float] | None = None,
        relative_sizes: bool = False,
        max_per_image: int = 100,
    ) -> None:
        self.classes = tuple(classes)
        if not self.classes:
            raise ValueError("a detection task needs the names of the classes of objects; the data set has none.")
        self._name = _checks.choice("model", model, tuple(MODELS))
        self._head_args = dict(head_args or {})
        self.masks = self._name == "mask_rcnn" or bool(self._head_args.get("masks"))
        usual = RELATIVE_OCTAVES if relative_sizes else OCTAVES
        self._measured: dict[str, Any] = {
            "masks": self.masks,
            "size_bins": usual if size_bins is None else size_bins,
            "relative_sizes": bool(relative_sizes),
            "max_per_image": max_per_image,
        }
        self.metrics()  # checks them

    @classmethod
    def for_data(cls, dataset: Labeled, **options: Any) -> Self:
        """Build the task for a data set with ``object_classes``, or else ``classes``."""
        return cls(getattr(dataset, "object_classes", None) or dataset.classes, **options)

    def model(self, backbone: nn.Module) -> nn.Module:
        """Return the model named by the option ``model`` on this backbone."""
        return built(getattr(dense, MODELS[self._name]), backbone, self.classes, self._head_args)

    def check(self, model: nn.Module, shape: tuple[int, int, int]) -> None:
        """Raise ValueError unless a model is a detector of as many classes."""
        if not isinstance(model, Detector):
            raise ValueError(f"{type(model).__name__} is not a detector of widefield.dense.")
        if model.num_classes != len(self.classes):
            raise ValueError(f"it knows {model.num_classes} classes, and the data have {len(self.classes)}.")
        first = next(model.parameters())
        with evaluating(model), torch.no_grad():
            model(torch.zeros(1, *shape, device=first.device, dtype=first.dtype))

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Return the samples as a batch, see above."""
        if self.masks and "masks" not in samples[0]:
            raise ValueError(
                f"model: {self._name} learns masks, and the data set has none. Choose a model of boxes such as "
                f"faster_rcnn, or data with masks (for coco: data.args.masks: true)."
            )
        images = [sample["image"] for sample in samples]
        sizes = torch.tensor([image.shape[1:] for image in images])
        whole = [-(-int(side) // DIVISOR) * DIVISOR for side in sizes.amax(0)]
        lists = {name: [sample[name] for sample in samples] for name in (*_LISTS, *(("masks",) if self.masks else ()))}
        files = torch.stack([sample["size"] for sample in samples])
        return {"image": padded(images, whole), "image_size": sizes, "size": files, **lists}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of the batch, a scalar."""
        return sum_of(self.losses(model, batch))

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return the losses of the batch by name, scalars."""
        sizes = [(height, width) for height, width in batch["image_size"].tolist()]
        masks = batch["masks"] if self.masks else [None] * len(sizes)
        entries = zip(batch["boxes"], batch["labels"], masks, batch["crowd"], sizes, strict=True)
        with training_on(batch["image"]):
            found: dict[str, Tensor] = model(batch["image"], [Targets(*entry) for entry in entries])
        return found

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        """Return what the metrics take: ``preds``, ``target`` and ``index``, see `CocoMetric.update`."""
        from widefield.tasks.coco_metric import TrueObjects

        found = model(batch["image"], sizes=batch["image_size"], out_sizes=batch["size"])
        masks = batch["masks"] if self.masks else [None] * len(found)
        entries = zip(
            batch["boxes"], batch["labels"], batch["size"].tolist(), batch["crowd"], batch["area"], masks, strict=True
        )
        true = [TrueObjects(boxes, labels, (size[0], size[1]), *rest) for boxes, labels, size, *rest in entries]
        return {"preds": found, "target": true, "index": batch.get("index")}

    def predict(self, model: nn.Module, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """Return the objects of each image in pixels of its file; arguments as of `Task.predict`."""
        with evaluating(model), torch.no_grad():
            found = model(images, out_sizes=sizes)
        return [_box_prediction(one, size) for one, size in zip(found, sizes, strict=True)]

    def truth(self, sample: Sample) -> Prediction:
        """Return the objects of a val sample."""
        height, width = sample["size"].tolist()
        masks = sample.get("masks") if self.masks else None
        return BoxPrediction(
            sample["boxes"], sample["labels"], masks=masks, size=(height, width), crowd=sample.get("crowd")
        )

    def rate(self, outputs: Mapping[str, Any]) -> Tensor:
        """Return the average precision of the boxes of each image on its own; NaN without objects."""
        from widefield.tasks.coco_metric import CocoMetric

        rated = []
        for found, true in zip(outputs["preds"], outputs["target"], strict=True):
            alone = CocoMetric(self.classes)
            alone.update([found], [true])
            rated.append(alone.compute()["box_ap"])
        return torch.stack(rated)

    def metrics(self) -> MetricCollection:
        """Return the metrics: one that gives all of COCO's."""
        from torchmetrics import MetricCollection

        from widefield.tasks.coco_metric import CocoMetric

        return MetricCollection({"coco": CocoMetric(self.classes, sync_on_compute=False, **self._measured)})

    def scores(self, metrics: MetricCollection) -> DetectionScores:
        """Return all results of updated metrics of :meth:`metrics`."""
        metric: Any = metrics["coco"]
        found: DetectionScores = metric.scores()
        return found


def _box_prediction(found: Detections, size: tuple[int, int]) -> BoxPrediction:
    masks = None if found.masks is None else dense.paste_masks(found.masks, found.boxes, size).cpu()
    return BoxPrediction(
        found.boxes.float().cpu(), found.labels.cpu(), found.scores.float().cpu(), masks, size=(size[0], size[1])
    )
