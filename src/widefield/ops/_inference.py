"""Run fused mixtures of depthwise experts in inference on CPUs with as few calls as possible.

Between the layers of a network a call in Python is slow, as its code and data have left the caches: checks, plans and
wrappers of a mixture took as long as a convolution of a small map. For shapes, layouts and dtypes that came up before,
only the mix and the convolution are left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from widefield._checks import Expert, Pair
from widefield.ops import _backend, fold
from widefield.ops._bank import Plan
from widefield.ops._problem import is_channels_last, is_eager, memory_format, problem_of


class Ready(NamedTuple):
    """How to run calls of one kind, whose arguments are checked."""

    size: tuple[int, ...]
    """Of the mixed kernels: (N, C, K, K)."""
    first: int
    """Taps a side to crop the bank to before it is mixed."""
    taps: int
    """Taps a side that can meet the map."""
    geometry: tuple[Pair, Pair, Pair]
    layout: torch.memory_format
    compute: Callable[..., Tensor]

    def run(self, x: Tensor, bank: Tensor, bias_bank: Tensor | None, weights: Tensor) -> Tensor:
        """Compute the mixture from tensors of the kind that this was made for."""
        # Below the dispatch key that tracks views: callers could not modify a view made here in place.
        with torch._C._AutoDispatchBelowADInplaceOrView():
            bank = fold.crop(bank, self.first)
            kernels = fold.crop(torch.mm(weights, bank.flatten(1)).view(self.size), self.taps)
            biases = None if bias_bank is None else torch.mm(weights, bias_bank)
            return self.compute(x, kernels, biases, *self.geometry).contiguous(memory_format=self.layout)


_known: dict[Any, Ready | None] = {}
"""Calls that came up before. None: it is not for this module."""


def key_of(
    x: Tensor,
    bank: Tensor,
    bias_bank: Tensor | None,
    experts: Sequence[Expert],
    stride: int,
    groups: int,
    backend: str,
) -> Any:
    """Return a key that calls share only if they are computed, or refused, alike; None for others than inference."""
    if torch.is_grad_enabled() or not is_eager(x) or torch._C._is_any_autocast_enabled():
        return None
    if type(experts) is not tuple or type(stride) is not int or type(groups) is not int:
        return None
    return (
        x.shape, x.stride(), x.dtype, x.device, bank.shape, bank.dtype, bank.device,
        None if bias_bank is None else (bias_bank.shape, bias_bank.dtype), experts, stride, groups, backend,
        torch.get_num_threads(),  # the choice of a backend depends on it
    )  # fmt: skip


def known(key: Any) -> Ready | None:
    """Return how to run calls of a kind, or None if it has not come up or is not for this module.

    The routing weights must be (N, n) of the kernels' dtype, as the router of a fused mixture returns them.
    """
    return _known.get(key)


def remember(key: Any, plan: Plan, x: Tensor, bank: Tensor) -> None:
    """Keep a plan for further calls of its kind, which :func:`known` then returns."""
    if key in _known or len(_known) >= 4096:
        return
    fits = plan.way == "merged" and plan.depthwise and x.device.type == "cpu" and x.dtype == bank.dtype == torch.float32
    _known[key] = _ready(plan, x, bank) if fits else None


def _ready(plan: Plan, x: Tensor, bank: Tensor) -> Ready:
    whole, batch = bank.shape[-1], x.shape[0]
    # To crop the bank copies it. Kernels cropped after the mix are a view, but idle taps were mixed.
    first = plan.taps if 2 * plan.taps**2 <= whole**2 else whole
    padding = plan.step * (plan.taps // 2)
    geometry = (plan.stride,) * 2, (padding,) * 2, (plan.step,) * 2
    kernels = (batch, plan.channels[0], plan.taps, plan.taps)
    problem = problem_of("forward", x, tuple(x.shape), kernels, *geometry)
    compute = _backend.resolve("auto", problem).forward
    layout = memory_format(is_channels_last(x))
    return Ready((batch, plan.channels[0], first, first), first, plan.taps, geometry, layout, compute)
