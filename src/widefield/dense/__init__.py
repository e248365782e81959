"""Build models for dense prediction on any backbone: (backbone, num_classes) -> module.

Module names inside heads and necks are OpenMMLab's, so published files load by name.
"""

from widefield.dense.aspp import DeepLabV3Plus, DepthwiseSeparableASPPHead
from widefield.dense.backbone import FeatureMaps, feature_maps
from widefield.dense.box_head import BoxHead
from widefield.dense.cascade import CascadeRCNN
from widefield.dense.checkpoints import (
    CheckpointInfo,
    LoadedCheckpoint,
    inspect_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from widefield.dense.detection_rules import DetectionRules
from widefield.dense.detector import BoxScores, Detections, Detector, Targets
from widefield.dense.faster_rcnn import FasterRCNN, MaskRCNN
from widefield.dense.fcn import FCN, FCNHead
from widefield.dense.fcos import FCOS, FCOSHead
from widefield.dense.fpn import FPN
from widefield.dense.heatmap import HeatmapHead, HeatmapPose
from widefield.dense.heatmap_codec import DecodedKeypoints, HeatmapCodec, flipped_heatmaps
from widefield.dense.inference import check_views, largest_at, segment
from widefield.dense.layers import ConvModule, DepthwiseSeparableConvModule
from widefield.dense.mask_head import FCNMaskHead, paste_masks
from widefield.dense.pose_convention import PoseConvention
from widefield.dense.pose_rules import PoseRules
from widefield.dense.retinanet import RetinaHead, RetinaNet
from widefield.dense.segmenter import DecodeHead, SegmentationLogits, Segmenter
from widefield.dense.semantic_fpn import FPNHead, SemanticFPN
from widefield.dense.served_pose import ServedPose
from widefield.dense.serving import ServedDetector
from widefield.dense.top_down import DetectorInput, Poses, estimate_poses, find_boxes
from widefield.dense.uper import UPerHead, UPerNet

__all__ = [
    "FCN",
    "FCOS",
    "FPN",
    "BoxHead",
    "BoxScores",
    "CascadeRCNN",
    "CheckpointInfo",
    "ConvModule",
    "DecodeHead",
    "DecodedKeypoints",
    "DeepLabV3Plus",
    "DepthwiseSeparableASPPHead",
    "DepthwiseSeparableConvModule",
    "DetectionRules",
    "Detections",
    "Detector",
    "DetectorInput",
    "FCNHead",
    "FCNMaskHead",
    "FCOSHead",
    "FPNHead",
    "FasterRCNN",
    "FeatureMaps",
    "HeatmapCodec",
    "HeatmapHead",
    "HeatmapPose",
    "LoadedCheckpoint",
    "MaskRCNN",
    "PoseConvention",
    "PoseRules",
    "Poses",
    "RetinaHead",
    "RetinaNet",
    "SegmentationLogits",
    "Segmenter",
    "SemanticFPN",
    "ServedDetector",
    "ServedPose",
    "Targets",
    "UPerHead",
    "UPerNet",
    "check_views",
    "estimate_poses",
    "feature_maps",
    "find_boxes",
    "flipped_heatmaps",
    "inspect_checkpoint",
    "largest_at",
    "load_checkpoint",
    "paste_masks",
    "save_checkpoint",
    "segment",
]
