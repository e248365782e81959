"""List published comparisons of segmentation models: cited counts, and how to build the same model here.

Sources, as printed there:

- slides: Siyuan Li, "Convolution Kernel Design and Gated Attention for Modern Convolutional Neural Networks", March 2024,
  the tables on ADE20K.
- MoRF: Lian, Yu, Wang, "Receptive Fields As Experts in Convolutional Neural Architectures", ICML 2024, table 4. Parameters
  are those after reparameterization.
- RepLKNet: Ding et al., "Scaling Up Your Kernels to 31x31", CVPR 2022, tables 5, 7 and 8.
- MogaNet: the repository's table of SemanticFPN.

The sources say FLOPs and mean multiply-accumulates. They count the decode head and not the auxiliary head, except in the
parameters.
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
    """In millions."""
    macs: float
    """Multiply-accumulates in billions; 0 if the source does not state them."""
    miou: str
    """Percent on the validation set; "ss": one scale, "ms": several scales and flips."""
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


def _ade_640(architecture: str, parameters: float, macs: float, miou: str, name: str) -> CitedSegmenter:
    return CitedSegmenter(
        f"{architecture} (22K)", "UPerNet", "ADE20K", _ADE_640, parameters, macs, miou, "slides", name
    )


_HUGE = {"kernel_sizes": (31, 29, 27, 13)}

CITED_SEGMENTERS = (
    _ade("ResNet-18", 41, 885, "39.2 ss", "slides", "resnet18"),
    _ade("MogaNet-XT", 30, 856, "42.2 ss", "slides", "moganet_xtiny"),
    _ade("ResNet-50", 67, 952, "42.1 ss", "slides", "resnet50"),
    _ade("MogaNet-T", 33, 862, "43.7 ss", "slides", "moganet_tiny"),
    _ade("ConvNeXt-T", 60, 939, "46.7 ms", "slides", "convnext_tiny"),
    _ade("ConvNeXt-T + MoRF (hard)", 63, 0, "47.2 ms", "MoRF", "morf_convnext_tiny", routing="hard"),
    _ade("ConvNeXt-T + MoRF (soft)", 63, 0, "47.7 ms", "MoRF", "morf_convnext_tiny"),
    _ade("FocalNet-T (SRF)", 61, 944, "46.5 ss", "slides", "focalnet_tiny_srf"),
    _ade("HorNet-T 7x7", 52, 926, "48.1 ss", "slides", "hornet_tiny_7x7"),
    _ade("SLaK-T", 65, 936, "47.6 ss", "slides", "slak_tiny"),
    _ade("InternImage-T", 59, 944, "47.9 ss", "slides", "internimage_t"),
    _ade("MogaNet-S", 55, 946, "49.2 ss", "slides", "moganet_small"),
    _ade("ConvNeXt-S", 82, 1027, "48.7 ss", "slides", "convnext_small"),
    _ade("ConvNeXt-S + MoRF (soft)", 85, 0, "50.1 ms", "MoRF", "morf_convnext_small"),
    _ade("FocalNet-S (SRF)", 83, 1035, "49.3 ss", "slides", "focalnet_small_srf"),
    _ade("SLaK-S", 91, 1028, "49.4 ss", "slides", "slak_small"),
    _ade("InternImage-S", 80, 1017, "50.1 ss", "slides", "internimage_s"),
    _ade("MogaNet-B", 74, 1050, "50.1 ss", "slides", "moganet_base"),
    _ade("ConvNeXt-B", 122, 1170, "49.1 ss", "slides", "convnext_base"),
    _ade("ConvNeXt-B + MoRF (soft)", 125, 0, "50.6 ms", "MoRF", "morf_convnext_base"),
    _ade("RepLKNet-3", 104.1, 1119, "46.05 ss", "RepLKNet", "replknet_31b", kernel_sizes=(3, 3, 3, 3)),
    _ade("RepLKNet-7", 104.6, 1123, "48.05 ss", "RepLKNet", "replknet_31b", kernel_sizes=(7, 7, 7, 7)),
    _ade("RepLKNet-13", 106.0, 1130, "48.35 ss", "RepLKNet", "replknet_31b", kernel_sizes=(13, 13, 13, 13)),
    _ade("RepLKNet-25", 110.6, 1159, "48.68 ss", "RepLKNet", "replknet_31b", kernel_sizes=(25, 25, 25, 13)),
    _ade("RepLKNet-31B", 111.7, 1170, "49.17 ss", "RepLKNet", "replknet_31b"),
    _ade("FocalNet-B (SRF)", 124, 1180, "50.2 ss", "slides", "focalnet_base_srf"),
    _ade("SLaK-B", 135, 1185, "50.2 ss", "slides", "slak_base"),
    _ade("InternImage-B", 128, 1185, "50.8 ss", "slides", "internimage_b"),
    _ade("MogaNet-L", 113, 1176, "50.9 ss", "slides", "moganet_large"),
    _ade_640("ConvNeXt-L", 235, 2458, "53.7 ss", "convnext_large"),
    _ade_640("RepLKNet-31L", 207, 2404, "52.4 ss", "replknet_31l"),
    _ade_640("MogaNet-XL", 214, 2451, "54.0 ss", "moganet_xlarge"),
    _ade_640("InternImage-L", 256, 2526, "53.9 ss", "internimage_l"),
    CitedSegmenter("RepLKNet-31B", "UPerNet", "Cityscapes", _CITY, 110, 2315, "83.1 ss", "RepLKNet", "replknet_31b"),
    CitedSegmenter("MogaNet-S", "SemanticFPN", "ADE20K", _ADE, 29.1, 190, "47.7 ss", "MogaNet", "moganet_small"),
)
