"""Two-stage detectors: proposals from a region proposal network, then a head on each of them.

Papers: Ren, He, Girshick, Sun, "Faster R-CNN", NeurIPS 2015; Lin et al., "Feature Pyramid Networks for Object
Detection", CVPR 2017, section 4; He, Gkioxari, Dollár, Girshick, "Mask R-CNN", ICCV 2017. Settings and names are those
of OpenMMLab's code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from widefield import _checks
from widefield.dense.anchors import Anchors
from widefield.dense.backbone import Backboned, FeatureMaps, StageNorms, feature_maps
from widefield.dense.box_head import BoxHead
from widefield.dense.boxes import Assigner, Sampler, Size
from widefield.dense.detection_rules import DetectionRules
from widefield.dense.detector import BoxScores, Detections, Detector, Targets, size_of
from widefield.dense.fpn import FPN
from widefield.dense.mask_head import FCNMaskHead
from widefield.dense.roi_head import RoIHead
from widefield.dense.rpn import ProposalLimits, RPNHead

POSITIVE_FRACTION = 0.25
"""Largest part of the sampled RoIs that stand for objects (Girshick 2015, section 2.3)."""


class TwoStageDetector(Detector):
    """A detector with an RPN and a second stage on its proposals.

    Args:
        backbone: the maps of a network.
        neck: from the backbone's maps to those of the heads.
        rpn_head: gives the proposals.
        roi_head: the second stage.
        options: of :class:`widefield.dense.Detector`.
    """

    rpn_head: RPNHead
    roi_head: RoIHead

    def __init__(
        self, backbone: FeatureMaps, neck: nn.Module, rpn_head: RPNHead, roi_head: RoIHead, **options: Any
    ) -> None:
        super().__init__(backbone, neck, {"rpn_head": rpn_head, "roi_head": roi_head}, **options)

    def losses(self, maps: Sequence[Tensor], targets: Sequence[Targets]) -> dict[str, Tensor]:
        """Return the losses of both stages by name."""
        outputs = self.rpn_head(maps)
        proposals = self.rpn_head.proposals(outputs, [size_of(target) for target in targets], training=True)
        second = self.roi_head.losses(maps, [entry.boxes for entry in proposals], targets)
        return {**self.rpn_head.losses(outputs, targets), **second}

    def detect(self, maps: Sequence[Tensor], sizes: Sequence[Size]) -> list[Detections]:
        """Return the detections of each image in pixels of the images that the model gets."""
        proposals = self.rpn_head.proposals(self.rpn_head(maps), sizes, training=False)
        return self.roi_head.detect(maps, [entry.boxes for entry in proposals], sizes, self.rules)

    def box_scores(self, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> BoxScores:
        """Return the scores that the second stage gives to boxes (M_i, 4) of each image; no box is moved."""
        return self.roi_head.box_scores(maps, boxes)


def first_stage(
    maps: FeatureMaps,
    channels: int,
    scales: Sequence[float],
    crowd: float | None,
    border: float | None,
    beta: float | None,
    training: ProposalLimits,
    testing: ProposalLimits,
) -> tuple[FPN, RPNHead]:
    """Return neck and RPN of two-stage detectors: one level more than maps, at twice the last stride.

    Args:
        maps: of the backbone.
        channels: of the pyramid and of the RPN.
        scales: sides of anchors in strides.
        crowd, border, beta: see ``crowd_overlap``, ``allowed_border`` and ``rpn_beta`` of :class:`FasterRCNN`.
        training, testing: how many proposals.
    """
    neck = FPN(maps.channels, channels, num_outs=len(maps.channels) + 1)
    anchors = Anchors(strides=(*maps.strides, 2 * maps.strides[-1]), scales=tuple(scales))
    rpn = RPNHead(
        channels,
        anchors=anchors,
        assigner=Assigner(crowd=crowd),
        allowed_border=border,
        smooth_l1_beta=beta,
        for_training=training,
        for_testing=testing,
    )
    return neck, rpn


class FasterRCNN(TwoStageDetector):
    """Faster R-CNN with a feature pyramid on any backbone.

    Args:
        backbone: a timm name, or a module that gives feature maps; see :func:`widefield.dense.feature_maps`.
        num_classes: number of classes, without the background.
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
        rois_per_image: RoIs of an image that are learned from, a quarter of them objects.
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

    masks = False
    low_quality = False
    """Whether the best proposal of an object below IoU 0.5 stands for it; so in OpenMMLab's Mask R-CNN only."""

    def __init__(
        self,
        backbone: Backboned | FeatureMaps,
        num_classes: int,
        *,
        neck_channels: int = 256,
        anchor_scales: Sequence[float] = (8.0,),
        box_head: str = "shared2fc",
        class_agnostic: bool = False,
        box_loss: str = "l1",
        rpn_beta: float | None = None,
        allowed_border: float | None = None,
        crowd_overlap: float | None = None,
        train_proposals: int = 1000,
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
        neck, rpn = first_stage(
            maps, neck_channels, anchor_scales, crowd_overlap, allowed_border, rpn_beta,
            ProposalLimits(train_candidates, train_proposals), ProposalLimits(test_candidates, test_proposals),
        )  # fmt: skip
        head: dict[str, Any] = {"class_agnostic": class_agnostic, "box_loss": box_loss, "channels": box_channels}
        roi = RoIHead(
            BoxHead(neck_channels, num_classes, kind=box_head, **head),
            FCNMaskHead(neck_channels, num_classes, channels=neck_channels) if self.masks else None,
            strides=maps.strides,
            assigners=[Assigner(0.5, 0.5, 0.5, low_quality=self.low_quality, crowd=crowd_overlap)],
            sampler=Sampler(rois_per_image, POSITIVE_FRACTION),
        )
        rules = DetectionRules(score_threshold, nms_threshold, max_per_image)
        common: dict[str, Any] = {"frozen_stages": frozen_stages, "norm_eval": norm_eval, "rules": rules}
        super().__init__(maps, neck, rpn, roi, num_classes=num_classes, masks=self.masks, **common)


class MaskRCNN(FasterRCNN):
    """Mask R-CNN with a feature pyramid on any backbone: Faster R-CNN that predicts a mask in each box.

    The arguments are those of :class:`FasterRCNN`. Targets need masks.
    """

    masks = True
    low_quality = True
