"""Describe a depthwise convolution for its backends; helpers for shapes, layouts and tracing.

All backends compute ``y[n, c] = sum_k weight[g, c, k] x[n, c, .]`` with weights (G, C, KH, KW). G is 1 (the batch
shares its kernels) or N (every sample has its own kernels, as in a mixture).
A backend is a module with four functions: ``why_not(problem)``, ``forward(x, weight, bias, stride, padding,
dilation)``, ``input_grad(grad, weight, input_size, ...)`` and ``weight_grad(grad, x, weight_size, ...)``. They may
return any memory format: the caller converts the result to that of ``x`` (``input_grad``: of ``grad``).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from widefield._checks import Pair

Sizes = Sequence[int]

_tracer: Any = torch._C

STEPS = ("forward", "input_grad", "weight_grad")
"""The three convolutions of a training step. Each has its own choice of backend."""


class Problem(NamedTuple):
    """One pass of one depthwise convolution: everything that the choice of a backend may depend on."""

    step: str
    """"forward", "input_grad" or "weight_grad"."""
    batch: int
    channels: int
    height: int
    """Of the input."""
    width: int
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    per_sample: bool
    """Whether every sample has its own kernels."""
    dtype: torch.dtype
    device: torch.device
    channels_last: bool

    @property
    def extent(self) -> Pair:
        """Rows and columns that the dilated kernel spans."""
        return (self.dilation[0] * (self.kernel[0] - 1) + 1, self.dilation[1] * (self.kernel[1] - 1) + 1)

    @property
    def pixels(self) -> int:
        """Pixels of one map of the input."""
        return self.height * self.width

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of one map of one sample: see :func:`multiply_adds`."""
        return multiply_adds((self.height, self.width), self.kernel, self.stride, self.padding, self.dilation)

    @property
    def all_multiply_adds(self) -> int:
        """The same for all maps of all samples."""
        return self.batch * self.channels * self.multiply_adds


def problem_of(
    step: str,
    x: Tensor,
    input_size: tuple[int, ...],
    weight_size: tuple[int, ...],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Problem:
    """Describe a pass. ``x`` is the tensor whose layout the result has: the input or the output's gradient. A tensor on
    the meta device is treated as one on the CPU.
    """
    batch, channels, height, width = input_size
    groups, _, kh, kw = weight_size
    channels_last = is_channels_last(x)
    if step == "input_grad" and output_size((height, width), (kh, kw), stride, padding, dilation) == (1, 1):
        channels_last = False  # x is the gradient here, and the strides of a single pixel do not tell its layout
    return Problem(
        step, batch, channels, height, width, (kh, kw), stride, padding, dilation,
        groups != 1, x.dtype, torch.device("cpu") if x.is_meta else x.device, channels_last,
    )  # fmt: skip


def size_of(x: Tensor) -> torch.Size:
    """Return the shape as integers. Under torch.jit.trace ``x.shape`` holds tensors, and comparing those warns."""
    state = _tracer._get_tracing_state()
    if state is None:
        return x.shape
    _tracer._set_tracing_state(None)
    try:
        return x.shape
    finally:
        _tracer._set_tracing_state(state)


def is_eager(x: Tensor) -> bool:
    """Return whether x is an ordinary tensor and nothing records or transforms the call.

    Only then may a decision for the shape of x be remembered: tracers and transforms may hide sizes and values.
    """
    return not (
        torch.compiler.is_compiling()  # first: compilers do not trace what follows
        or type(x) not in PLAIN
        or torch._C._len_torch_dispatch_stack() > 0
        or _tracer._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._functorch.is_legacy_batchedtensor(x)
        or x.is_meta
    )


PLAIN = (Tensor, nn.Parameter)
"""Types that do not override ``__torch_function__`` or ``__torch_dispatch__``."""


def is_traced() -> bool:
    """Return whether torch.jit.trace records the call."""
    return _tracer._get_tracing_state() is not None


def is_exported() -> bool:
    """Return whether torch.export or torch.jit.trace records the call.

    Their graphs may run where widefield is not installed, on batches and maps of any size.
    """
    return torch.compiler.is_exporting() or is_traced()


def is_scripted_for_onnx() -> bool:
    """Return whether torch.onnx.export(dynamo=False) records the call. It supports fewer operators than a trace."""
    return is_traced() and torch.onnx.is_in_onnx_export()


def has_numbers(x: Tensor) -> bool:
    """Return whether a call may depend on the values of x. It may not where the call is recorded or transformed."""
    hidden = torch.compiler.is_compiling() or is_exported() or torch._C._are_functorch_transforms_active()
    return not (hidden or x.is_meta or isinstance(x, FakeTensor) or is_batch_of_gradients(x))


def is_differentiated(x: Tensor) -> bool:
    """Return whether derivatives with respect to x may be taken, in reverse or in forward mode."""
    if x.requires_grad and torch.is_grad_enabled():
        return True
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def is_batch_of_gradients(x: Tensor) -> bool:
    """Return whether x is inside torch.autograd's own vmap, used by ``is_grads_batched`` and ``vectorize``."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(x)


def is_channels_last(x: Tensor) -> bool:
    """Return whether the channels of (N, C, H, W) are adjacent in memory. False if the strides fit both layouts.

    It reads strides, because vmap does not support ``is_contiguous`` and slices are not contiguous.
    """
    if x.stride(1) != 1:
        return False
    _, channels, height, width = size_of(x)
    return channels > 1 and height * width > 1


def memory_format(channels_last: bool) -> torch.memory_format:
    """Return the memory format of the layout."""
    return torch.channels_last if channels_last else torch.contiguous_format


def laid_out(x: Tensor, channels_last: bool) -> Tensor:
    """Return x in that layout, or unchanged under vmap and other transforms, which do not support layouts."""
    if torch._C._are_functorch_transforms_active() or is_batch_of_gradients(x):
        return x
    return x.contiguous(memory_format=memory_format(channels_last))


def output_size(size: Sizes, kernel: Sizes, stride: Pair, padding: Pair, dilation: Pair) -> Pair:
    """Return rows and columns of F.conv2d's output. They are below 1 for kernels that do not fit."""
    rows, columns = ((size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2))
    return rows, columns


@functools.lru_cache(4096)
def idle_taps(size: Sizes, kernel: Sizes, stride: Pair, padding: Pair, dilation: Pair) -> Pair:
    """Return the number of taps on either side of each axis that only ever meet padding.

    Removing t taps at both ends and ``dilation * t`` of the padding does not change the output.
    """
    out = output_size(size, kernel, stride, padding, dilation)
    cuts = []
    for i in range(2):
        p, d, k = padding[i], dilation[i], kernel[i]
        last_row = (out[i] - 1) * stride[i]
        first = max(0, -(-(p - last_row) // d))  # the first tap that some output meets the map with
        last = (size[i] - 1 + p) // d  # and the last one
        cuts.append(max(0, min(first, k - 1 - last, p // d, (k - 1) // 2)))
    return cuts[0], cuts[1]


@functools.lru_cache(4096)
def multiply_adds(size: Pair, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> int:
    """Return the products of a tap and a pixel that one map of one sample takes. Padding does not count."""
    total = 1
    out = output_size(size, kernel, stride, padding, dilation)
    for i in range(2):
        count = 0
        for k in range(kernel[i]):
            first = max(0, -(-(padding[i] - k * dilation[i]) // stride[i]))  # outputs whose tap k is inside the map
            last = min(out[i] - 1, (size[i] - 1 + padding[i] - k * dilation[i]) // stride[i])
            count += max(0, last - first + 1)
        total *= count
    return total


def channels_first(x: Tensor) -> Tensor:
    """Return (N, H, W, C) as (N, C, H, W), without a copy."""
    if torch.is_grad_enabled() or forward_ad._current_level >= 0 or not has_numbers(x):
        return x.permute(0, 3, 1, 2)
    # Below the dispatch key that tracks views: a view made under no_grad cannot be modified in place with gradients on.
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return x.permute(0, 3, 1, 2)


def fold(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (1, N*C, H, W): a batch with per-sample kernels is one image of many channels."""
    return x.reshape(1, -1, *x.shape[2:])
