"""DeepLabv3+: parallel dilated convolutions on the coarsest map, refined with the finest.

Paper: Chen, Zhu, Papandreou, Schroff, Adam, "Encoder-Decoder with Atrous Separable Convolution for Semantic Image
Segmentation", ECCV 2018, section 3.1 and figure 2. Structure and names are those of mmsegmentation's
``DepthwiseSeparableASPPHead``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from widefield import _checks
from widefield.dense.backbone import Backboned, StageNorms, feature_maps
from widefield.dense.fcn import auxiliary_head
from widefield.dense.layers import AdaptivePool, ConvModule, DepthwiseSeparableConvModule, concatenate
from widefield.dense.segmenter import DecodeHead, Segmenter

OUTPUT_STRIDE = 8
"""Stride of the coarsest map in the published models, reached by dilation."""

USUAL_STRIDE = 32
"""Stride of the coarsest map of networks built without an output stride."""

_REACH = (96, 192, 288)
"""Pixels of the image per dilation: 12, 24, 36 at stride 8 and 6, 12, 18 at stride 16 (section 4)."""


class DepthwiseSeparableASPPHead(DecodeHead):
    """The head of DeepLabv3+, at the resolution of the map ``c1_index``.

    Args:
        in_channels: channels of the map with the pyramid.
        num_classes: number of classes.
        in_index: which of the maps, finest first.
        channels: channels of every map inside.
        dilations: of each parallel convolution; 1 is a pointwise convolution.
        c1_in_channels: channels of the finer map; 0 for none.
        c1_channels: channels to which the finer map is reduced; 0 if there is none.
        c1_index: which of the maps the finer one is.
        dropout: probability that a channel is dropped before the classifier.
        align_corners: of every resizing.

    Raises:
        ValueError: one of ``c1_in_channels`` and ``c1_channels`` is 0.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        in_index: int = -1,
        channels: int = 512,
        dilations: Sequence[int] = (1, 12, 24, 36),
        c1_in_channels: int,
        c1_channels: int = 48,
        c1_index: int = 0,
        dropout: float = 0.1,
        align_corners: bool = False,
    ) -> None:
        super().__init__(channels, num_classes, dropout=dropout, align_corners=align_corners)
        if bool(c1_in_channels) != bool(c1_channels):
            raise ValueError(
                f"c1_in_channels={c1_in_channels} and c1_channels={c1_channels} must both be 0 (no finer map) or not."
            )
        self.in_channels = _checks.integer("in_channels", in_channels)
        self.in_index, self.c1_index = in_index, c1_index
        self.dilations = tuple(_checks.integer("every entry of dilations", dilation) for dilation in dilations)
        self.image_pool = nn.Sequential(AdaptivePool(1), ConvModule(in_channels, channels, 1))
        self.aspp_modules = nn.ModuleList(
            ConvModule(in_channels, channels, 1)
            if dilation == 1
            else DepthwiseSeparableConvModule(in_channels, channels, 3, padding=dilation, dilation=dilation)
            for dilation in self.dilations
        )
        self.bottleneck = ConvModule((len(self.dilations) + 1) * channels, channels, 3, padding=1)
        self.c1_bottleneck = ConvModule(c1_in_channels, c1_channels, 1) if c1_in_channels else None
        self.sep_bottleneck = nn.Sequential(
            DepthwiseSeparableConvModule(channels + c1_channels, channels, 3, padding=1),
            DepthwiseSeparableConvModule(channels, channels, 3, padding=1),
        )

    def pyramid(self, x: Tensor) -> Tensor:
        """Return the map with context: (N, in_channels, H, W) -> (N, channels, H, W)."""
        context = [self.resize(self.image_pool(x), x.shape[2:]), *(module(x) for module in self.aspp_modules)]
        y: Tensor = self.bottleneck(concatenate(context, self.bottleneck))
        return y

    def features(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps -> (N, channels, H, W) at the size of the finer map."""
        y = self.pyramid(maps[self.in_index])
        if self.c1_bottleneck is not None:
            finer = self.c1_bottleneck(maps[self.c1_index])
            y = torch.cat([self.resize(y, finer.shape[2:]), finer], 1)
        out: Tensor = self.sep_bottleneck(y)
        return out


class DeepLabV3Plus(Segmenter):
    """DeepLabv3+ with a depthwise separable head on any backbone, with an FCN as the auxiliary head.

    Args:
        backbone: a timm name, or a module that gives feature maps; see :func:`widefield.dense.feature_maps`.
        num_classes: number of classes.
        channels: channels inside the decode head.
        output_stride: stride of the coarsest map. A name is built with it; not every network can have a stride other
            than 32. A module must have it. None: 8 for a name, whatever it is for a module.
        dilations: of the parallel convolutions. None: 12, 24, 36 at output stride 8 and 6, 12, 18 at 16, so that they
            reach as far in the image.
        c1_channels: channels to which the finest map is reduced.
        auxiliary: whether there is an auxiliary head, on the second coarsest map. It is used only in training.
        auxiliary_channels: channels inside the auxiliary head.
        stage_norms: norms between backbone and heads; None follows the published code of the backbone's family.
        dropout: probability that a channel is dropped before the classifiers.
        align_corners: of every resizing.
        out_indices: which of the backbone's maps to use, at least two; None for the last four.
        backbone_args: further arguments of ``timm.create_model``, such as ``pretrained=True``.

    Raises:
        TypeError, ValueError: an argument is out of range, or the backbone does not fit.
    """

    def __init__(
        self,
        backbone: Backboned,
        num_classes: int,
        *,
        channels: int = 512,
        output_stride: int | None = None,
        dilations: Sequence[int] | None = None,
        c1_channels: int = 48,
        auxiliary: bool = True,
        auxiliary_channels: int = 256,
        stage_norms: StageNorms = None,
        dropout: float = 0.1,
        align_corners: bool = False,
        out_indices: Sequence[int] | None = None,
        **backbone_args: Any,
    ) -> None:
        wanted = OUTPUT_STRIDE if output_stride is None else output_stride
        if isinstance(backbone, str) and wanted != USUAL_STRIDE:
            backbone_args["output_stride"] = wanted
        count = 4 if out_indices is None else len(out_indices)
        used = (0, count - 2, count - 1) if auxiliary else (0, count - 1)
        maps = feature_maps(backbone, out_indices=out_indices, stage_norms=stage_norms, normed=used, **backbone_args)
        stride = maps.strides[-1]
        if output_stride not in (None, stride):
            raise ValueError(
                f"the backbone's coarsest map has stride {stride}, not output_stride={output_stride}. Build the "
                "backbone with that stride, or leave output_stride out."
            )
        common: dict[str, Any] = {"dropout": dropout, "align_corners": align_corners}
        head = DepthwiseSeparableASPPHead(
            maps.channels[-1],
            num_classes,
            channels=channels,
            dilations=(1, *(max(1, reach // stride) for reach in _REACH)) if dilations is None else dilations,
            c1_in_channels=maps.channels[0],
            c1_channels=c1_channels,
            **common,
        )
        aux = auxiliary_head(maps.channels, num_classes, channels=auxiliary_channels, **common) if auxiliary else None
        super().__init__(maps, head, auxiliary_head=aux)
