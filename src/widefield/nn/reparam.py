"""Sums of depthwise branches, each with batch norm, that merge into one convolution.

Convolution is linear, and so is batch norm in evaluation mode. A sum of branches is one convolution with the sum of
the kernels, each spread by its dilation, padded with zeros to the largest and scaled by its norm. The layers are in
:mod:`widefield.nn.large_kernel`.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from widefield import _checks
from widefield._checks import Pair
from widefield.nn import depthwise
from widefield.nn.depthwise import DepthwiseConv2d
from widefield.nn.fusing import add_parameter, fold_norm, refuse_training
from widefield.ops import fold

Branch = tuple[nn.Conv2d, _BatchNorm | None]
"""A convolution and the norm after it, if there is one."""


class ConvNorm(nn.Sequential):
    """A convolution without bias, batch norm, and perhaps an activation: ``conv``, ``bn``, ``nonlinear``.

    Args:
        conv: the convolution; the norm has its channels, device and dtype.
        activation: applied last, or None.
    """

    conv: nn.Conv2d
    bn: _BatchNorm

    def __init__(self, conv: nn.Conv2d, activation: nn.Module | None = None) -> None:
        norm = nn.BatchNorm2d(conv.out_channels, device=conv.weight.device, dtype=conv.weight.dtype)
        parts: OrderedDict[str, nn.Module] = OrderedDict(conv=conv, bn=norm)
        super().__init__(parts if activation is None else OrderedDict(**parts, nonlinear=activation))

    def fuse(self) -> nn.Sequential:
        """Return ``conv``, now with a bias, and a copy of the activation. Exact in evaluation mode.

        Raises:
            RuntimeError: in training mode.
        """
        refuse_training(self)
        conv = fold_norm(self.conv, self.bn)
        rest = {name: part for name, part in self.named_children() if name not in ("conv", "bn")}
        return nn.Sequential(OrderedDict(conv=conv, **copy.deepcopy(rest))).eval()


class ReparamConv2d(nn.Module):
    """Base of the sums: depthwise, (N, C, H, W) -> (N, C, ceil(H/stride), ceil(W/stride)).

    A subclass registers its convolutions and norms under names of its choice, and returns them from :meth:`branches`,
    the largest first.
    """

    def branches(self) -> list[Branch]:
        """Return the convolutions, each with its norm."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Sum over the branches of ``norm(conv(x))``."""
        y: Tensor | None = None
        for conv, norm in self.branches():
            term = conv(x) if norm is None else norm(conv(x))
            y = term if y is None else y + term
        if y is None:
            raise ValueError("there are no branches to sum.")
        return y

    def fuse(self) -> nn.Module:
        """Return the merged layer. Exact in evaluation mode; raises RuntimeError in training mode."""
        raise NotImplementedError

    def merge_kernel(self) -> None:
        """Turn this layer into the result of :meth:`fuse`, in place, including its class.

        For scripts written for the authors' code. They call this name (RepLKNet, SLaK), ``merge_dilated_branches``
        (UniRepLKNet) or ``switch_to_deploy``.

        Raises:
            RuntimeError: in training mode.
            ValueError: the layer has hooks, which would be lost.
        """
        if self._forward_hooks or self._forward_pre_hooks:
            raise ValueError(f"{type(self).__name__} has hooks, which merging would lose: remove them first.")
        fused = self.fuse()
        self.__class__ = type(fused)  # type: ignore[assignment]
        self.__dict__ = fused.__dict__

    merge_dilated_branches = switch_to_deploy = merge_kernel

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, kernel_size: int | Pair, *, init: str = "preserve", **options: Any) -> Self:
        """Return this layer as a replacement for ``conv``, with its stride, backend, device, dtype and mode.

        If the kernel of ``conv`` is frozen (``requires_grad`` is False), so is the layer.

        Args:
            conv: depthwise, odd kernel, "same" padding with zeros, no dilation; any stride.
            kernel_size: as in the constructor.
            init: "preserve": the layer computes what ``conv`` computes (:meth:`absorb`). With norms this holds in
                evaluation mode only, as batch norm uses the statistics of the batch in training. "random": random
                weights.
            options: further ones of the constructor.

        Raises:
            ValueError: ``conv`` cannot be replaced (the message says why), or with ``init="preserve"`` the first branch
                cannot hold its kernel.
        """
        _checks.init(init)
        reason = why_not(conv)
        if reason:
            raise ValueError(f"{conv} cannot become a {cls.__name__}: {reason}.")
        make: Any = cls
        stride, backend = _checks.pair("stride", conv.stride), getattr(conv, "backend", "auto")
        channels, where = (conv.in_channels,) * 2, {"device": conv.weight.device, "dtype": conv.weight.dtype}
        layer: Self = make(*channels, kernel_size, stride, backend=backend, **where, **options)
        if init == "preserve":
            layer.absorb(conv)
        return layer.requires_grad_(conv.weight.requires_grad).train(conv.training)

    @torch.no_grad()
    def absorb(self, conv: nn.Conv2d) -> None:
        """Set all branches so that their sum computes ``conv`` in evaluation mode, and every branch can learn.

        All branches but the first start as equal shares of half of the old kernel at their taps. Noise of a tenth of
        the channel's root mean square is added, as equal branches would get equal gradients forever. Taps that the
        first branch does not have start at zero. The first branch takes the remainder, so the sum is the old kernel to
        rounding. Norms are reset to mean 0 and variance 1, and their weight is the root of ``1 + eps``, so that they
        scale by 1. The first norm, or without norms the first convolution, gets the old bias.

        Raises:
            ValueError: the kernel of ``conv`` is larger than the first branch.
        """
        (first, norm), *beside = self.branches()
        size = _checks.pair("kernel_size", first.kernel_size)
        reason = lacks_room(conv, size)
        if reason:
            raise ValueError(f"{conv} cannot become a {type(self).__name__}: {reason}.")
        old = conv.weight.double()
        noise = 0.1 * old.square().mean((1, 2, 3), keepdim=True).sqrt()
        noise = torch.where(noise > 0, noise, 1e-2)
        remainder = fold.pad(old, size)
        for part, _ in beside:
            dilation = part.dilation[0]
            span = tuple(fold.effective_size(k, dilation) for k in part.kernel_size)
            share = fold.fit(old, span)[..., ::dilation, ::dilation] / (2 * len(beside))
            common = fold.fit(old.new_ones(size), span)[::dilation, ::dilation]  # taps that the first has
            part.weight.copy_(share + common * noise * torch.randn_like(share))
            remainder -= fold.fit(fold.dilate(part.weight.double(), dilation), size)  # as rounded
        first.weight.copy_(remainder)
        for _, each in self.branches():
            if each is not None:
                each.reset_parameters()
                each.weight.fill_((1 + each.eps) ** 0.5)
        bias = first.bias if norm is None else norm.bias
        if bias is not None:
            bias.copy_(torch.zeros_like(bias) if conv.bias is None else conv.bias)

    def extra_repr(self) -> str:
        """Show the kernels."""
        kernels = [(*conv.kernel_size, conv.dilation[0]) for conv, _ in self.branches()]
        words = (f"{h}x{w}" + (f" dilated {d}" if d > 1 else "") for h, w, d in kernels)
        return f"{self.branches()[0][0].in_channels}, {' + '.join(words)}"


def merged(layer: ReparamConv2d) -> nn.Conv2d:
    """Return one depthwise convolution, with a bias, that is the sum of all branches in evaluation mode.

    Raises:
        RuntimeError: the layer is in training mode.
    """
    refuse_training(layer)
    branches = [fold_norm(conv, norm) for conv, norm in layer.branches()]
    largest, *others = branches
    rows, columns = largest.kernel_size
    for conv in others:
        # On the grid of the largest kernel: a network may be dilated after its kernels were enlarged.
        spread = fold.pad(fold.dilate(conv.weight, conv.dilation[0] // largest.dilation[0]), (rows, columns))
        add_parameter(largest.weight, conv.weight, spread)
        add_parameter(cast(Tensor, largest.bias), cast(Tensor, conv.bias))
    return largest


def why_not(conv: nn.Module) -> str | None:
    """Return why ``conv`` cannot become a :class:`LargeKernelConv2d`, or None if it can."""
    reason = None if type(conv) is DepthwiseConv2d else depthwise.why_not(conv)
    if reason is not None or not isinstance(conv, nn.Conv2d):
        return reason
    rows, columns = conv.kernel_size
    if rows % 2 == 0 or columns % 2 == 0:
        return f"its kernel size is even ({rows}x{columns})"
    if set(conv.dilation) != {1}:
        return f"its dilation is {conv.dilation}: insert the large kernel before the network is dilated"
    if conv.padding_mode != "zeros":
        return f"its padding mode is {conv.padding_mode!r}, not 'zeros'"
    same = rows // 2, columns // 2
    if conv.padding != "same" and conv.padding != same:
        return f"its padding is {conv.padding}, and {same} would center the kernel on the pixel"
    return None


def lacks_room(conv: nn.Conv2d, kernel_size: int | Pair) -> str | None:
    """Return why a kernel of this size cannot hold that of ``conv`` (which passed :func:`why_not`), or None."""
    rows, columns = _checks.odd_pair("kernel_size", kernel_size)
    if conv.kernel_size[0] > rows or conv.kernel_size[1] > columns:
        return f"its {conv.kernel_size[0]}x{conv.kernel_size[1]} kernel does not fit into one of {rows}x{columns}"
    return None


def depthwise_same(
    channels: int, size: Pair, stride: int | Pair = 1, dilation: int = 1, *, bias: bool = False, **options: Any
) -> DepthwiseConv2d:
    """Return a depthwise convolution that is centered on its pixel. ``options``: backend, device and dtype."""
    padding = (dilation * (size[0] // 2), dilation * (size[1] // 2))
    return DepthwiseConv2d(channels, channels, size, stride, padding, dilation, bias=bias, **options)
