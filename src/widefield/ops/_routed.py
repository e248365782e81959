"""Register PyTorch operators for depthwise experts that are mixed inside the convolution, for CUDA devices.

``torch.ops.widefield.routed`` never writes a sample's kernel to memory. This is faster on small maps, where the kernels
of a batch are as large as its maps. Stride 1, "same" alignment, dilation 1. Differentiable once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from widefield.ops import _triton
from widefield.ops._fakes import register_fake
from widefield.ops._problem import is_channels_last, memory_format

_library = torch.library.Library("widefield", "FRAGMENT")
_library.define("routed(Tensor x, Tensor bank, Tensor? bias_bank, Tensor weights, int[] spans) -> Tensor")
_library.define(
    "routed_backward(Tensor grad, Tensor x, Tensor bank, Tensor? bias_bank, Tensor weights, int[] spans)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


def why_not(
    x: Tensor, bank: Tensor, bias_bank: Tensor | None, weights: Tensor, stride: int, dilation: int
) -> str | None:
    """Return why :func:`routed` cannot compute this mixture of depthwise experts, or None if it can."""
    if stride != 1 or dilation != 1:
        return f"it is written for stride 1 and dilation 1; got {stride} and {dilation}"
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return "it has no forward-mode derivative, and does not support torch.func's transforms"
    reason = _triton.unavailable()
    if reason is None:
        from widefield.ops._triton import routed as kernels

        reason = kernels.why_not(x, bank, bias_bank, weights)
    return reason


def routed(x: Tensor, bank: Tensor, bias_bank: Tensor | None, weights: Tensor, spans: Sequence[int]) -> Tensor:
    """Mix a bank (n, C, K, K), biases (n, C) by weights (N, n), and convolve (N, C, H, W). ``spans``: live sizes."""
    y: Tensor = torch.ops.widefield.routed(x, bank, bias_bank, weights, spans)
    return y


def _forward(x: Tensor, bank: Tensor, bias_bank: Tensor | None, weights: Tensor, spans: list[int]) -> Tensor:
    from widefield.ops._triton import routed as kernels

    with torch._C._AutoDispatchBelowADInplaceOrView():  # views made here could not be modified in place
        return kernels.forward(x, bank, spans, bias_bank, weights)


def _backward(
    grad: Tensor, x: Tensor, bank: Tensor, bias_bank: Tensor | None, weights: Tensor, spans: list[int]
) -> tuple[Tensor, ...]:
    from widefield.ops._triton import routed as kernels

    dx, d_bank, d_bias, d_weights = kernels.backward(grad, x, bank, spans, bias_bank, weights)
    nothing = bank.new_empty(0)  # operators return tensors
    return tuple(nothing if part is None else part for part in (dx, d_bank, d_bias, d_weights))


def _fake_forward(x: Tensor, *_: object) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(is_channels_last(x)))


def _fake_backward(
    grad: Tensor, x: Tensor, bank: Tensor, bias_bank: Tensor | None, weights: Tensor, spans: list[int]
) -> tuple[Tensor, ...]:
    d_bias = bank.new_empty(0) if bias_bank is None else bias_bank.new_empty(bias_bank.shape)
    return _fake_forward(grad), bank.new_empty(bank.shape), d_bias, weights.new_empty(weights.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.spans = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, bank, bias_bank, weights = ctx.saved_tensors
    grad = grad.contiguous(memory_format=memory_format(is_channels_last(x)))
    grads = torch.ops.widefield.routed_backward(grad, x, bank, bias_bank, weights, ctx.spans)
    return *(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False)), None


def _not_twice(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    raise RuntimeError(
        "the routed kernel is differentiable once. For second derivatives call mixture_conv2d with backend='merged'."
    )


_library.impl("routed", _forward, "CompositeExplicitAutograd")
_library.impl("routed_backward", _backward, "CompositeExplicitAutograd")
register_fake("routed", _fake_forward, _library)
register_fake("routed_backward", _fake_backward, _library)
torch.library.register_autograd("widefield::routed", _differentiate, setup_context=_remember, lib=_library)
torch.library.register_autograd("widefield::routed_backward", _not_twice, lib=_library)


@register_flop_formula(torch.ops.widefield.routed)
def _flops(x: Any, bank: Any, *_: Any, **__: Any) -> int:
    batch, channels, height, width = x
    flops: int = 2 * batch * channels * height * width * bank[2] * bank[3]
    return flops
