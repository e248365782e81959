"""List published segmentation models: cited counts and accuracies, and how to build the same model here.

Sources, as printed there:

- README: of the authors' repository (facebookresearch/ConvNeXt, raoyongming/HorNet, microsoft/FocalNet,
  OpenGVLab/InternImage, AILab-CVC/UniRepLKNet, Westlake-AI/MogaNet, Visual-Attention-Network/VAN-Segmentation).
- slides: Siyuan Li, "Convolution Kernel Design and Gated Attention for Modern Convolutional Neural Networks", March
  2024, the tables on ADE20K.
- MoRF: Lian, Yu, Wang, "Receptive Fields As Experts in Convolutional Neural Architectures", ICML 2024, table 4.
  Parameters are those after reparameterization.
- RepLKNet: Ding, Zhang, Han, Ding, "Scaling Up Your Kernels to 31x31", CVPR 2022, tables 3, 5, 7 and 8.

The sources say FLOPs and mean multiply-accumulates of the backbone and the decode head. The parameters include the
auxiliary head.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

_NONE: Mapping[str, Any] = MappingProxyType({})


class CitedSegmenter(NamedTuple):
    """A row of the tables."""

    architecture: str
    method: str
    """Name of the class in ``widefield.dense``."""
    data: str
    """The data set, which decides the number of classes: a key of :data:`CLASSES`."""
    size: tuple[int, int]
    """Height and width in pixels of the image that MACs are counted for."""
    parameters: float
    """In millions; 0 if the source does not state them."""
    macs: float
    """Multiply-accumulates in billions; 0 if the source does not state them."""
    miou: str
    """Percent on the validation set at one scale / at several scales with flips; "-" if not stated."""
    source: str
    name: str
    """Name in timm's registry."""
    args: Mapping[str, Any] = _NONE
    """Arguments of the network."""


CLASSES: Mapping[str, int] = MappingProxyType({"ADE20K": 150, "Cityscapes": 19})
"""Number of classes of each data set."""

_ADE, _ADE_640, _CITY = (512, 2048), (640, 2560), (1024, 2048)


def _ade(
    architecture: str, parameters: float, macs: float, miou: str, source: str, name: str, **args: Any
) -> CitedSegmenter:
    return CitedSegmenter(architecture, "UPerNet", "ADE20K", _ADE, parameters, macs, miou, source, name, args)


def _ade_640(
    architecture: str, parameters: float, macs: float, miou: str, source: str, name: str, **args: Any
) -> CitedSegmenter:
    return CitedSegmenter(
        f"{architecture} (22K)", "UPerNet", "ADE20K", _ADE_640, parameters, macs, miou, source, name, args
    )


def _fpn(architecture: str, parameters: float, macs: float, miou: str, name: str) -> CitedSegmenter:
    return CitedSegmenter(architecture, "SemanticFPN", "ADE20K", _ADE, parameters, macs, miou, "README", name)


def _lite(architecture: str, miou: str, **args: Any) -> CitedSegmenter:
    args = {"output_stride": 8, **args}
    return CitedSegmenter(
        architecture, "DeepLabV3Plus", "Cityscapes", _CITY, 0, 0, miou, "RepLKNet", "mobilenetv2_lk", args
    )


_FOCAL = {"focal_windows": (9, 9, 9, 9)}
"""The kernels of FocalNet for segmentation; those for classification start at 3."""
_GF = {"global_filters": (None, None, (24, 13), (12, 7))}
"""The global filters of HorNet for segmentation; those for classification have 14x8 and 7x4 entries."""

CITED_SEGMENTERS = (
    _ade("ResNet-18", 41, 885, "39.2 / -", "slides", "resnet18"),
    _ade("ResNet-50", 67, 952, "42.1 / -", "slides", "resnet50"),
    _ade("ConvNeXt-T", 60, 939, "46.0 / 46.7", "README", "convnext_tiny"),
    _ade("ConvNeXt-S", 82, 1027, "48.7 / 49.6", "README", "convnext_small"),
    _ade("ConvNeXt-B", 122, 1170, "49.1 / 49.9", "README", "convnext_base"),
    _ade_640("ConvNeXt-B", 122, 1828, "52.6 / 53.1", "README", "convnext_base"),
    _ade_640("ConvNeXt-L", 235, 2458, "53.2 / 53.7", "README", "convnext_large"),
    _ade_640("ConvNeXt-XL", 391, 3335, "53.6 / 54.0", "README", "convnext_xlarge"),
    _ade("ConvNeXt-T + MoRF (hard)", 63, 0, "- / 47.2", "MoRF", "morf_convnext_tiny", routing="hard"),
    _ade("ConvNeXt-T + MoRF (soft)", 63, 0, "- / 47.7", "MoRF", "morf_convnext_tiny"),
    _ade("ConvNeXt-S + MoRF (hard)", 85, 0, "- / 49.9", "MoRF", "morf_convnext_small", routing="hard"),
    _ade("ConvNeXt-S + MoRF (soft)", 85, 0, "- / 50.1", "MoRF", "morf_convnext_small"),
    _ade("ConvNeXt-B + MoRF (hard)", 125, 0, "- / 50.3", "MoRF", "morf_convnext_base", routing="hard"),
    _ade("ConvNeXt-B + MoRF (soft)", 125, 0, "- / 50.6", "MoRF", "morf_convnext_base"),
    _ade("RepLKNet-3", 104.1, 1119, "46.05 / -", "RepLKNet", "replknet_31b", kernel_sizes=(3, 3, 3, 3)),
    _ade("RepLKNet-7", 104.6, 1123, "48.05 / -", "RepLKNet", "replknet_31b", kernel_sizes=(7, 7, 7, 7)),
    _ade("RepLKNet-13", 106.0, 1130, "48.35 / -", "RepLKNet", "replknet_31b", kernel_sizes=(13, 13, 13, 13)),
    _ade("RepLKNet-25", 110.6, 1159, "48.68 / -", "RepLKNet", "replknet_31b", kernel_sizes=(25, 25, 25, 13)),
    _ade("RepLKNet-31", 111.7, 1170, "49.17 / -", "RepLKNet", "replknet_31b"),
    _ade("RepLKNet-31B", 112, 1170, "49.9 / 50.6", "RepLKNet", "replknet_31b"),
    _ade_640("RepLKNet-31B", 112, 1829, "51.5 / 52.3", "RepLKNet", "replknet_31b"),
    _ade_640("RepLKNet-31L", 207, 2404, "52.4 / 52.7", "RepLKNet", "replknet_31l"),
    CitedSegmenter(
        "RepLKNet-XL (73M)", "UPerNet", "ADE20K", _ADE_640, 374, 3431, "55.2 / 56.0", "RepLKNet", "replknet_xl"
    ),
    CitedSegmenter(
        "RepLKNet-31B", "UPerNet", "Cityscapes", _CITY, 110, 2315, "83.1 / 83.5", "RepLKNet", "replknet_31b"
    ),
    _ade("UniRepLKNet-T", 61, 946, "48.6 / 49.1", "README", "unireplknet_t"),
    _ade("UniRepLKNet-S", 86, 1036, "50.5 / 51.0", "README", "unireplknet_s"),
    _ade_640("UniRepLKNet-B", 130, 1850, "53.5 / 53.9", "README", "unireplknet_b"),
    _ade_640("UniRepLKNet-L", 254, 2507, "54.5 / 55.0", "README", "unireplknet_l"),
    _ade_640("UniRepLKNet-XL", 425, 3420, "55.2 / 55.6", "README", "unireplknet_xl"),
    _ade("SLaK-T", 65, 936, "47.6 / -", "slides", "slak_tiny"),
    _ade("SLaK-S", 91, 1028, "49.4 / -", "slides", "slak_small"),
    _ade("SLaK-B", 135, 1172, "50.2 / -", "slides", "slak_base"),
    _ade("InternImage-T", 59, 944, "47.9 / 48.1", "README", "internimage_t"),
    _ade("InternImage-S", 80, 1017, "50.1 / 50.9", "README", "internimage_s"),
    _ade("InternImage-B", 128, 1185, "50.8 / 51.3", "README", "internimage_b"),
    _ade_640("InternImage-L", 256, 2526, "53.9 / 54.1", "README", "internimage_l"),
    _ade_640("InternImage-XL", 368, 3142, "55.0 / 55.3", "README", "internimage_xl"),
    _ade("VAN-B0", 0, 0, "- / 41.1", "README", "van_b0"),
    _ade("VAN-B1", 0, 0, "- / 44.9", "README", "van_b1"),
    _ade("VAN-B2", 0, 0, "- / 48.3", "README", "van_b2"),
    _ade("VAN-B3", 0, 0, "- / 50.1", "README", "van_b3"),
    _ade("HorNet-T 7x7", 52, 926, "48.1 / 48.9", "README", "hornet_tiny_7x7"),
    _ade("HorNet-T GF", 55, 924, "49.2 / 49.3", "README", "hornet_tiny_gf", **_GF),
    _ade("HorNet-S 7x7", 81, 1030, "49.2 / 49.8", "README", "hornet_small_7x7"),
    _ade("HorNet-S GF", 85, 1027, "50.0 / 50.5", "README", "hornet_small_gf", **_GF),
    _ade("HorNet-B 7x7", 121, 1174, "50.0 / 50.5", "README", "hornet_base_7x7"),
    _ade("HorNet-B GF", 126, 1171, "50.5 / 50.9", "README", "hornet_base_gf", **_GF),
    _ade_640("HorNet-L 7x7", 232, 2473, "54.1 / 54.5", "README", "hornet_large_7x7"),
    _ade_640("HorNet-L GF", 239, 2465, "55.0 / 55.2", "README", "hornet_large_gf", **_GF),
    _ade("FocalNet-T (SRF)", 61, 944, "46.5 / 47.2", "README", "focalnet_tiny_srf", **_FOCAL),
    _ade("FocalNet-T (LRF)", 61, 949, "46.8 / 47.8", "README", "focalnet_tiny_lrf", **_FOCAL),
    _ade("FocalNet-S (SRF)", 83, 1035, "49.3 / 50.1", "README", "focalnet_small_srf", **_FOCAL),
    _ade("FocalNet-S (LRF)", 84, 1044, "49.1 / 50.1", "README", "focalnet_small_lrf", **_FOCAL),
    _ade("FocalNet-B (SRF)", 124, 1180, "50.2 / 51.1", "README", "focalnet_base_srf", **_FOCAL),
    _ade("FocalNet-B (LRF)", 126, 1192, "50.5 / 51.4", "README", "focalnet_base_lrf", **_FOCAL),
    _ade("MogaNet-XT", 30.4, 855.7, "42.2 / -", "README", "moganet_xtiny"),
    _ade("MogaNet-T", 33.1, 862.4, "43.7 / -", "README", "moganet_tiny"),
    _ade("MogaNet-S", 55.3, 946.4, "49.2 / -", "README", "moganet_small"),
    _ade("MogaNet-B", 73.7, 1050.4, "50.1 / -", "README", "moganet_base"),
    _ade("MogaNet-L", 113.2, 1176.1, "50.9 / -", "README", "moganet_large"),
    _ade_640("MogaNet-XL", 214, 2451, "54.0 / -", "slides", "moganet_xlarge"),
    _fpn("MogaNet-XT", 6.9, 101.4, "40.3 / -", "moganet_xtiny"),
    _fpn("MogaNet-T", 9.1, 107.8, "43.1 / -", "moganet_tiny"),
    _fpn("MogaNet-S", 29.1, 189.7, "47.7 / -", "moganet_small"),
    _fpn("MogaNet-B", 47.5, 293.6, "49.3 / -", "moganet_base"),
    _fpn("MogaNet-L", 86.2, 418.7, "50.2 / -", "moganet_large"),
    _fpn("VAN-B0", 0, 0, "38.5 / -", "van_b0"),
    _fpn("VAN-B1", 0, 0, "42.9 / -", "van_b1"),
    _fpn("VAN-B2", 0, 0, "46.7 / -", "van_b2"),
    _fpn("VAN-B3", 0, 0, "48.1 / -", "van_b3"),
    _lite("MobileNetV2 3x3", "72.31 / -", kernel_sizes=3),
    _lite("MobileNetV2 9x9", "76.11 / -", kernel_sizes=9, small_kernel=0),
    _lite("MobileNetV2 9x9 + 3x3", "76.30 / -", kernel_sizes=9),
    _lite("MobileNetV2 13x13", "75.67 / -", kernel_sizes=13, small_kernel=0),
    _lite("MobileNetV2 13x13 + 3x3", "76.60 / -", kernel_sizes=13),
)
