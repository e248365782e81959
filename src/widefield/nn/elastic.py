"""A convolution that can run at several kernel sizes: nested experts of which the first ones act.

Training draws the size anew at each step, so that one network holds a trained network of each size. A search reads
their losses and chooses. Related: Cai et al., "Once-for-All", ICLR 2020 (crops of one kernel, each transformed by a
matrix); Stamoulis et al., "Single-Path NAS", ECML 2019 (the rings of one kernel, with thresholds). Here the kernel of a
size is the sum of all experts up to that size, as in a mixture of receptive fields. The center thus has parameters of
its own, which train faster (Ding et al., RepLKNet, CVPR 2022, guideline 3), and the sum merges exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from widefield import _checks
from widefield._checks import Pair
from widefield.nn import morf
from widefield.nn._leaf import is_symbolic, recorded
from widefield.nn.depthwise import DepthwiseConv2d
from widefield.nn.fusing import learns, refuse_training
from widefield.ops import depthwise_conv2d, fold
from widefield.ops._backend import BACKENDS
from widefield.ops._problem import size_of


class ElasticConv2d(nn.Module):
    """A convolution of a size to choose: (N, in_channels, H, W) -> (N, out_channels, ceil(H/stride), ceil(W/stride)).

    The kernel at the i-th size is the sum of experts 0 to i, each centered and padded with zeros. The padding is "same"
    with zeros. A new layer has its largest size, and computes the same at all sizes, because all experts but the
    smallest start at zero.

    Args:
        in_channels, out_channels, stride, groups, bias, device, dtype: as in Conv2d.
        kernel_sizes: the sizes to choose from, odd; sorted, and each taken once.
        backend: of :func:`widefield.ops.depthwise_conv2d`, for depthwise layers.

    Attributes:
        experts: kernels (out_channels, in_channels / groups, k, k), the smallest first.
        kernel_sizes: their sizes.
        kernel_size: the chosen size.
        drawn: the size in training mode; None: the chosen one.
        stage: index of the layer's stage in its model.

    Raises:
        ValueError, TypeError: an even size, no size, or arguments that Conv2d refuses.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_sizes: Sequence[int] = (3, 5, 7, 11),
        stride: int | Pair = 1,
        *,
        groups: int = 1,
        bias: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.groups = _checks.conv_channels(in_channels, out_channels, groups)
        self.kernel_sizes = checked_sizes(kernel_sizes)
        self.stride = _checks.square("stride", stride)
        self.backend = _checks.choice("backend", backend, BACKENDS)
        self.kernel_size = self.kernel_sizes[-1]
        self.drawn: int | None = None
        self.stage = 0
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        shape = (self.out_channels, self.in_channels // self.groups)
        self.experts = nn.ParameterList(torch.empty(*shape, size, size, **factory) for size in self.kernel_sizes)
        self.bias = nn.Parameter(torch.empty(self.out_channels, **factory)) if bias else None
        self.reset_parameters()

    @property
    def depthwise(self) -> bool:
        """Return whether every channel has a kernel of its own."""
        return self.groups == self.in_channels == self.out_channels

    def reset_parameters(self) -> None:
        """Initialize the smallest expert and the bias as Conv2d does; set the others to zero."""
        first, *others = self.experts
        nn.init.kaiming_uniform_(first, a=5**0.5)
        for expert in others:
            nn.init.zeros_(expert)
        if self.bias is not None:
            bound = first[0].numel() ** -0.5
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_conv2d(
        cls, conv: nn.Conv2d, kernel_sizes: Sequence[int] = (3, 5, 7, 11), *, init: str = "preserve"
    ) -> Self:
        """Return this layer in place of ``conv``, with its stride, device, dtype and mode, at its size.

        The convolution's own size is added to the sizes.

        Args:
            conv: odd square kernel, "same" padding with zeros, no dilation; any groups.
            kernel_sizes: the sizes to choose from.
            init: "preserve": the layer computes what ``conv`` computes. Each expert gets the taps of the kernel that
                the next smaller one does not have, so that the layer has the cropped kernel at a smaller size, and the
                same at a larger one. "random": random weights (:meth:`reset_parameters`).

        Raises:
            ValueError: ``conv`` cannot be replaced; the message is that of :func:`why_not`.
        """
        reason = why_not(conv)
        if reason:
            raise ValueError(f"{conv} cannot become an {cls.__name__}: {reason}.")
        own = conv.kernel_size[0]
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            (*kernel_sizes, own),
            conv.stride[0],
            groups=conv.groups,
            bias=conv.bias is not None,
            backend=getattr(conv, "backend", "auto"),
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        if _checks.init(init) == "preserve":
            layer._absorb(conv)
        layer.kernel_size = own
        return layer.requires_grad_(conv.weight.requires_grad).train(conv.training)

    @torch.no_grad()
    def _absorb(self, conv: nn.Conv2d) -> None:
        """Cut the kernel of a convolution into rings, one for each expert."""
        inner = 0
        for expert, size in zip(self.experts, self.kernel_sizes, strict=True):
            expert.copy_(fold.fit(conv.weight, (size, size)))
            if inner:
                fold.crop(expert, inner).zero_()
            inner = size
        if self.bias is not None and conv.bias is not None:
            self.bias.copy_(conv.bias)

    @property
    def active(self) -> int:
        """Return the size at which the layer runs in its mode."""
        return self.drawn if self.training and self.drawn is not None else self.kernel_size

    def checked(self, kernel_size: int) -> int:
        """Return one of the layer's sizes; raises ValueError for another one."""
        if kernel_size not in self.kernel_sizes:
            known = ", ".join(map(str, self.kernel_sizes))
            raise ValueError(f"kernel_size must be one of this layer's, {known}; got {kernel_size!r}.")
        return kernel_size

    def nearest(self, kernel_size: float) -> int:
        """Return the layer's largest size that is not above ``kernel_size``, or its smallest."""
        return max((size for size in self.kernel_sizes if size <= kernel_size), default=self.kernel_sizes[0])

    def kernel(self) -> Tensor:
        """Return the kernel of the active size k, (out_channels, in_channels / groups, k, k)."""
        size = self.active
        total: Tensor | None = None
        for expert, own in zip(self.experts, self.kernel_sizes, strict=True):
            if own <= size:
                padded = fold.pad(expert, size)
                total = padded if total is None else total + padded
            elif self.training and dist.is_available() and dist.is_initialized():
                total = total + 0 * expert.sum()  # processes that exchange gradients wait for one of every parameter
        return cast(Tensor, total)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, ceil(H/stride), ceil(W/stride))."""
        if is_symbolic(x):
            return recorded(self, x)
        _checks.images(size_of(x), self.in_channels)
        kernel, padding = self.kernel(), self.active // 2
        if self.depthwise:
            return depthwise_conv2d(x, kernel, self.bias, stride=self.stride, padding=padding, backend=self.backend)
        return F.conv2d(x, kernel, self.bias, self.stride, padding, groups=self.groups)

    def fuse(self) -> nn.Conv2d:
        """Return a convolution of the chosen size: a DepthwiseConv2d if the layer is depthwise. Exact to rounding.

        Raises:
            RuntimeError: in training mode.
        """
        refuse_training(self)
        conv = plain(self.in_channels, self.out_channels, self.kernel_size, self.stride, self.groups, self.backend)
        conv.weight = nn.Parameter(self.kernel().detach().clone(), learns(self.experts))
        conv.bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone(), learns([self.bias]))
        return conv.eval()

    def extra_repr(self) -> str:
        """Show the channels and the sizes, the chosen one in brackets."""
        sizes = ", ".join(f"[{size}]" if size == self.kernel_size else str(size) for size in self.kernel_sizes)
        groups = f", groups={self.groups}" if self.groups > 1 else ""
        return f"{self.in_channels}, {self.out_channels}, sizes {sizes}, stride={self.stride}{groups}"


def resized(conv: nn.Conv2d, kernel_size: int) -> nn.Conv2d:
    """Return a convolution of another size with the kernel of ``conv``, cropped or padded with zeros.

    A depthwise convolution becomes a :class:`DepthwiseConv2d`.

    Args:
        conv: as in :meth:`ElasticConv2d.from_conv2d`.
        kernel_size: the new size, odd.

    Raises:
        ValueError: ``conv`` cannot be resized, or the size is even.
    """
    reason = why_not(conv)
    if reason:
        raise ValueError(f"{conv} cannot be resized: {reason}.")
    size = _checks.odd("kernel_size", kernel_size)
    backend = getattr(conv, "backend", "auto")
    new = plain(conv.in_channels, conv.out_channels, size, conv.stride[0], conv.groups, backend)
    new.weight = nn.Parameter(fold.fit(conv.weight.detach(), (size, size)).clone(), conv.weight.requires_grad)
    new.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().clone(), conv.bias.requires_grad)
    return new.train(conv.training)


def plain(
    in_channels: int, out_channels: int, kernel_size: int, stride: int, groups: int, backend: str = "auto"
) -> nn.Conv2d:
    """Return a convolution with "same" padding, its weight on the meta device and no bias; depthwise ones are fast."""
    arguments = (in_channels, out_channels, kernel_size, stride, kernel_size // 2)
    if groups == in_channels == out_channels:
        return DepthwiseConv2d(*arguments, bias=False, backend=backend, device="meta")
    return nn.Conv2d(*arguments, groups=groups, bias=False, device="meta")


def checked_sizes(kernel_sizes: Sequence[int]) -> tuple[int, ...]:
    """Return kernel sizes in ascending order, each once; raises ValueError or TypeError for even ones or none."""
    if isinstance(kernel_sizes, (str, bytes)) or not isinstance(kernel_sizes, Sequence):
        raise TypeError(f"kernel_sizes must be a sequence of odd sizes, such as (3, 5, 7); got {kernel_sizes!r}.")
    if not kernel_sizes:
        raise ValueError("kernel_sizes is empty: give the sizes to choose from, such as (3, 5, 7).")
    return tuple(sorted({_checks.odd("every entry of kernel_sizes", size) for size in kernel_sizes}))


def why_not(conv: nn.Module) -> str | None:
    """Return why ``conv`` cannot become an :class:`ElasticConv2d`, or None if it can."""
    reason = morf.why_not(conv)
    if reason is None and isinstance(conv, nn.Conv2d) and conv.dilation != (1, 1):
        return f"it is dilated by {conv.dilation[0]}"
    return reason
