"""Large depthwise kernels that train as a sum of branches, in three forms; see :mod:`widefield.nn.reparam`.

- A large kernel plus a small one: Ding, Zhang, Han, Ding, "Scaling Up Your Kernels to 31x31", CVPR 2022,
  section 3, guideline 3.
- A large kernel plus dilated small ones: Ding et al., "UniRepLKNet", CVPR 2024, section 3.1.
- Two crossed bands plus a small square: Liu et al., "More ConvNets in the 2020s: Scaling up Kernels Beyond
  51x51 using Sparsity" (SLaK), ICLR 2023, section 3.

Keys are those of the papers' code.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from widefield import _checks
from widefield._checks import Pair
from widefield.nn.depthwise import DepthwiseConv2d
from widefield.nn.fusing import add_parameter, fold_norm, refuse_training
from widefield.nn.reparam import (
    Branch,
    ConvNorm,
    ReparamConv2d,
    depthwise_same,
    merged,
)
from widefield.ops import fold

DILATED_BRANCHES: Mapping[int, tuple[Pair, ...]] = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}
"""Kernel size -> (kernel size, dilation) of UniRepLKNet's dilated branches."""


class LargeKernelConv2d(ReparamConv2d):
    """RepLKNet's: a large kernel and a small one, each with batch norm. ``lkb_origin``, ``small_conv``.

    Args:
        in_channels, out_channels: the same number.
        kernel_size: odd, or (rows, columns) both odd.
        stride: of both; one number or (rows, columns).
        small: size of the small kernel, no larger than the large one, or None for no small kernel. It is cut to the
            shorter side of a rectangular large kernel.
        norm: False for branches without batch norm, and a large kernel with a bias: for blocks that normalize the sum,
            and for pretrained ones (see :meth:`from_conv2d`).
        backend: of :func:`widefield.ops.depthwise_conv2d`.

    Raises:
        TypeError, ValueError: sizes that are not odd integers, ``small`` larger than the kernel, an unknown backend.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        *,
        small: int | None = 5,
        norm: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        channels = _checks.depthwise_channels(in_channels, out_channels)
        options: dict[str, Any] = {"backend": backend, "device": device, "dtype": dtype}
        size, steps = _checks.odd_pair("kernel_size", kernel_size), _checks.pair("stride", stride)
        self.lkb_origin = _part(depthwise_same(channels, size, steps, bias=not norm, **options), norm)
        if small is not None:
            side = _checks.odd("small", small)
            if side > max(size):
                raise ValueError(f"small must not exceed the kernel of {size[0]}x{size[1]}; got {small}.")
            beside = min(side, size[0]), min(side, size[1])
            self.small_conv = _part(depthwise_same(channels, beside, steps, **options), norm)

    def branches(self) -> list[Branch]:
        """Return the large kernel, and the small one if there is one."""
        return _convs_and_norms(self)

    def fuse(self, norm: _BatchNorm | None = None) -> nn.Sequential:
        """Return one depthwise convolution, ``lkb_reparam``, with a bias. Exact in evaluation mode.

        Args:
            norm: a batch norm that directly follows this layer, to be folded in.

        Raises:
            RuntimeError: in training mode.
            ValueError: ``norm`` has no running statistics, or another number of channels.
        """
        conv = merged(self)
        return _alone("lkb_reparam", conv if norm is None else fold_norm(conv, norm))


class DilatedReparamConv2d(ReparamConv2d):
    """UniRepLKNet's: a large kernel plus dilated ones. ``lk_origin``, ``origin_bn``, ``dil_conv_k3_2``, ...

    Args:
        in_channels, out_channels: the same number.
        kernel_size: odd.
        stride, backend: of all, as in :class:`LargeKernelConv2d`.
        branches: (kernel size, dilation) of each dilated kernel; by default UniRepLKNet's for this size.

    Raises:
        TypeError, ValueError: sizes that are not odd integers; no default for this size; a branch that is larger than
            the kernel, or given twice.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int | Pair = 1,
        *,
        branches: Sequence[Pair] | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        channels = _checks.depthwise_channels(in_channels, out_channels)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        size = _checks.odd("kernel_size", kernel_size)
        if branches is None:
            if size not in DILATED_BRANCHES:
                known = ", ".join(map(str, DILATED_BRANCHES))
                raise ValueError(f"UniRepLKNet has branches for kernels of {known}; got {size}: give branches=.")
            branches = DILATED_BRANCHES[size]
        self.lk_origin = depthwise_same(channels, (size, size), stride, backend=backend, **where)
        self.origin_bn = nn.BatchNorm2d(channels, **where)
        self._branches = _checks.experts(branches) if branches else ()
        for k, d in self._branches:
            if self._branches.count((k, d)) > 1:
                raise ValueError(f"branches must differ; got kernel size {k} with dilation {d} more than once.")
            if fold.effective_size(k, d) > size:
                raise ValueError(
                    f"a branch of kernel size {k} and dilation {d} spans {fold.effective_size(k, d)} pixels, "
                    f"more than the kernel of {size}x{size}."
                )
            self.add_module(f"dil_conv_k{k}_{d}", depthwise_same(channels, (k, k), stride, d, backend=backend, **where))
            self.add_module(f"dil_bn_k{k}_{d}", nn.BatchNorm2d(channels, **where))

    def branches(self) -> list[Branch]:
        """Return the large kernel and the dilated ones."""
        beside = [(getattr(self, f"dil_conv_k{k}_{d}"), getattr(self, f"dil_bn_k{k}_{d}")) for k, d in self._branches]
        return [(self.lk_origin, self.origin_bn), *beside]

    def fuse(self) -> nn.Sequential:
        """Return one depthwise convolution, ``lk_origin``, with a bias. Exact in evaluation mode.

        Raises:
            RuntimeError: in training mode.
        """
        return _alone("lk_origin", merged(self))


class DecomposedConv2d(ReparamConv2d):
    """SLaK's: bands of KxN and NxK and a square of NxN, each with batch norm. ``LoRA1``, ``LoRA2``, ``small_conv``.

    Args:
        in_channels, out_channels: the same number.
        kernel_size: K, odd.
        stride, backend: of all, as in :class:`LargeKernelConv2d`.
        small: N, odd. There is no square if N is not below K.

    Raises:
        TypeError, ValueError: sizes that are not odd integers.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int | Pair = 1,
        *,
        small: int = 5,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        channels = _checks.depthwise_channels(in_channels, out_channels)
        options: dict[str, Any] = {"backend": backend, "device": device, "dtype": dtype}
        long, short = _checks.odd("kernel_size", kernel_size), _checks.odd("small", small)
        self.LoRA1 = ConvNorm(depthwise_same(channels, (long, short), stride, **options))
        self.LoRA2 = ConvNorm(depthwise_same(channels, (short, long), stride, **options))
        if short < long:
            self.small_conv = ConvNorm(depthwise_same(channels, (short, short), stride, **options))

    def branches(self) -> list[Branch]:
        """Return the two bands and the square."""
        return _convs_and_norms(self)

    def fuse(self) -> DecomposedKernel:
        """Return the sum of the two bands, norms and square folded in. Exact in evaluation mode.

        One KxK kernel would be exact, too, but takes K / (2N) times as many multiply-adds.

        Raises:
            RuntimeError: in training mode.
        """
        refuse_training(self)
        first, second, *square = (fold_norm(conv, norm) for conv, norm in self.branches())
        for conv in square:
            add_parameter(first.weight, conv.weight, fold.pad(conv.weight, first.kernel_size))  # type: ignore[arg-type]
        for conv in (*square, second):
            add_parameter(cast(Tensor, first.bias), cast(Tensor, conv.bias))
        second.bias = None
        return DecomposedKernel(first, second)


class DecomposedKernel(nn.Module):
    """The merged :class:`DecomposedConv2d`: the sum of two bands, ``LoRA1`` and ``LoRA2``. Made by ``fuse()``."""

    def __init__(self, rows: nn.Conv2d, columns: nn.Conv2d) -> None:
        super().__init__()
        self.LoRA1, self.LoRA2 = rows, columns
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        y: Tensor = self.LoRA1(x) + self.LoRA2(x)
        return y


def _part(conv: DepthwiseConv2d, norm: bool) -> nn.Sequential:
    return ConvNorm(conv) if norm else nn.Sequential(OrderedDict(conv=conv))


def _convs_and_norms(layer: nn.Module) -> list[Branch]:
    return [(part.conv, getattr(part, "bn", None)) for part in layer.children()]  # type: ignore[misc]


def _alone(name: str, conv: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(OrderedDict({name: conv})).eval()
