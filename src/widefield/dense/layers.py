"""Provide the layers that heads and necks share; submodules have OpenMMLab's names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widefield import _checks

NORMS = ("batch", "group")
"""Norms of a :class:`ConvModule`."""

GROUPS = 32
"""Groups of a group norm (Wu and He 2018)."""


class GroupNorm(nn.GroupNorm):
    """``torch.nn.GroupNorm`` for maps of any size.

    PyTorch's refuses groups of one value, as those of 32 channels on a map of one pixel. Here they become the bias.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def observed(module: nn.Module) -> bool:
    """Return whether hooks read what a module gets or returns: it must run, and nothing may change its output."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


class ConvModule(nn.Module):
    """A convolution, a norm and a ReLU, under OpenMMLab's names: ``conv``, and ``bn`` or ``gn``.

    Weights of the convolution start as Kaiming normal with the fan-out (He et al. 2015), biases as 0, norms as 1 and 0.

    Args:
        in_channels, out_channels, kernel_size: as in ``torch.nn.Conv2d``.
        stride, padding, dilation, groups: as in ``torch.nn.Conv2d``.
        norm: "batch", "group" (32 groups), or None.
        activation: whether a ReLU follows.
        bias: whether the convolution has a bias; None: if there is no norm.
        device, dtype: of the parameters.

    Raises:
        ValueError: an unknown norm.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        norm: str | None = "batch",
        activation: bool = True,
        bias: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if norm is not None:
            _checks.choice("norm", norm, NORMS)
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
            bias=norm is None if bias is None else bias,
            device=device, dtype=dtype,
        )  # fmt: skip
        if norm == "batch":
            self.bn = nn.BatchNorm2d(out_channels, device=device, dtype=dtype)
        elif norm == "group":
            self.gn = GroupNorm(GROUPS, out_channels, device=device, dtype=dtype)
        self._norm = {"batch": "bn", "group": "gn"}.get(norm or "")
        self.activate = nn.ReLU(inplace=True) if activation else None
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H', W')."""
        y: Tensor = self.conv(x)
        if self._norm is not None:
            y = self.get_submodule(self._norm)(y)
        return y if self.activate is None else self.activate(y)


class DepthwiseSeparableConvModule(nn.Module):
    """A depthwise and a pointwise convolution, each with its batch norm and ReLU.

    The submodules are two :class:`ConvModule`: ``depthwise_conv`` and ``pointwise_conv``.

    Args:
        in_channels, out_channels, kernel_size: as in ``torch.nn.Conv2d``.
        padding, dilation: of the depthwise convolution.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        padding: int = 0,
        dilation: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.depthwise_conv = ConvModule(
            in_channels, in_channels, kernel_size, padding=padding, dilation=dilation, groups=in_channels,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.pointwise_conv = ConvModule(in_channels, out_channels, 1, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H', W')."""
        y: Tensor = self.pointwise_conv(self.depthwise_conv(x))
        return y


class AdaptivePool(nn.AdaptiveAvgPool2d):
    """``torch.nn.AdaptiveAvgPool2d`` to a square, exportable with a dynamic height and width.

    PyTorch decomposes its own operator for one size of the map only. While exporting, this one multiplies by a matrix
    of averages along each axis, whose entries the graph computes from the size.

    Args:
        size: side of the output.
    """

    def __init__(self, size: int) -> None:
        super().__init__(_checks.integer("size", size))
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, size, size)."""
        if self.size == 1:
            return x.mean((2, 3), keepdim=True)
        if not torch.compiler.is_exporting():
            return super().forward(x)
        rows, columns = (_averages(side, self.size, x) for side in x.shape[2:])
        return rows @ x @ columns.T


def _averages(side: int, size: int, like: Tensor) -> Tensor:
    """Return the matrix (size, side) that averages ``side`` entries to ``size``; bins start at floor(i * side / size).

    Bins end at ceil((i + 1) * side / size), so that they overlap if ``size`` does not divide ``side``.
    """
    place = torch.arange(side, device=like.device)
    bins = torch.arange(size, device=like.device)[:, None]
    starts = torch.div(bins * side, size, rounding_mode="floor")
    ends = torch.div((bins + 1) * side + size - 1, size, rounding_mode="floor")
    inside = ((place >= starts) & (place < ends)).to(like.dtype)
    return inside / inside.sum(1, keepdim=True)


def widened(x: Tensor) -> Tensor:
    """Return x in float32 or wider.

    Boxes and losses need the precision; logits resized in half precision tie at many pixels.
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def concatenate(maps: Sequence[Tensor], reader: nn.Module) -> Tensor:
    """Concatenate maps of one size along the channels, in channels_last if the weights are.

    Maps resized from a single pixel are in NCHW. Next to maps in channels_last they make the concatenation slow, and
    its result NCHW as well.

    Args:
        maps: (N, C_i, H, W) each.
        reader: the layer that reads the result.

    Returns:
        (N, sum of C_i, H, W).
    """
    # Compilers choose memory formats themselves, and a check would bind their graph to this one.
    if not torch.compiler.is_compiling() and any(_in_channels_last(weight) for weight in reader.parameters()):
        maps = [x.contiguous(memory_format=torch.channels_last) for x in maps]
    return torch.cat(list(maps), 1)


def _in_channels_last(weight: Tensor) -> bool:
    return weight.ndim == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)


def resize(x: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """Resize maps bilinearly without antialiasing.

    Args:
        x: (N, C, H, W).
        size: (H', W').
        align_corners: whether the centers of corner pixels keep their place, as in ``torch.nn.functional.interpolate``.

    Returns:
        (N, C, H', W').
    """
    return F.interpolate(x, size=list(size), mode="bilinear", align_corners=align_corners)
