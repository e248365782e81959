"""Define the task of top-down pose estimation: heatmaps of the key points of one person or thing in each crop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from widefield._coco.keypoints import oks
from widefield.data import Sample
from widefield.data.crops import PADDING
from widefield.data.skeleton import Skeleton
from widefield.dense.heatmap import HeatmapPose
from widefield.dense.heatmap_codec import HeatmapCodec
from widefield.dense.layers import widened
from widefield.dense.pose_rules import PoseRules
from widefield.surgery.answers import described, evaluating, meant, wrapping
from widefield.tasks.base import Batch, Labeled, Task, built, training_on, tried
from widefield.tasks.metric_names import HEADLINES
from widefield.tasks.pose_scores import PoseScores
from widefield.tasks.predictions import PosePrediction, Prediction
from widefield.tasks.sizes import OCTAVES

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

_PEOPLE = {
    "people": "keypoints",
    "people_boxes": "boxes",
    "people_area": "areas",
    "people_labels": "labels",
    "people_crowd": "crowd",
}
"""Entries of val samples whose length differs (see `widefield.data.PoseSet`) -> attributes of `People`."""
_OWN = ("channels", "kind", "sigma", "blur")
"""Options that are arguments of the model."""


class PoseEstimation(Task):
    """Top-down pose estimation: a model maps the crop around a person (N, C, h, w) to heatmaps (N, K, H, W).

    The loss is mmpose's: the mean squared difference to target heatmaps over all pixels and key points, with 0 for key
    points without a label. Metrics are measured in pixels of the files:

    - ``oks_ap`` (mean over OKS from 0.5 to 0.95), ``oks_ap50``, ``oks_ap75``, ``oks_ap_medium``, ``oks_ap_large`` and
      ``oks_ar``: COCO's figures, with the suppression of duplicates and at most 20 poses of a class in an image;
    - ``pck`` and ``pck20``: the fraction of key points closer than 0.05 and 0.2 of the longer side of the person's box,
      averaged over key points; ``auc``: the same averaged over 20 distances from 0 to 28.5 pixels; ``epe``: the mean
      distance in pixels. They are mmpose's ``PCKAccuracy``, ``AUC`` and ``EPE``, and need true boxes.

    All other results are in :class:`PoseScores`.

    Batches hold the entries of the samples, stacked; see `widefield.data.PoseSet`. Those that start with ``people`` are
    lists of N tensors.

    Args:
        skeleton: the key points.
        crop_size: (height, width) of the crops in pixels.
        classes: names of the classes of people or things.
        udp: whether the crops are cut with ``udp``, which ``kind`` must fit.
        padding: sides of the crops relative to the boxes.
        channels: of each deconvolution of the head.
        kind, sigma, blur: how key points become heatmaps, and heatmaps key points; see
            :class:`widefield.dense.HeatmapCodec`. Published: a sigma of 2 for 256x192, 3 (and a blur of 17) for
            384x288.
        flip_test: also run the mirrored crops, and average the heatmaps.
        shift_heatmaps: move the mirrored heatmaps by one pixel; null: unless ``kind`` is udp, as published.
        nms_threshold: of two poses of a class in an image that are more alike (OKS), the one with the lower score is
            dropped; 1 keeps all.
        keypoint_threshold: key points with lower scores do not count in the score of a pose.
        size_bins: edges between the finer groups of people by size, square roots of areas in pixels; null: octaves
            from 8 to 512.
        head_args: further arguments of :class:`widefield.dense.HeatmapPose`, such as ``{"stage_norms": true}``.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range; the message names it.
    """

    headline = HEADLINES["pose"]
    higher_is_better = True
    rating = "the object keypoint similarity of its pose to the true one"
    model_args = {"features_only": True}  # noqa: RUF012 (read only, as in the base class)

    def __init__(
        self,
        skeleton: Skeleton,
        crop_size: tuple[int, int],
        classes: Sequence[str] = ("person",),
        udp: bool = False,
        padding: float = PADDING,
        *,
        channels: Sequence[int] = (256, 256, 256),
        kind: str = "msra",
        sigma: float = 2.0,
        blur: int = 11,
        flip_test: bool = True,
        shift_heatmaps: bool | None = None,
        nms_threshold: float = 0.9,
        keypoint_threshold: float = 0.2,
        size_bins: Sequence[float] | None = None,
        head_args: Mapping[str, Any] | None = None,
    ) -> None:
        self.skeleton, self.classes = skeleton, tuple(classes)
        if not self.classes:
            raise ValueError("a pose task needs the names of the classes of people; the data set has none.")
        self.rules = PoseRules(
            crop_size=(int(crop_size[0]), int(crop_size[1])),
            swapped=skeleton.swapped,
            sigmas=skeleton.sigmas,
            kind=kind,
            sigma=sigma,
            blur=blur,
            flip_test=flip_test,
            shift_heatmaps=shift_heatmaps,
            padding=padding,
            udp=udp,
            keypoint_threshold=keypoint_threshold,
            nms_threshold=nms_threshold,
        )
        if udp != (kind == "udp"):
            raise ValueError(
                f"task.args.kind is {kind!r}, and the crops of the data are cut {'with' if udp else 'without'} udp, "
                f"which shifts key points: set both (data.args.udp: true, kind: udp) or neither."
            )
        if not isinstance(channels, (tuple, list)):
            raise TypeError(f"channels must be a list such as [256, 256, 256]; got {channels!r}.")
        self._head_args = {**(head_args or {}), "channels": channels, "kind": kind, "sigma": sigma, "blur": blur}
        for name in head_args or {}:
            if name in _OWN:
                raise ValueError(f"task.args.head_args.{name} is an option of the task itself: write task.args.{name}.")
        self._measured: dict[str, Any] = {
            "nms_threshold": nms_threshold,
            "size_bins": OCTAVES if size_bins is None else size_bins,
        }
        self.metrics()  # checks them

    @classmethod
    def for_data(cls, dataset: Labeled, **options: Any) -> Self:
        """Build the task for a data set with a skeleton, or for a run's record of one."""
        skeleton, size = (getattr(dataset, name, None) for name in ("skeleton", "crop_size"))
        if skeleton is None or size is None:
            raise ValueError(
                f"the task 'pose' needs crops of people with key points, and {type(dataset).__name__} gives none: use "
                f"data such as coco_keypoints or scene_poses."
            )
        udp, padding = getattr(dataset, "udp", False), getattr(dataset, "padding", PADDING)
        return cls(skeleton, size, dataset.classes, udp, padding, **options)

    def model(self, backbone: nn.Module) -> nn.Module:
        """Return a :class:`widefield.dense.HeatmapPose` on this backbone."""
        return built(HeatmapPose, backbone, self.skeleton.names, self._head_args)

    def check(self, model: nn.Module, shape: tuple[int, int, int]) -> None:
        """Raise ValueError unless a model gives a heatmap for each key point."""
        if isinstance(model, HeatmapPose):
            for name in _OWN[1:]:
                has, wants = getattr(model, name), getattr(self.rules, name)
                if has != wants:
                    raise ValueError(f"its heatmaps have {name} {has!r}, and the task's {wants!r}.")
        output = tried(model, shape)
        heatmaps = meant(output)
        if heatmaps is None or heatmaps.ndim != 4:
            raise ValueError(f"it gives no heatmaps (N, K, H, W); it gives {described(output)}.{wrapping(output)}")
        if heatmaps.shape[1] != len(self.skeleton.names):
            raise ValueError(
                f"it gives {heatmaps.shape[1]} heatmaps, and the data have {len(self.skeleton.names)} key points."
            )
        self._codec(heatmaps)  # refuses heatmaps of one pixel

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Return the samples as a batch, see above."""
        lists = {name: [sample[name] for sample in samples] for name in _PEOPLE if name in samples[0]}
        rest = [{name: value for name, value in one.items() if not name.startswith("people")} for one in samples]
        return {**default_collate(rest), **lists}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of the batch, a scalar."""
        with training_on(batch["image"]):
            return self._errors(model, batch).mean()

    def image_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of each crop, (N,)."""
        return self._errors(model, batch).mean((1, 2, 3))

    def _errors(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the squared errors of the heatmaps, (N, K, H, W); 0 for key points without a label."""
        heatmaps = widened(model(batch["image"]))
        points, visible = batch["keypoints"][..., :2], batch["keypoints"][..., 2] > 0
        target, weights = self._codec(heatmaps).encode(points, visible)
        return (heatmaps - target) ** 2 * weights[..., None, None]

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        """Return what the metrics take: ``preds``, ``target`` and ``index``, see `PoseMetric.update`."""
        from widefield.tasks.pose_metric import FoundPoses, People, TruePoses

        read = self.rules.decode(self.rules.heatmaps(model, batch["image"]))
        box_scores = batch["box_score"]
        height, width = (side - self.rules.aligned for side in self.rules.crop_size)
        preds = FoundPoses(
            points=self.rules.to_file(read.points, batch["affine"]).cpu(),
            scores=self.rules.pose_scores(read.scores, box_scores).cpu(),
            boxes=batch["box"].cpu(),
            areas=(height * width / torch.linalg.det(batch["affine"][..., :2]).abs()).cpu(),
            labels=batch["label"].cpu(),
            images=batch["image_id"].cpu(),
        )
        for name in _PEOPLE:
            if name not in batch:
                raise ValueError(f"poses are measured on val samples, which have the entry {name!r}; these have none.")
        people = [
            People(**{attribute: batch[name][row].cpu() for name, attribute in _PEOPLE.items()})
            for row in range(len(batch["image"]))
        ]
        target = TruePoses(batch["truth"].cpu(), batch["area"].cpu(), people)
        return {"preds": preds, "target": target, "index": batch.get("index")}

    def counted(self, outputs: Mapping[str, Any]) -> int:
        """Return the number of crops that stand for a box."""
        return int(outputs["preds"].scores.isfinite().sum())

    def predict(self, model: nn.Module, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """Return the pose in each crop.

        Poses in whole images are found by :func:`widefield.dense.estimate_poses`.

        Args:
            model: in any mode.
            images: float32 (N, 3, H, W), crops.
            sizes: (height, width) to which key points are scaled: those of the crops, or of them enlarged.
        """
        with evaluating(model), torch.no_grad():
            read = self.rules.decode(self.rules.heatmaps(model, images))
        crop = read.points.new_tensor([images.shape[3], images.shape[2]])
        size = read.points.new_tensor([[width, height] for height, width in sizes])[:, None]
        points = ((read.points + 0.5) * size / crop - 0.5).float().cpu()
        overall = self.rules.pose_scores(read.scores, read.scores.new_ones(len(images))).float().cpu()
        scores = read.scores.float().cpu()
        return [
            PosePrediction(
                points[row : row + 1], scores[row : row + 1], overall[row : row + 1],
                torch.tensor([[0.0, 0, width, height]]), size=(height, width), skeleton=self.skeleton,
                threshold=self.rules.keypoint_threshold,
            )
            for row, (height, width) in enumerate(sizes)
        ]  # fmt: skip

    def truth(self, sample: Sample) -> Prediction:
        """Return the true pose in a sample's crop; without visible key points for a detector's box."""
        height, width = sample["image"].shape[1:]
        points = sample["keypoints"][None]
        return PosePrediction(
            points[..., :2], torch.ones(points.shape[:2]), None, torch.tensor([[0.0, 0, width, height]]),
            visible=points[..., 2], labels=sample["label"][None], size=(height, width), skeleton=self.skeleton,
        )  # fmt: skip

    def rate(self, outputs: Mapping[str, Any]) -> Tensor:
        """Return the OKS of each pose with the person in its box; NaN without a labeled key point."""
        found, true = outputs["preds"], outputs["target"]
        sigmas, rated = np.array(self.skeleton.sigmas, np.float64), []
        for row in range(len(found)):
            part = slice(row, row + 1)
            points, person, area, box = (
                values[part].double().numpy() for values in (found.points, true.keypoints, true.areas, found.boxes)
            )
            alike = oks(points, person, area, box, sigmas)[0, 0] if (person[..., 2] > 0).any() else np.nan
            rated.append(float(alike))
        return torch.tensor(rated, dtype=torch.float64)

    def metrics(self) -> MetricCollection:
        """Return the metrics: one that gives all."""
        from torchmetrics import MetricCollection

        from widefield.tasks.pose_metric import PoseMetric

        return MetricCollection(
            {"pose": PoseMetric(self.classes, self.skeleton, sync_on_compute=False, **self._measured)}
        )

    def scores(self, metrics: MetricCollection) -> PoseScores:
        """Return all results of updated metrics of :meth:`metrics`."""
        metric: Any = metrics["pose"]
        found: PoseScores = metric.scores()
        return found

    def _codec(self, heatmaps: Tensor) -> HeatmapCodec:
        rules, size = self.rules, (heatmaps.shape[2], heatmaps.shape[3])
        return HeatmapCodec(rules.crop_size, size, rules.sigma, rules.kind, rules.blur)
