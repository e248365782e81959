"""Depthwise convolution of any kernel size, with forward and both gradients each on the fastest way there is.

``y[n, c, i, j] = b[c] + sum_kl w[c, k, l] x[n, c, s i + d k - p, s j + d l - p]``, what F.conv2d computes with
``groups == channels``. PyTorch's own is fast for few widths and layouts and slow beyond (issues 18631 and 74363 of
its repository); :func:`explain` says which backend each pass of a call would take.

The three passes are operators of their own (``torch.ops.widefield.depthwise*``) with fake twins, so that torch.compile
and torch.export keep them as nodes, and each is differentiable in terms of the others, any number of times.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from widefield import _checks
from widefield.ops import _backend
from widefield.ops._autocast import autocast_dtype
from widefield.ops._operators import depthwise
from widefield.ops._problem import STEPS, Pair, Problem, is_channels_last, output_size


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = "same",
    dilation: int | Sequence[int] = 1,
    backend: str = "auto",
) -> Tensor:
    """Convolve every channel with a kernel of its own: F.conv2d with ``groups == channels``, and its contract.

    Args:
        x: (N, C, H, W), any memory format; under autocast in autocast's dtype.
        weight: (C, 1, KH, KW), any size, rectangular and even ones too, also larger than the map.
        bias: (C,) or None.
        stride: one number or (rows, columns).
        padding: one number, (rows, columns), "valid", or "same" (stride 1 only): as many rows and columns out as in.
            An even kernel pads one more at the bottom and on the right, as F.conv2d does.
        dilation: one number or (rows, columns).
        backend: "auto" picks by shape, layout, dtype and device, for each pass by itself. "aten" is PyTorch's own.
            "onednn", "fft" (CPU) and "direct", "gemm" (Triton) insist on one way for all passes.

    Returns:
        (N, C, H_out, W_out) as F.conv2d's, in the memory format of x and in its dtype.

    Raises:
        ValueError: shapes that do not fit together, "same" with a stride, an unknown backend, or one that cannot
            compute this call.
        TypeError: x, weight and bias of different dtypes, outside autocast.
    """
    key = _key(x, weight, bias, stride, padding, dilation, backend)
    if key in _stock_calls:
        steps, pads, spread = _stock_calls[key]
        return F.conv2d(x, weight, bias, steps, pads, spread, weight.shape[0])
    given = x, weight
    backend = _backend.names(backend)
    x, weight, bias = _checked(x, weight, bias)
    x, steps, pads, spread = _placed(x, weight, stride, padding, dilation)
    if backend == "aten" or torch.compiler.is_exporting():
        # What is exported runs where widefield is not installed: it keeps the operator that every runtime knows.
        return F.conv2d(x, weight, bias, steps, pads, spread, x.shape[1])
    if not _is_traced(x):
        stock = _is_stock(_facts(x, weight), steps, pads, spread, backend, _steps(x, weight))
        if stock and not x.is_meta:  # there F.conv2d forgets the layout
            if key is not None and given[0] is x and given[1] is weight and len(_stock_calls) < 4096:
                _stock_calls[key] = steps, pads, spread
            return F.conv2d(x, weight, bias, steps, pads, spread, x.shape[1])
    bias = None if bias is None else bias[None]
    return depthwise(x, weight.transpose(0, 1), bias, steps, pads, spread, backend)


_stock_calls: dict[Any, tuple[Pair, Pair, Pair]] = {}
"""Calls that came out as PyTorch's own, with their geometry: reading it anew takes as long as small convolutions."""


def _key(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, backend: str) -> Any:
    """Return what tells apart calls that take different ways or are to be refused, or None where that is not plain:
    under transforms and autocast, and for arguments that are only equal to numbers that were checked, such as 1.0.
    """
    if torch.compiler.is_compiling() or x.is_meta or torch.is_autocast_enabled(x.device.type):
        return None
    size, kernel = x.shape, weight.shape
    if type(stride) is int and type(dilation) is int and type(padding) in (int, str):
        plain = True
    else:
        plain = all(
            type(value) in (int, str) or (type(value) is tuple and all(type(n) is int for n in value))
            for value in (stride, padding, dilation)
        )
    if not plain or len(size) != 4 or len(kernel) != 4 or type(size[0]) is not int:  # the last: a symbol
        return None
    return (
        size, kernel, x.stride(1) == 1, weight.stride(1) == 1, x.dtype, weight.dtype, x.device,
        x.requires_grad, weight.requires_grad, torch.is_grad_enabled(), stride, padding, dilation, backend,
        None if bias is None else (bias.shape, bias.dtype),
    )  # fmt: skip


def _steps(x: Tensor, weight: Tensor) -> tuple[str, ...]:
    """Return the passes that there will be."""
    if not torch.is_grad_enabled():
        return STEPS[:1]
    return STEPS[:1] + STEPS[1:2] * x.requires_grad + STEPS[2:] * weight.requires_grad


def _is_traced(x: Tensor) -> bool:
    """Say whether sizes may be symbols, which choose nothing and are no keys of a cache."""
    return torch.compiler.is_compiling() or any(isinstance(size, torch.SymInt) for size in x.shape)


def plan(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = "same",
    dilation: int | Sequence[int] = 1,
    backend: str = "auto",
) -> list[Problem]:
    """Return the passes that a training step of this call makes; raises what :func:`depthwise_conv2d` would."""
    x, weight, _ = _checked(x, weight, bias)
    x, steps, pads, spread = _placed(x, weight, stride, padding, dilation)
    return _problems(_facts(x, weight), steps, pads, spread, _backend.names(backend), STEPS)


Facts = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device, bool]


def _facts(x: Tensor, weight: Tensor) -> Facts:
    """Return all that a choice looks at, in values that a cache can tell apart. Meta tensors stand for a CPU's."""
    weight_size = (1, weight.shape[0], weight.shape[2], weight.shape[3])
    device = torch.device("cpu") if x.is_meta else x.device
    return tuple(x.shape), weight_size, x.dtype, device, is_channels_last(x)


def _problems(
    facts: Facts, stride: Pair, padding: Pair, dilation: Pair, backend: str, steps: Sequence[str]
) -> list[Problem]:
    size, weight_size, dtype, device, channels_last = facts
    batch, channels, height, width = size
    kernel, per_sample = (weight_size[2], weight_size[3]), False
    problems = [
        Problem(
            step, batch, channels, height, width, kernel, stride, padding, dilation, per_sample, dtype, device,
            channels_last,
        )
        for step in steps
    ]  # fmt: skip
    for problem in problems:
        _backend.check(backend, problem)
    return problems


@functools.lru_cache(4096)  # which costs as much time as the smallest convolutions
def _is_stock(facts: Facts, stride: Pair, padding: Pair, dilation: Pair, backend: str, steps: Sequence[str]) -> bool:
    """Say whether PyTorch's own kernels are what a call would take; raises where its backend cannot compute it."""
    problems = _problems(facts, stride, padding, dilation, backend, steps if backend == "auto" else STEPS)
    return backend == "auto" and _backend.is_stock(problems)


def _checked(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the tensors in the dtype to compute in; raises where they do not fit together."""
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(autocast_dtype(weight) or weight.dtype)
        bias = None if bias is None else bias.to(autocast_dtype(bias) or bias.dtype)
    if x.ndim != 4:
        raise ValueError(f"x must be (N, C, H, W); got shape {tuple(x.shape)}.")
    if weight.ndim != 4 or weight.shape[1] != 1 or weight.shape[0] != x.shape[1]:
        raise ValueError(
            f"weight must be (C, 1, KH, KW) = ({x.shape[1]}, 1, KH, KW), one kernel for each channel of x; "
            f"got shape {tuple(weight.shape)}."
        )
    if 0 in weight.shape[2:]:
        raise ValueError(f"weight holds kernels without taps; got shape {tuple(weight.shape)}.")
    if bias is not None and tuple(bias.shape) != (x.shape[1],):
        raise ValueError(f"bias must be (C,) = ({x.shape[1]},) or None; got shape {tuple(bias.shape)}.")
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and other.dtype != x.dtype:
            raise TypeError(f"x is {x.dtype} and {name} is {other.dtype}: convert one to the other, or use autocast.")
    # F.conv2d takes the strides of single channels for a layout: it would return that of the weight, and reads out of
    # bounds where x has one channel (2.14, CPU).
    if weight.stride(1) == 1 and not is_channels_last(x):
        weight = weight.flatten(1).view(weight.shape)
    if x.shape[1] == 1:
        x = x.contiguous().flatten(1).view(x.shape)
    return x, weight, bias


def _placed(
    x: Tensor, weight: Tensor, stride: object, padding: object, dilation: object
) -> tuple[Tensor, Pair, Pair, Pair]:
    """Return x, padded beforehand where the sides differ, and stride, padding and dilation as pairs."""
    steps, spread = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    if not isinstance(padding, str):
        padding = _pair("padding", padding, 0)
    elif padding == "same" and steps != (1, 1):
        halves = tuple(d * (k // 2) for d, k in zip(spread, weight.shape[2:], strict=True))
        raise ValueError(
            f"padding='same' is defined for stride 1; got stride={stride!r}. Give numbers, such as padding={halves}."
        )
    geometry = _geometry.__wrapped__ if _is_traced(x) else _geometry
    pads, more = geometry(tuple(x.shape[2:]), tuple(weight.shape[2:]), steps, padding, spread)
    if more != (0, 0):
        x = F.pad(x, (0, more[1], 0, more[0]))
    return x, steps, pads, spread


@functools.lru_cache(4096)
def _geometry(size: Pair, kernel: Pair, steps: Pair, padding: Pair | str, spread: Pair) -> tuple[Pair, Pair]:
    """Return the padding of all sides, and how many rows and columns to add at the bottom and on the right."""
    more: Pair = (0, 0)
    if padding == "valid":
        pads: Pair = (0, 0)
    elif padding == "same":
        total = (spread[0] * (kernel[0] - 1), spread[1] * (kernel[1] - 1))
        pads, more = (total[0] // 2, total[1] // 2), (total[0] % 2, total[1] % 2)
    elif isinstance(padding, str):
        raise ValueError(f"padding must be numbers, 'same' or 'valid'; got {padding!r}.")
    else:
        pads = padding
    rows, columns = output_size((size[0] + more[0], size[1] + more[1]), kernel, steps, pads, spread)
    if rows < 1 or columns < 1:
        raise ValueError(
            f"a {kernel[0]}x{kernel[1]} kernel with dilation {spread} does not fit on a map of "
            f"{size[0]}x{size[1]} pixels with padding {pads}. padding='same' fits any kernel."
        )
    return pads, more


def _pair(name: str, value: object, minimum: int) -> Pair:
    if type(value) is int and value >= minimum:
        return value, value
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) == 1:
            return _pair(name, value[0], minimum)
        if len(value) != 2:
            raise ValueError(f"{name} must be one integer or two (rows, columns); got {tuple(value)!r}.")
        return _checks.integer(name, value[0], minimum=minimum), _checks.integer(name, value[1], minimum=minimum)
    number = _checks.integer(name, value, minimum=minimum)
    return number, number
