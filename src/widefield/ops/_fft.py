"""The convolution theorem: multiply spectra. For large kernels on large maps, where it needs the fewest operations.

Stride 1 and dilation 1; any padding. Maps are padded with zeros to a length that has small factors only: lengths such
as 17 or 47 cost up to four times of 20 or 48. Some channels at a time, so that spectra stay in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from widefield.ops._problem import Pair, Problem, is_channels_last, memory_format

_CHANNELS = 16


def why_not(problem: Problem) -> str | None:
    """Say what keeps this backend from computing the problem."""
    if problem.stride != (1, 1) or problem.dilation != (1, 1):
        return f"spectra know no stride or dilation; got stride {problem.stride} and dilation {problem.dilation}"
    return None


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """Return the convolution: the spectrum of x times the conjugate of the kernel's (F.conv2d is a correlation)."""
    height, width = x.shape[2:]
    kh, kw = weight.shape[2:]
    rows, columns = height + 2 * padding[0] - kh + 1, width + 2 * padding[1] - kw + 1
    lengths = _lengths((height, width), (kh, kw), padding)
    y = _empty(x, (*x.shape[:2], rows, columns))
    for part in _parts(x.shape[1]):
        product = _spectrum(x[:, part], lengths) * _kernel_spectrum(weight[:, part], lengths, padding).conj()
        y[:, part] = _inverse(product, lengths)[..., :rows, :columns]
    if bias is not None:
        y += bias[:, :, None, None]
    return y


def input_grad(
    grad: Tensor, weight: Tensor, input_size: tuple[int, ...], stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """Return the gradient with respect to x: the product of the spectra of ``grad`` and the kernel."""
    height, width = input_size[2:]
    lengths = _lengths((height, width), (weight.shape[2], weight.shape[3]), padding)
    dx = _empty(grad, input_size)
    for part in _parts(grad.shape[1]):
        product = _spectrum(grad[:, part], lengths) * _kernel_spectrum(weight[:, part], lengths, padding)
        dx[:, part] = _inverse(product, lengths)[..., :height, :width]
    return dx


def weight_grad(
    grad: Tensor, x: Tensor, weight_size: tuple[int, ...], stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """Return the gradient with respect to the kernels: the correlation of x with ``grad``, at the kernel's lags."""
    groups, _, kh, kw = weight_size
    lengths = _lengths((x.shape[2], x.shape[3]), (kh, kw), padding)
    dw = x.new_empty(weight_size)
    for part in _parts(x.shape[1]):
        product = _spectrum(x[:, part], lengths) * _spectrum(grad[:, part], lengths).conj()
        if groups == 1:
            product = product.sum(0, keepdim=True)
        dw[:, part] = _inverse(product, lengths).roll(padding, (-2, -1))[..., :kh, :kw]
    return dw


def _lengths(size: Pair, kernel: Pair, padding: Pair) -> Pair:
    """Return lengths at which nothing wraps around onto something else."""
    height, width = (_smooth(max(s + p, k, s + 2 * p - k + 1)) for s, k, p in zip(size, kernel, padding, strict=True))
    return height, width


def _smooth(least: int) -> int:
    """Return the smallest number from ``least`` on with no prime factor but 2, 3 and 5, and a factor of 4."""
    n = -(-least // 4) * 4
    while True:
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 4


def _parts(channels: int) -> list[slice]:
    return [slice(i, i + _CHANNELS) for i in range(0, channels, _CHANNELS)]


def _spectrum(x: Tensor, lengths: Pair) -> Tensor:
    spectrum: Tensor = torch.fft.rfft2(_wide(x), s=lengths)
    return spectrum


def _kernel_spectrum(weight: Tensor, lengths: Pair, padding: Pair) -> Tensor:
    """Return the spectrum of the kernel with the tap that meets its own pixel at the origin."""
    at_origin = weight.new_zeros(*weight.shape[:2], *lengths, dtype=_wide(weight).dtype)
    at_origin[..., : weight.shape[2], : weight.shape[3]] = weight
    return _spectrum(at_origin.roll((-padding[0], -padding[1]), (-2, -1)), lengths)


def _inverse(spectrum: Tensor, lengths: Pair) -> Tensor:
    x: Tensor = torch.fft.irfft2(spectrum, s=lengths)
    return x


def _wide(x: Tensor) -> Tensor:
    """There are no spectra of 16-bit numbers."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _empty(like: Tensor, size: tuple[int, ...]) -> Tensor:
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=memory_format(is_channels_last(like)))
