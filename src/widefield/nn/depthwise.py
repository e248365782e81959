"""Depthwise convolution as a layer: torch.nn.Conv2d in all but speed."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from widefield import _checks
from widefield.ops import depthwise_conv2d
from widefield.ops._backend import BACKENDS
from widefield.ops._problem import size_of

_Conv = TypeVar("_Conv", bound=nn.Conv2d)

_ARGUMENTS = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"
)  # fmt: skip


class DepthwiseConv2d(nn.Conv2d):
    """A ``torch.nn.Conv2d`` with ``groups == in_channels == out_channels`` that runs :func:`ops.depthwise_conv2d`.

    Same arguments, parameters, keys, initialisation and ``isinstance``; the same output to rounding.

    Args:
        channels: of input and output.
        kernel_size, stride, dilation, bias, padding_mode, device, dtype: as in Conv2d.
        padding: as in Conv2d; "same" by default, which needs stride 1.
        backend: of :func:`widefield.ops.depthwise_conv2d`.

    Raises:
        ValueError: an unknown backend.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = "same",
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        *,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.backend = _checks.choice("backend", backend, BACKENDS)
        super().__init__(
            channels, channels, kernel_size, stride, padding, dilation, channels, bias, padding_mode,
            device=device, dtype=dtype,
        )  # fmt: skip

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, *, backend: str = "auto") -> DepthwiseConv2d:
        """Return this layer in place of ``conv``, with its very parameters, mode and padding.

        Raises:
            ValueError: ``conv`` is no depthwise convolution; the message is that of :func:`why_not`.
        """
        reason = why_not(conv)
        if reason is not None:
            raise ValueError(f"cannot be a DepthwiseConv2d: {reason}.")
        layer = cls(
            conv.in_channels,
            _pair(conv.kernel_size),
            stride=_pair(conv.stride),
            padding=conv.padding if isinstance(conv.padding, str) else _pair(conv.padding),
            dilation=_pair(conv.dilation),
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            backend=backend,
            device="meta",
        )
        return _hand_over(conv, layer)

    def fuse(self) -> nn.Conv2d:
        """Return the plain ``torch.nn.Conv2d`` with these very parameters. Exact in any mode: nothing is merged."""
        return _hand_over(self, bare(self, bias=self.bias is not None))

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


def _pair(sizes: tuple[int, ...]) -> tuple[int, int]:
    rows, columns = sizes
    return rows, columns


def _hand_over(source: nn.Conv2d, target: _Conv) -> _Conv:
    target.weight, target.bias = source.weight, source.bias
    return target.train(source.training)
