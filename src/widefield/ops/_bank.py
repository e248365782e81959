"""Prepare the inputs of a mixture: the plan for the shapes of a call, and the experts as one bank of kernels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from widefield._checks import Expert
from widefield.ops import fold
from widefield.ops._autocast import autocast_dtype, without_autocast
from widefield.ops._operators import depthwise, input_grad, is_wanted, weight_grad
from widefield.ops._problem import PLAIN, is_channels_last, is_eager, laid_out, size_of
from widefield.ops.per_sample import convolve_samples


class Kind(NamedTuple):
    """Neighboring experts of one size and dilation, and which taps of the mix are theirs."""

    first: int
    last: int
    """One past the last expert."""
    kept: int
    """Taps a side that can meet the map."""
    margin: int
    """Taps of the mix before the first of these."""
    step: int
    """Taps of the mix from one of these to the next."""


def kinds_of(experts: Sequence[Expert], step: int, taps: int) -> tuple[Kind, ...]:
    """Return the kinds of experts that are sorted by kind, in a mix of ``taps`` a side, ``step`` pixels apart."""
    found = []
    for size, dilation in dict.fromkeys(experts):
        first, own = experts.index((size, dilation)), dilation // step
        kept = min(size, 2 * (taps // 2 // own) + 1)
        margin = taps // 2 - kept // 2 * own
        found.append(Kind(first, first + experts.count((size, dilation)), kept, margin, own))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Plan:
    """How a mixture is computed. Depends on shapes, dtypes and options, never on values."""

    way: str
    """"branches", "merged" or "routed"."""
    reason: str
    timed: bool
    """Whether "merged" may give way to "routed" by a measurement on the device."""
    by_kind: bool
    """Whether experts of one kind are mixed before they are padded, so that there is no bank."""
    experts: tuple[Expert, ...]
    """In the order in which they are mixed: equal ones next to each other, unless they came as a bank."""
    order: tuple[int, ...] | None
    """Where each of ``experts`` stood among those given, or None if their order has not changed."""
    step: int
    """Pixels between neighboring taps of the bank."""
    taps: int
    """Taps a side of the bank, less those that never meet the map."""
    spans: tuple[int, ...]
    """Taps a side of the bank that each expert takes up."""
    stride: int
    groups: int
    channels: tuple[int, int]
    """Output channels, and input channels of each group."""
    kinds: tuple[Kind, ...]
    """Of ``experts``, unless they came as a bank."""

    @property
    def depthwise(self) -> bool:
        """Whether every channel has its own kernel."""
        return self.channels == (self.groups, 1)


@dataclass(frozen=True, slots=True)
class Bank:
    """Experts padded to one size, and how they are applied."""

    kernels: Tensor
    """(n, C_out, C_in/groups, K, K)."""
    biases: Tensor | None
    """(n, C_out)."""
    spans: tuple[int, ...]
    """Central taps a side that each expert takes up; the others are zero."""
    step: int
    """Dilation of the bank."""
    stride: int
    groups: int

    def only(self, chosen: Sequence[int], taps: int) -> Bank:
        """Return the bank of some experts, none of which takes up more than ``taps``."""
        kernels = fold.crop(self.kernels, taps)[chosen]
        biases = None if self.biases is None else self.biases[chosen]
        return replace(self, kernels=kernels, biases=biases, spans=tuple(self.spans[r] for r in chosen))

    def mixed(self, x: Tensor, weights: Tensor) -> Tensor:
        """Convolve every sample with its own mix: (N, C_in, H, W), (N, n) -> (N, C_out, H_out, W_out)."""
        _, c_out, c_group, taps, _ = size_of(self.kernels)
        # In the parameters' precision also under autocast: rounding n kernels before they are added costs accuracy and
        # saves nothing, as the mix is small compared with the convolution.
        with without_autocast(x):
            a = weights.to(self.kernels.dtype)
            kernels = (a @ self.kernels.flatten(1)).view(a.shape[0], c_out, c_group, taps, taps)
            biases = None if self.biases is None else a @ self.biases
        return centered(x, kernels, biases, self.stride, self.groups, self.step)


@dataclass(frozen=True, slots=True)
class Experts:
    """Experts with a kernel each, in the order of their plan: the form in training."""

    kernels: Sequence[Tensor]
    """n tensors (C_out, C_in/groups, K_r, K_r)."""
    biases: Tensor | None
    """(n, C_out)."""
    plan: Plan

    @property
    def spans(self) -> tuple[int, ...]:
        """Central taps a side that each expert takes up in the mix."""
        return self.plan.spans

    def bank(self) -> Bank:
        """Return them as a bank."""
        plan = self.plan
        return Bank(_padded(self.kernels, plan), self.biases, plan.spans, plan.step, plan.stride, plan.groups)

    def only(self, chosen: Sequence[int], taps: int) -> Experts:
        """Return some of the experts, cropped to ``taps``."""
        plan = self.plan
        kept = tuple(plan.experts[r] for r in chosen)
        some = replace(
            plan,
            experts=kept,
            spans=tuple(min(plan.spans[r], taps) for r in chosen),
            taps=taps,
            kinds=kinds_of(kept, plan.step, taps),
        )
        return Experts([self.kernels[r] for r in chosen], None if self.biases is None else self.biases[chosen], some)

    def mixed(self, x: Tensor, weights: Tensor) -> Tensor:
        """Convolve every sample with its own mix: (N, C_in, H, W), (N, n) -> (N, C_out, H_out, W_out)."""
        plan = self.plan
        dtype = autocast_dtype(x) or x.dtype
        with without_autocast(x):
            a = weights.to(self.kernels[0].dtype)
            if plan.depthwise and torch.is_grad_enabled() and self._are_eager(x):
                y: Tensor = _Mixed.apply(x.to(dtype), a, *self.kernels, self.biases, plan)
                return y
            kernels, biases = _mix(self.kernels, a, plan), _mix_biases(self.biases, a)
        return centered(x, kernels, biases, plan.stride, plan.groups, plan.step)

    def _are_eager(self, x: Tensor) -> bool:
        return is_eager(x) and set(map(type, self.kernels)).issubset(PLAIN)


def _mix(kernels: Sequence[Tensor], weights: Tensor, plan: Plan) -> Tensor:
    """Return each sample's kernel (N, C_out, C_in/groups, taps, taps), in the experts' dtype."""
    return mixed_by_kind(kernels, weights, plan) if plan.by_kind else _mix_bank(_padded(kernels, plan), weights)


def _mix_bank(bank: Tensor, weights: Tensor) -> Tensor:
    mixed: Tensor = (weights @ bank.flatten(1)).view(weights.shape[0], *size_of(bank)[1:])
    return mixed


def _mix_biases(biases: Tensor | None, weights: Tensor) -> Tensor | None:
    return None if biases is None else weights.to(biases.dtype) @ biases


def _padded(kernels: Sequence[Tensor], plan: Plan) -> Tensor:
    """Return experts as one tensor (n, C_out, C_in/groups, taps, taps)."""
    # Some of a plan's experts may have a coarser grid in common: theirs is the plan's all the same.
    spread = [
        k if d == plan.step else fold.dilate(k, d // plan.step) for k, (_, d) in zip(kernels, plan.experts, strict=True)
    ]
    return fold.crop(fold.kernel_bank(spread, (1,) * len(spread)), plan.taps)


class _Mixed(torch.autograd.Function):
    """Convolve (N, C, H, W) with a mix of depthwise kernels for each sample; nothing of the mix is kept for backward.

    On small maps the mixed kernels of a batch, and the bank that they are mixed from, would take more memory than the
    maps. To mix once more costs as many multiplications as n pixels of the convolution. Differentiable in reverse mode
    at any order, as ``backward`` consists of differentiable operators.

    Arguments: x, routing weights (N, n) and n kernels (C, 1, K_r, K_r) of one dtype, biases (n, C) or None, the plan.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, weights, *kernels, biases, plan = args
        offsets = _mix_biases(biases, weights)
        offsets = None if offsets is None else offsets.to(x.dtype)
        y = depthwise(x, _mix(kernels, weights, plan).squeeze(2).to(x.dtype), offsets, *_geometry(plan))
        ctx.save_for_backward(x, weights, *kernels, biases)
        ctx.plan, ctx.channels_last = plan, is_channels_last(x)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, *kernels, biases = ctx.saved_tensors
        plan = ctx.plan
        grad = laid_out(grads[0], ctx.channels_last)
        of_x = of_weights = of_biases = None
        of_kernels: list[Tensor | None] = [None] * len(kernels)
        learns = any(is_wanted(ctx, 2 + r) for r in range(len(kernels)))
        routes, passes = is_wanted(ctx, 1), is_wanted(ctx, 0)
        with without_autocast(x):
            bank = _padded(kernels, plan) if not plan.by_kind and (routes or passes) else None
            if passes:
                mixed = _mix(kernels, weights, plan) if bank is None else _mix_bank(bank, weights)
                of_x = input_grad(grad, mixed.squeeze(2).to(x.dtype), x.shape, *_geometry(plan))
                del mixed
            if learns or routes:
                size = (x.shape[0], x.shape[1], plan.taps, plan.taps)
                of_mix = weight_grad(grad, x, size, *_geometry(plan)).to(weights.dtype)
                if plan.by_kind:
                    of_weights, of_kernels = _unmix_kinds(of_mix, weights, kernels, plan, routes=routes, learns=learns)
                else:
                    flat = of_mix.reshape(x.shape[0], -1)
                    of_weights = None if bank is None or not routes else flat @ bank.reshape(len(kernels), -1).T
                    of_kernels = _unmix(flat, weights, kernels, plan) if learns else of_kernels
            if biases is not None and (routes or is_wanted(ctx, 2 + len(kernels))):
                of_offsets = grad.sum((2, 3)).to(biases.dtype)
                of_biases = weights.to(biases.dtype).T @ of_offsets
                if of_weights is not None:
                    of_weights = of_weights + (of_offsets @ biases.T).to(of_weights.dtype)
        return of_x, of_weights, *of_kernels, of_biases, None


def _geometry(plan: Plan) -> tuple[Any, ...]:
    padding = plan.step * (plan.taps // 2)
    return (plan.stride,) * 2, (padding,) * 2, (plan.step,) * 2, "auto"


def _unmix(flat: Tensor, weights: Tensor, kernels: Sequence[Tensor], plan: Plan) -> list[Tensor | None]:
    """Return the gradient of each kernel from that of the mix, (N, C * taps * taps).

    None shares memory with that of the bank, which would live as long as it does.
    """
    of_bank = weights.T @ flat
    found: list[Tensor | None] = []
    for first, last, kept, margin, step in plan.kinds:
        own = slice(margin, margin + (kept - 1) * step + 1, step)
        for r in range(first, last):
            one = of_bank[r].reshape(-1, 1, plan.taps, plan.taps)
            one = one if (kept, step) == (plan.taps, 1) else one[..., own, own]  # older vmap refuses whole slices
            side = kernels[r].shape[-1]
            found.append(one.clone(memory_format=torch.contiguous_format) if kept == side else fold.pad(one, side))
    return found


def _unmix_kinds(
    of_mix: Tensor, weights: Tensor, kernels: Sequence[Tensor], plan: Plan, *, routes: bool, learns: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradients of the routing weights and of each kernel from that of the mix (N, C, taps, taps).

    It goes from kind to kind, as :func:`mixed_by_kind` does, without a bank.
    """
    of_weights: list[Tensor] = []
    of_kernels: list[Tensor | None] = []
    count, channels = of_mix.shape[:2]
    for first, last, kept, margin, step in plan.kinds:
        own = slice(margin, margin + (kept - 1) * step + 1, step)
        # Views that PyTorch's older vmap knows, which is_grads_batched uses.
        part = (of_mix if (kept, step) == (plan.taps, 1) else of_mix[..., own, own]).reshape(count, -1)
        some = kernels[first:last]
        if learns:
            found = weights[:, first:last].T @ part
            for r, kernel in enumerate(some):
                one = found[r].reshape(channels, 1, kept, kept)
                of_kernels.append(one if kept == kernel.shape[-1] else fold.pad(one, kernel.shape[-1]))
        if routes:
            stack = [(kernel if kept == kernel.shape[-1] else fold.crop(kernel, kept)).reshape(-1) for kernel in some]
            of_weights.append(part @ (stack[0][None] if len(stack) == 1 else torch.stack(stack)).T)
    return (torch.cat(of_weights, 1) if routes else None), of_kernels or [None] * len(kernels)


def centered(x: Tensor, kernels: Tensor, biases: Tensor | None, stride: int, groups: int, dilation: int) -> Tensor:
    """Convolve every sample with its own kernels (N, C_out, C_in/groups, K, K), centered on each stride-th pixel."""
    padding = dilation * (size_of(kernels)[-1] // 2)
    return convolve_samples(x, kernels, biases, (stride,) * 2, (padding,) * 2, (dilation,) * 2, groups)


def mixed_by_kind(kernels: Sequence[Tensor], weights: Tensor, plan: Plan) -> Tensor:
    """Mix experts that are sorted by kind: each kind in one product, and each result into the next larger kind.

    Equals the mix of the bank. Where experts are many, most of a bank is padding.
    """
    kinds = sorted(set(plan.experts), key=lambda kind: fold.effective_size(*kind))
    layers = []
    for size, dilation in kinds:
        first = plan.experts.index((size, dilation))
        last = first + plan.experts.count((size, dilation))
        stack = torch.stack(list(kernels[first:last]))
        one = (weights[:, first:last] @ stack.flatten(1)).view(weights.shape[0], *size_of(stack)[1:])
        layers.append(fold.crop(fold.dilate(one, dilation // plan.step), plan.taps))
    return functools.reduce(lambda inner, outer: outer + fold.pad(inner, size_of(outer)[-1]), layers)
