"""MogaNet's two layers: gated context of three ranges, and channel aggregation.

Li et al., "MogaNet: Multi-order Gated Aggregation Network", ICLR 2024, sections 4.2 (spatial aggregation) and 4.3
(channel aggregation). Keys are those of its code.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from widefield import _checks
from widefield._checks import Pair
from widefield.nn import depthwise
from widefield.nn._leaf import is_symbolic, recorded
from widefield.nn.depthwise import DepthwiseConv2d
from widefield.nn.fusing import learns, refuse_training
from widefield.ops._problem import size_of

KERNEL_SIZES = (5, 5, 7)
"""Of the depthwise convolution that all channels pass, and of the two after it that some do."""

DILATIONS = (1, 2, 3)
"""Theirs."""

SPLIT = (1, 3, 4)
"""Parts of the channels that pass the first alone, the second too, and the third too."""


class Decomposition(nn.Module):
    """Amplify the difference from a common part: ``x + scale * (x - common)``, with a scale for each channel.

    Args:
        channels: of x.
    """

    def __init__(
        self, channels: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1, channels, 1, 1), 1e-5, device=device, dtype=dtype))

    def forward(self, x: Tensor, common: Tensor) -> Tensor:
        """(N, C, H, W), and ``common`` that broadcasts to it -> (N, C, H, W)."""
        return x + self.scale * (x - common)


class MultiOrderDWConv(nn.Module):
    """Depthwise convolutions of growing reach, each on fewer channels, and a 1x1 convolution: (N, C, H, W) -> the same.

    All channels pass a 5x5 kernel. Then the first eighth does not change, the next three eighths pass another 5x5 with
    dilation 2, and the last half a 7x7 with dilation 3. Their receptive fields are 5, 13 and 23 pixels wide. Keys
    ``DW_conv0`` to ``DW_conv2``, ``PW_conv``.

    Args:
        channels: C.
        dilations: of the three depthwise convolutions.
        split: proportions of the three shares. The second and third are rounded down; the first may be 0.
        backend: of :func:`widefield.ops.depthwise_conv2d`.

    Raises:
        TypeError, ValueError: not three integers each, or out of range; a share without channels.
    """

    def __init__(
        self,
        channels: int,
        dilations: Sequence[int] = DILATIONS,
        split: Sequence[int] = SPLIT,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.channels = _checks.integer("channels", channels)
        self.splits = _shares(self.channels, split)
        if not all(self.splits[1:]):
            raise ValueError(
                f"split must leave the second and third share a channel; {tuple(split)} of {channels} gives "
                f"{self.splits}."
            )
        widths = (self.channels, *self.splits[1:])
        for index, (width, size, d) in enumerate(
            zip(widths, KERNEL_SIZES, _three("dilations", dilations), strict=True)
        ):
            conv = DepthwiseConv2d(width, width, size, padding="same", dilation=d, backend=backend, **where)
            self.add_module(f"DW_conv{index}", conv)
        self.PW_conv = nn.Conv2d(self.channels, self.channels, 1, **where)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W); ValueError for an input of another shape."""
        if is_symbolic(x):
            return recorded(self, x)
        _checks.images(size_of(x), self.channels)
        low, middle, high = self.DW_conv0(x).split(self.splits, 1)  # type: ignore[operator]
        y: Tensor = self.PW_conv(torch.cat([low, self.DW_conv1(middle), self.DW_conv2(high)], 1))  # type: ignore[operator]
        return y

    def extra_repr(self) -> str:
        """Show how the channels are split."""
        return f"{self.channels} = {' + '.join(map(str, self.splits))}"


class MultiOrderGatedAggregation(nn.Module):
    """MogaNet's spatial aggregation; it adds its own input: (N, C, H, W) -> the same.

    ``y = SiLU(D(P1 x))``, ``x + P2 (SiLU(G y) * SiLU(V y))``, where P1, P2 and G are 1x1 convolutions, V is a
    :class:`MultiOrderDWConv` and D a :class:`Decomposition` from the mean over the map. The published code is followed
    where the paper differs: the paper has a GELU after D, and no sum with the input. Keys ``proj_1``, ``gate``,
    ``value``, ``proj_2``, ``sigma``.

    Nothing is forced to float32. Under autocast D adds in float32, the dtype of its scales, which start too small for
    narrower sums. The published code does the same. Its option to compute the product in float32
    (``attn_force_fp32``, off by default) applies SiLU twice, which is another function; it is not implemented here. If
    the product overflows in float16, use bfloat16.

    Args:
        channels, dilations, split, backend: of :class:`MultiOrderDWConv`.
    """

    def __init__(
        self,
        channels: int,
        dilations: Sequence[int] = DILATIONS,
        split: Sequence[int] = SPLIT,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.channels = _checks.integer("channels", channels)
        self.proj_1 = nn.Conv2d(channels, channels, 1, **where)
        self.gate = nn.Conv2d(channels, channels, 1, **where)
        self.value = MultiOrderDWConv(channels, dilations, split, backend=backend, **where)
        self.proj_2 = nn.Conv2d(channels, channels, 1, **where)
        self.sigma = Decomposition(channels, **where)

    @classmethod
    def from_conv2d(
        cls, conv: nn.Conv2d, dilations: Sequence[int] = DILATIONS, split: Sequence[int] = SPLIT
    ) -> MultiOrderGatedAggregation:
        """Return a new layer with the channels, device, dtype, mode and backend of a depthwise convolution.

        This does not keep the function of ``conv`` or any of its weights: the layer cannot compute a convolution. If
        the kernel of ``conv`` is frozen (``requires_grad`` is False), so is the layer.

        Args:
            conv: a depthwise convolution of stride 1 that keeps the size of its input.
            dilations, split: as of the layer.

        Raises:
            TypeError, ValueError: ``conv`` cannot be replaced, as :func:`why_not` says, or the layer refuses its
                arguments.
        """
        reason = why_not(conv, split)
        if reason is not None:
            raise ValueError(f"{conv} cannot become a MultiOrderGatedAggregation: {reason}.")
        where: dict[str, Any] = {"device": conv.weight.device, "dtype": conv.weight.dtype}
        layer = cls(conv.in_channels, dilations, split, backend=getattr(conv, "backend", "auto"), **where)
        return layer.requires_grad_(conv.weight.requires_grad).train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W); ValueError for an input of another shape."""
        if is_symbolic(x):
            return recorded(self, x)
        return x + self.aggregate(x)

    def aggregate(self, x: Tensor) -> Tensor:
        """Return the part that is added to the input."""
        _checks.images(size_of(x), self.channels)
        y = self.proj_1(x)
        y = F.silu(self.sigma(y, y.mean((2, 3), keepdim=True)))
        out: Tensor = self.proj_2(F.silu(self.gate(y)) * F.silu(self.value(y)))
        return out


class ChannelAggregationFFN(nn.Module):
    """MogaNet's channel aggregation: (N, C, H, W) -> the same.

    ``y = GELU(DW(P1 x))``, ``P2 (D y)``, where P1 and P2 are 1x1 convolutions, DW is depthwise and D a
    :class:`Decomposition` from ``GELU(R y)``, a mix of all channels into one. Keys ``fc1``, ``dwconv``,
    ``fc2``, ``decompose``, ``sigma``.

    Args:
        channels: C.
        hidden: channels of y.
        kernel_size: of DW, odd; or (rows, columns).
        backend: of :func:`widefield.ops.depthwise_conv2d`.

    Raises:
        TypeError, ValueError: numbers that are not positive integers, an even kernel size.
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        kernel_size: int | Pair = 3,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.channels, hidden = _checks.integer("channels", channels), _checks.integer("hidden", hidden)
        size = _checks.odd_pair("kernel_size", kernel_size)
        self.fc1 = nn.Conv2d(channels, hidden, 1, **where)
        self.dwconv = DepthwiseConv2d(hidden, hidden, size, padding="same", backend=backend, **where)
        self.fc2 = nn.Conv2d(hidden, channels, 1, **where)
        self.decompose = nn.Conv2d(hidden, 1, 1, **where)
        self.sigma = Decomposition(hidden, **where)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W); ValueError for an input of another shape."""
        if is_symbolic(x):
            return recorded(self, x)
        _checks.images(size_of(x), self.channels)
        y = F.gelu(self.dwconv(self.fc1(x)))
        out: Tensor = self.fc2(self.sigma(y, F.gelu(self.decompose(y))))
        return out

    def fuse(self) -> FusedChannelAggregationFFN:
        """Return the layer with its decomposition folded into ``fc2``. Exact in evaluation mode.

        ``P2 (y + s (y - c)) = (P2 (1 + s)) y - (P2 s) c``: three passes over the hidden channels become one over C.

        Raises:
            RuntimeError: in training mode.
        """
        refuse_training(self)
        return FusedChannelAggregationFFN(self)


class FusedChannelAggregationFFN(nn.Module):
    """A merged :class:`ChannelAggregationFFN`, which adds the common part at the end. Made by ``fuse()``.

    Args:
        layer: the layer to merge; it is not changed.
    """

    @torch.no_grad()
    def __init__(self, layer: ChannelAggregationFFN) -> None:
        super().__init__()
        self.fc1, self.dwconv, self.fc2, self.decompose = (
            copy.deepcopy(part) for part in (layer.fc1, layer.dwconv, layer.fc2, layer.decompose)
        )
        weight, scale = layer.fc2.weight, layer.sigma.scale
        self.fc2.weight.mul_(1 + scale)
        self.fc2.weight.requires_grad_(learns([weight, scale]))
        self.common = nn.Parameter(-(weight * scale).sum((1, 2, 3)).view(1, -1, 1, 1), learns([weight, scale]))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        y = F.gelu(self.dwconv(self.fc1(x)))
        out: Tensor = self.fc2(y) + self.common * F.gelu(self.decompose(y))
        return out


def why_not(conv: nn.Module, split: Sequence[int] = SPLIT) -> str | None:
    """Return why ``conv`` cannot be replaced by :meth:`MultiOrderGatedAggregation.from_conv2d`, or None if it can."""
    reason = None if type(conv) is DepthwiseConv2d else depthwise.why_not(conv)
    if reason is not None or not isinstance(conv, nn.Conv2d):
        return reason
    if conv.stride != (1, 1):
        return f"its stride is {conv.stride}, and the layer adds its input to its output"
    if conv.padding_mode != "zeros":
        return f"its padding mode is {conv.padding_mode!r}, not 'zeros'"
    grown = [d * (size - 1) for d, size in zip(conv.dilation, conv.kernel_size, strict=True)]
    padded = [0, 0] if isinstance(conv.padding, str) else [2 * pad for pad in conv.padding]
    if conv.padding != "same" and padded != grown:
        return f"its padding is {conv.padding}, which does not keep the size of its input"
    if not all(_shares(conv.in_channels, split)[1:]):
        return f"it has {conv.in_channels} channels, too few for a split of {tuple(split)}"
    return None


def _shares(channels: int, split: Sequence[int]) -> tuple[int, int, int]:
    parts = _three("split", split, first=0)
    middle, high = (channels * part // sum(parts) for part in parts[1:])
    return channels - middle - high, middle, high


def _three(name: str, values: Sequence[int], first: int = 1) -> list[int]:
    if not isinstance(values, Sequence) or len(values) != 3:
        raise ValueError(f"{name} must have three entries, one for each depthwise convolution; got {values!r}.")
    smallest = (first, 1, 1)
    return [_checks.integer(f"every entry of {name}", v, minimum=m) for v, m in zip(values, smallest, strict=True)]
