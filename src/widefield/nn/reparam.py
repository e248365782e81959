"""Large depthwise kernels that train as a sum of branches, each with batch norm, and merge into one convolution.

- A small kernel beside the large one: Ding, Zhang, Han, Ding, "Scaling Up Your Kernels to 31x31", CVPR 2022,
  section 3, guideline 3.
- Dilated small kernels beside the large one: Ding et al., "UniRepLKNet", CVPR 2024, section 3.1.
- Two crossed bands and a small square in its place: Liu et al., "More ConvNets in the 2020s: Scaling up Kernels Beyond
  51x51 using Sparsity" (SLaK), ICLR 2023, section 3.

Convolution is linear, and so is batch norm in evaluation: a sum of both is one convolution with the sum of the
kernels, each spread by its dilation, padded with zeros to the largest and scaled by its norm. Keys are those of the
papers' code.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from widefield import _checks
from widefield.nn.depthwise import DepthwiseConv2d, bare
from widefield.ops import fold

Pair = tuple[int, int]

DILATED_BRANCHES: Mapping[int, tuple[Pair, ...]] = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}
"""UniRepLKNet's (kernel size, dilation) of the branches beside a kernel of each size."""


class ConvNorm(nn.Sequential):
    """A convolution without bias, batch norm, and perhaps an activation: ``conv``, ``bn``, ``nonlinear``.

    Args:
        conv: the convolution; its channels are the norm's.
        activation: applied last, or None.
    """

    conv: nn.Conv2d
    bn: _BatchNorm

    def __init__(self, conv: nn.Conv2d, activation: nn.Module | None = None) -> None:
        parts = OrderedDict(conv=conv, bn=nn.BatchNorm2d(conv.out_channels))
        super().__init__(parts if activation is None else OrderedDict(**parts, nonlinear=activation))

    def fuse(self) -> nn.Sequential:
        """Return ``conv``, now with a bias, and the activation. Exact in evaluation mode.

        Raises:
            RuntimeError: in training mode.
        """
        refuse_training(self)
        conv = fold_norm(self.conv, self.bn)
        rest = OrderedDict((name, part) for name, part in self.named_children() if name not in ("conv", "bn"))
        return nn.Sequential(OrderedDict(conv=conv, **rest)).eval()


class ReparamConv2d(nn.Module):
    """Base of the sums: depthwise, (N, C, H, W) -> (N, C, ceil(H/stride), ceil(W/stride)).

    A kind of sum registers its convolutions and norms under the names it wants, and returns them from
    :meth:`branches`, the first of them the largest.
    """

    def branches(self) -> list[tuple[nn.Conv2d, _BatchNorm]]:
        """Return the convolutions, each with its norm."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Sum over the branches of ``norm(conv(x))``."""
        y: Tensor | None = None
        for conv, norm in self.branches():
            term = norm(conv(x))
            y = term if y is None else y + term
        if y is None:
            raise ValueError("there are no branches to sum.")
        return y

    def fuse(self) -> nn.Module:
        """Return the merged layer. Exact in evaluation mode; raises RuntimeError in training mode."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Show the kernels."""
        kernels = [(*conv.kernel_size, conv.dilation[0]) for conv, _ in self.branches()]
        words = (f"{h}x{w}" + (f" dilated {d}" if d > 1 else "") for h, w, d in kernels)
        return f"{self.branches()[0][0].in_channels}, {' + '.join(words)}"


class LargeKernelConv2d(ReparamConv2d):
    """RepLKNet's: a large kernel and a small one, each with batch norm. ``lkb_origin``, ``small_conv``.

    Args:
        channels: of input and output.
        kernel_size: odd, or (rows, columns) both odd.
        stride: of both.
        small: size of the small kernel; smaller than the large one, or None for none. Where a side of the large kernel
            is smaller, so is that of the small kernel.

    Raises:
        TypeError, ValueError: sizes that are no odd integers, ``small`` larger than the kernel.
    """

    def __init__(self, channels: int, kernel_size: int | Pair, stride: int = 1, small: int | None = 5) -> None:
        super().__init__()
        size = _odd_pair("kernel_size", kernel_size)
        self.lkb_origin = ConvNorm(_depthwise(channels, size, stride))
        if small is not None:
            beside = _odd_pair("small", small)
            if beside[0] > max(size):
                raise ValueError(f"small must not exceed the kernel of {size[0]}x{size[1]}; got {small}.")
            beside = min(beside[0], size[0]), min(beside[1], size[1])
            self.small_conv = ConvNorm(_depthwise(channels, beside, stride))

    def branches(self) -> list[tuple[nn.Conv2d, _BatchNorm]]:
        """Return the large kernel, and the small one if there is one."""
        return [(part.conv, part.bn) for part in self.children() if isinstance(part, ConvNorm)]

    def fuse(self) -> nn.Sequential:
        """Return one depthwise convolution, ``lkb_reparam``, with a bias. Exact in evaluation mode.

        Raises:
            RuntimeError: in training mode.
        """
        return _alone("lkb_reparam", merged(self))


class DilatedReparamConv2d(ReparamConv2d):
    """UniRepLKNet's: a large kernel, and dilated ones beside it. ``lk_origin``, ``origin_bn``, ``dil_conv_k3_2``, ...

    Args:
        channels: of input and output.
        kernel_size: odd.
        branches: (kernel size, dilation) of each one beside it; by default UniRepLKNet's for this size.

    Raises:
        TypeError, ValueError: sizes that are no odd integers; no default for this size; a branch that spans more.
    """

    def __init__(self, channels: int, kernel_size: int, branches: Sequence[Pair] | None = None) -> None:
        super().__init__()
        size, _ = _odd_pair("kernel_size", kernel_size)
        if branches is None:
            if size not in DILATED_BRANCHES:
                known = ", ".join(map(str, DILATED_BRANCHES))
                raise ValueError(f"UniRepLKNet has branches for kernels of {known}; got {size}: give branches=.")
            branches = DILATED_BRANCHES[size]
        self.lk_origin = _depthwise(channels, (size, size), 1)
        self.origin_bn = nn.BatchNorm2d(channels)
        self._branches = _checks.experts(branches) if branches else ()
        for k, d in self._branches:
            if fold.effective_size(k, d) > size:
                raise ValueError(
                    f"a branch of kernel size {k} and dilation {d} spans {fold.effective_size(k, d)} pixels, "
                    f"more than the kernel of {size}x{size}."
                )
            self.add_module(f"dil_conv_k{k}_{d}", _depthwise(channels, (k, k), 1, d))
            self.add_module(f"dil_bn_k{k}_{d}", nn.BatchNorm2d(channels))

    def branches(self) -> list[tuple[nn.Conv2d, _BatchNorm]]:
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
        channels: of input and output.
        kernel_size: K, odd.
        small: N, odd. The square is left out where N is not below K.

    Raises:
        TypeError, ValueError: sizes that are no odd integers.
    """

    def __init__(self, channels: int, kernel_size: int, small: int = 5) -> None:
        super().__init__()
        (long, _), (short, _) = _odd_pair("kernel_size", kernel_size), _odd_pair("small", small)
        self.LoRA1 = ConvNorm(_depthwise(channels, (long, short), 1))
        self.LoRA2 = ConvNorm(_depthwise(channels, (short, long), 1))
        if short < long:
            self.small_conv = ConvNorm(_depthwise(channels, (short, short), 1))

    def branches(self) -> list[tuple[nn.Conv2d, _BatchNorm]]:
        """Return the two bands and the square."""
        return [(part.conv, part.bn) for part in self.children() if isinstance(part, ConvNorm)]

    def fuse(self) -> DecomposedKernel:
        """Return the sum of the two bands, norms and square folded in. Exact in evaluation mode.

        One KxK kernel would be exact too, and cost K / (2N) times as many multiply-adds.

        Raises:
            RuntimeError: in training mode.
        """
        refuse_training(self)
        first, second, *square = (fold_norm(conv, norm) for conv, norm in self.branches())
        with torch.no_grad():
            for conv in square:
                first.weight += fold.pad(conv.weight, first.kernel_size)  # type: ignore[arg-type]
                first.bias += conv.bias  # type: ignore[operator]
            first.bias += second.bias  # type: ignore[operator]
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


def merged(layer: ReparamConv2d) -> nn.Conv2d:
    """Return one depthwise convolution, with a bias, that is the sum of all branches in evaluation mode.

    Raises:
        RuntimeError: the layer is in training mode.
    """
    refuse_training(layer)
    branches = [fold_norm(conv, norm) for conv, norm in layer.branches()]
    largest, *others = branches
    rows, columns = largest.kernel_size
    with torch.no_grad():
        for conv in others:
            largest.weight += fold.pad(fold.dilate(conv.weight, conv.dilation[0]), (rows, columns))
            largest.bias += conv.bias  # type: ignore[operator]
    return largest


@torch.no_grad()
def fold_norm(conv: nn.Conv2d, norm: _BatchNorm) -> nn.Conv2d:
    """Return the convolution, of the same kind and with a bias, that ``conv`` and ``norm`` are in evaluation mode.

    Raises:
        RuntimeError: one of the two is in training mode.
        ValueError: ``norm`` has no running statistics.
    """
    for module in (conv, norm):
        refuse_training(module)
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("cannot fold a batch norm without running statistics (track_running_stats=False).")
    weight, bias = fold.fold_batch_norm(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps
    )
    plain = bare(conv, bias=True)
    plain.weight, plain.bias = nn.Parameter(weight), nn.Parameter(bias)
    plain.eval()
    return DepthwiseConv2d.from_conv2d(plain, backend=conv.backend) if isinstance(conv, DepthwiseConv2d) else plain


def refuse_training(module: nn.Module) -> None:
    """Raise RuntimeError for a layer that is to be fused in training mode."""
    if module.training:
        raise RuntimeError("fuse() computes the evaluation-mode function: call model.eval() first.")


def _depthwise(channels: int, size: Pair, stride: int, dilation: int = 1) -> DepthwiseConv2d:
    padding = (dilation * (size[0] // 2), dilation * (size[1] // 2))
    return DepthwiseConv2d(channels, size, stride, padding, dilation, bias=False)


def _alone(name: str, conv: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(OrderedDict({name: conv})).eval()


def _odd_pair(name: str, value: object) -> Pair:
    pair = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be one integer or two (rows, columns); got {pair!r}.")
    rows, columns = (_checks.integer(name, side) for side in pair)
    for side in (rows, columns):
        if side % 2 == 0:
            raise ValueError(f"{name} must be odd, so that it is centred on a pixel; got {side}.")
    return rows, columns
