"""Token mixers and channel mixers by name: modules (N, C, H, W) -> (N, C, H, W) that can stand for each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from timm.layers import Attention2d, GlobalResponseNormMlp, GluMlp, Mlp
from timm.models.focalnet import FocalModulation
from timm.models.metaformer import Pooling
from torch import nn

from widefield.nn.deform import DeformConv2d
from widefield.nn.depthwise import DepthwiseConv2d
from widefield.nn.gmconv import GMConv2d
from widefield.nn.gnconv import GnConv, highest_order
from widefield.nn.large_kernel import LargeKernelConv2d
from widefield.nn.lka import LKAAttention
from widefield.nn.moga import ChannelAggregationFFN, MultiOrderGatedAggregation
from widefield.nn.morf import MoRFConv2d

TOKEN_MIXERS: Mapping[str, Callable[[int, int], nn.Module]] = {
    "attention": lambda width, stage: Attention2d(width, num_heads=max(1, width // 32)),
    "conv": lambda width, stage: DepthwiseConv2d(width, 7),
    "deformable": lambda width, stage: DeformConv2d(width, width, 3),
    "focal": lambda width, stage: FocalModulation(width, focal_window=3, focal_level=3),
    "gmconv": lambda width, stage: GMConv2d(width, width, 7, padding=3, groups=width),
    "gnconv": lambda width, stage: GnConv(width, order=min(2 + stage, highest_order(width))),
    "large_kernel": lambda width, stage: LargeKernelConv2d(width, (31, 29, 27, 13)[min(stage, 3)]),
    "lka": lambda width, stage: LKAAttention(width),
    "moga": lambda width, stage: MultiOrderGatedAggregation(width),
    "morf": lambda width, stage: MoRFConv2d(width, width, (3, 5, 7, 9, 11), groups=width),
    "pooling": lambda width, stage: Pooling(),
}
"""Name -> function of (channels, stage from 0). Sizes are those of the papers' networks: HorNet's orders 2 to 5 and
RepLKNet's 31-29-27-13 go by the stage."""

CHANNEL_MIXERS: Mapping[str, Callable[[int, int], nn.Module]] = {
    "gated": lambda width, hidden: GluMlp(width, hidden, act_layer=nn.SiLU, use_conv=True),
    "grn": lambda width, hidden: GlobalResponseNormMlp(width, hidden, use_conv=True),
    "mlp": lambda width, hidden: Mlp(width, hidden, use_conv=True),
    "moga": lambda width, hidden: ChannelAggregationFFN(width, hidden),
}
"""Name -> function of (channels, hidden channels): a gated MLP (Shazeer 2020), ConvNeXt V2's with GRN, the plain one,
MogaNet's channel aggregation."""
