"""Depthwise convolution of any kernel size, with forward and both gradients each on the fastest way there is.

``y[n, c, i, j] = b[c] + sum_kl w[c, k, l] x[n, c, s i + d k - p, s j + d l - p]``, what F.conv2d computes with
``groups == channels``. PyTorch's own is fast for few widths and layouts and slow beyond (issues 18631 and 74363 of
its repository); :func:`explain` says which backend each pass of a call would take.

The three passes are operators of their own (``torch.ops.widefield.depthwise*``) with fake twins, so that torch.compile
and torch.export keep them as nodes, and each is differentiable in terms of the others, any number of times.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from widefield import _checks
from widefield.ops import _backend
from widefield.ops._autocast import autocast_dtype
from widefield.ops._operators import depthwise
from widefield.ops._problem import STEPS, Pair, Problem, output_size, problem_of


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
    backend = _backend.names(backend)
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    x, steps, pads, spread = _normalise(x, weight, bias, stride, padding, dilation)
    if backend == "aten" or torch.compiler.is_exporting():
        # What is exported runs where widefield is not installed: it keeps the operator that every runtime knows.
        return F.conv2d(x, weight, bias, steps, pads, spread, x.shape[1])
    kernel = weight.transpose(0, 1)
    if not torch.compiler.is_compiling():
        wanted = passes(x, kernel, steps, pads, spread)
        for problem in wanted:
            _backend.check(backend, problem)
        if backend == "auto" and _backend.is_stock(wanted if _trains(x, weight) else wanted[:1]):
            return F.conv2d(x, weight, bias, steps, pads, spread, x.shape[1])
    return depthwise(x, kernel, None if bias is None else bias[None], steps, pads, spread, backend)


def _trains(x: Tensor, weight: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)


def passes(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> list[Problem]:
    """Return the problems that a training step of this convolution poses; weights (G, C, KH, KW)."""
    return [problem_of(step, x, tuple(x.shape), tuple(weight.shape), stride, padding, dilation) for step in STEPS]


def plan(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> list[Problem]:
    """Return the passes of ``depthwise_conv2d(x, weight, bias, **options)``; raises what it would."""
    backend = _backend.names(options.pop("backend", "auto"))
    geometry = {"stride": 1, "padding": "same", "dilation": 1, **options}
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    x, steps, pads, spread = _normalise(x, weight, bias, **geometry)
    problems = passes(x, weight.transpose(0, 1), steps, pads, spread)
    for problem in problems:
        _backend.check(backend, problem)
    return problems


def _normalise(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: object, padding: object, dilation: object
) -> tuple[Tensor, Pair, Pair, Pair]:
    """Check everything; return x, padded beforehand where the sides differ, and stride, padding, dilation as pairs."""
    if x.ndim != 4:
        raise ValueError(f"x must be (N, C, H, W); got shape {tuple(x.shape)}.")
    if weight.ndim != 4 or weight.shape[1] != 1 or weight.shape[0] != x.shape[1]:
        raise ValueError(
            f"weight must be (C, 1, KH, KW) = ({x.shape[1]}, 1, KH, KW), one kernel for each channel of x; "
            f"got shape {tuple(weight.shape)}."
        )
    if bias is not None and tuple(bias.shape) != (x.shape[1],):
        raise ValueError(f"bias must be (C,) = ({x.shape[1]},) or None; got shape {tuple(bias.shape)}.")
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and other.dtype != x.dtype:
            raise TypeError(f"x is {x.dtype} and {name} is {other.dtype}: convert one to the other, or use autocast.")
    steps, spread = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    kernel = (weight.shape[2], weight.shape[3])
    if padding == "valid":
        pads: Pair = (0, 0)
    elif padding == "same":
        if steps != (1, 1):
            raise ValueError(
                f"padding='same' is defined for stride 1; got stride={stride!r}. "
                f"Give numbers, such as padding={tuple(d * (k // 2) for d, k in zip(spread, kernel, strict=True))}."
            )
        total = (spread[0] * (kernel[0] - 1), spread[1] * (kernel[1] - 1))
        pads = (total[0] // 2, total[1] // 2)
        if total[0] % 2 or total[1] % 2:
            x = F.pad(x, (0, total[1] % 2, 0, total[0] % 2))
    elif isinstance(padding, str):
        raise ValueError(f"padding must be numbers, 'same' or 'valid'; got {padding!r}.")
    else:
        pads = _pair("padding", padding, 0)
    rows, columns = output_size((x.shape[2], x.shape[3]), kernel, steps, pads, spread)
    if rows < 1 or columns < 1:
        raise ValueError(
            f"a {kernel[0]}x{kernel[1]} kernel with dilation {spread} does not fit on a map of "
            f"{x.shape[2]}x{x.shape[3]} pixels with padding {pads}. padding='same' fits any kernel."
        )
    return x, steps, pads, spread


def _pair(name: str, value: object, minimum: int) -> Pair:
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != 2:
            raise ValueError(f"{name} must be one integer or two (rows, columns); got {tuple(value)!r}.")
        return _checks.integer(name, value[0], minimum=minimum), _checks.integer(name, value[1], minimum=minimum)
    number = _checks.integer(name, value, minimum=minimum)
    return number, number
