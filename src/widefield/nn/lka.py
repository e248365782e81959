"""Large kernel attention: multiply every pixel by a learned function of a large neighborhood.

Guo, Lu, Liu, Cheng, Hu, "Visual Attention Network", Computational Visual Media 2023, section 3.1. A KxK kernel is
decomposed into a small depthwise convolution, a dilated one, and a pointwise one. Their output is the gate. Keys are
those of the official code (github.com/Visual-Attention-Network/VAN-Classification, Apache 2.0).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from widefield import _checks
from widefield.nn import depthwise
from widefield.nn.depthwise import DepthwiseConv2d
from widefield.ops import fold


class LKA(nn.Module):
    """``x * attention(x)``: (N, C, H, W) -> the same, with a gate that sees far and mixes channels.

    For a KxK kernel and dilation d, section 3.1: ``conv0`` is depthwise, 2d-1 taps a side; ``conv_spatial`` is
    depthwise, ceil(K/d) taps a side, d pixels apart; ``conv1`` is 1x1. If those taps cannot be centered on the pixel
    (an even number of taps, an odd dilation) there is one more. K = 21 and d = 3 are 5x5 and 7x7.

    There is no ``fuse()``. The product with the input is not linear. The two depthwise convolutions equal one only in
    the middle of a map, as the second one pads the output of the first; and that one would have 23x23 taps instead of
    25 + 49.

    Args:
        channels: C.
        kernel_size: K, the nominal size. What the layer sees is :attr:`receptive_field`.
        dilation: d.
        backend: of :func:`widefield.ops.depthwise_conv2d`.

    Raises:
        TypeError, ValueError: channels, a kernel size or a dilation that are not positive integers.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 21,
        dilation: int = 3,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        channels = _checks.integer("channels", channels)
        kernel_size = _checks.integer("kernel_size", kernel_size)
        dilation = _checks.integer("dilation", dilation)
        taps = -(-kernel_size // dilation)
        taps += fold.effective_size(taps, dilation) % 2 == 0
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        near: dict[str, Any] = {"padding": "same", "backend": backend, **where}
        self.conv0 = DepthwiseConv2d(channels, channels, 2 * dilation - 1, **near)
        self.conv_spatial = DepthwiseConv2d(channels, channels, taps, dilation=dilation, **near)
        self.conv1 = nn.Conv2d(channels, channels, 1, **where)

    @classmethod
    def from_conv2d(
        cls, conv: nn.Conv2d, kernel_size: int | None = None, dilation: int = 3, *, backend: str = "auto"
    ) -> LKA:
        """Return a new gate as a replacement for a depthwise ``conv``, with its channels, device, dtype and mode.

        This does not keep the function of ``conv``, and uses none of its weights: a convolution is linear in its input,
        and the gated input is not. It is a start for training.

        Args:
            conv: a depthwise convolution of stride 1 that keeps the size of its input.
            kernel_size: as of the layer; None for the longer side that ``conv`` spans.
            dilation, backend: as of the layer.

        Raises:
            ValueError: ``conv`` cannot be replaced; the message is that of :func:`why_not`.
        """
        reason = why_not(conv)
        if reason is not None:
            raise ValueError(f"cannot be an LKA: {reason}.")
        weight = conv.weight
        size = max(_spans(conv)) if kernel_size is None else kernel_size
        layer = cls(conv.in_channels, size, dilation, backend=backend, device=weight.device, dtype=weight.dtype)
        return layer.requires_grad_(weight.requires_grad).train(conv.training)

    @property
    def receptive_field(self) -> int:
        """Pixels a side on which the gate of a pixel depends: 23 for K = 21 and d = 3."""
        return _spans(self.conv0)[0] + _spans(self.conv_spatial)[0] - 1

    def attention(self, x: Tensor) -> Tensor:
        """Return the gate, a real number for every pixel and channel: (N, C, H, W) -> the same."""
        gate: Tensor = self.conv1(self.conv_spatial(self.conv0(x)))
        return gate

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W); ValueError for other channels."""
        return x * self.attention(x)

    def extra_repr(self) -> str:
        """Show the receptive field."""
        return f"receptive_field={self.receptive_field}"


class LKAAttention(nn.Sequential):
    """The token mixer of VAN: ``x + proj_2(LKA(GELU(proj_1(x))))``, (N, C, H, W) -> the same. Figure 3.

    Args:
        channels: C.
        kernel_size, dilation, backend: of :class:`LKA`.

    Raises:
        TypeError, ValueError: as LKA.
    """

    proj_1: nn.Conv2d
    spatial_gating_unit: LKA
    proj_2: nn.Conv2d

    def __init__(
        self,
        channels: int,
        kernel_size: int = 21,
        dilation: int = 3,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        gate = LKA(channels, kernel_size, dilation, backend=backend, **where)  # checks the arguments
        super().__init__(
            OrderedDict(
                proj_1=nn.Conv2d(channels, channels, 1, **where),
                activation=nn.GELU(),
                spatial_gating_unit=gate,
                proj_2=nn.Conv2d(channels, channels, 1, **where),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        y: Tensor = x + super().forward(x)  # type: ignore[no-untyped-call]
        return y


def why_not(conv: nn.Module) -> str | None:
    """Return why ``conv`` cannot be replaced by :meth:`LKA.from_conv2d`, or None if it can."""
    reason = None if type(conv) is DepthwiseConv2d else depthwise.why_not(conv)
    if reason is not None or not isinstance(conv, nn.Conv2d):
        return reason
    if conv.stride != (1, 1):
        return f"its stride is {conv.stride}, and a gate has one value for each pixel of the input"
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    rows, columns = _spans(conv)
    if (top + bottom, left + right) != (rows - 1, columns - 1):
        return f"its padding is {conv.padding!r}, with which it does not keep the size of its input"
    return None


def _spans(conv: nn.Conv2d) -> tuple[int, ...]:
    """Return the pixels that the taps of a convolution span, in rows and columns."""
    return tuple(fold.effective_size(k, d) for k, d in zip(conv.kernel_size, conv.dilation, strict=True))
