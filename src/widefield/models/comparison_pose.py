"""List published top-down pose models on COCO: cited counts and average precisions, and how to build them here.

Sources, as printed there:

- README: ``pose_estimation`` in github.com/Westlake-AI/MogaNet.
- mmpose: ``configs/body_2d_keypoint/topdown_heatmap/coco/resnet_coco.yml`` in github.com/open-mmlab/mmpose, 1.x.
  It states no counts.
- slides: Siyuan Li, "Convolution Kernel Design and Gated Attention for Modern Convolutional Neural Networks", March
  2024, the table "COCO 2D Human Pose Estimation".
- none: no published pose model with this backbone was found. Recipes train it as MogaNet.

All have the head of three deconvolutions of Xiao, Wu, Wei, "Simple Baselines for Human Pose Estimation and Tracking",
ECCV 2018, and boxes of a detector with 56.4 % average precision of people. The sources say FLOPs and mean
multiply-accumulates for one crop.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

KEYPOINTS = 17
"""Number of COCO's key points."""

SMALL, LARGE = (256, 192), (384, 288)
"""Height and width of the crops in pixels."""


class CitedPose(NamedTuple):
    """A row of the tables."""

    architecture: str
    size: tuple[int, int]
    """Height and width of the crops in pixels."""
    parameters: float
    """In millions; 0 if the source does not state them."""
    macs: float
    """Multiply-accumulates in billions; 0 if the source does not state them."""
    ap: str
    """Percent on the validation set; "-" if not stated."""
    source: str
    name: str
    """Name in timm's registry."""
    args: Mapping[str, Any] = MappingProxyType({})
    """Arguments of the network and, as ``stage_norms``, of the pose model."""


def _rows(source: str, rows: tuple[tuple[str, str, float, float, str, float, str], ...]) -> tuple[CitedPose, ...]:
    """Return two rows for each (architecture, name, parameters, MACs and AP of the small, of the large crops)."""
    return tuple(
        CitedPose(architecture, size, parameters, macs, ap, source, name)
        for architecture, name, parameters, small, small_ap, large, large_ap in rows
        for size, macs, ap in ((SMALL, small, small_ap), (LARGE, large, large_ap))
        if macs or ap
    )


_SLAK = MappingProxyType(
    {"kernel_sizes": (51, 49, 47, 13), "small_kernel": 5, "width_factor": 1.3, "stage_norms": "layer"}
)


CITED_POSES: tuple[CitedPose, ...] = (
    *_rows(
        "README",
        (
            ("MogaNet-XT", "moganet_xtiny", 5.6, 1.8, "72.1", 4.2, "74.7"),
            ("MogaNet-T", "moganet_tiny", 8.1, 2.2, "73.2", 4.9, "75.7"),
            ("MogaNet-S", "moganet_small", 29.0, 6.0, "74.9", 13.5, "76.4"),
            ("MogaNet-B", "moganet_base", 47.4, 10.9, "75.3", 24.4, "77.3"),
        ),
    ),
    *_rows(
        "slides",
        (
            ("ConvNeXt-T", "convnext_tiny", 33, 5.5, "73.2", 33.1, "75.3"),
            ("ConvNeXt-S", "convnext_small", 55, 9.7, "73.7", 21.8, "75.8"),
            ("ConvNeXt-B", "convnext_base", 94, 16.4, "74.0", 36.6, "75.9"),
            ("ResNet-50", "resnet50", 34, 5.5, "72.1", 0, ""),
            ("ResNet-101", "resnet101", 53, 12.4, "71.4", 0, ""),
            ("ResNet-152", "resnet152", 69, 15.7, "72.0", 35.6, "74.3"),
        ),
    ),
    *_rows(
        "mmpose",
        (
            ("ResNet-50", "resnet50", 0, 0, "71.8", 0, "73.1"),
            ("ResNet-101", "resnet101", 0, 0, "72.8", 0, "74.9"),
            ("ResNet-152", "resnet152", 0, 0, "73.6", 0, "75.0"),
        ),
    ),
    *_rows(
        "none",
        (
            ("VAN-B0", "van_b0", 0, 0, "-", 0, "-"),
            ("VAN-B2", "van_b2", 0, 0, "-", 0, "-"),
            ("MoRF-ConvNeXt-T", "morf_convnext_tiny", 0, 0, "-", 0, "-"),
            ("RepLKNet-31B", "replknet_31b", 0, 0, "-", 0, "-"),
            ("UniRepLKNet-T", "unireplknet_t", 0, 0, "-", 0, "-"),
            ("InternImage-T", "internimage_t", 0, 0, "-", 0, "-"),
            ("HorNet-T (7x7)", "hornet_tiny_7x7", 0, 0, "-", 0, "-"),
            ("FocalNet-T (LRF)", "focalnet_tiny_lrf", 0, 0, "-", 0, "-"),
            ("MobileNetV2", "mobilenetv2_100", 0, 0, "-", 0, "-"),
        ),
    ),
    *(CitedPose("SLaK-T", size, 0, 0, "-", "none", "slak_tiny", _SLAK) for size in (SMALL, LARGE)),
)
"""Rows whose models can be built here; those of one source together."""
