"""The convolution theorem: multiply spectra. For large kernels on large maps, where it needs the fewest operations.

Stride 1 and dilation 1; any padding. Maps are padded with zeros to a length that the transforms are fast for, and
taken a few at a time, so that their spectra never leave the cache: written to memory they would cost what they save.
An infinity or NaN spreads over its whole map.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from math import log2

import torch
from torch import Tensor

from widefield.ops._problem import Pair, Problem, is_channels_last, memory_format

_LENGTHS = (16, 20, 24, 32, 36, 40, 44, 48, 64, 80, 96, 112, 128)
"""Lengths that transforms are fast for; the ones between cost more than the next of these (MKL, on Zen 4 and Cascade
Lake: 64x64 takes less time than 50x50)."""

_CACHED = 2**16
"""Numbers of padded maps that a thread transforms at once: with spectrum and product about 1 MiB, a core's cache."""


def why_not(problem: Problem) -> str | None:
    """Say what keeps this backend from computing the problem."""
    if problem.stride != (1, 1) or problem.dilation != (1, 1):
        return f"spectra know no stride or dilation; got stride {problem.stride} and dilation {problem.dilation}"
    if not problem.dtype.is_floating_point:
        return f"spectra are of real floating-point numbers; got {problem.dtype}"
    return None


def work(problem: Problem) -> float:
    """Return how much one map costs, in units of one multiply-add of the transform of a number."""
    rows, columns = _lengths((problem.height, problem.width), problem.kernel, problem.padding)
    return rows * columns * log2(rows * columns)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """Return the convolution: the spectrum of x times the conjugate of the kernel's (F.conv2d is a correlation)."""
    height, width = x.shape[2:]
    kh, kw = weight.shape[2:]
    rows, columns = height + 2 * padding[0] - kh + 1, width + 2 * padding[1] - kw + 1
    y = _apply(x, weight, (height, width), (rows, columns), padding, conjugate=True)
    if bias is not None:
        y += bias[:, :, None, None]
    return y


def input_grad(
    grad: Tensor, weight: Tensor, input_size: tuple[int, ...], stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """Return the gradient with respect to x: the product of the spectra of ``grad`` and the kernel."""
    size = (input_size[2], input_size[3])
    return _apply(grad, weight, size, size, padding, conjugate=False)


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
                lags = _inverse(product if total is None else total, lengths).roll(padding, (-2, -1))
                dw[n if groups != 1 else 0, part] = lags[..., :kh, :kw]
    return dw


def _apply(x: Tensor, weight: Tensor, size: Pair, output: Pair, padding: Pair, *, conjugate: bool) -> Tensor:
    """Multiply the spectra of x and of the kernels, or of their conjugates; ``size`` is that of the convolution's x."""
    lengths = _lengths(size, (weight.shape[2], weight.shape[3]), padding)
    y = torch.empty(
        (*x.shape[:2], *output), dtype=x.dtype, device=x.device, memory_format=memory_format(is_channels_last(x))
    )
    for part in _parts(x.shape[1], lengths):
        kernel = None
        for n in range(len(x)):
            if kernel is None or weight.shape[0] != 1:
                mine = weight[n if weight.shape[0] != 1 else 0, part]
                kernel = _kernel_spectrum(mine, lengths, padding, conjugate)
            product = _spectrum(x[n, part], lengths).mul_(kernel)
            y[n, part] = _inverse(product, lengths)[..., : output[0], : output[1]]
    return y


def _lengths(size: Pair, kernel: Pair, padding: Pair) -> Pair:
    """Return lengths at which nothing wraps around onto something else."""
    rows, columns = (_good(max(s + p, k, s + 2 * p - k + 1)) for s, k, p in zip(size, kernel, padding, strict=True))
    return rows, columns


def _good(least: int) -> int:
    """Return a length from ``least`` on that transforms are fast for."""
    for length in _LENGTHS:
        if length >= least:
            return length
    power = 1 << (least - 1).bit_length()  # beyond the list: 5/8, 3/4 or the whole of a power of two
    return next(length for length in (5 * power // 8, 3 * power // 4, power) if length >= least)


def _parts(channels: int, lengths: Pair) -> Iterator[slice]:
    count = max(1, torch.get_num_threads() * _CACHED // (lengths[0] * lengths[1]))
    return (slice(i, i + count) for i in range(0, channels, count))


def _spectrum(maps: Tensor, lengths: Pair) -> Tensor:
    """Return the half spectrum of real maps (C, H, W). There are no spectra of 16-bit numbers."""
    maps = maps.float() if maps.dtype in (torch.bfloat16, torch.float16) else maps
    spectrum: Tensor = torch.fft.rfft2(maps, s=lengths)
    return spectrum


def _kernel_spectrum(kernels: Tensor, lengths: Pair, padding: Pair, conjugate: bool) -> Tensor:
    """Return the spectrum of kernels (C, KH, KW), or its conjugate, with the tap that meets its own pixel at the
    origin. Turning phases moves it there, without a map of zeros to move it in.
    """
    spectrum = _spectrum(kernels, lengths)
    if conjugate:
        spectrum = spectrum.conj_physical_()
    return spectrum.mul_(_phases(lengths, padding, conjugate, spectrum.dtype, spectrum.device))


@functools.lru_cache(64)
def _phases(lengths: Pair, padding: Pair, conjugate: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    rows = torch.arange(lengths[0], dtype=torch.float64, device=device) * padding[0] / lengths[0]
    columns = torch.arange(lengths[1] // 2 + 1, dtype=torch.float64, device=device) * padding[1] / lengths[1]
    turns = rows[:, None] + columns[None, :]
    angles = (-2 if conjugate else 2) * torch.pi * (turns - turns.floor())
    return torch.polar(torch.ones_like(angles), angles).to(dtype)


def _inverse(spectrum: Tensor, lengths: Pair) -> Tensor:
    maps: Tensor = torch.fft.irfft2(spectrum, s=lengths)
    return maps
