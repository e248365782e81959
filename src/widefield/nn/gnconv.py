"""Recursive gated convolution: products of increasing order of neighborhoods, from one depthwise convolution.

Rao et al., "HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions", NeurIPS 2022, section
3. Keys are those of the official code.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from timm.layers import LayerNorm2d, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from widefield import _checks
from widefield._checks import Pair
from widefield.nn import reparam
from widefield.nn._leaf import is_symbolic, recorded
from widefield.nn.depthwise import DepthwiseConv2d
from widefield.nn.fusing import refuse_training
from widefield.ops._problem import size_of

HIGHEST_ORDER = 5
"""Of the published networks."""


class GlobalLocalFilter(nn.Module):
    """A 3x3 depthwise convolution for half of the channels, and a filter as large as the map for the others.

    (N, C, H, W) -> the same, between two layer norms over the channels. The filter multiplies the spectrum of the map
    (Rao et al., "Global Filter Networks for Image Classification", NeurIPS 2021), which is a circular convolution: it
    wraps around at the edges. On maps of another size the filter is interpolated in the frequency domain, bilinearly
    and with aligned corners. In the result the channels of the two halves alternate.

    Spectra are computed in float32 at least, also under autocast, and in float64 for float64. They are complex, which
    ``torch.export`` takes. A filter is stored for one size of map; :meth:`resize` changes it.

    Args:
        channels: C, even.
        height, width: of the stored filter: H rows and W // 2 + 1 columns for maps of (H, W).

    Attributes:
        complex_weight: (C / 2, height, width, 2), real and imaginary parts.

    Raises:
        TypeError, ValueError: numbers that are not positive integers, odd channels.
    """

    def __init__(
        self,
        channels: int,
        height: int = 14,
        width: int = 8,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.channels = _checks.integer("channels", channels)
        if channels % 2:
            raise ValueError(f"channels must be even, half for each kind of filter; got {channels}.")
        size = _checks.integer("height", height), _checks.integer("width", width)
        self.dw = DepthwiseConv2d(channels // 2, channels // 2, 3, padding="same", bias=False, **where)
        self.complex_weight = nn.Parameter(torch.empty(channels // 2, *size, 2, **where))
        trunc_normal_(self.complex_weight, std=0.02)
        self.pre_norm = LayerNorm2d(channels, eps=1e-6, **where)
        self.post_norm = LayerNorm2d(channels, eps=1e-6, **where)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W); ValueError for an input of another shape."""
        if is_symbolic(x):
            return recorded(self, x)
        _checks.images(size_of(x), self.channels)
        near, far = self.pre_norm(x).chunk(2, 1)
        y: Tensor = self.post_norm(torch.stack((self.dw(near), self.filtered(far)), 2).flatten(1, 2))
        return y

    def filtered(self, x: Tensor) -> Tensor:
        """Apply the global filter: (N, C / 2, H, W) -> the same."""
        if 0 in size_of(x):
            return x  # MKL does not transform empty tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        spectrum = torch.fft.rfft2(x.to(wide), norm="ortho")
        gains = _resized(self.complex_weight.to(wide), spectrum.shape[2:])
        # contiguous, because a network's .to(memory_format=channels_last) separates real and imaginary parts
        spectrum = spectrum * torch.view_as_complex(gains.contiguous())
        y: Tensor = torch.fft.irfft2(spectrum, s=x.shape[2:], norm="ortho")
        return y.to(x.dtype)

    @torch.no_grad()
    def resize(self, height: int, width: int) -> None:
        """Store the filter for maps of (height, width), without changing the function on them.

        This saves the interpolation in every call. The parameter is replaced: create the optimizer afterwards.
        """
        size = _checks.integer("height", height), _checks.integer("width", width) // 2 + 1
        old = self.complex_weight
        self.complex_weight = nn.Parameter(_resized(old, size).contiguous(), old.requires_grad)

    def extra_repr(self) -> str:
        """Show the arguments."""
        return ", ".join(map(str, (self.channels, *self.complex_weight.shape[1:3])))


def _resized(weight: Tensor, size: Sequence[int]) -> Tensor:
    """(C, h, w, 2) -> (C, *size, 2)."""
    # Symbolic sizes are not compared: a program exported for many sizes would exclude the stored one.
    if all(isinstance(side, int) for side in size) and weight.shape[1:3] == tuple(size):
        return weight
    resized = F.interpolate(weight.permute(3, 0, 1, 2), tuple(size), mode="bilinear", align_corners=True)
    return resized.permute(1, 2, 3, 0)


class GatedRecursion(nn.Module):
    """:class:`GnConv` with a scale of 1. Made by its ``fuse()``.

    Args:
        widths: channels of each order, the lowest first.
        parts: ``proj_in``, ``dwconv``, ``proj_out`` and the list ``pws``, in the order of the keys.
    """

    proj_in: nn.Module
    dwconv: nn.Module
    proj_out: nn.Module
    pws: nn.ModuleList

    def __init__(self, widths: Sequence[int], parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.widths = tuple(widths)
        for name, part in parts.items():
            self.add_module(name, part)

    def neighborhoods(self, x: Tensor) -> Tensor:
        """Return the gates of all orders: (N, sum of widths, H, W) -> the same."""
        y: Tensor = self.dwconv(x)
        return y

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W); ValueError for an input of another shape."""
        if is_symbolic(x):
            return recorded(self, x)
        _checks.images(size_of(x), self.widths[-1])
        y, rest = self.proj_in(x).split((self.widths[0], sum(self.widths)), 1)
        first, *gates = self.neighborhoods(rest).split(self.widths, 1)
        y = y * first
        for widen, gate in zip(self.pws, gates, strict=True):
            y = widen(y) * gate
        out: Tensor = self.proj_out(y)
        return out


class GnConv(GatedRecursion):
    """Recursive gated convolution of order n: (N, C, H, W) -> the same (eq. 3.3 to 3.5, figure 2).

    A 1x1 convolution makes 2C channels. A depthwise convolution turns all but the first few into n gates of
    C / 2^(n-1), ..., C / 2, C channels. The first few are multiplied by the first gate, widened by a 1x1 convolution,
    multiplied by the second gate, and so on. A last 1x1 convolution follows. An output is thus a polynomial of degree
    n + 1 in the inputs that the kernel reaches. The widths halve towards the lower orders, so the inner 1x1
    convolutions take less than 2/3 C^2 multiply-adds per pixel at any order, compared with 3 C^2 of the outer two.

    Args:
        channels: C, divisible by 2^(order-1).
        order: n, at least 1, which is a gated convolution.
        kernel_size: of the depthwise convolution, odd; two for a rectangle. Not used with a global filter.
        scale: factor on the gates; 1/alpha of eq. 3.3, 1/3 in the published networks.
        global_filter: height and width of the stored filter of a :class:`GlobalLocalFilter`, which replaces the
            depthwise convolution; None for the convolution.
        backend: of :func:`widefield.ops.depthwise_conv2d`.

    Raises:
        TypeError, ValueError: numbers out of range; channels that cannot be halved as often; an even kernel size.
    """

    def __init__(
        self,
        channels: int,
        order: int = HIGHEST_ORDER,
        kernel_size: int | Pair = 7,
        scale: float = 1.0,
        global_filter: Pair | None = None,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        channels, order = _checks.integer("channels", channels), _checks.integer("order", order)
        if channels % 2 ** (order - 1):
            raise ValueError(
                f"channels must be divisible by {2 ** (order - 1)}, to be halved {order - 1} times for order={order}; "
                f"got {channels}. Use an order of at most {highest_order(channels, order)}."
            )
        widths = [channels // 2**i for i in reversed(range(order))]
        size = _checks.odd_pair("kernel_size", kernel_size)
        mixer: nn.Module
        if global_filter is None:
            mixer = DepthwiseConv2d(sum(widths), sum(widths), size, padding="same", backend=backend, **where)
        elif widths[0] % 2:
            raise ValueError(
                f"a global filter takes half of {sum(widths)} channels: channels must be divisible by {2**order} for "
                f"order={order}; got {channels}."
            )
        else:
            mixer = GlobalLocalFilter(sum(widths), *_checks.pair("global_filter", global_filter), **where)
        pws = nn.ModuleList(nn.Conv2d(width, 2 * width, 1, **where) for width in widths[:-1])
        ends = nn.Conv2d(channels, 2 * channels, 1, **where), nn.Conv2d(channels, channels, 1, **where)
        super().__init__(widths, OrderedDict(proj_in=ends[0], dwconv=mixer, proj_out=ends[1], pws=pws))
        self.scale = _checks.number("scale", scale)

    def neighborhoods(self, x: Tensor) -> Tensor:
        """Return the gates of all orders: (N, sum of widths, H, W) -> the same."""
        y = super().neighborhoods(x)
        return y if self.scale == 1 else y * self.scale

    @torch.no_grad()
    def fuse(self) -> GatedRecursion:
        """Return the layer with its scale in the weights of ``dwconv``. Exact.

        ``dwconv`` becomes ``dwconv.scaled``, so that its weights are not loaded into a layer that scales again.

        Raises:
            RuntimeError: in training mode.
        """
        refuse_training(self)
        parts = copy.deepcopy(self._modules)
        mixer = cast(nn.Module, parts["dwconv"])
        for parameter in (mixer.post_norm if isinstance(mixer, GlobalLocalFilter) else mixer).parameters():
            parameter.mul_(self.scale)
        parts["dwconv"] = nn.Sequential(OrderedDict(scaled=mixer))
        return GatedRecursion(self.widths, cast(Mapping[str, nn.Module], parts)).eval()

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, order: int | None = None, **options: Any) -> GnConv:
        """Return a new layer as a replacement for a depthwise ``conv``: its channels, size, device, dtype and mode.

        This does not keep the function of ``conv``: a product of neighborhoods is not a convolution. It has up to
        3.7 C^2 weights in its 1x1 convolutions, and twice the depthwise ones. If the kernel of ``conv`` is frozen, so
        is the layer.

        Args:
            conv: depthwise, odd kernel, "same" padding with zeros, no stride and no dilation.
            order: as in the constructor; None: the highest up to 5 that the channels allow.
            options: further ones of the constructor, by name.

        Raises:
            TypeError, ValueError: ``conv`` cannot be replaced; the message is that of :func:`why_not`. Or options that
                the constructor refuses.
        """
        reason = why_not(conv)
        if reason is not None:
            raise ValueError(f"{conv} cannot become a {cls.__name__}: {reason}.")
        order = highest_order(conv.in_channels) if order is None else order
        options = {"kernel_size": conv.kernel_size, "backend": getattr(conv, "backend", "auto"), **options}
        layer = cls(conv.in_channels, order, device=conv.weight.device, dtype=conv.weight.dtype, **options)
        return layer.requires_grad_(conv.weight.requires_grad).train(conv.training)

    def extra_repr(self) -> str:
        """Show the channels of each order and the scale."""
        return f"{' + '.join(map(str, self.widths))}, scale={self.scale:.4g}"


def highest_order(channels: int, most: int = HIGHEST_ORDER) -> int:
    """Return the highest order, up to ``most``, for which the channels can be halved often enough."""
    return next(order for order in range(most, 0, -1) if channels % 2 ** (order - 1) == 0)


def why_not(conv: nn.Module) -> str | None:
    """Return why ``conv`` cannot become a :class:`GnConv`, or None if it can."""
    if isinstance(conv, nn.Conv2d) and conv.stride != (1, 1):
        return f"its stride is {conv.stride}, and a gate is as large as the map that it multiplies"
    if isinstance(conv, nn.Conv2d) and conv.dilation != (1, 1):
        return f"its dilation is {conv.dilation}, and the gates' kernel has none"
    return reparam.why_not(conv)
