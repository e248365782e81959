"""Compute with PyTorch's own convolution, on any device; it is the fallback and the reference for other backends."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from widefield._checks import Pair
from widefield.ops._problem import Problem, fold, is_channels_last, memory_format


def why_not(problem: Problem) -> str | None:
    """Return None: this backend computes every problem."""
    return None


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """Return F.conv2d(x, weight) with groups == channels."""
    groups, channels = weight.shape[:2]
    bias = None if bias is None else bias.flatten()
    if groups == 1:
        y = F.conv2d(x, weight.transpose(0, 1), bias, stride, padding, dilation, channels)
    else:
        y = F.conv2d(
            fold(x), weight.reshape(-1, 1, *weight.shape[2:]), bias, stride, padding, dilation, x.shape[1] * groups
        )
        y = y.view(groups, channels, *y.shape[2:])
    return y


def input_grad(
    grad: Tensor, weight: Tensor, input_size: tuple[int, ...], stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """Return the gradient of :func:`forward` with respect to x."""
    layout = memory_format(is_channels_last(grad))
    x = torch.empty(input_size, dtype=grad.dtype, device=grad.device, memory_format=layout)  # only its size is read
    dx, _ = _backward(grad, x, weight, stride, padding, dilation, (True, False, False))
    return dx


def weight_grad(
    grad: Tensor, x: Tensor, weight_size: tuple[int, ...], stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """Return the gradient of :func:`forward` with respect to its weights."""
    _, dw = _backward(grad, x, x.new_empty(weight_size), stride, padding, dilation, (False, True, False))
    return dw


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, mask: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor]:
    groups, channels, kh, kw = weight.shape
    if groups != 1:
        grad, x = fold(grad), fold(x)
    dx, dw, _ = torch.ops.aten.convolution_backward(
        grad, x, weight.reshape(-1, 1, kh, kw), None, stride, padding, dilation, False, (0, 0), groups * channels, mask
    )
    if mask[0]:
        dx = dx.view(-1, channels, *x.shape[2:])
    if mask[1]:
        dw = dw.reshape(groups, channels, kh, kw)
    return dx, dw
