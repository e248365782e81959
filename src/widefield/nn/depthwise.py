"""Depthwise convolution as a layer: torch.nn.Conv2d, but faster."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from widefield import _checks
from widefield._checks import Pair
from widefield.nn._leaf import is_symbolic, recorded
from widefield.nn.fusing import learns, refuse_training
from widefield.ops import depthwise_conv2d
from widefield.ops._backend import BACKENDS
from widefield.ops._problem import size_of

_Conv = TypeVar("_Conv", bound=nn.Conv2d)

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]

_ARGUMENTS = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"
)  # fmt: skip


class DepthwiseConv2d(nn.Conv2d):
    """A ``torch.nn.Conv2d`` with ``groups == in_channels == out_channels`` that runs :func:`ops.depthwise_conv2d`.

    Same arguments, parameters, keys, initialization and ``isinstance``; the same output to rounding.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias, padding_mode, device, dtype: as in
            Conv2d.
        groups: as in Conv2d, but the channels by default, and no other number.
        backend: of :func:`widefield.ops.depthwise_conv2d`.

    Raises:
        ValueError: different numbers of channels and groups, an unknown backend.
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
        padding_mode: PaddingMode = "zeros",
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        channels = _checks.depthwise_channels(in_channels, out_channels, groups)
        self.backend = _checks.choice("backend", backend, BACKENDS)
        super().__init__(
            channels, channels, kernel_size, stride, padding, dilation, channels, bias, padding_mode,
            device=device, dtype=dtype,
        )  # fmt: skip

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, *, backend: str = "auto") -> DepthwiseConv2d:
        """Return this layer in place of ``conv``, with its mode and padding. It shares the parameters of ``conv``.

        Raises:
            ValueError: ``conv`` is not a depthwise convolution; the message is that of :func:`why_not`.
        """
        reason = why_not(conv)
        if reason is not None:
            raise ValueError(f"cannot be a DepthwiseConv2d: {reason}.")
        make: Any = cls
        arguments = {name: getattr(conv, name) for name in _ARGUMENTS}
        layer: DepthwiseConv2d = make(**arguments, bias=conv.bias is not None, backend=backend, device="meta")
        layer.weight, layer.bias = conv.weight, conv.bias
        return layer.train(conv.training)

    def fuse(self) -> nn.Conv2d:
        """Return a plain ``torch.nn.Conv2d`` with copies of the parameters. Exact.

        Raises:
            RuntimeError: in training mode.
        """
        refuse_training(self)
        return copied_into(bare(self, bias=self.bias is not None), self)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) or (C, H, W) -> as Conv2d's; ValueError for an input of another shape."""
        if is_symbolic(input):
            return recorded(self, input)
        return self._conv_forward(input, self.weight, self.bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if input.ndim == 3:  # an image without a batch, as Conv2d takes it
            return self._conv_forward(input[None], weight, bias)[0]
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            _checks.images(size_of(input), self.in_channels)
            input, padding = nn.functional.pad(input, self._reversed_padding_repeated_twice, self.padding_mode), 0
        try:
            return depthwise_conv2d(
                input, weight, bias, stride=self.stride, padding=padding, dilation=self.dilation, backend=self.backend
            )
        except ValueError:
            _checks.images(size_of(input), self.in_channels)  # in the words of the layer if the input is at fault
            raise


def bare(conv: nn.Conv2d, *, bias: bool) -> nn.Conv2d:
    """Return a plain convolution with the arguments of ``conv``, its parameters on the meta device."""
    arguments = {name: getattr(conv, name) for name in _ARGUMENTS}
    return nn.Conv2d(**arguments, bias=bias, device="meta")


def why_not(conv: nn.Module) -> str | None:
    """Return why ``conv`` cannot become a :class:`DepthwiseConv2d`, or None if it can."""
    if type(conv) is not nn.Conv2d:
        return f"it is a {type(conv).__name__}, not a plain torch.nn.Conv2d"
    return not_depthwise(conv)


def not_depthwise(conv: nn.Conv2d) -> str | None:
    """Return why ``conv`` is not depthwise, or None if it is."""
    if not conv.groups == conv.in_channels == conv.out_channels:
        return (
            f"it is not depthwise: {conv.in_channels} input channels, {conv.out_channels} output channels, "
            f"groups={conv.groups}"
        )
    return None


def copied_into(target: _Conv, source: nn.Conv2d) -> _Conv:
    """Return ``target`` with copies of the parameters of ``source``, in evaluation mode."""
    target.weight = nn.Parameter(source.weight.detach().clone(), learns([source.weight]))
    if source.bias is not None:
        target.bias = nn.Parameter(source.bias.detach().clone(), learns([source.bias]))
    return target.eval()
