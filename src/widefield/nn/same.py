"""TensorFlow's "SAME" padding for layers that are centered on their pixels.

"SAME" padding gives ceil(H / stride) rows, and puts the odd row of zeros at the bottom. So it depends on the size of
the input: along an axis of n pixels, output i of an odd kernel is centered on pixel ``i * stride + phase`` with
``phase = ((n - 1) % stride + 1) // 2``, whatever the size and the dilation of the kernel. A layer that is centered on
the pixels ``i * stride`` therefore computes the same on an input that is shifted by the phase.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from timm.layers import pad_same
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional as F

from widefield import _checks
from widefield._checks import Pair
from widefield.nn.depthwise import DepthwiseConv2d, copied_into, not_depthwise
from widefield.nn.fusing import fold_norm, refuse_training
from widefield.nn.large_kernel import DecomposedKernel
from widefield.ops import fold


class DepthwiseConv2dSame(DepthwiseConv2d):
    """A depthwise ``timm.layers.Conv2dSame`` that runs :func:`widefield.ops.depthwise_conv2d`.

    Same parameters, keys and function.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias, backend, device, dtype: as in
            :class:`DepthwiseConv2d`.
        padding: not used, as in Conv2dSame.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair | str = 0,
        dilation: int | Pair = 1,
        groups: int | None = None,
        bias: bool = True,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        size: Any = (kernel_size, stride, 0, dilation, groups, bias)
        super().__init__(in_channels, out_channels, *size, backend=backend, device=device, dtype=dtype)

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, *, backend: str = "auto") -> DepthwiseConv2dSame:
        """Return this layer in place of a depthwise ``Conv2dSame``, with its mode. It shares the parameters.

        Raises:
            ValueError: ``conv`` is not a depthwise ``Conv2dSame``.
        """
        kind = None if type(conv) is Conv2dSame else f"it is a {type(conv).__name__}, not a timm.layers.Conv2dSame"
        reason = kind or not_depthwise(conv)
        if reason is not None:
            raise ValueError(f"cannot be a DepthwiseConv2dSame: {reason}.")
        size: Any = conv.kernel_size, conv.stride, 0, conv.dilation, conv.groups, conv.bias is not None
        layer = cls(conv.in_channels, conv.out_channels, *size, backend=backend, device="meta")
        layer.weight, layer.bias = conv.weight, conv.bias
        return layer.train(conv.training)

    def fuse(self) -> Conv2dSame:
        """Return a ``timm.layers.Conv2dSame`` with copies of the parameters. Exact.

        Raises:
            RuntimeError: in training mode.
        """
        refuse_training(self)
        return conv2d_same(self)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(pad_same(input, self.kernel_size, self.stride, self.dilation), weight, bias)


class SameAligned(nn.Module):
    """A layer with a centered kernel, aligned as TensorFlow's "SAME" padding does: (N, C, H, W) -> ceil(H / stride).

    Args:
        layer: computes (N, C, H, W) -> (N, C_out, ceil(H / stride), ceil(W / stride)), centered on every stride-th
            pixel from the first, with zeros around the map.
        stride: of the layer; (rows, columns).
    """

    def __init__(self, layer: nn.Module, stride: int | Pair) -> None:
        super().__init__()
        self.layer = layer
        self.stride = _checks.pair("stride", stride)
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C_out, ceil(H / stride), ceil(W / stride))."""
        # Centers at i * stride + phase are those at (i + 1) * stride behind stride - phase rows of zeros.
        (down, right), rows, columns = self.stride, x.shape[-2], x.shape[-1]
        above, before = (down - phase(rows, down)) % down, (right - phase(columns, right)) % right
        if type(above) is int and above == before == 0:  # sizes may be symbols, on which a graph must not branch
            return cast(Tensor, self.layer(x))
        y: Tensor = self.layer(F.pad(x, (before, 0, above, 0)))
        kept = y[..., (above + down - 1) // down :, (before + right - 1) // right :]
        # Not a view: one made under no_grad cannot be modified in place, and exporters turn such changes into scatters.
        return kept.clone()

    def merges(self) -> bool:
        """Return whether :meth:`fuse` would return something simpler."""
        return _is_plain(self.layer) or hasattr(self.layer, "fuse")

    def fuse(self, norm: nn.Module | None = None) -> nn.Module:
        """Return the merged layer, made of ``timm.layers.Conv2dSame`` where it is convolutions. Exact.

        Args:
            norm: a batch norm that directly follows this layer, to be folded in; for convolutions, and for layers whose
                ``fuse`` takes one.

        Raises:
            RuntimeError: in training mode.
        """
        refuse_training(self)
        layer: Any = self.layer
        merged: nn.Module
        if not _is_plain(layer):
            merged = layer.fuse() if norm is None else layer.fuse(norm)
        else:
            merged = layer if norm is None else fold_norm(layer, norm)
        if isinstance(merged, nn.Sequential) and len(merged) == 1:
            merged = merged[0]
        if _is_plain(merged):
            return cast(nn.Module, conv2d_same(cast(nn.Conv2d, merged)))
        if isinstance(merged, DecomposedKernel) and all(_keeps_padding(band) for band in merged.children()):
            return DecomposedKernel(conv2d_same(merged.LoRA1), conv2d_same(merged.LoRA2))
        return SameAligned(merged, self.stride)

    def extra_repr(self) -> str:
        """Show the stride."""
        return f"stride={self.stride}"


def phase(side: int, stride: int) -> int:
    """Return on which pixel, from 0, the first output of a "SAME" convolution along ``side`` pixels is centered."""
    return ((side - 1) % stride + 1) // 2


def least_size(stride: int, dilation: int, parity: int) -> int:
    """Return the smallest kernel size, odd or even as ``parity`` (1 or 0), for which "SAME" padding is never cut to 0.

    From this size on, zeros around a kernel leave the function as it is.
    """
    size = 2 - parity
    while fold.effective_size(size, dilation) < stride:
        size += 2
    return size


def centered(conv: nn.Module) -> nn.Conv2d | str:
    """Return a convolution with a centered kernel that equals ``conv`` except in alignment, or why there is none.

    It shares the parameters of ``conv``; inside :class:`SameAligned` it computes what ``conv`` does.
    """
    same = cast(nn.Conv2d, conv)
    shown = "x".join(map(str, same.kernel_size))
    if any(size % 2 == 0 for size in same.kernel_size):
        return f"its kernel size is even ({shown}), so that no pixel is its center"
    if not _keeps_padding(same):
        return f"its kernel of {shown} is smaller than its stride, and its 'SAME' padding then skips pixels"
    padding = tuple(d * (k // 2) for k, d in zip(same.kernel_size, same.dilation, strict=True))
    make: Any = nn.Conv2d
    arguments = same.in_channels, same.out_channels, same.kernel_size, same.stride, padding, same.dilation
    twin: nn.Conv2d = make(*arguments, same.groups, same.bias is not None, device="meta")
    twin.weight, twin.bias = same.weight, same.bias
    if isinstance(conv, DepthwiseConv2d):
        twin = DepthwiseConv2d.from_conv2d(twin, backend=conv.backend)
    return twin.train(conv.training)


def _is_plain(layer: nn.Module) -> bool:
    return type(layer) in (nn.Conv2d, DepthwiseConv2d)


def _keeps_padding(conv: Any) -> bool:
    return all(k >= least_size(s, d, 1) for k, s, d in zip(conv.kernel_size, conv.stride, conv.dilation, strict=True))


def is_same(module: nn.Module) -> bool:
    """Return whether this is a convolution with TensorFlow's "SAME" padding and an ordinary kernel."""
    return type(module) in (Conv2dSame, DepthwiseConv2dSame)


def conv2d_same(conv: nn.Conv2d) -> Conv2dSame:
    """Return a ``timm.layers.Conv2dSame`` with copies of a convolution's parameters, and its arguments but padding."""
    make: Any = Conv2dSame
    channels, bias = (conv.in_channels, conv.out_channels), conv.bias is not None
    layer: Conv2dSame = make(
        *channels, conv.kernel_size, conv.stride, 0, conv.dilation, conv.groups, bias, device="meta"
    )
    return copied_into(layer, conv)
