"""Compute every pass on CPUs as a convolution of a shape and layout for which oneDNN has a fast kernel.

oneDNN computes a depthwise forward convolution fast in NCHW as long as the kernel, dilated, is at most 13 columns
wide, and in channels_last at any width but 12 and 13. Everything else falls back to a loop over small matrix products:
NCHW wider than 13, dilations past that width, the weight gradient of every width but 1 to 3. All of these can be
rewritten as fast convolutions:

- taps that never overlap the map are cropped first;
- wide kernels run in channels_last, some channels at a time so that their weights stay in the cache;
- channels_last kernels 11 to 13 columns wide are padded with zero columns to 15, or 14;
- a dilated kernel that spans too much is a plain kernel on each of the d*d interleaved maps;
- the gradient with respect to x is the convolution with the flipped kernel;
- the gradient with respect to the kernel is, for each sample, the convolution of x with the output gradient as the
  kernel. A dilation there becomes a stride; a stride splits x into interleaved maps;
- in channels_last, the kernel gradient of up to 9 columns of many numbers is composed of gradients of three columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from widefield._checks import Pair
from widefield.ops import _limits
from widefield.ops._problem import Problem, Sizes, fold, idle_taps, is_channels_last, memory_format

WIDEST = 13
"""Columns up to which oneDNN's NCHW kernels go (jit_dw; oneDNN 3.12, ONEDNN_VERBOSE=dispatch)."""

_FEW_PIXELS = 150
"""Pixels below which zero columns for 11x11 kernels cost more than they save."""

_Run = Callable[[Tensor, Tensor, Tensor | None, Pair, Pair, Pair], Tensor]

_WIDTHS = {
    1: (1,), 2: (2,), 3: (3,), 4: (2, 2), 5: (3, 2), 6: (3, 3), 7: (2, 3, 2), 8: (3, 3, 2), 9: (3, 3, 3),
}  # fmt: skip
"""Columns of a kernel -> the widths that their gradients are taken in: three in the middle needs no copy of x."""


def why_not(problem: Problem) -> str | None:
    """Return what keeps this backend from computing the problem."""
    if problem.device.type != "cpu":
        return f"oneDNN computes on CPUs, not on {problem.device.type}"
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"oneDNN does not compute in {problem.dtype}"
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch was built without oneDNN"
    if problem.step == "input_grad":
        if problem.stride != (1, 1):
            return f"with stride {problem.stride} the input gradient is no plain convolution"
        if any(p > e - 1 for p, e in zip(problem.padding, problem.extent, strict=True)):
            return f"padding {problem.padding} is wider than the kernel"
    if problem.step == "weight_grad" and problem.stride != (1, 1) and problem.dilation != (1, 1):
        return f"taps of dilation {problem.dilation} and stride {problem.stride} interleave"
    return None


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """Return the convolution."""
    weight, padding = _trimmed(weight, x.shape[2:], stride, padding, dilation)
    extent = dilation[1] * (weight.shape[3] - 1) + 1
    if extent > WIDEST and dilation != (1, 1) and stride == (1, 1):
        return _interleaved(x, weight, bias, padding, dilation)
    each = weight.shape[0] != 1
    if each and not (is_channels_last(x) and x[0].numel() >= _limits.LIMITS.each):
        return _as_one_image(x, weight, bias, stride, padding, dilation)
    if is_channels_last(x) and dilation == stride == (1, 1):
        pixels = x.shape[2] * x.shape[3] * (1 if each else len(x))
        if is_slow_in_channels_last(weight.shape[2], extent, pixels):
            side = (WIDEST + 2 - extent) // 2
            weight, padding = F.pad(weight, (side, side)), (padding[0], padding[1] + side)
            extent = weight.shape[3]
    run = _wide if extent > WIDEST else _narrow
    if each:
        return _sample_by_sample(x, weight, bias, stride, padding, dilation, run)
    return run(x, weight, bias, stride, padding, dilation)


def _sample_by_sample(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair, run: _Run
) -> Tensor:
    """Convolve samples with their own kernels one after the other in channels_last."""
    channels, kh, kw = weight.shape[1:]
    count = len(x)
    if run is _wide:
        is_one_call = _at_once(x, channels, kh, kw) >= channels and not never_returns(x.dtype, channels, kw)
    else:
        is_one_call = (kh, kw) != (1, 1)
    if not is_one_call:
        offsets: Sequence[Tensor | None] = (None,) * count if bias is None else bias.split(1)
        samples = zip(x.split(1), weight.split(1), offsets, strict=True)
        return torch.cat([run(*sample, stride, padding, dilation) for sample in samples])
    offsets = (None,) * count if bias is None else bias.unbind()
    singles = zip(x.split(1), weight.unsqueeze(2).unbind(), offsets, strict=True)
    return torch.cat([F.conv2d(*single, stride, padding, dilation, channels) for single in singles])


def _as_one_image(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """Convolve samples with their own kernels as the channels of one image in NCHW."""
    run = _wide if dilation[1] * (weight.shape[3] - 1) + 1 > WIDEST else _narrow
    bias = None if bias is None else bias.reshape(1, -1)
    y = run(fold(x), weight.reshape(1, -1, *weight.shape[2:]), bias, stride, padding, dilation)
    return y.view(*x.shape[:2], *y.shape[2:]).contiguous(memory_format=memory_format(is_channels_last(x)))


def input_grad(
    grad: Tensor, weight: Tensor, input_size: tuple[int, ...], stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """Return the gradient with respect to x: the convolution of ``grad`` with the flipped kernel. Stride 1 only."""
    inner, least = _trimmed(weight, input_size[2:], stride, padding, dilation)
    if all(d * (k - 1) >= p for d, k, p in zip(dilation, inner.shape[2:], least, strict=True)):
        weight, padding = inner, least  # there is less to flip then
    padding = (
        dilation[0] * (weight.shape[2] - 1) - padding[0],
        dilation[1] * (weight.shape[3] - 1) - padding[1],
    )
    return forward(grad, weight.flip(-1, -2), None, stride, padding, dilation)


def weight_grad(
    grad: Tensor, x: Tensor, weight_size: tuple[int, ...], stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """Return the gradient with respect to the weights, from columns by threes or from each sample by itself.

    16-bit inputs are multiplied and added up in 32 bits.
    """
    if stride != (1, 1):
        return _strided_weight_grad(grad, x, weight_size, stride, padding)
    groups, channels, kh, kw = weight_size
    cut_h, cut_w = idle_taps(x.shape[2:], (kh, kw), stride, padding, dilation)
    kh, kw = kh - 2 * cut_h, kw - 2 * cut_w
    padding = (padding[0] - dilation[0] * cut_h, padding[1] - dilation[1] * cut_w)
    if groups == 1 and dilation == (1, 1) and is_channels_last(x) and _gains_by_threes(x, kw):
        few = _share(len(x), round(x.numel() / _limits.LIMITS.slab))
        pairs = zip(grad.split(few), x.split(few), strict=True)
        dw = functools.reduce(torch.add, (_by_threes(*pair, (kh, kw), padding) for pair in pairs))
    else:
        dw = _by_samples(grad, x, (groups, channels, kh, kw), padding, dilation)
    if cut_h or cut_w:  # by nothing, too, padding copies
        dw = F.pad(dw, (cut_w, cut_w, cut_h, cut_h))
    return dw.to(x.dtype)


def _share(count: int, parts: int, step: int = 1) -> int:
    """Return the size of each of ``parts`` about equal parts of ``count``, a multiple of ``step``."""
    return step * -(-count // (step * max(parts, 1)))


def _by_samples(grad: Tensor, x: Tensor, weight_size: tuple[int, ...], padding: Pair, dilation: Pair) -> Tensor:
    """Return the weight gradient from convolutions of each sample with its output gradient."""
    groups, channels, kh, kw = weight_size
    channels_last = grad.shape[3] > WIDEST

    def correlate(image: Tensor, kernel: Tensor) -> Tensor:
        count = _share(len(kernel), -(-len(kernel) * x.shape[2] * x.shape[3] // _limits.LIMITS.slab), 32)
        parts = [
            F.conv2d(
                image[:, i : i + count].float().contiguous(memory_format=memory_format(channels_last)),
                kernel[i : i + count].float(),
                padding=padding,
                stride=dilation,
                groups=min(count, len(kernel) - i),
            )[..., :kh, :kw]
            for i in range(0, len(kernel), count)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    if channels_last and _limits.LIMITS.at_once <= x[0].numel() <= _limits.LIMITS.slab:
        x = x.float().contiguous(memory_format=torch.channels_last)
    if is_channels_last(x) and x[0].numel() >= (_limits.LIMITS.few if groups == 1 else _limits.LIMITS.each):
        grad = grad.contiguous()  # kernels are read plane by plane
        each = (correlate(x[n : n + 1], grad[n].unsqueeze(1)) for n in range(len(x)))
        return functools.reduce(torch.add, each) if groups == 1 else torch.cat(list(each))
    dw = correlate(fold(x), grad.reshape(-1, 1, *grad.shape[2:])).reshape(len(x), channels, kh, kw)
    return dw.sum(0, keepdim=True) if groups == 1 else dw


def _gains_by_threes(x: Tensor, columns: int) -> bool:
    """Return whether three columns at a time are faster than one sample at a time: few columns of many numbers."""
    least = _limits.LIMITS.threes if len(x) >= 4 else _limits.LIMITS.threes_of_few
    return columns in _WIDTHS and x.shape[1] > 1 and x.numel() >= least


def _by_threes(grad: Tensor, x: Tensor, kernel: Pair, padding: Pair) -> Tensor:
    """Return the weight gradient (1, C, *kernel) in channels_last from those of at most three columns of the kernel,
    the width that oneDNN has a fast one for, each on x moved by as many columns.
    """
    (rows, columns), channels = kernel, x.shape[1]
    x, grad = x.float(), grad.float().contiguous(memory_format=torch.channels_last)
    if rows > x.shape[2] or padding[0] > rows // 2:  # oneDNN falls back for these
        x, padding = F.pad(x, (0, 0, padding[0], padding[0])), (0, padding[1])
    parts, first = [], 0
    for width in _WIDTHS[columns]:
        left = padding[1] - first
        right = grad.shape[3] + width - 1 - x.shape[3] - left
        whole = left == right and 0 <= left <= width // 2  # the middle ones: what is beyond x is zero anyway
        moved = x if whole else F.pad(x, (left, right))
        sides = (padding[0], left if whole else 0)
        taps = x.new_empty(channels, 1, rows, width)  # only their size is read
        parts.append(
            torch.ops.aten.convolution_backward(
                grad, moved, taps, None, (1, 1), sides, (1, 1), False, (0, 0), channels, (False, True, False)
            )[1]
        )
        first += width
    return torch.cat(parts, 3).view(1, channels, rows, columns)


def _strided_weight_grad(grad: Tensor, x: Tensor, weight_size: tuple[int, ...], stride: Pair, padding: Pair) -> Tensor:
    """Split x into the maps that taps 0, s, 2s..., then 1, s + 1, ... meet: each has gradients of a plain stride."""
    kh, kw = weight_size[2:]
    rows, columns = grad.shape[2:]
    channels_last = is_channels_last(x)
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    dw = x.new_zeros(weight_size)
    for a in range(min(stride[0], kh)):
        for b in range(min(stride[1], kw)):
            part = dw[:, :, a :: stride[0], b :: stride[1]]
            met = x[:, :, a :: stride[0], b :: stride[1]][
                :, :, : rows + part.shape[2] - 1, : columns + part.shape[3] - 1
            ]
            met = met.contiguous(memory_format=memory_format(channels_last))
            part.copy_(weight_grad(grad, met, tuple(part.shape), (1, 1), (0, 0), (1, 1)))
    return dw


def leaves_cache(channels: int, rows: int, columns: int, dtype: torch.dtype) -> bool:
    """Return whether the kernels leave no room in a core's cache for the map. In 16 bits grouping has not paid."""
    return dtype == torch.float32 and channels * rows * columns > _limits.LIMITS.cached


def is_slow_in_channels_last(rows: int, columns: int, pixels: int) -> bool:
    """Return whether zero columns pay, because oneDNN falls back to small matrix products in channels_last.

    It does not fall back for two columns more. For 11 columns four columns of zeros pay in kernels of several rows,
    unless so few pixels share the kernels that it takes longer to pad them.
    """
    return columns in (WIDEST - 1, WIDEST) or (columns == WIDEST - 2 and rows >= 7 and pixels >= _FEW_PIXELS)


def computes_in(dtype: torch.dtype) -> bool:
    """Return whether this CPU multiplies in ``dtype``. If not, oneDNN and PyTorch use slow emulations."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and torch.cpu._is_avx512_bf16_supported()
    return dtype == torch.float32


def never_returns(dtype: torch.dtype, channels: int, columns: int) -> bool:
    """Return whether oneDNN may never return from a forward convolution in channels_last.

    This happens in bfloat16 with 2 to 16 channels, from 15 columns of the kernel and 31 of the output on (oneDNN 3.12,
    on CPUs with AVX512_BF16).
    """
    return dtype == torch.bfloat16 and channels <= 16 and columns > WIDEST


def _trimmed(weight: Tensor, size: Sizes, stride: Pair, padding: Pair, dilation: Pair) -> tuple[Tensor, Pair]:
    kh, kw = weight.shape[2:]
    cut_h, cut_w = idle_taps(size, (kh, kw), stride, padding, dilation)
    padding = (padding[0] - dilation[0] * cut_h, padding[1] - dilation[1] * cut_w)
    return weight[:, :, cut_h : kh - cut_h, cut_w : kw - cut_w], padding


def _narrow(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """Return F.conv2d, except for two shapes that PyTorch does not pass to oneDNN."""
    _, channels, kh, kw = weight.shape
    bias = None if bias is None else bias.flatten()
    if kh == kw == 1 and padding == (0, 0):
        y = x[..., :: stride[0], :: stride[1]] * weight.view(1, -1, 1, 1)
        return y if bias is None else y + bias[:, None, None]
    if kh == kw == 3 and stride == dilation == (1, 1) and _loops(x):
        weight, padding = F.pad(weight, (1, 1, 1, 1)), (padding[0] + 1, padding[1] + 1)
    return F.conv2d(x, weight.transpose(0, 1), bias, stride, padding, dilation, channels)


def _loops(x: Tensor) -> bool:
    """Return whether PyTorch would loop over the groups of a 3x3 convolution.

    It does with one thread and one image of at most 20,480 numbers (ConvParams::use_mkldnn). Wider kernels always go to
    oneDNN.
    """
    return x.shape[0] == 1 and torch.get_num_threads() == 1 and x.numel() <= 20480


def _at_once(x: Tensor, channels: int, kh: int, kw: int) -> int:
    """Return how many channels with wide kernels to compute at a time."""
    count = channels
    if x.shape[2] * x.shape[3] >= _limits.LIMITS.pixels:
        if leaves_cache(channels, kh, kw, x.dtype):
            count = max(32, 32 * (_limits.LIMITS.cached // (4 * 32 * kh * kw)))
        if not is_channels_last(x):
            count = min(count, max(32, 32 * (4 * _limits.LIMITS.cached // (32 * x[:, 0].numel()))))
    return count


def _wide(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """Run in channels_last, some channels at a time where all of them together would leave the cache."""
    channels, kh, kw = weight.shape[1:]
    bias = None if bias is None else bias.flatten()
    kernel = weight.transpose(0, 1)
    channels_last = is_channels_last(x)
    count = _at_once(x, channels, kh, kw)

    def part(i: int) -> Tensor:
        some, taps, more = x[:, i : i + count], kernel[i : i + count], None if bias is None else bias[i : i + count]
        if never_returns(some.dtype, len(taps), kw):
            some, taps, more = some.float(), taps.float(), None if more is None else more.float()
        layout = memory_format(len(taps) > 1)  # one channel in channels_last strides is read out of bounds (2.14)
        y = F.conv2d(some.contiguous(memory_format=layout), taps, more, stride, padding, dilation, len(taps))
        return y.to(x.dtype)

    if count >= channels:
        return part(0).contiguous(memory_format=memory_format(channels_last))
    if channels_last:
        return torch.cat([part(i) for i in range(0, channels, count)], 1)
    first = part(0)
    y = first.new_empty(len(x), channels, *first.shape[2:])
    y[:, :count] = first
    for i in range(count, channels, count):  # copied while it is still in the cache
        y[:, i : i + count] = part(i)
    return y


def _interleaved(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Pair, dilation: Pair) -> Tensor:
    """Split each map into dilation x dilation interleaved ones, on which the kernel is a plain one. Stride 1.

    A padding that is no multiple of the dilation is rounded up, and the rows that this adds are cut off.
    """
    batch, channels, height, width = x.shape
    channels_last = is_channels_last(x)
    (dh, dw), (kh, kw) = dilation, weight.shape[2:]
    rows, columns = height + 2 * padding[0] - dh * (kh - 1), width + 2 * padding[1] - dw * (kw - 1)
    inner = (-(-padding[0] // dh), -(-padding[1] // dw))
    top, left = inner[0] * dh - padding[0], inner[1] * dw - padding[1]
    if weight.shape[0] != 1:
        x, weight = fold(x), weight.reshape(1, -1, kh, kw)
        bias = None if bias is None else bias.reshape(1, -1)
    images, maps = x.shape[:2]
    x = F.pad(x, (0, -width % dw, 0, -height % dh))
    h, w = x.shape[2] // dh, x.shape[3] // dw
    x = x.reshape(images, maps, h, dh, w, dw).permute(3, 5, 0, 1, 2, 4).reshape(dh * dw * images, maps, h, w)
    y = forward(x, weight, bias, (1, 1), inner, (1, 1))
    y = y.view(dh, dw, images, maps, *y.shape[2:]).permute(2, 3, 4, 0, 5, 1)
    y = y.reshape(batch, channels, y.shape[2] * dh, y.shape[4] * dw)[..., top : top + rows, left : left + columns]
    return y.contiguous(memory_format=memory_format(channels_last))
