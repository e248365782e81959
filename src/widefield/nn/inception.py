"""Depthwise convolution with different kernels for groups of channels: a square, a row, a column, or none.

Yu, Zhou, Yan, Wang, "InceptionNeXt: When Inception Meets ConvNeXt", CVPR 2024, section 3. Keys are those of its code,
and of timm's ``inception_next_*``, which are the networks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from widefield import _checks
from widefield.nn import depthwise
from widefield.nn._leaf import is_symbolic, recorded
from widefield.nn.depthwise import DepthwiseConv2d
from widefield.ops import fold
from widefield.ops._problem import size_of


class InceptionDWConv2d(nn.Module):
    """Depthwise convolutions of 3x3, 1xk and kx1, each on a share of the channels. The other channels do not change.

    With g = ``int(channels * branch_ratio)``, the channels are, in this order: all but 3g, which do not change, g for
    ``dwconv_hw``, g for ``dwconv_w`` (one row), g for ``dwconv_h`` (one column).

    There is no ``fuse()``. One kxk kernel per channel would be exact, but would take k² multiply-adds per pixel in
    every channel. This layer takes 9 + 2k in g channels: 31 times fewer for k = 11 and an eighth of the channels.

    Args:
        channels: of input and output.
        square_kernel_size, band_kernel_size: odd.
        branch_ratio: share of the channels in each of the three branches, at most a third.
        dilation: of all three.
        bias: of all three.
        backend: of :func:`widefield.ops.depthwise_conv2d`.

    Raises:
        TypeError, ValueError: sizes that are not odd integers; a share of no channel, or of more than a third.
    """

    dwconv_hw: DepthwiseConv2d
    dwconv_w: DepthwiseConv2d
    dwconv_h: DepthwiseConv2d

    def __init__(
        self,
        channels: int,
        square_kernel_size: int = 3,
        band_kernel_size: int = 11,
        branch_ratio: float = 0.125,
        dilation: int = 1,
        bias: bool = True,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels = _checks.integer("channels", channels)
        square = _checks.odd("square_kernel_size", square_kernel_size)
        band = _checks.odd("band_kernel_size", band_kernel_size)
        reason = lacks_room(channels, branch_ratio)
        if reason is not None:
            raise ValueError(f"branch_ratio={branch_ratio} does not fit {channels} channels: {reason}.")
        group = int(channels * branch_ratio)
        self.splits = (channels - 3 * group, group, group, group)
        options: dict[str, Any] = {
            "padding": "same", "bias": bias, "backend": backend, "device": device, "dtype": dtype,
        }  # fmt: skip
        for name, kernel, steps in (
            ("dwconv_hw", (square, square), (dilation, dilation)),
            ("dwconv_w", (1, band), (1, dilation)),
            ("dwconv_h", (band, 1), (dilation, 1)),
        ):
            self.add_module(name, DepthwiseConv2d(group, group, kernel, dilation=steps, **options))

    @classmethod
    def from_conv2d(
        cls,
        conv: nn.Conv2d,
        square_kernel_size: int = 3,
        band_kernel_size: int | None = None,
        branch_ratio: float = 0.125,
    ) -> InceptionDWConv2d:
        """Return this layer as a replacement for a depthwise ``conv``, with those of its weights that fit.

        This does not keep the function of ``conv``. Most channels lose their kernel and bias, the others keep only the
        central square, row or column. It is a start for training.

        Args:
            conv: a depthwise convolution of stride 1 that keeps the size of its input.
            square_kernel_size, branch_ratio: as of the layer.
            band_kernel_size: as of the layer; None for the size of ``conv``. Taps that ``conv`` does not have start at
                0.

        Raises:
            ValueError: ``conv`` cannot be split; the message is that of :func:`why_not`.
        """
        reason = why_not(conv)
        if reason is not None:
            raise ValueError(f"cannot be an InceptionDWConv2d: {reason}.")
        size = conv.kernel_size[0]
        layer = cls(
            conv.in_channels,
            square_kernel_size,
            size if band_kernel_size is None else band_kernel_size,
            branch_ratio,
            conv.dilation[0],
            conv.bias is not None,
            backend=getattr(conv, "backend", "auto"),
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        kernels = conv.weight.detach().split(layer.splits)[1:]
        biases = (None,) * 3 if conv.bias is None else conv.bias.detach().split(layer.splits)[1:]
        with torch.no_grad():
            for branch, kernel, bias in zip(layer.branches(), kernels, biases, strict=True):
                branch.weight.copy_(fold.fit(kernel, branch.kernel_size))
                if branch.bias is not None:
                    branch.bias.copy_(bias)
        layer.requires_grad_(conv.weight.requires_grad)
        return layer.train(conv.training)

    def branches(self) -> tuple[DepthwiseConv2d, DepthwiseConv2d, DepthwiseConv2d]:
        """Return the convolutions, in the order of their channels."""
        return self.dwconv_hw, self.dwconv_w, self.dwconv_h

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W); ValueError for an input of another shape."""
        if is_symbolic(x):
            return recorded(self, x)
        _checks.images(size_of(x), self.channels)
        same, *parts = x.split(self.splits, 1)
        return torch.cat([same, *(conv(part) for conv, part in zip(self.branches(), parts, strict=True))], 1)

    def extra_repr(self) -> str:
        """Show how the channels are split."""
        return f"{self.channels} = {' + '.join(map(str, self.splits))}"


def why_not(conv: nn.Module) -> str | None:
    """Return why ``conv`` cannot be split by :meth:`InceptionDWConv2d.from_conv2d`, or None if it can."""
    reason = None if type(conv) is DepthwiseConv2d else depthwise.why_not(conv)
    if reason is not None or not isinstance(conv, nn.Conv2d):
        return reason
    (height, width), (down, right), padding = conv.kernel_size, conv.dilation, conv.padding
    if height != width or height % 2 == 0:
        return f"its kernel is not square and odd ({height}x{width})"
    if conv.stride != (1, 1):
        return f"its stride is {conv.stride}, and channels that do not change keep their size"
    if down != right:
        return f"its dilation {conv.dilation} differs between the axes"
    if conv.padding_mode != "zeros":
        return f"its padding mode is {conv.padding_mode!r}, not 'zeros'"
    same = down * (height // 2)
    if padding != "same" and padding != (same, same):
        return f"its padding is {padding}, and {same} would center the kernel on the pixel"
    return None


def lacks_room(channels: int, branch_ratio: float) -> str | None:
    """Return why the channels cannot have three branches of this share, or None if they can."""
    group = int(channels * _checks.number("branch_ratio", branch_ratio))
    if group < 1:
        return f"a branch would have no channel of its {channels}"
    if 3 * group > channels:
        return f"three branches would take {3 * group} of its {channels} channels"
    return None
