"""FCN: convolutions on one map and a classifier; as a whole model, and as the auxiliary head of others.

Paper: Long, Shelhamer, Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015; as an auxiliary
head: Zhao et al., "Pyramid Scene Parsing Network", CVPR 2017, section 4. Structure and names are those of
mmsegmentation's ``FCNHead``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from widefield import _checks
from widefield.dense.backbone import Backboned, StageNorms, feature_maps
from widefield.dense.layers import ConvModule
from widefield.dense.segmenter import DecodeHead, Segmenter


class FCNHead(DecodeHead):
    """Convolutions on one map, and a classifier.

    Args:
        in_channels: channels of the map.
        num_classes: number of classes.
        in_index: which of the maps, finest first.
        channels: channels of the convolutions.
        num_convs: number of convolutions; 0 for none, which needs ``in_channels == channels``.
        kernel_size: of the convolutions.
        dilation: of the convolutions.
        concat_input: whether one more convolution, ``conv_cat``, sees the map and the result side by side.
        dropout: probability that a channel is dropped before the classifier.
        align_corners: of the resizing of the logits.

    Raises:
        ValueError: no convolutions, but ``in_channels`` differs from ``channels``.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        in_index: int = 2,
        channels: int = 256,
        num_convs: int = 1,
        kernel_size: int = 3,
        dilation: int = 1,
        concat_input: bool = False,
        dropout: float = 0.1,
        align_corners: bool = False,
    ) -> None:
        super().__init__(channels, num_classes, dropout=dropout, align_corners=align_corners)
        self.in_channels = _checks.integer("in_channels", in_channels)
        self.in_index = in_index
        count = _checks.integer("num_convs", num_convs, minimum=0)
        size = _checks.odd("kernel_size", kernel_size)
        if count == 0 and in_channels != channels:
            raise ValueError(
                f"without convolutions the classifier reads the map itself, so in_channels={in_channels} and "
                f"channels={channels} must be equal."
            )
        widths = [in_channels, *[channels] * count]
        padding = size // 2 * _checks.integer("dilation", dilation)
        self.convs = nn.Sequential(
            *(ConvModule(width, channels, size, padding=padding, dilation=dilation) for width in widths[:-1])
        )
        self.conv_cat = ConvModule(in_channels + channels, channels, size, padding=size // 2) if concat_input else None

    def features(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps -> (N, channels, H, W) at the size of the map in use."""
        x = maps[self.in_index]
        y: Tensor = self.convs(x)
        return y if self.conv_cat is None else self.conv_cat(torch.cat([x, y], 1))


def auxiliary_head(in_channels: Sequence[int], num_classes: int, **options: Any) -> FCNHead:
    """Return the auxiliary head of the published models, an FCN on the second coarsest map.

    Args:
        in_channels: channels of the maps, finest first; at least two maps.
        num_classes: number of classes.
        options: further arguments of :class:`FCNHead`, such as ``channels``.
    """
    index = len(in_channels) - 2
    return FCNHead(in_channels[index], num_classes, in_index=index, **options)


class FCN(Segmenter):
    """An FCN head on the coarsest of a backbone's maps, with another on the second coarsest to help training.

    Without convolutions and without the auxiliary head, the head is one linear classifier of each pixel. It adds
    nothing to the field of the backbone, which makes it the head for questions about that.

    Args:
        backbone: a timm name, or a module that gives feature maps; see :func:`widefield.dense.feature_maps`. Published
            models keep a stride of 8: ``output_stride=8``.
        num_classes: number of classes.
        channels: channels of the convolutions; None for 512, or those of the map if there are no convolutions.
        num_convs, kernel_size, concat_input: see :class:`FCNHead`.
        auxiliary: whether there is an auxiliary head, which needs two maps. It is used only in training.
        auxiliary_channels: channels inside the auxiliary head.
        stage_norms: norms between backbone and heads; None follows the published code of the backbone's family.
        dropout: probability that a channel is dropped before the classifiers.
        align_corners: of every resizing.
        out_indices: which of the backbone's maps to choose from; None for all. The head uses the last of them.
        backbone_args: further arguments of ``timm.create_model``, such as ``pretrained=True``.

    Raises:
        TypeError, ValueError: an argument is out of range, or the backbone does not fit.
    """

    def __init__(
        self,
        backbone: Backboned,
        num_classes: int,
        *,
        channels: int | None = None,
        num_convs: int = 2,
        kernel_size: int = 3,
        concat_input: bool = True,
        auxiliary: bool = True,
        auxiliary_channels: int = 256,
        stage_norms: StageNorms = None,
        dropout: float = 0.1,
        align_corners: bool = False,
        out_indices: Sequence[int] | None = None,
        **backbone_args: Any,
    ) -> None:
        used = 2 if auxiliary else 1  # norms of further maps would have no gradient
        chosen = {"levels": used} if out_indices is None else {"out_indices": out_indices[-used:]}
        maps = feature_maps(backbone, **chosen, stage_norms=stage_norms, **backbone_args)
        if len(maps.channels) < used:
            raise ValueError(
                f"the auxiliary head reads the second coarsest map, but out_indices={out_indices} leaves one map; pass "
                "auxiliary=False, or use more maps."
            )
        common: dict[str, Any] = {"dropout": dropout, "align_corners": align_corners}
        head = FCNHead(
            maps.channels[-1],
            num_classes,
            in_index=len(maps.channels) - 1,
            channels=channels if channels is not None else (512 if num_convs else maps.channels[-1]),
            num_convs=num_convs,
            kernel_size=kernel_size,
            concat_input=concat_input,
            **common,
        )
        aux = auxiliary_head(maps.channels, num_classes, channels=auxiliary_channels, **common) if auxiliary else None
        super().__init__(maps, head, auxiliary_head=aux)
