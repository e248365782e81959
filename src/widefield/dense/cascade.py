"""Cascade R-CNN: three heads, each on the boxes of the one before and with a higher IoU for objects.

Papers: Cai and Vasconcelos, "Cascade R-CNN: Delving into High Quality Object Detection", CVPR 2018; with masks:
"Cascade R-CNN: High Quality Object Detection and Instance Segmentation", TPAMI 2019, section 5. Settings and names are
those of OpenMMLab's code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from widefield import _checks
from widefield.dense.backbone import Backboned, FeatureMaps, StageNorms, feature_maps
from widefield.dense.box_head import BoxHead
from widefield.dense.boxes import Assigner, Sampler
from widefield.dense.detection_rules import DetectionRules
from widefield.dense.faster_rcnn import POSITIVE_FRACTION, TwoStageDetector, first_stage
from widefield.dense.mask_head import FCNMaskHead
from widefield.dense.roi_head import RoIHead
from widefield.dense.rpn import ProposalLimits

STAGES = (
    (0.5, 1.0, (0.1, 0.1, 0.2, 0.2)),
    (0.6, 0.5, (0.05, 0.05, 0.1, 0.1)),
    (0.7, 0.25, (0.033, 0.033, 0.067, 0.067)),
)
"""Least IoU of an object's proposals, weight of the losses, and scale of the differences, stage by stage."""


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
        neck, rpn = first_stage(
            maps, neck_channels, anchor_scales, crowd_overlap, allowed_border, rpn_beta,
            ProposalLimits(train_candidates, train_proposals), ProposalLimits(test_candidates, test_proposals),
        )  # fmt: skip
        heads: dict[str, Any] = {
            "kind": box_head, "class_agnostic": class_agnostic, "box_loss": box_loss, "channels": box_channels,
        }  # fmt: skip
        roi = RoIHead(
            [BoxHead(neck_channels, num_classes, stds=stds, **heads) for _, _, stds in STAGES],
            [FCNMaskHead(neck_channels, num_classes, channels=neck_channels) for _ in STAGES] if masks else [],
            strides=maps.strides,
            assigners=[Assigner(least, least, least, low_quality=False, crowd=crowd_overlap) for least, _, _ in STAGES],
            weights=[weight for _, weight, _ in STAGES],
            sampler=Sampler(rois_per_image, POSITIVE_FRACTION),
        )
        rules = DetectionRules(score_threshold, nms_threshold, max_per_image)
        common: dict[str, Any] = {"frozen_stages": frozen_stages, "norm_eval": norm_eval, "rules": rules}
        super().__init__(maps, neck, rpn, roi, num_classes=num_classes, masks=masks, **common)
