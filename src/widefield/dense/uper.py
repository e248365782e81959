"""UPerNet: pyramid pooling on the coarsest map, then a feature pyramid over all maps.

Papers: Xiao, Liu, Zhou, Jiang, Sun, "Unified Perceptual Parsing for Scene Understanding", ECCV 2018, section 3.1 and
figure 4; pyramid pooling: Zhao et al., "Pyramid Scene Parsing Network", CVPR 2017, section 3.2. Structure and names are
those of mmsegmentation's ``UPerHead``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from widefield import _checks
from widefield.dense.backbone import Backboned, StageNorms, feature_maps
from widefield.dense.fcn import auxiliary_head
from widefield.dense.layers import AdaptivePool, ConvModule, concatenate
from widefield.dense.segmenter import DecodeHead, Segmenter


class UPerHead(DecodeHead):
    """The head of UPerNet, at the resolution of the finest map.

    Args:
        in_channels: channels of the maps, finest first; at least two maps.
        num_classes: number of classes.
        channels: channels of every map inside.
        pool_scales: sides to which the coarsest map is pooled.
        dropout: probability that a channel is dropped before the classifier.
        align_corners: of every resizing.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        channels: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
        align_corners: bool = False,
    ) -> None:
        super().__init__(channels, num_classes, dropout=dropout, align_corners=align_corners)
        if len(in_channels) < 2:
            raise ValueError(f"UPerHead needs at least two maps; in_channels is {tuple(in_channels)}.")
        *finer, coarsest = (_checks.integer("every entry of in_channels", count) for count in in_channels)
        self.in_channels = (*finer, coarsest)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(AdaptivePool(scale), ConvModule(coarsest, channels, 1)) for scale in pool_scales
        )
        self.bottleneck = ConvModule(coarsest + len(pool_scales) * channels, channels, 3, padding=1)
        self.lateral_convs = nn.ModuleList(ConvModule(count, channels, 1) for count in finer)
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3, padding=1) for _ in finer)
        self.fpn_bottleneck = ConvModule((len(finer) + 1) * channels, channels, 3, padding=1)

    def pooled(self, x: Tensor) -> Tensor:
        """Return the coarsest map with pooled context: (N, C, H, W) -> (N, channels, H, W)."""
        context = [self.resize(module(x), x.shape[2:]) for module in self.psp_modules]
        y: Tensor = self.bottleneck(concatenate([x, *context], self.bottleneck))
        return y

    def features(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps, finest first -> (N, channels, H, W) at the size of the finest."""
        if len(maps) != len(self.in_channels):
            raise ValueError(f"this head was built for {len(self.in_channels)} maps; got {len(maps)}.")
        levels = [conv(x) for conv, x in zip(self.lateral_convs, maps[:-1], strict=True)]
        levels.append(self.pooled(maps[-1]))
        for index in range(len(levels) - 1, 0, -1):
            # In this order: the sum has the memory format of its first term, and the last level that of the weights.
            levels[index - 1] = self.resize(levels[index], levels[index - 1].shape[2:]) + levels[index - 1]
        for index, conv in enumerate(self.fpn_convs):  # the list keeps no map longer than needed
            levels[index] = conv(levels[index])
        for index in range(1, len(levels)):
            levels[index] = self.resize(levels[index], levels[0].shape[2:])
        joined = concatenate(levels, self.fpn_bottleneck)
        levels.clear()
        y: Tensor = self.fpn_bottleneck(joined)
        return y


class UPerNet(Segmenter):
    """UPerNet on any backbone, with an FCN as the auxiliary head.

    Args:
        backbone: a timm name, or a module that gives feature maps; see :func:`widefield.dense.feature_maps`.
        num_classes: number of classes.
        channels: channels inside the decode head.
        auxiliary: whether there is an auxiliary head, on the second coarsest map. It is used only in training.
        auxiliary_channels: channels inside the auxiliary head.
        stage_norms: norms between backbone and heads; None follows the published code of the backbone's family.
        dropout: probability that a channel is dropped before the classifiers.
        align_corners: of every resizing; True in published models for 769x769 crops of Cityscapes.
        pool_scales: sides to which the coarsest map is pooled.
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
        auxiliary: bool = True,
        auxiliary_channels: int = 256,
        stage_norms: StageNorms = None,
        dropout: float = 0.1,
        align_corners: bool = False,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        out_indices: Sequence[int] | None = None,
        **backbone_args: Any,
    ) -> None:
        maps = feature_maps(backbone, out_indices=out_indices, stage_norms=stage_norms, **backbone_args)
        common: dict[str, Any] = {"dropout": dropout, "align_corners": align_corners}
        head = UPerHead(maps.channels, num_classes, channels=channels, pool_scales=pool_scales, **common)
        aux = auxiliary_head(maps.channels, num_classes, channels=auxiliary_channels, **common) if auxiliary else None
        super().__init__(maps, head, auxiliary_head=aux)
