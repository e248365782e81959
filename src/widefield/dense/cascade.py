"""Cascade R-CNN: three heads, each on the boxes of the one before and with a higher IoU for objects.

Papers: Cai and Vasconcelos, "Cascade R-CNN: Delving into High Quality Object Detection", CVPR 2018; with masks:
"Cascade R-CNN: High Quality Object Detection and Instance Segmentation", TPAMI 2019, section 5. Settings and names are
those of OpenMMLab's code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from widefield import _checks
from widefield.dense.backbone import Backboned, FeatureMaps, StageNorms, feature_maps
from widefield.dense.box_head import BoxHead, probabilities
from widefield.dense.boxes import Assigner, Sampler
from widefield.dense.detector import BoxScores, Detections, Size, Targets, size_of
from widefield.dense.faster_rcnn import POSITIVE_FRACTION, TwoStageDetector, pyramid_of
from widefield.dense.layers import widened
from widefield.dense.mask_head import FCNMaskHead
from widefield.dense.roi import RoISample, batched, roi_features, sampled_rois
from widefield.dense.roi_head import Selection, mask_loss, roi_scores, with_masks
from widefield.dense.rpn import ProposalLimits, RPNHead

STAGES = (
    (0.5, 1.0, (0.1, 0.1, 0.2, 0.2)),
    (0.6, 0.5, (0.05, 0.05, 0.1, 0.1)),
    (0.7, 0.25, (0.033, 0.033, 0.067, 0.067)),
)
"""Least IoU of an object's proposals, weight of the losses, and scale of the differences, stage by stage."""


class CascadeRoIHead(nn.Module):
    """Box heads in a row, and perhaps as many mask heads.

    At test, the logits of all stages are averaged, and the boxes are those of the last one; the probabilities of masks
    are averaged.

    Args:
        bbox_head: the box heads.
        mask_head: the mask heads; empty for none.
        strides: of the pyramid's levels that give features, finest first.
        assigners: of each stage.
        weights: of each stage's losses.
        sampler: how many RoIs of an image are learned from.
        selection: which boxes become detections.
    """

    def __init__(
        self,
        bbox_head: Sequence[BoxHead],
        mask_head: Sequence[FCNMaskHead],
        *,
        strides: Sequence[int],
        assigners: Sequence[Assigner],
        weights: Sequence[float],
        sampler: Sampler,
        selection: Selection,
    ) -> None:
        super().__init__()
        self.bbox_head = nn.ModuleList(bbox_head)
        if mask_head:
            self.mask_head = nn.ModuleList(mask_head)
        self.strides = tuple(strides)
        self.assigners, self.weights = tuple(assigners), tuple(weights)
        self.sampler, self.selection = sampler, selection

    @property
    def box_heads(self) -> list[BoxHead]:
        """Return the box heads, first stage first."""
        return list(self.bbox_head)  # type: ignore[arg-type]

    @property
    def mask_heads(self) -> list[FCNMaskHead]:
        """Return the mask heads, first stage first; empty without masks."""
        return list(self._modules.get("mask_head") or [])  # type: ignore[arg-type]

    def box_scores(self, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> BoxScores:
        """Return the scores of given boxes, (M_i, 4) of each image, as RoIs of all stages; the logits are averaged."""
        return roi_scores(self.box_heads, maps, boxes, self.strides)

    def losses(
        self, maps: Sequence[Tensor], proposals: Sequence[Tensor], targets: Sequence[Targets]
    ) -> dict[str, Tensor]:
        """Return the losses of every stage, named ``s0.loss_cls`` and so on, with their weights.

        Args:
            maps: of the neck, finest first.
            proposals: (M_i, 4) of each image.
            targets: of each image.
        """
        losses: dict[str, Tensor] = {}
        boxes = list(proposals)
        for stage, (head, assigner) in enumerate(zip(self.box_heads, self.assigners, strict=True)):
            samples = [
                sampled_rois(entry, target, assigner, self.sampler, head.num_classes)
                for entry, target in zip(boxes, targets, strict=True)
            ]
            rois = batched([sample.boxes for sample in samples])
            logits, deltas = head(roi_features(maps, rois, self.strides, head.roi_size))
            found = head.losses(logits, deltas, samples)
            for mask_head in self.mask_heads[stage : stage + 1]:
                found["loss_mask"] = mask_loss(mask_head, maps, samples, targets, self.strides)
            losses |= {f"s{stage}.{name}": self.weights[stage] * value for name, value in found.items()}
            if stage + 1 < len(self.bbox_head):
                boxes = self._next(head, logits, deltas, samples, targets)
        return losses

    @staticmethod
    def _next(
        head: BoxHead, logits: Tensor, deltas: Tensor, samples: Sequence[RoISample], targets: Sequence[Targets]
    ) -> list[Tensor]:
        """Return the boxes that the next stage learns from, without those that were objects themselves."""
        counts = [len(sample.boxes) for sample in samples]
        boxes = []
        for sample, target, own, moved in zip(
            samples, targets, logits.split(counts), deltas.split(counts), strict=True
        ):
            refined = head.refined(sample.boxes, own, moved, size_of(target), sample.labels)
            boxes.append(refined[~sample.given])
        return boxes

    def detect(self, maps: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sequence[Size]) -> list[Detections]:
        """Return the detections of each image.

        Args:
            maps: of the neck, finest first.
            proposals: (M_i, 4) of each image.
            sizes: (height, width) of each image.
        """
        boxes, counts = list(proposals), [len(entry) for entry in proposals]
        said: list[Tensor] = []
        for stage, head in enumerate(self.box_heads):
            logits, deltas = head(roi_features(maps, batched(boxes), self.strides, head.roi_size))
            said.append(widened(logits))
            outputs = list(zip(boxes, logits.split(counts), deltas.split(counts), sizes, strict=True))
            if stage + 1 < len(self.bbox_head):
                boxes = [head.refined(*entry) for entry in outputs]
        scores = probabilities(torch.stack(said).mean(0)).split(counts)
        found = [
            self.selection(head.decode(entry, moved, size), own)
            for (entry, _, moved, size), own in zip(outputs, scores, strict=True)
        ]
        return with_masks(self.mask_heads, maps, found, self.strides) if self.mask_heads else found


class CascadeRCNN(TwoStageDetector):
    """Cascade R-CNN with three stages and a feature pyramid on any backbone.

    The defaults are those of OpenMMLab's own models. Those of ConvNeXt and later networks have ``box_head="4conv1fc"``,
    ``class_agnostic=False`` and ``box_loss="giou"``.

    Args:
        backbone: a timm name, or a module that gives feature maps; see :func:`widefield.dense.feature_maps`.
        num_classes: number of classes, without the background.
        masks: whether masks are predicted; targets need them then.
        neck_channels: channels of the pyramid and of the RPN.
        anchor_scales: sides of square anchors in strides of their level. The published ones suit images of 800 pixels;
            small images with small objects need smaller ones.
        box_head: "shared2fc" (two fully connected layers) or "4conv1fc" (four convolutions with batch norms and one).
        class_agnostic: whether one box is predicted for all classes.
        box_loss: "l1" or "smooth_l1" (beta 1) of the differences to the RoI, or "iou" or "giou" of the box (weight 10).
        rpn_beta: of the smooth L1 loss of the RPN's boxes; None for L1.
        allowed_border: anchors that leave the image by more pixels are not used in training; None: all are used.
        crowd_overlap: anchors and proposals of which more than this part lies within a crowd region are not used in
            training; None: they are background, as in published models.
        train_proposals, test_proposals: proposals of an image.
        train_candidates, test_candidates: anchors of each level from which NMS chooses the proposals.
        box_channels: outputs of the fully connected layers.
        rois_per_image: RoIs of an image and stage that are learned from, a quarter of them objects.
        score_threshold: least score of a detection.
        nms_threshold: largest IoU of two detections of one class.
        max_per_image: detections of an image.
        frozen_stages: stages of the backbone that are not trained, with the stem. Published ResNets: 1.
        norm_eval: whether the backbone's batch norms stay in evaluation mode. Published ResNets: True.
        stage_norms: norms between backbone and neck; None follows the published code of the backbone's family.
        out_indices: which of the backbone's maps to use; None for the last four.
        backbone_args: further arguments of ``timm.create_model``, such as ``pretrained=True``.

    Raises:
        TypeError, ValueError: an argument is out of range, or the backbone does not fit.
    """

    def __init__(
        self,
        backbone: Backboned | FeatureMaps,
        num_classes: int,
        *,
        masks: bool = False,
        neck_channels: int = 256,
        anchor_scales: Sequence[float] = (8.0,),
        box_head: str = "shared2fc",
        class_agnostic: bool = True,
        box_loss: str = "smooth_l1",
        rpn_beta: float | None = 1 / 9,
        allowed_border: float | None = 0,
        crowd_overlap: float | None = None,
        train_proposals: int = 2000,
        test_proposals: int = 1000,
        train_candidates: int = 2000,
        test_candidates: int = 1000,
        box_channels: int = 1024,
        rois_per_image: int = 512,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        max_per_image: int = 100,
        frozen_stages: int = 0,
        norm_eval: bool = False,
        stage_norms: StageNorms = None,
        out_indices: Sequence[int] | None = None,
        **backbone_args: Any,
    ) -> None:
        num_classes = _checks.integer("num_classes", num_classes)
        maps = feature_maps(backbone, out_indices=out_indices, stage_norms=stage_norms, **backbone_args)
        neck, anchors = pyramid_of(maps, neck_channels, anchor_scales)
        rpn = RPNHead(
            neck_channels,
            anchors=anchors,
            assigner=Assigner(crowd=crowd_overlap),
            allowed_border=allowed_border,
            smooth_l1_beta=rpn_beta,
            for_training=ProposalLimits(train_candidates, train_proposals),
            for_testing=ProposalLimits(test_candidates, test_proposals),
        )
        heads: dict[str, Any] = {
            "kind": box_head, "class_agnostic": class_agnostic, "box_loss": box_loss, "channels": box_channels,
        }  # fmt: skip
        roi = CascadeRoIHead(
            [BoxHead(neck_channels, num_classes, stds=stds, **heads) for _, _, stds in STAGES],
            [FCNMaskHead(neck_channels, num_classes, channels=neck_channels) for _ in STAGES] if masks else [],
            strides=maps.strides,
            assigners=[Assigner(least, least, least, low_quality=False, crowd=crowd_overlap) for least, _, _ in STAGES],
            weights=[weight for _, weight, _ in STAGES],
            sampler=Sampler(rois_per_image, POSITIVE_FRACTION),
            selection=Selection(score_threshold, nms_threshold, max_per_image),
        )
        common: dict[str, Any] = {"frozen_stages": frozen_stages, "norm_eval": norm_eval}
        super().__init__(maps, neck, rpn, roi, num_classes=num_classes, masks=masks, **common)
