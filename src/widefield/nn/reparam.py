"""Sums of depthwise branches, each with batch norm, that merge into one convolution; :mod:`widefield.nn.large_kernel`
has the kinds of them.

Convolution is linear, and so is batch norm in evaluation: a sum of both is one convolution with the sum of the
kernels, each spread by its dilation, padded with zeros to the largest and scaled by its norm. What ``fuse()`` returns
has parameters of its own and is in evaluation mode; they are those of plain convolutions, and train on where the
branches' kernels did.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, Self, TypeVar, cast

import torch
import torch.nn.functional as F
from timm.layers import FrozenBatchNormAct2d
from timm.layers.norm_act import FrozenBatchNorm2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd

from widefield import _checks
from widefield._checks import Pair
from widefield.nn import depthwise
from widefield.nn.depthwise import DepthwiseConv2d
from widefield.ops import fold

INIT = ("preserve", "random")

FROZEN_NORMS = (FrozenBatchNorm2d, FrozenBatchNormAct2d)
"""Batch norms of torchvision and timm that compute the same in training and evaluation mode."""


_Conv = TypeVar("_Conv", bound=nn.Module)

Branch = tuple[nn.Conv2d, _BatchNorm | None]
"""A convolution and the norm after it, if there is one."""


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
        """Become, in place, what :meth:`fuse` returns; its class, too. For scripts written for the authors' code, which
        call blocks by this name (RepLKNet, SLaK), ``merge_dilated_branches`` (UniRepLKNet) or ``switch_to_deploy``.

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
        """Make this layer in place of a depthwise convolution: its stride, backend, device, dtype and mode.

        Where the kernel of ``conv`` is frozen (``requires_grad`` is False), so is the layer.

        Args:
            conv: depthwise, odd kernel, "same" padding with zeros, no dilation; any stride.
            kernel_size: as in the constructor.
            init: "preserve": the layer computes what ``conv`` computes (:meth:`absorb`); where there are norms, in
                evaluation mode only, as in training mode batch norm subtracts and divides by what it sees. "random": a
                fresh start.
            options: further ones of the constructor.

        Raises:
            ValueError: ``conv`` cannot be replaced (the message says why), or with ``init="preserve"`` the first branch
                cannot hold its kernel.
        """
        check_init(init)
        reason = why_not(conv)
        if reason:
            raise ValueError(f"{conv} cannot become a {cls.__name__}: {reason}.")
        make: Any = cls
        stride, backend = _checks.pair("stride", conv.stride), getattr(conv, "backend", "auto")
        layer: Self = make(conv.in_channels, kernel_size, stride=stride, backend=backend, **options).to(conv.weight)
        if init == "preserve":
            layer.absorb(conv)
        return layer.requires_grad_(conv.weight.requires_grad).train(conv.training)

    @torch.no_grad()
    def absorb(self, conv: nn.Conv2d) -> None:
        """Set all branches so that in evaluation mode their sum is ``conv``, while every branch stays able to learn.

        All branches but the first start as equal shares of half of the old kernel at their taps, perturbed by a tenth
        of the channel's root mean square, as two equal branches would get equal gradients for ever; taps that the first
        one does not have start at zero. The first one takes up the remainder, so the sum is the old kernel to rounding.
        Norms, as new, have mean 0 and variance 1; their weight is the root of ``1 + eps``, so that they scale by 1. The
        old bias is that of the first norm, or without norms that of the first convolution.

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
            share = _centred(old, span)[..., ::dilation, ::dilation] / (2 * len(beside))
            common = _centred(old.new_ones(size), span)[::dilation, ::dilation]  # taps that the first has
            part.weight.copy_(share + common * noise * torch.randn_like(share))
            remainder -= _centred(fold.dilate(part.weight.double(), dilation), size)  # as rounded
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
    with torch.no_grad():
        for conv in others:
            largest.weight += fold.pad(fold.dilate(conv.weight, conv.dilation[0]), (rows, columns))
            largest.bias += conv.bias  # type: ignore[operator]
    return largest


def norm_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return (scale, shift), each (C,) and of the norm's dtype, such that ``norm`` evaluates to ``scale * x + shift``.

    Raises:
        RuntimeError: in training mode.
        ValueError: no running statistics.
    """
    scale, shift = exact_affine(norm)
    dtype = cast(Tensor, norm.running_mean).dtype
    return scale.to(dtype), shift.to(dtype)


@torch.no_grad()
def fold_norm(conv: _Conv, norm: nn.Module | None) -> _Conv:
    """Return the layer, of the same kind and with a bias, that ``conv`` and ``norm`` are in evaluation mode.

    Its parameters are new ones, and ask for gradients where the kernel of ``conv`` does. They are computed in float64
    and rounded once. Without a norm: copies.

    Args:
        conv: a convolution, transposed or not, of any number of dimensions and groups, or a linear layer, which
            computes with its ``weight`` as it is.
        norm: a batch norm, frozen or not.

    Raises:
        RuntimeError: one of the two is in training mode.
        ValueError: ``norm`` has no running statistics, or another number of channels.
    """
    refuse_training(conv)
    old: Any = conv
    outputs = conv.out_features if isinstance(conv, nn.Linear) else old.out_channels
    if norm is None:
        weight, bias = old.weight.clone(), None if old.bias is None else old.bias.clone()
    else:
        scale, shift = exact_affine(norm)
        if len(scale) != outputs:
            raise ValueError(f"cannot fold a batch norm of {len(scale)} channels into {outputs} outputs.")
        transposed = old.groups if isinstance(conv, _ConvTransposeNd) else None
        weight, bias = fold.scale_outputs(old.weight, old.bias, scale, shift, transposed=transposed)
    if bias is None:
        bias = weight.new_zeros(outputs)
    learns = old.weight.requires_grad
    parameters = nn.Parameter(weight, learns), nn.Parameter(bias, learns)
    known = {id(old.weight): parameters[0]}  # a copy of whatever a kind of convolution holds, but for the old kernel
    if old.bias is not None:
        known[id(old.bias)] = parameters[1]
    twin: Any = copy.deepcopy(conv, known)
    twin.weight, twin.bias = parameters
    return twin  # type: ignore[no-any-return]


def exact_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return (scale, shift) of a batch norm in evaluation mode, frozen or not; see :func:`fold.batch_norm_affine`."""
    refuse_training(norm)
    bn: Any = norm
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("cannot fold a batch norm without running statistics (track_running_stats=False).")
    return fold.batch_norm_affine(bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)


def refuse_training(module: nn.Module) -> None:
    """Raise RuntimeError for a layer that is to be fused in training mode; the mode of a frozen norm does not count."""
    if module.training and not isinstance(module, FROZEN_NORMS):
        raise RuntimeError("fuse() computes the evaluation-mode function: call model.eval() first.")


def check_init(init: str) -> str:
    """Return ``init`` if :meth:`LargeKernelConv2d.from_conv2d` knows it; raises ValueError."""
    return _checks.choice("init", init, INIT)


def why_not(conv: nn.Module) -> str | None:
    """Return why ``conv`` cannot become a :class:`LargeKernelConv2d`, or None if it can."""
    reason = None if type(conv) is DepthwiseConv2d else depthwise.why_not(conv)
    if reason is not None or not isinstance(conv, nn.Conv2d):
        return reason
    rows, columns = conv.kernel_size
    if rows % 2 == 0 or columns % 2 == 0:
        return f"its kernel size is even ({rows}x{columns})"
    if set(conv.dilation) != {1}:
        return f"its dilation is {conv.dilation}: put the large kernel into the network before it is dilated"
    if conv.padding_mode != "zeros":
        return f"its padding mode is {conv.padding_mode!r}, not 'zeros'"
    same = rows // 2, columns // 2
    if conv.padding != "same" and conv.padding != same:
        return f"its padding is {conv.padding}, and {same} is what centres the kernel on the pixel"
    return None


def lacks_room(conv: nn.Conv2d, kernel_size: int | Pair) -> str | None:
    """Return why a kernel of this size cannot hold that of ``conv`` (which passed :func:`why_not`), or None."""
    rows, columns = odd_pair("kernel_size", kernel_size)
    if conv.kernel_size[0] > rows or conv.kernel_size[1] > columns:
        return f"its {conv.kernel_size[0]}x{conv.kernel_size[1]} kernel does not fit into one of {rows}x{columns}"
    return None


def depthwise_same(
    channels: int, size: Pair, stride: int | Pair = 1, dilation: int = 1, bias: bool = False, backend: str = "auto"
) -> DepthwiseConv2d:
    """Return a depthwise convolution that is centred on its pixel."""
    padding = (dilation * (size[0] // 2), dilation * (size[1] // 2))
    return DepthwiseConv2d(channels, size, stride, padding, dilation, bias, backend=backend)


def _centred(kernel: Tensor, size: tuple[int, ...]) -> Tensor:
    """Crop or pad (..., K_h, K_w) to (..., rows, columns), all odd, around the same centre."""
    down, right = (size[0] - kernel.shape[-2]) // 2, (size[1] - kernel.shape[-1]) // 2
    return F.pad(kernel, (right, right, down, down))  # which crops where these are negative


def odd_pair(name: str, value: object) -> Pair:
    """Return (rows, columns), both odd, for one number or two; raises TypeError or ValueError."""
    rows, columns = _checks.pair(name, value)
    for side in (rows, columns):
        if side % 2 == 0:
            raise ValueError(f"{name} must be odd, so that it is centred on a pixel; got {side}.")
    return rows, columns
