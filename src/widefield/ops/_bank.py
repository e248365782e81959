"""Prepare the inputs of a mixture: the plan for the shapes of a call, and the experts as one bank of kernels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from widefield._checks import Expert
from widefield.ops import fold
from widefield.ops._autocast import without_autocast
from widefield.ops._problem import size_of
from widefield.ops.per_sample import convolve_samples


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
