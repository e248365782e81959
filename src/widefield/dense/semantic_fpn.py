"""Semantic FPN: a feature pyramid whose levels are enlarged step by step and added.

Paper: Kirillov, Girshick, He, Dollár, "Panoptic Feature Pyramid Networks", CVPR 2019, section 3.1 and figure 3.
Structure and names are those of mmsegmentation's ``FPNHead`` and ``FPN``; the head has batch norms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from widefield import _checks
from widefield.dense.backbone import Backboned, StageNorms, feature_maps
from widefield.dense.fpn import FPN
from widefield.dense.layers import ConvModule
from widefield.dense.segmenter import DecodeHead, Segmenter


class FPNHead(DecodeHead):
    """The head of Semantic FPN, at the resolution of the finest level.

    Args:
        in_channels: channels of the levels, finest first.
        num_classes: number of classes.
        feature_strides: strides of the levels. Each level is doubled until it has the stride of the first.
        channels: channels of every map inside.
        dropout: probability that a channel is dropped before the classifier.
        align_corners: of every resizing.

    Raises:
        ValueError: not one stride for each level, or the first is not the smallest.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        feature_strides: Sequence[int],
        channels: int = 128,
        dropout: float = 0.1,
        align_corners: bool = False,
    ) -> None:
        super().__init__(channels, num_classes, dropout=dropout, align_corners=align_corners)
        self.in_channels = tuple(_checks.integer("every entry of in_channels", count) for count in in_channels)
        self.feature_strides = tuple(_checks.integer("every entry of feature_strides", s) for s in feature_strides)
        if len(self.in_channels) != len(self.feature_strides) or min(self.feature_strides) < self.feature_strides[0]:
            raise ValueError(
                f"feature_strides must hold a stride for each of {len(self.in_channels)} levels, finest first; got "
                f"{self.feature_strides}."
            )
        self.scale_heads = nn.ModuleList(
            self._scale_head(count, stride / self.feature_strides[0])
            for count, stride in zip(self.in_channels, self.feature_strides, strict=True)
        )

    def _scale_head(self, width: int, ratio: float) -> nn.Sequential:
        """Return convolutions, each followed by a doubling of the map unless its stride is the first level's."""
        steps: list[nn.Module] = []
        for index in range(max(1, int(math.log2(ratio)))):
            steps.append(ConvModule(self.channels if index else width, self.channels, 3, padding=1))
            if ratio != 1:
                steps.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=self.align_corners))
        return nn.Sequential(*steps)

    def features(self, maps: Sequence[Tensor]) -> Tensor:
        """Levels, finest first -> (N, channels, H, W) at the size of the finest."""
        finest, *others = (head(x) for head, x in zip(self.scale_heads, maps, strict=True))
        y: Tensor = finest
        for x in others:
            y = y + self.resize(x, finest.shape[2:])
        return y


class SemanticFPN(Segmenter):
    """Semantic FPN on any backbone. It has no auxiliary head.

    Args:
        backbone: a timm name, or a module that gives feature maps; see :func:`widefield.dense.feature_maps`.
        num_classes: number of classes.
        channels: channels inside the decode head.
        neck_channels: channels of the pyramid.
        stage_norms: norms between backbone and neck; None follows the published code of the backbone's family.
        dropout: probability that a channel is dropped before the classifier.
        align_corners: of every resizing in the head; the pyramid enlarges by the nearest neighbor.
        out_indices: which of the backbone's maps to use; None for the last four.
        backbone_args: further arguments of ``timm.create_model``, such as ``pretrained=True``.

    Raises:
        TypeError, ValueError: an argument is out of range, or the backbone does not fit.
    """

    def __init__(
        self,
        backbone: Backboned,
        num_classes: int,
        *,
        channels: int = 128,
        neck_channels: int = 256,
        stage_norms: StageNorms = None,
        dropout: float = 0.1,
        align_corners: bool = False,
        out_indices: Sequence[int] | None = None,
        **backbone_args: Any,
    ) -> None:
        maps = feature_maps(backbone, out_indices=out_indices, stage_norms=stage_norms, **backbone_args)
        neck = FPN(maps.channels, neck_channels)
        head = FPNHead(
            [neck_channels] * neck.num_outs,
            num_classes,
            feature_strides=maps.strides,
            channels=channels,
            dropout=dropout,
            align_corners=align_corners,
        )
        super().__init__(maps, head, neck=neck)
