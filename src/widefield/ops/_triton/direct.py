"""Launch :mod:`.kernels.fma`, depthwise convolution with small kernels and any stride, padding and dilation.

channels_last tensors are not copied; their kernels are copied to (G, KH, KW, C), so that channels are lanes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from widefield._checks import Pair
from widefield.ops._problem import Problem, is_channels_last, output_size
from widefield.ops._triton import tune
from widefield.ops._triton.blocks import forward_configs, strided_configs, weight_grad_configs
from widefield.ops._triton.host import (
    PROGRAMS,
    dense,
    device_reason,
    empty,
    power_of_two,
)
from widefield.ops._triton.kernels.fma import forward_kernel, strided_input_grad_kernel, weight_grad_kernel


def why_not(problem: Problem) -> str | None:
    """Return why these kernels cannot compute the problem, or None if they can."""
    return device_reason(problem.device, problem.dtype)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """Convolve x (N, C, H, W) with weight (G, C, KH, KW), G = 1 or N, bias (G, C) or None, in x's memory format."""
    size = output_size((x.shape[2], x.shape[3]), _kernel(weight), stride, padding, dilation)
    return _convolve(x, weight, bias, size, stride, padding, dilation, flip=False)


def input_grad(
    grad: Tensor, weight: Tensor, input_size: Sequence[int], stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """Return the gradient with respect to x of ``input_size`` (N, C, H, W), in the memory format of grad."""
    size = (input_size[2], input_size[3])
    if tuple(stride) == (1, 1):  # a convolution with the flipped kernel; its padding may be negative
        turned = tuple(dilation[i] * (weight.shape[2 + i] - 1) - padding[i] for i in range(2))
        return _convolve(grad, weight, None, size, stride, (turned[0], turned[1]), dilation, flip=True)
    return _strided_input_grad(grad, weight, size, stride, padding, dilation)


def weight_grad(
    grad: Tensor, x: Tensor, weight_size: Sequence[int], stride: Pair, padding: Pair, dilation: Pair,
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Return the gradient of the kernels (G, C, KH, KW), summed over the batch if G = 1; grad's dtype by default."""
    groups, channels, height, width = weight_size
    dtype = out_dtype or grad.dtype
    if grad.numel() == 0:
        return torch.zeros((groups, channels, height, width), dtype=dtype, device=grad.device)
    batch, last = x.shape[0], is_channels_last(x)
    per_sample = groups == batch
    x, grad = dense(x, last), dense(grad, last)
    size = (grad.shape[2], grad.shape[3])

    def launch(config: tune.Config) -> Tensor:
        rows, a, b, tall, wide = (config[k] for k in ("BH", "BA", "BB", "KC", "KD"))
        row_blocks, col_blocks = -(-size[0] // rows), -(-size[1] // (a if last else b))
        if last:
            units, images = -(-channels // b) * groups, 1 if per_sample else batch
        elif per_sample:
            units, images = -(-batch * channels // a), 1
        else:
            units, images = channels, -(-batch // a)
        tiles = row_blocks * col_blocks * images
        programs = units * -(-height // tall) * -(-width // wide)
        splits = min(max(1, PROGRAMS // programs), tiles)
        per = -(-tiles // splits)
        splits = -(-tiles // per)
        shape = (height, width, channels) if last else (channels, height, width)
        part = torch.empty((splits, groups, *shape), dtype=dtype if splits == 1 else torch.float32, device=grad.device)
        weight_grad_kernel[(programs, splits)](
            grad, x, part, batch, channels, x.shape[2], x.shape[3], *size, *padding, row_blocks, col_blocks, tiles, per,
            height, width, *stride, *dilation, last, per_sample, rows, a, b, tall, wide,
            num_warps=config["num_warps"], num_stages=1,
        )  # fmt: skip
        total = part[0] if splits == 1 else part.sum(0).to(dtype)
        return total.permute(0, 3, 1, 2).contiguous() if last else total

    key = _key(grad, (height, width), size, stride, dilation, per_sample, last)
    return tune.run(
        "direct.weight_grad", key,
        lambda: weight_grad_configs((height, width), size, channels, batch, last, per_sample), launch, grad.device,
    )  # fmt: skip


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, size: Pair, stride: Pair, padding: Pair, dilation: Pair, flip: bool
) -> Tensor:
    last = is_channels_last(x)
    batch, channels, height, width = x.shape
    y = empty(batch, channels, size, x.dtype, x.device, last)
    if y.numel() == 0:
        return y
    per_sample = weight.shape[0] == batch
    kernel = _kernel(weight)
    x, weight = dense(x, last), _taps(weight, last)
    bias = None if bias is None else bias.contiguous()

    def launch(config: tune.Config) -> Tensor:
        rows, a, b = config["BH"], config["BA"], config["BB"]
        row_blocks, col_blocks = -(-size[0] // rows), -(-size[1] // (a if last else b))
        blocks = batch * -(-channels // b) if last else -(-batch * channels // a)
        forward_kernel[(blocks * row_blocks * col_blocks,)](
            x, weight, x if bias is None else bias, y, channels, batch * channels, height, width, *size, *padding,
            row_blocks, col_blocks, *kernel, *stride, *dilation, last, per_sample, flip, bias is not None,
            rows, a, b, config["KC"], bool(config["UNROLL"]), num_warps=config["num_warps"], num_stages=1,
        )  # fmt: skip
        return y

    key = _key(x, kernel, size, stride, dilation, per_sample, last)
    return tune.run(
        "direct.forward", key,
        lambda: forward_configs(kernel, size, channels, batch, last), launch, x.device,
    )  # fmt: skip


def _strided_input_grad(
    grad: Tensor, weight: Tensor, size: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    last = is_channels_last(grad)
    batch, channels, height, width = grad.shape
    dx = empty(batch, channels, size, grad.dtype, grad.device, last)
    if dx.numel() == 0:
        return dx
    per_sample = weight.shape[0] == batch
    kernel = _kernel(weight)
    grad, weight = dense(grad, last), _taps(weight, last)
    phase_size = (size[0], -(-size[1] // stride[1]))

    def launch(config: tune.Config) -> Tensor:
        rows, a, b = config["BH"], config["BA"], config["BB"]
        row_blocks, col_blocks = -(-size[0] // rows), -(-phase_size[1] // (a if last else b))
        blocks = batch * -(-channels // b) if last else -(-batch * channels // a)
        strided_input_grad_kernel[(blocks * row_blocks * col_blocks * stride[1],)](
            grad, weight, dx, channels, batch * channels, *size, height, width, padding[1], row_blocks, col_blocks,
            *kernel, *stride, *dilation, padding[0], last, per_sample, rows, a, b,
            num_warps=config["num_warps"], num_stages=1,
        )  # fmt: skip
        return dx

    key = _key(grad, kernel, size, stride, dilation, per_sample, last)
    return tune.run(
        "direct.strided_input_grad", key,
        lambda: strided_configs(phase_size, channels, batch, last, stride[0]), launch, grad.device,
    )  # fmt: skip


def _kernel(weight: Tensor) -> Pair:
    return weight.shape[2], weight.shape[3]


def _taps(weight: Tensor, last: bool) -> Tensor:
    """Return the kernels with adjacent channels if lanes are channels."""
    return weight.permute(0, 2, 3, 1).contiguous() if last else weight.contiguous()


def _key(
    x: Tensor, kernel: Pair, size: Pair, stride: Pair, dilation: Pair, per_sample: bool, last: bool
) -> tuple[Any, ...]:
    batch, channels = x.shape[:2]
    return (
        *kernel, *stride, *dilation, tune.bucket(size[0]), tune.bucket(size[1]), power_of_two(batch * size[0]),
        power_of_two(channels), channels % 16 == 0, str(x.dtype), per_sample, last,
    )  # fmt: skip
