"""Compute convolutions as products of spectra, which needs the fewest operations for large kernels on large maps.

Stride 1 and dilation 1; any padding. Maps are padded with zeros to a length for which transforms are fast. A few maps
are transformed at a time, so that their spectra stay in the caches; moving them to memory would cost what they save.
An infinity or NaN spreads over its whole map.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import log2

import torch
from torch import Tensor

from widefield._checks import Pair
from widefield.ops import _limits
from widefield.ops._problem import Problem, is_channels_last, memory_format

_LENGTHS = (16, 20, 24, 32, 36, 40, 44, 48, 64, 80, 96, 112, 128)
"""Lengths for which transforms are fast. Lengths in between cost more than the next of these (MKL, on Zen 4 and Cascade
Lake: 64x64 takes less time than 50x50)."""


def why_not(problem: Problem) -> str | None:
    """Return what keeps this backend from computing the problem."""
    if problem.stride != (1, 1) or problem.dilation != (1, 1):
        return f"spectra do not support stride or dilation; got stride {problem.stride} and dilation {problem.dilation}"
    if not problem.dtype.is_floating_point:
        return f"spectra are of real floating-point numbers; got {problem.dtype}"
    return None


def work(problem: Problem) -> float:
    """Return the cost of one map, in multiply-adds of the transforms."""
    rows, columns = _lengths((problem.height, problem.width), problem.kernel, problem.padding)
    return rows * columns * log2(rows * columns)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """Return the convolution with the flipped kernel, as F.conv2d is a correlation."""
    height, width = x.shape[2:]
    kh, kw = weight.shape[2:]
    output = (height + 2 * padding[0] - kh + 1, width + 2 * padding[1] - kw + 1)
    start = (kh - 1 - padding[0], kw - 1 - padding[1])
    y = _convolve(x, weight.flip(-1, -2), _lengths((height, width), (kh, kw), padding), start, output)
    if bias is not None:
        y += bias[:, :, None, None]
    return y


def input_grad(
    grad: Tensor, weight: Tensor, input_size: tuple[int, ...], stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """Return the gradient with respect to x: the convolution of ``grad`` with the kernel."""
    size = (input_size[2], input_size[3])
    lengths = _lengths(size, (weight.shape[2], weight.shape[3]), padding)
    return _convolve(grad, weight, lengths, padding, size)


def weight_grad(
    grad: Tensor, x: Tensor, weight_size: tuple[int, ...], stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """Return the gradient with respect to the kernels: the correlation of x with ``grad``, at the kernel's lags."""
    groups, _, kh, kw = weight_size
    lengths = _lengths((x.shape[2], x.shape[3]), (kh, kw), padding)
    dw = x.new_empty(weight_size)
    for part in _parts(x.shape[1], lengths):
        total = None
        for n in range(len(x)):
            product = _spectrum(grad[n, part], lengths).conj_physical_().mul_(_spectrum(x[n, part], lengths))
            if groups == 1:
                total = product if total is None else total.add_(product)
            if groups != 1 or n == len(x) - 1:
                lags = _inverse(product if total is None else total, lengths)
                dw[n if groups != 1 else 0, part] = _window(lags, (-padding[0], -padding[1]), (kh, kw))
    return dw


def _convolve(x: Tensor, weight: Tensor, lengths: Pair, start: Pair, output: Pair) -> Tensor:
    """Return ``output`` rows and columns of the circular convolution from ``start`` on, in the layout of x."""
    y = torch.empty(
        (*x.shape[:2], *output), dtype=x.dtype, device=x.device, memory_format=memory_format(is_channels_last(x))
    )
    for part in _parts(x.shape[1], lengths):
        kernel = None
        for n in range(len(x)):
            if kernel is None or weight.shape[0] != 1:
                kernel = _spectrum(weight[n if weight.shape[0] != 1 else 0, part], lengths)
            product = _spectrum(x[n, part], lengths).mul_(kernel)
            y[n, part] = _window(_inverse(product, lengths), start, output)
    return y


def _window(maps: Tensor, start: Pair, size: Pair) -> Tensor:
    """Return ``size`` rows and columns from ``start`` on, which may be negative: maps are circular."""
    if min(start) >= 0:
        return maps[:, start[0] : start[0] + size[0], start[1] : start[1] + size[1]]
    rows = torch.arange(start[0], start[0] + size[0], device=maps.device) % maps.shape[1]
    columns = torch.arange(start[1], start[1] + size[1], device=maps.device) % maps.shape[2]
    return maps[:, rows[:, None], columns]


def _lengths(size: Pair, kernel: Pair, padding: Pair) -> Pair:
    """Return lengths at which the part that wraps around comes before the first output that is read."""
    rows, columns = (_good(max(s + p, k, s + 2 * p - k + 1)) for s, k, p in zip(size, kernel, padding, strict=True))
    return rows, columns


def _good(least: int) -> int:
    """Return a length, at least ``least``, for which transforms are fast."""
    for length in _LENGTHS:
        if length >= least:
            return length
    power = 1 << (least - 1).bit_length()  # beyond the list: 5/8, 3/4 or the whole of a power of two
    return next(length for length in (5 * power // 8, 3 * power // 4, power) if length >= least)


def _parts(channels: int, lengths: Pair) -> Iterator[slice]:
    count = max(1, torch.get_num_threads() * _limits.LIMITS.transformed // (lengths[0] * lengths[1]))
    count = -(-channels // -(-channels // count))  # parts of equal size
    return (slice(i, i + count) for i in range(0, channels, count))


def _spectrum(maps: Tensor, lengths: Pair) -> Tensor:
    """Return the half spectrum of real maps (C, H, W). 16-bit maps are transformed in float32."""
    maps = maps.float() if maps.dtype in (torch.bfloat16, torch.float16) else maps
    spectrum: Tensor = torch.fft.rfft2(maps, s=lengths)
    return spectrum


def _inverse(spectrum: Tensor, lengths: Pair) -> Tensor:
    maps: Tensor = torch.fft.irfft2(spectrum, s=lengths)
    return maps
