"""Launch :mod:`.kernels.band`, depthwise convolution with large kernels on tensor cores, stride 1.

The GPU kernels work on NCHW; channels_last tensors are copied to it and back. Per-sample kernels fold the batch into
the channels, so samples cannot share T. float32 is computed as three TF32 products ("tf32x3"), as exact as float32 to a
few units in the last place. With ``torch.backends.cudnn.allow_tf32`` it is rounded to TF32 instead.

Taps outside the kernel are multiplied as zeros, so an infinity or NaN in x spreads over the columns of its block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from widefield._checks import Pair
from widefield.ops._problem import Problem, is_channels_last, output_size
from widefield.ops._triton import tune
from widefield.ops._triton.blocks import band_configs, band_weight_grad_configs
from widefield.ops._triton.host import (
    INTERPRETED,
    PROGRAMS,
    dense,
    device_reason,
    empty,
    power_of_two,
    tf32_allowed,
)
from widefield.ops._triton.kernels.band import band_kernel, band_weight_grad_kernel

ALIGN = 16


def why_not(problem: Problem) -> str | None:
    """Return why these kernels cannot compute the problem, or None if they can."""
    if tuple(problem.stride) != (1, 1) or tuple(problem.dilation) != (1, 1):
        return f"needs stride and dilation 1; got stride {problem.stride} and dilation {problem.dilation}"
    return device_reason(problem.device, problem.dtype)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """Convolve x (N, C, H, W) with weight (G, C, KH, KW), G = 1 or N, bias (G, C) or None, in x's memory format."""
    size = output_size((x.shape[2], x.shape[3]), (weight.shape[2], weight.shape[3]), stride, padding, dilation)
    return _convolve(x, weight, bias, size, padding)


def input_grad(
    grad: Tensor, weight: Tensor, input_size: Sequence[int], stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """Return the gradient with respect to x of ``input_size`` (N, C, H, W), in the memory format of grad."""
    turned = (weight.shape[2] - 1 - padding[0], weight.shape[3] - 1 - padding[1])
    return _convolve(grad, weight.flip(-1, -2), None, (input_size[2], input_size[3]), turned)


def weight_grad(
    grad: Tensor, x: Tensor, weight_size: Sequence[int], stride: Pair, padding: Pair, dilation: Pair,
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Return the gradient of the kernels (G, C, KH, KW), summed over the batch if G = 1; grad's dtype by default."""
    shape = tuple(weight_size)
    groups, _, tall, wide = shape
    dtype = out_dtype or grad.dtype
    if grad.numel() == 0:
        return torch.zeros(shape, dtype=dtype, device=grad.device)
    x, grad = _planes(x, groups), _planes(grad, groups)
    batch, planes, height, width = x.shape
    size = (grad.shape[2], grad.shape[3])

    def launch(config: tune.Config) -> Tensor:
        rows, cols, together = config["BM"], config["BN"], config["KB"]
        shift, reach = _window(wide, padding[1], cols, width, size[1])
        col_blocks = -(-size[1] // cols)
        programs = planes * -(-tall // together)
        parts = min(max(1, PROGRAMS // programs), -(-batch * size[0] // rows))
        part = torch.empty((parts, *shape), dtype=dtype if parts == 1 else torch.float32, device=grad.device)
        x_vector, g_vector = _vector(width), _vector(size[1])
        band_weight_grad_kernel[(programs * parts,)](
            grad, x, part, batch, planes, height, size[0], col_blocks, width // x_vector, size[1] // g_vector,
            padding[0], parts, tall, wide, shift, shift - padding[1], x_vector, g_vector, _precision(x), INTERPRETED,
            rows, cols, max(16, power_of_two(reach)), power_of_two(wide), together,
            num_warps=config["num_warps"], num_stages=config["num_stages"],
        )  # fmt: skip
        return part[0] if parts == 1 else part.sum(0).to(dtype)

    key = _key(x, (tall, wide), size)
    return tune.run("gemm.weight_grad", key, lambda: band_weight_grad_configs(size), launch, x.device)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, size: Pair, padding: Pair) -> Tensor:
    last = is_channels_last(x)
    shape = (x.shape[0], x.shape[1], *size)
    x = _planes(x, weight.shape[0])
    batch, planes, height, width = x.shape
    y = empty(batch, planes, size, x.dtype, x.device, False)
    if y.numel() == 0:
        return y.view(shape)
    tall, wide = weight.shape[2:]
    kernels = weight.reshape(planes, tall, wide).to(x.dtype)
    bias = None if bias is None else bias.contiguous()

    def launch(config: tune.Config) -> Tensor:
        rows, cols, deep = config["BM"], config["BN"], config["BK"]
        shift, reach = _window(wide, padding[1], cols, width, size[1])
        if shift == 0 and reach == width:  # one block covers the whole row
            deep = max(16, power_of_two(width))
        chunks = -(-reach // deep)
        before = max(0, cols - 1 + shift - padding[1])  # zeros that the band needs on both sides
        length = max(before + chunks * deep - shift + padding[1], before + wide)
        band = F.pad(kernels, (before, length - before - wide))
        row_blocks, col_blocks = -(-batch * size[0] // rows), -(-size[1] // cols)
        vector = _vector(width)
        band_kernel[(row_blocks * col_blocks * planes,)](
            x, band, band if bias is None else bias, y, batch, planes, height, *size, row_blocks, col_blocks,
            width // vector, padding[0], tall, shift, before + padding[1], length, chunks, vector, bias is not None,
            _precision(x), INTERPRETED, rows, cols, deep, bool(config["BY_ROW"]),
            num_warps=config["num_warps"], num_stages=config["num_stages"],
        )  # fmt: skip
        return y

    key = _key(x, (tall, wide), size)
    tune.run("gemm.forward", key, lambda: band_configs(size, batch, _precision(x)), launch, x.device)
    y = y.view(shape)
    return y.contiguous(memory_format=torch.channels_last) if last else y


def _planes(x: Tensor, groups: int) -> Tensor:
    """Return x in NCHW, with the batch folded into the channels if kernels are per-sample."""
    x = dense(x, False)
    return x.view(1, -1, *x.shape[2:]) if groups == x.shape[0] else x


def _window(wide: int, padding: int, cols: int, width: int, out_width: int) -> Pair:
    """Return (shift, reach): a block of ``cols`` outputs from column 0 needs columns -shift to reach - shift of x.

    The window is the whole map if one block writes all outputs and the map is no wider than the window.
    """
    shift = -(-padding // ALIGN) * ALIGN
    reach = shift + cols - padding + wide - 1
    if out_width <= cols and width <= reach:
        return 0, width
    return shift, reach


def _vector(width: int) -> int:
    """Return the largest power of two, at most 16, that divides the length of a row."""
    return min(width & -width, 16)


def _precision(x: Tensor) -> str:
    if x.dtype != torch.float32:
        return "ieee"
    return "tf32" if tf32_allowed() else "tf32x3"


def _key(x: Tensor, kernel: Pair, size: Pair) -> tuple[Any, ...]:
    batch, planes, _, width = x.shape
    return (
        *kernel, tune.bucket(size[0]), tune.bucket(size[1]), power_of_two(batch * size[0]), power_of_two(planes),
        _vector(width), str(x.dtype), _precision(x),
    )  # fmt: skip
