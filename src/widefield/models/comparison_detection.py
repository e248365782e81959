"""List published detectors: cited counts and average precisions, and how to build the same model here.

Sources, as printed there:

- README: of the authors' repository (facebookresearch/ConvNeXt, raoyongming/HorNet, microsoft/FocalNet,
  OpenGVLab/InternImage, AILab-CVC/UniRepLKNet, Westlake-AI/MogaNet, open-mmlab/mmdetection).
- slides: Siyuan Li, "Convolution Kernel Design and Gated Attention for Modern Convolutional Neural Networks", March
  2024, the tables on COCO.
- MoRF: Lian, Yu, Wang, "Receptive Fields As Experts in Convolutional Neural Architectures", ICML 2024, table 3.
  Parameters are those after reparameterization.
- RepLKNet: Ding, Zhang, Han, Ding, "Scaling Up Your Kernels to 31x31", CVPR 2022, table 9.
- GMConv: Chen, Li, Ning, Lin, He, "GMConv: Modulating Effective Receptive Fields for Convolutional Kernels", table III.
- SLaK, VAN: README of VITA-Group/SLaK; abstract of Guo et al., "Visual Attention Network". They state no counts.

The sources say FLOPs and mean multiply-accumulates for an image of 1280x800 pixels, with 1000 RoIs in each box head and
100 in each mask head.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

_NONE: Mapping[str, Any] = MappingProxyType({})

CLASSES = 80
"""Number of classes of COCO."""
SIZE = (800, 1280)
"""Height and width of the image that multiply-accumulates are counted for."""


class CitedDetector(NamedTuple):
    """A row of the tables."""

    architecture: str
    method: str
    """A key of :data:`METHODS`."""
    schedule: str
    """"1x" is 12 epochs, "2x" is 24 and "3x" is 36."""
    parameters: float
    """In millions; 0 if the source does not state them."""
    macs: float
    """Multiply-accumulates in billions; 0 if the source does not state them."""
    ap: str
    """Percent on the validation set, of boxes / of masks; "-" if not stated."""
    source: str
    name: str
    """Name in timm's registry."""
    args: Mapping[str, Any] = _NONE
    """Arguments of the network and, as ``stage_norms``, of the detector."""


class Method(NamedTuple):
    """How to build a detector: the class in ``widefield.dense``, and its arguments."""

    kind: str
    args: Mapping[str, Any] = _NONE


_FOUR: Mapping[str, Any] = MappingProxyType(
    {"masks": True, "box_head": "4conv1fc", "class_agnostic": False, "box_loss": "giou"}
)
METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "Faster R-CNN": Method("FasterRCNN"),
        "Mask R-CNN": Method("MaskRCNN"),
        "Cascade R-CNN": Method("CascadeRCNN"),
        "Cascade Mask R-CNN": Method("CascadeRCNN", _FOUR),
        "Cascade Mask R-CNN, 2 fc": Method("CascadeRCNN", MappingProxyType({"masks": True})),
        "RetinaNet": Method("RetinaNet"),
        "FCOS": Method("FCOS"),
    }
)
"""Method in the tables -> how to build it. "2 fc" has MMDetection's box heads, the others those of ConvNeXt's code."""

_WINDOWS = {"focal_windows": (9, 9, 9, 9)}
_CASCADE_WINDOWS = {"focal_windows": (11, 9, 9, 7)}
_GF = {"global_filters": (None, None, (24, 13), (12, 7))}
_SLAK = {"kernel_sizes": (51, 49, 47, 13), "small_kernel": 5, "width_factor": 1.3, "stage_norms": "layer"}


def _rows(method: str, schedule: str, source: str, rows: tuple[tuple[Any, ...], ...]) -> tuple[CitedDetector, ...]:
    """Return rows from (architecture, parameters, macs, ap, name[, args])."""
    return tuple(
        CitedDetector(architecture, method, schedule, parameters, macs, ap, source, name, args[0] if args else _NONE)
        for architecture, parameters, macs, ap, name, *args in rows
    )


CITED_DETECTORS: tuple[CitedDetector, ...] = (
    *_rows("Faster R-CNN", "1x", "README", (("ResNet-50", 0, 0, "37.4 / -", "resnet50"),)),
    *_rows("Mask R-CNN", "1x", "slides", (("ResNet-50", 44, 260, "38.0 / 34.4", "resnet50"),)),
    *_rows("Cascade R-CNN", "1x", "README", (("ResNet-50", 0, 0, "40.3 / -", "resnet50"),)),
    *_rows("Cascade Mask R-CNN, 2 fc", "1x", "README", (("ResNet-50", 0, 0, "41.2 / 35.9", "resnet50"),)),
    *_rows("FCOS", "1x", "README", (("ResNet-50", 0, 0, "36.6 / -", "resnet50"),)),
    *_rows("Mask R-CNN", "1x", "slides", (("ResNet-18", 31, 207, "34.0 / 31.2", "resnet18"),)),
    *_rows("Mask R-CNN", "1x", "slides", (("ResNet-101", 63, 336, "40.4 / 36.4", "resnet101"),)),
    *_rows("Cascade Mask R-CNN", "3x", "slides", (("ResNet-50", 77, 739, "46.3 / 40.1", "resnet50"),)),
    *_rows(
        "RetinaNet",
        "1x",
        "slides",
        (
            ("ResNet-18", 21, 189, "31.8 / -", "resnet18"),
            ("ResNet-50", 37, 239, "36.3 / -", "resnet50"),
            ("ResNet-101", 57, 315, "38.5 / -", "resnet101"),
        ),
    ),
    *_rows(
        "RetinaNet",
        "1x",
        "README",
        (
            ("MogaNet-XT", 12.1, 167.2, "39.7 / -", "moganet_xtiny"),
            ("MogaNet-T", 14.4, 173.4, "41.4 / -", "moganet_tiny"),
            ("MogaNet-S", 35.1, 253.0, "45.8 / -", "moganet_small"),
            ("MogaNet-B", 53.5, 354.5, "47.7 / -", "moganet_base"),
            ("MogaNet-L", 92.4, 476.8, "48.7 / -", "moganet_large"),
        ),
    ),
    *_rows(
        "Mask R-CNN",
        "1x",
        "README",
        (
            ("MogaNet-XT", 22.8, 185.4, "40.7 / 37.6", "moganet_xtiny"),
            ("MogaNet-T", 25.0, 191.7, "42.6 / 39.1", "moganet_tiny"),
            ("MogaNet-S", 45.0, 271.6, "46.6 / 42.2", "moganet_small"),
            ("MogaNet-B", 63.4, 373.1, "49.0 / 43.8", "moganet_base"),
            ("MogaNet-L", 102.1, 495.3, "49.4 / 44.2", "moganet_large"),
            ("InternImage-T", 49, 270, "47.2 / 42.5", "internimage_t"),
            ("InternImage-S", 69, 340, "47.8 / 43.3", "internimage_s"),
            ("InternImage-B", 115, 501, "48.8 / 44.0", "internimage_b"),
            ("FocalNet-T (SRF)", 48.6, 267, "45.9 / 41.3", "focalnet_tiny_srf", _WINDOWS),
            ("FocalNet-T (LRF)", 48.8, 268, "46.1 / 41.5", "focalnet_tiny_lrf", _WINDOWS),
            ("FocalNet-S (SRF)", 70.8, 356, "48.0 / 42.7", "focalnet_small_srf", _WINDOWS),
            ("FocalNet-S (LRF)", 72.3, 365, "48.3 / 43.1", "focalnet_small_lrf", _WINDOWS),
            ("FocalNet-B (SRF)", 109.4, 496, "48.8 / 43.3", "focalnet_base_srf", _WINDOWS),
            ("FocalNet-B (LRF)", 111.4, 507, "49.0 / 43.5", "focalnet_base_lrf", _WINDOWS),
        ),
    ),
    *_rows(
        "Mask R-CNN",
        "1x",
        "slides",
        (
            ("ConvNeXt-S", 70, 348, "45.4 / 41.8", "convnext_small"),
            ("ConvNeXt-B", 108, 486, "47.0 / 42.7", "convnext_base"),
        ),
    ),
    *_rows("Mask R-CNN", "3x", "README", (("ConvNeXt-T", 48, 262, "46.2 / 41.7", "convnext_tiny"),)),
    *_rows("Mask R-CNN", "3x", "MoRF", (("MoRF-ConvNeXt-T", 50, 0, "46.8 / 42.2", "morf_convnext_tiny"),)),
    *_rows("Mask R-CNN", "3x", "VAN", (("VAN-B2", 0, 0, "48.8 / -", "van_b2"),)),
    *_rows(
        "Cascade Mask R-CNN",
        "3x",
        "README",
        (
            ("ConvNeXt-T", 86, 741, "50.4 / 43.7", "convnext_tiny"),
            ("ConvNeXt-S", 108, 827, "51.9 / 45.0", "convnext_small"),
            ("ConvNeXt-B", 146, 964, "52.7 / 45.6", "convnext_base"),
            ("ConvNeXt-L (22K)", 255, 1354, "54.8 / 47.6", "convnext_large"),
            ("ConvNeXt-XL (22K)", 407, 1898, "55.2 / 47.7", "convnext_xlarge"),
            ("HorNet-T (7x7)", 80, 730, "51.7 / 44.8", "hornet_tiny_7x7"),
            ("HorNet-T (GF)", 80, 728, "52.4 / 45.6", "hornet_tiny_gf"),
            ("HorNet-S (7x7)", 107, 830, "52.7 / 45.6", "hornet_small_7x7"),
            ("HorNet-S (GF)", 108, 827, "53.3 / 46.3", "hornet_small_gf"),
            ("HorNet-B (7x7)", 144, 969, "53.3 / 46.1", "hornet_base_7x7"),
            ("HorNet-B (GF)", 146, 965, "54.0 / 46.9", "hornet_base_gf"),
            ("HorNet-L (7x7, 22K)", 251, 1363, "55.4 / 48.0", "hornet_large_7x7"),
            ("HorNet-L (GF, 22K)", 259, 1358, "56.0 / 48.6", "hornet_large_gf", _GF),
            ("InternImage-L (22K)", 277, 1399, "56.1 / 48.5", "internimage_l"),
            ("InternImage-XL (22K)", 387, 1782, "56.2 / 48.8", "internimage_xl"),
            ("UniRepLKNet-T", 89, 749, "51.7 / 44.9", "unireplknet_t"),
            ("UniRepLKNet-S", 113, 835, "53.0 / 45.9", "unireplknet_s"),
            ("UniRepLKNet-B (22K)", 155, 978, "54.8 / 47.4", "unireplknet_b"),
            ("UniRepLKNet-L (22K)", 276, 1385, "55.8 / 48.4", "unireplknet_l"),
            ("UniRepLKNet-XL (22K)", 443, 1952, "56.4 / 49.0", "unireplknet_xl"),
            ("FocalNet-T (LRF)", 87.1, 751, "51.5 / -", "focalnet_tiny_lrf", _CASCADE_WINDOWS),
            ("MogaNet-S", 82.8, 750.2, "51.7 / 45.1", "moganet_small"),
            ("MogaNet-B", 101.2, 851.6, "52.6 / 46.0", "moganet_base"),
            ("MogaNet-L", 139.9, 973.8, "53.3 / 46.1", "moganet_large"),
            ("SLaK-T", 0, 0, "51.3 / 44.3", "slak_tiny", _SLAK),
        ),
    ),
    *_rows("Cascade Mask R-CNN, 2 fc", "3x", "README", (("MogaNet-S", 77.9, 405.4, "51.4 / 44.9", "moganet_small"),)),
    *_rows(
        "Cascade Mask R-CNN",
        "3x",
        "slides",
        (
            ("FocalNet-T (SRF)", 86, 746, "51.5 / 44.6", "focalnet_tiny_srf", _CASCADE_WINDOWS),
            ("MogaNet-XL (22K)", 238, 1355, "56.2 / 48.8", "moganet_xlarge"),
        ),
    ),
    *_rows(
        "Cascade Mask R-CNN",
        "3x",
        "MoRF",
        (
            ("MoRF-ConvNeXt-T", 88, 0, "51.1 / 44.2", "morf_convnext_tiny"),
            ("MoRF-ConvNeXt-S", 110, 0, "52.2 / 45.2", "morf_convnext_small"),
            ("MoRF-ConvNeXt-B", 148, 0, "52.9 / 45.7", "morf_convnext_base"),
        ),
    ),
    *_rows("FCOS", "2x", "RepLKNet", (("RepLKNet-31B", 87, 437, "47.0 / -", "replknet_31b"),)),
    *_rows(
        "Cascade Mask R-CNN",
        "3x",
        "RepLKNet",
        (
            ("RepLKNet-31B", 137, 965, "52.2 / 45.2", "replknet_31b"),
            ("RepLKNet-31L (22K)", 229, 1321, "53.9 / 46.5", "replknet_31l"),
            ("RepLKNet-XL", 392, 1958, "55.5 / 48.0", "replknet_xl"),
        ),
    ),
)
"""Rows of the tables on COCO whose models can be built here; those of one method and source together."""
