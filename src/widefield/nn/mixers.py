"""Token mixers and channel mixers by name: interchangeable modules (N, C, H, W) -> (N, C, H, W)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.layers import Attention2d, GlobalResponseNormMlp, GluMlp, Mlp
from timm.models.focalnet import FocalModulation
from timm.models.metaformer import Pooling
from torch import Tensor, nn

from widefield.nn.deform import DeformConv2d
from widefield.nn.depthwise import DepthwiseConv2d
from widefield.nn.gmconv import GMConv2d
from widefield.nn.gnconv import GnConv, highest_order
from widefield.nn.large_kernel import LargeKernelConv2d
from widefield.nn.lka import LKAAttention
from widefield.nn.moga import ChannelAggregationFFN, MultiOrderGatedAggregation
from widefield.nn.morf import MoRFConv2d

TOKEN_MIXERS: Mapping[str, Callable[[int, int], nn.Module]] = {
    "attention": lambda width, stage: Attention2d(width, num_heads=_heads(width)),
    "conv": lambda width, stage: DepthwiseConv2d(width, width, 7, padding=3),
    "deformable": lambda width, stage: DeformConv2d(width, width, 3),
    "focal": lambda width, stage: FocalModulation(width, focal_window=3, focal_level=3),
    "gmconv": lambda width, stage: GMConv2d(width, width, 7, padding=3, groups=width),
    "gnconv": lambda width, stage: GnConv(width, order=min(2 + stage, highest_order(width))),
    "large_kernel": lambda width, stage: LargeKernelConv2d(width, width, (31, 29, 27, 13)[min(stage, 3)]),
    "lka": lambda width, stage: LKAAttention(width),
    "moga": lambda width, stage: MultiOrderGatedAggregation(width),
    "morf": lambda width, stage: MoRFConv2d(width, width, (3, 5, 7, 9, 11), groups=width),
    "pooling": lambda width, stage: Pooling(),
}
"""Name -> function of (channels, stage from 0). Sizes are those of the papers' networks: HorNet's orders 2 to 5 and
RepLKNet's 31-29-27-13 depend on the stage."""

CHANNEL_MIXERS: Mapping[str, Callable[[int, int], nn.Module]] = {
    "gated": lambda width, hidden: GluMlp(width, hidden, act_layer=nn.SiLU, use_conv=True),
    "grn": lambda width, hidden: GlobalResponseNormMlp(width, hidden, use_conv=True),
    "mlp": lambda width, hidden: Mlp(width, hidden, use_conv=True),
    "moga": lambda width, hidden: ChannelAggregationFFN(width, hidden),
}
"""Name -> function of (channels, hidden channels): a gated MLP (Shazeer 2020), ConvNeXt V2's with GRN, the plain one,
MogaNet's channel aggregation."""

GATED = ("focal", "gnconv", "lka", "moga")
"""Token mixers that multiply functions of their input: their output grows faster than the input."""

_OUTPUTS: Mapping[str, Callable[[Any], list[nn.Parameter]]] = {
    "attention": lambda layer: [*layer.proj.parameters()],
    "conv": lambda layer: [*layer.parameters()],
    "deformable": lambda layer: [*layer.output_proj.parameters()],
    "gmconv": lambda layer: [layer.weight, layer.bias],
    "large_kernel": lambda layer: [p for _, norm in layer.branches() for p in norm.parameters()],
    "morf": lambda layer: [*layer.expert_weights, *layer.expert_biases],
}
"""Parameters to which the output of a mixer is proportional."""

_SIDE = 14
"""Least side of the map on which the scale of a new mixer is measured."""


class Rescaled(nn.Module):
    """A token mixer that reads every sample at unit scale: ``gain * s * mixer(x / s)``, s the RMS of x.

    Gated mixers multiply functions of their input by each other. The papers put them behind a norm. In a model without
    one their output grows with a power of the input, up to the sixth, and overflows after a few layers. The output of
    this module is proportional to the input's scale, as that of a convolution is.

    Args:
        mixer: (N, C, H, W) -> (N, C, H, W).
        channels: C.

    Attributes:
        gain: (C, 1, 1), a parameter; 1 at first.
    """

    def __init__(self, mixer: nn.Module, channels: int) -> None:
        super().__init__()
        self.mixer = mixer
        self.gain = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        level = x.abs().mean((1, 2, 3), keepdim=True) + 1e-6  # first, as squares overflow in float16
        y = x / level
        spread = torch.linalg.vector_norm(y, dim=(1, 2, 3), keepdim=True) / x[0].numel() ** 0.5 + 1e-6
        out: Tensor = self.mixer(y / spread) * spread * level * self.gain
        return out


def in_place_of(conv: nn.Conv2d, mixer: str, stage: int) -> nn.Module:
    """Return a new token mixer whose output is about as large as that of ``conv``, a depthwise convolution.

    Both are compared on noise. Mixers of :data:`GATED` are :class:`Rescaled`, a mixture of receptive fields starts with
    routing weights that are the same for all inputs, and "pooling", which has no parameters, does not change. The mixer
    has the device, dtype and mode of ``conv``, and is frozen if its kernel is.

    Args:
        conv: stride 1; keeps the size of its input.
        mixer: a name of :data:`TOKEN_MIXERS`.
        stage: from 0.

    Raises:
        TypeError, ValueError: the mixer cannot have as many channels.
    """
    with conv.weight.device:
        layer = TOKEN_MIXERS[mixer](conv.in_channels, stage)
        if mixer in GATED:
            layer = Rescaled(layer, conv.in_channels)
    if isinstance(layer, MoRFConv2d):
        layer.router.settle(0)
    if not conv.weight.is_meta:
        _calibrate(layer, [layer.gain] if isinstance(layer, Rescaled) else _OUTPUTS.get(mixer, _none)(layer), conv)
    return layer.to(conv.weight.dtype).requires_grad_(conv.weight.requires_grad).train(conv.training)


@torch.no_grad()
def _calibrate(layer: nn.Module, proportional: list[nn.Parameter], conv: nn.Conv2d) -> None:
    """Scale parameters so that the output of ``layer`` is as large as that of ``conv`` without its bias.

    The input is noise plus a random level for each channel, as some mixers average the noise and some drop the level.
    """
    generator = torch.Generator().manual_seed(0)
    spans = (dilation * (size - 1) + 1 for size, dilation in zip(conv.kernel_size, conv.dilation, strict=True))
    shape = 2, conv.in_channels, *(max(span, _SIDE) for span in spans)
    x = torch.randn(shape, generator=generator) + torch.randn(*shape[:2], 1, 1, generator=generator)
    x, fresh, bare = x.to(conv.weight.device), copy.deepcopy(layer).eval(), copy.deepcopy(conv).float()
    bare.bias = None
    factor = torch.linalg.vector_norm(bare(x)) / torch.linalg.vector_norm(fresh(x))
    if factor.isfinite() and factor > 0:
        for parameter in proportional:
            parameter.mul_(factor)


def _none(layer: nn.Module) -> list[nn.Parameter]:
    return []


def _heads(width: int) -> int:
    """Return the largest number of heads that have at least 32 channels and divide them; 1 if none do."""
    return max((heads for heads in range(1, width // 32 + 1) if width % heads == 0), default=1)
