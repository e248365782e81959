"""Compute mixtures of depthwise experts by mixing inside the convolution (MoRF, Lian, Yu, Wang 2024, eq. 6 and 7).

The mixture is linear in x, so each sample has one kernel, which is never stored (stride 1, "same" padding)::

    y[n, c] = (sum_r a[n, r] bank[r, c]) * x[n, c] + sum_r a[n, r] bias[r, c]

The forward kernel is that of :mod:`.kernels.fma`, except that it reads n experts for each tap. The n multiply-adds are
shared by BH rows of every column of a thread. Taps outside an expert's span are neither loaded nor multiplied.

Backward has three steps. dx is the forward with every expert rotated by 180 degrees. dW[n, c], the gradient of one
sample's kernel, is the weight gradient of :mod:`.direct` or :mod:`.gemm`, in float32; it is small compared with the
maps. One pass over it then computes both ::

    d_bank[r, c] = sum_n a[n, r] dW[n, c],    d_weights[n, r] = sum_c <dW[n, c], bank[r, c]>

Sums are in a fixed order, without atomics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from widefield._checks import Pair
from widefield.ops._problem import is_channels_last
from widefield.ops._triton import direct, gemm, tune
from widefield.ops._triton.blocks import mixture_configs
from widefield.ops._triton.host import dense, device_reason, empty, power_of_two
from widefield.ops._triton.kernels.mix import bank_grad_kernel, mixture_kernel

# From this size on dW uses tensor cores and bands, below it one register per tap.
GEMM_FROM = 15

# Taps per program of the last step.
TAPS = 128


def why_not(x: Tensor, bank: Tensor, bias_bank: Tensor | None, weights: Tensor) -> str | None:
    """Return why the kernels cannot compute :func:`forward` for these, or None if they can."""
    for tensor in (x, bank, weights, *([] if bias_bank is None else [bias_bank])):
        if reason := device_reason(tensor.device, tensor.dtype):
            return reason
    return None


def forward(x: Tensor, bank: Tensor, spans: Sequence[int], bias_bank: Tensor | None, weights: Tensor) -> Tensor:
    """Mix and convolve: (N, C, H, W) in x's dtype and memory format.

    Args:
        x: (N, C, H, W).
        bank: (n, C, K, K), K odd, experts centered; like the two below of any float dtype except float64.
        spans: n odd sizes of at most K. Taps of expert r outside its central (span, span) are treated as zero.
        bias_bank: (n, C) or None.
        weights: (N, n).
    """
    return _mix(x, bank, spans, bias_bank, weights, flip=False)


def backward(
    grad: Tensor,
    x: Tensor,
    bank: Tensor,
    spans: Sequence[int],
    bias_bank: Tensor | None,
    weights: Tensor,
    *,
    need_x: bool = True,
    need_parameters: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients (dx, d_bank, d_bias, d_weights) of :func:`forward`, each in the dtype of its tensor.

    dx is None without ``need_x``, the others without ``need_parameters``, and d_bias without biases.
    """
    dx = _mix(grad, bank, spans, None, weights, flip=True) if need_x else None
    if not need_parameters:
        return dx, None, None, None
    d_bank, d_weights = _parameter_grads(grad, x, bank, spans, weights)
    d_bias = None
    if bias_bank is not None:
        total = grad.sum((2, 3), dtype=torch.float32)
        d_bias = (weights.float().t() @ total).to(bias_bank.dtype)
        d_weights = d_weights + total @ bias_bank.float().t()
    return dx, d_bank, d_bias, d_weights.to(weights.dtype)


def _mix(
    x: Tensor, bank: Tensor, spans: Sequence[int], bias_bank: Tensor | None, weights: Tensor, *, flip: bool
) -> Tensor:
    last = is_channels_last(x)
    batch, channels, height, width = x.shape
    experts, side = bank.shape[0], bank.shape[-1]
    y = empty(batch, channels, (height, width), x.dtype, x.device, last)
    if y.numel() == 0:
        return y
    x, weights = dense(x, last), weights.contiguous()
    bank = bank.permute(0, 2, 3, 1).contiguous() if last else bank.contiguous()
    bias = None if bias_bank is None else bias_bank.contiguous()

    def launch(config: tune.Config) -> Tensor:
        rows, a, b = config["BH"], config["BA"], config["BB"]
        row_blocks, col_blocks = -(-height // rows), -(-width // (a if last else b))
        blocks = batch * -(-channels // b) if last else -(-batch * channels // a)
        mixture_kernel[(blocks * row_blocks * col_blocks,)](
            x, bank, bank if bias is None else bias, weights, y, channels, channels * side * side, batch * channels,
            height, width, row_blocks, col_blocks, side, experts, tuple(spans), last, flip, bias is not None,
            rows, a, b, config["KC"], num_warps=config["num_warps"], num_stages=1,
        )  # fmt: skip
        return y

    size: Pair = (height, width)
    key = (
        side, *spans, tune.bucket(height), tune.bucket(width), power_of_two(batch * height), power_of_two(channels),
        channels % 16 == 0, str(x.dtype), str(bank.dtype), last,
    )  # fmt: skip
    return tune.run("routed", key, lambda: mixture_configs(side, size, channels, batch, last), launch, x.device)


def _parameter_grads(
    grad: Tensor, x: Tensor, bank: Tensor, spans: Sequence[int], weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Return d_bank, and d_weights in float32 without the contribution of the biases."""
    experts, channels, side, _ = bank.shape
    batch = x.shape[0]
    if grad.numel() == 0:
        return torch.zeros_like(bank), weights.new_zeros(weights.shape, dtype=torch.float32)
    backend = gemm if side >= GEMM_FROM and device_reason(x.device, x.dtype) is None else direct
    one, padding = (1, 1), (side // 2, side // 2)
    dw = backend.weight_grad(grad, x, (batch, channels, side, side), one, padding, one, torch.float32)
    bank, weights = bank.contiguous(), weights.contiguous()
    d_bank = torch.empty_like(bank)
    taps = min(TAPS, power_of_two(side * side))
    tap_blocks = -(-side * side // taps)
    part = torch.empty((channels * tap_blocks, batch, experts), dtype=torch.float32, device=x.device)
    with tune.on(x.device):
        bank_grad_kernel[(channels * tap_blocks,)](
            dw, bank, weights, d_bank, part, batch, channels * side * side, tap_blocks,
            side, experts, tuple(spans), min(16, power_of_two(batch)), taps, num_warps=4, num_stages=1,
        )  # fmt: skip
    return d_bank, part.sum(0)
