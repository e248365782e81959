"""Registry of the layers of widefield.nn, for tests of common properties."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from widefield import nn as wnn


class Case(NamedTuple):
    """One small layer. ``make`` takes ``device`` and ``dtype``."""

    make: Callable[..., nn.Module]
    channels_last: bool = False
    """Whether the layer takes (N, H, W, C)."""


LAYERS = {
    "ChannelAggregationFFN": Case(lambda **where: wnn.ChannelAggregationFFN(8, 16, **where)),
    "ConvNorm": Case(lambda **where: wnn.ConvNorm(nn.Conv2d(8, 8, 3, padding=1, **where), nn.ReLU())),
    "DCNv3": Case(lambda **where: wnn.DCNv3(8, groups=2, **where), channels_last=True),
    "DecomposedConv2d": Case(lambda **where: wnn.DecomposedConv2d(8, 8, 9, small=3, **where)),
    "DeformConv2d": Case(lambda **where: wnn.DeformConv2d(8, 8, 3, padding=1, groups=2, **where)),
    "DepthwiseConv2d": Case(lambda **where: wnn.DepthwiseConv2d(8, 8, 7, padding=3, **where)),
    "DepthwiseConv2dSame": Case(lambda **where: wnn.DepthwiseConv2dSame(8, 8, 5, 2, **where)),
    "DilatedReparamConv2d": Case(lambda **where: wnn.DilatedReparamConv2d(8, 8, 7, **where)),
    "DynamicGMConv2d": Case(lambda **where: wnn.DynamicGMConv2d(8, 8, 5, padding=2, groups=8, **where)),
    "ElasticConv2d": Case(lambda **where: wnn.ElasticConv2d(8, 8, (3, 5), groups=8, **where)),
    "FusedMoRFConv2d": Case(lambda **where: wnn.MoRFConv2d(8, 8, (3, 5), groups=8, **where).eval().fuse()),
    "GMConv2d": Case(lambda **where: wnn.GMConv2d(8, 8, 5, padding=2, groups=8, **where)),
    "GRN": Case(lambda **where: wnn.GRN(8, **where), channels_last=True),
    "GlobalLocalFilter": Case(lambda **where: wnn.GlobalLocalFilter(8, 9, 5, **where)),
    "GnConv": Case(lambda **where: wnn.GnConv(8, 3, scale=0.5, **where)),
    "InceptionDWConv2d": Case(lambda **where: wnn.InceptionDWConv2d(8, **where)),
    "LKA": Case(lambda **where: wnn.LKA(8, **where)),
    "LKAAttention": Case(lambda **where: wnn.LKAAttention(8, **where)),
    "LargeKernelConv2d": Case(lambda **where: wnn.LargeKernelConv2d(8, 8, 9, small=3, **where)),
    "MoRFConv2d": Case(lambda **where: wnn.MoRFConv2d(8, 8, (3, 5, 7), groups=8, **where)),
    "MultiOrderDWConv": Case(lambda **where: wnn.MultiOrderDWConv(8, **where)),
    "MultiOrderGatedAggregation": Case(lambda **where: wnn.MultiOrderGatedAggregation(8, **where)),
    "Router": Case(lambda **where: wnn.Router(8, 3, **where)),
    "SameAligned": Case(lambda **where: wnn.SameAligned(wnn.MoRFConv2d(8, 8, (3, 5), 2, groups=8, **where), 2)),
}


def lived(layer: nn.Module) -> nn.Module:
    """Return the layer with all parameters and statistics changed, like after some training."""
    if isinstance(layer, wnn.FusedMoRFConv2d):
        return layer  # the padding of its bank is zero
    with torch.no_grad():
        for tensor in layer.parameters():
            tensor.add_(0.1 * torch.randn_like(tensor))
        for name, tensor in layer.named_buffers():
            if tensor.is_floating_point():
                tensor.add_(0.3 * torch.rand_like(tensor)) if "var" in name else tensor.normal_(0, 0.3)
    return layer


def example(name: str, batch: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return an input of a layer."""
    x = torch.randn(batch, 8, 10, 9, dtype=dtype)
    return x.permute(0, 2, 3, 1) if LAYERS[name].channels_last else x
