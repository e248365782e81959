"""Compute depthwise convolutions of any kernel size; forward and both gradients each use the fastest backend.

It computes ``y[n, c, i, j] = b[c] + sum_kl w[c, k, l] x[n, c, s i + d k - p, s j + d l - p]``, as F.conv2d does with
``groups == channels``. PyTorch's own kernels are fast for few widths and layouts, and slow for others (issues 18631 and
74363 of its repository). :func:`explain` reports which backend each pass of a call uses.

The three passes are operators (``torch.ops.widefield.depthwise*``) with fake implementations, so torch.compile keeps
them as nodes. Each is differentiable in terms of the others, any number of times.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from widefield import _checks
from widefield._checks import Pair
from widefield.ops import _backend
from widefield.ops._autocast import autocast_dtype
from widefield.ops._operators import depthwise
from widefield.ops._problem import (
    STEPS,
    Problem,
    is_channels_last,
    is_exported,
    output_size,
    problem_of,
    size_of,
)


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
    """Convolve every channel with its own kernel, as F.conv2d does with ``groups == channels``.

    Args:
        x: (N, C, H, W), any memory format; under autocast in autocast's dtype.
        weight: (C, 1, KH, KW) of any size: rectangular, even, or larger than the map.
        bias: (C,) or None.
        stride: one number or (rows, columns).
        padding: one number, (rows, columns), "valid", or "same" (stride 1 only): as many rows and columns out as in.
            An even kernel pads one more at the bottom and on the right, as F.conv2d does.
        dilation: one number or (rows, columns).
        backend: "auto" chooses by shape, layout, dtype and device, separately for each pass. "aten" is PyTorch's own
            convolution. "onednn", "fft" (CPU), "direct" and "gemm" (Triton) compute all passes, or refuse the call.

    Returns:
        (N, C, H_out, W_out), as F.conv2d returns it, in the memory format and dtype of x.

    Raises:
        ValueError: shapes that do not fit together, "same" with a stride, an unknown backend, or one that cannot
            compute this call.
        TypeError: x, weight and bias of different dtypes, outside autocast.
    """
    key = _key(x, weight, bias, stride, padding, dilation, backend)
    call = _calls.get(key)
    if call is None:
        given = x, weight
        x, weight, bias, call = _prepared(x, weight, bias, stride, padding, dilation, backend)
        if key is not None and given[0] is x and given[1] is weight and len(_calls) < 4096:
            _calls[key] = call
    if call.stock is not None:
        return F.conv2d(x, weight, bias, *call.stock)
    bias = None if bias is None else bias[None]
    return depthwise(x, weight.transpose(0, 1), bias, call.stride, call.padding, call.dilation, backend)


class _Call(NamedTuple):
    """How to run a call whose arguments are checked: with F.conv2d, or with our operator."""

    stride: Pair
    padding: Pair
    dilation: Pair
    stock: tuple[Any, ...] | None
    """F.conv2d's arguments after the bias. It reads one number faster than two."""


_calls: dict[Any, _Call] = {}
"""Calls that came up before. Checking and choosing again takes as long as a small convolution."""


def _key(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, backend: str) -> Any:
    """Return a key that calls share only if they are computed, or refused, alike. None: do not remember this call.

    Arguments that merely equal a number that was checked, such as 1.0, get no key.
    """
    if torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled() or x.is_meta:
        return None
    size = x.shape
    if len(size) != 4 or type(size[0]) is not int:  # a symbol, or a tensor under torch.jit.trace
        return None
    for value in (stride, padding, dilation):
        kind = type(value)
        if kind is tuple:
            if len(value) != 2 or type(value[0]) is not int or type(value[1]) is not int:
                return None
        elif kind is not int and kind is not str:
            return None
    return (
        size, weight.shape, x.stride(), weight.stride(), x.dtype, weight.dtype, x.device,
        x.requires_grad, weight.requires_grad, torch.is_grad_enabled(), stride, padding, dilation, backend,
        None if bias is None else (bias.shape, bias.dtype),
    )  # fmt: skip


def _prepared(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: object, padding: object, dilation: object, backend: object
) -> tuple[Tensor, Tensor, Tensor | None, _Call]:
    """Return the tensors to convolve, and how. Raises what :func:`depthwise_conv2d` documents."""
    name = _backend.names(backend)
    x, weight, bias = _checked(x, weight, bias)
    x, *geometry = _placed(x, weight, stride, padding, dilation)
    if name == "aten" or is_exported():
        # Exported models run where widefield is not installed, so they keep the operator that every runtime supports.
        stock = True
    elif torch.compiler.is_compiling() or any(isinstance(size, torch.SymInt) for size in x.shape):
        stock = False  # sizes may be symbols, by which nothing can be chosen
    else:
        passes = _passes(x, weight, *geometry)
        for problem in passes:
            _backend.check(name, problem)
        if not torch.is_grad_enabled():
            passes = passes[:1]
        else:  # only the passes that will run
            passes = passes[:1] + passes[1:2] * x.requires_grad + passes[2:] * weight.requires_grad
        stock = (
            name == "auto" and not x.is_meta and _backend.is_stock(passes)
        )  # F.conv2d loses the layout of meta tensors
    plain = (*(pair[0] if pair[0] == pair[1] else pair for pair in geometry), size_of(x)[1])
    return x, weight, bias, _Call(geometry[0], geometry[1], geometry[2], plain if stock else None)


def plan(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: object, padding: object, dilation: object, backend: str
) -> list[Problem]:
    """Return the passes of a training step with this call. Raises what :func:`depthwise_conv2d` raises."""
    x, weight, _, call = _prepared(x, weight, bias, stride, padding, dilation, backend)
    return _passes(x, weight, call.stride, call.padding, call.dilation)


def _passes(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> list[Problem]:
    size, kernels = tuple(x.shape), (1, x.shape[1], *weight.shape[2:])
    return [problem_of(step, x, size, kernels, stride, padding, dilation) for step in STEPS]


def _checked(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the tensors in the dtype of the computation; raise an error if they do not fit together."""
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(autocast_dtype(weight) or weight.dtype)
        bias = None if bias is None else bias.to(autocast_dtype(bias) or bias.dtype)
    if x.ndim != 4:
        raise ValueError(f"x must be (N, C, H, W); got shape {tuple(x.shape)}.")
    channels, size = size_of(x)[1], size_of(weight)
    if weight.ndim != 4 or size[:2] != (channels, 1):
        raise ValueError(
            f"weight must be (C, 1, KH, KW) = ({channels}, 1, KH, KW), one kernel for each channel of x; "
            f"got shape {tuple(weight.shape)}."
        )
    if 0 in size[2:]:
        raise ValueError(f"the kernels of weight are empty; got shape {tuple(weight.shape)}.")
    if bias is not None and size_of(bias) != (channels,):
        raise ValueError(f"bias must be (C,) = ({channels},) or None; got shape {tuple(bias.shape)}.")
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and other.dtype != x.dtype:
            raise TypeError(f"x is {x.dtype} and {name} is {other.dtype}: convert one to the other, or use autocast.")
    # F.conv2d infers a layout from the strides of size-1 dimensions: it would return that of the weight, and it reads
    # out of bounds if x has one channel (2.14, CPU).
    if weight.stride(1) == 1 and not is_channels_last(x):
        weight = weight.flatten(1).view(weight.shape)
    if channels == 1:
        x = x.contiguous().flatten(1).view(x.shape)
    return x, weight, bias


def _placed(
    x: Tensor, weight: Tensor, stride: object, padding: object, dilation: object
) -> tuple[Tensor, Pair, Pair, Pair]:
    """Return x, and stride, padding and dilation as pairs. x is padded here if the two sides differ."""
    steps, spread = _checks.pair("stride", stride), _checks.pair("dilation", dilation)
    size, kernel = size_of(x)[2:], (size_of(weight)[2], size_of(weight)[3])
    pads, more = (0, 0), (0, 0)
    if padding == "same":
        if steps != (1, 1):
            halves = tuple(d * (k // 2) for d, k in zip(spread, kernel, strict=True))
            raise ValueError(
                f"padding='same' is defined for stride 1; got stride={stride!r}. "
                f"Give numbers, such as padding={halves}."
            )
        total = (spread[0] * (kernel[0] - 1), spread[1] * (kernel[1] - 1))
        pads, more = (total[0] // 2, total[1] // 2), (total[0] % 2, total[1] % 2)
    elif isinstance(padding, str):
        if padding != "valid":
            raise ValueError(f"padding must be numbers, 'same' or 'valid'; got {padding!r}.")
    else:
        pads = _checks.pair("padding", padding, minimum=0)
    rows, columns = output_size((size[0] + more[0], size[1] + more[1]), kernel, steps, pads, spread)
    if rows < 1 or columns < 1:
        raise ValueError(
            f"a {kernel[0]}x{kernel[1]} kernel with dilation {spread} does not fit on a map of "
            f"{size[0]}x{size[1]} pixels with padding {pads}. padding='same' fits any kernel."
        )
    if more != (0, 0):
        x = F.pad(x, (0, more[1], 0, more[0]))
    return x, steps, pads, spread
