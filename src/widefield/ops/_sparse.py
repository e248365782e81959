"""Compute sparse mixtures by sorting samples by their largest chosen expert.

A weight of exactly 0 means that an expert was not chosen. A sample that chose small experts needs only a small kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from widefield.ops import fold
from widefield.ops._bank import Bank, Experts, Plan
from widefield.ops._onednn import WIDEST
from widefield.ops._problem import has_numbers, is_traced, multiply_adds


@dataclass(frozen=True, slots=True)
class Costs:
    """What it takes to sort samples, in multiply-adds of narrow kernels."""

    move: float = 25
    """To copy one number of a map into a bucket, or out of one."""
    call: float = 40_000_000
    """To select the kernels of a bucket, and to call its operators."""


COSTS = Costs()


@dataclass(frozen=True, slots=True)
class Sorting:
    """Which samples are convolved with kernels of which size."""

    buckets: dict[int, list[int]]
    """Taps a side -> samples."""
    reason: str

    def is_plain(self, plan: Plan) -> bool:
        """Return whether all samples are convolved together, with the whole bank."""
        return list(self.buckets) == [plan.taps]


def of_chosen(weights: Tensor) -> Tensor:
    """Keep gradients from weights of exactly 0: their experts were not chosen."""
    # torch.jit.trace checks a graph against one recorded without gradients: they must not differ.
    learning = (torch.is_grad_enabled() and weights.requires_grad) or is_traced()
    return torch.where(weights == 0, 0, weights) if learning else weights


def sort(x: Tensor, weights: Tensor, plan: Plan) -> Sorting:
    """Put each sample into the bucket of the largest expert that it chose, where that saves more than it costs.

    It reads values: on a GPU it waits for them once a layer. Where values are hidden, all samples stay together.
    """
    together = {plan.taps: list(range(weights.shape[0]))}
    if not has_numbers(weights):
        return Sorting(together, "the routing weights have no values here")
    buckets: dict[int, list[int]] = {}
    for i, row in enumerate(weights.tolist()):
        live = [span for span, weight in zip(plan.spans, row, strict=True) if weight != 0]
        buckets.setdefault(max(live, default=min(plan.spans)), []).append(i)
    work = {taps: _work(x, taps, plan) for taps in {*buckets, plan.taps}}
    saved = sum((work[plan.taps] - work[taps]) * len(samples) for taps, samples in buckets.items())
    saved *= plan.channels[0] * plan.channels[1]
    moves = 0.0
    if len(buckets) > 1:
        numbers = x.numel() + x.shape[0] * plan.channels[0] * -(-x.shape[2] // plan.stride) * -(
            -x.shape[3] // plan.stride
        )
        moves = COSTS.move * numbers + COSTS.call * len(buckets)
    shown = f"kernels of the sizes that samples chose save {saved:.2g} multiply-adds, and sorting costs {moves:.2g}"
    return Sorting(dict(sorted(buckets.items())) if saved > moves else together, shown)


def _work(x: Tensor, taps: int, plan: Plan) -> float:
    """Return the multiply-adds of one kernel on one map, in units of those of narrow kernels."""
    padding = plan.step * (taps // 2)
    slower = 1.5 if fold.effective_size(taps, plan.step) > WIDEST else 1.0
    pairs = ((side,) * 2 for side in (taps, plan.stride, padding, plan.step))
    return slower * multiply_adds((x.shape[2], x.shape[3]), *pairs)


def mixed_by_size(x: Tensor, bank: Bank | Experts, weights: Tensor, buckets: dict[int, list[int]]) -> Tensor:
    """Convolve each bucket of samples with kernels of its size, mixed from the experts that are no larger."""
    # Split and joined, not indexed: the gradient of an index is a map of zeros for each bucket.
    samples, rows = x.split(1), weights.split(1)
    results: dict[int, Tensor] = {}
    for taps, chosen in buckets.items():
        fitting = [r for r, span in enumerate(bank.spans) if span <= taps]
        if isinstance(bank, Experts) and taps == max(buckets):
            fitting = list(range(len(bank.spans)))  # those that no sample chose get gradients, which are zeros
        some = bank.only(fitting, taps)
        if len(chosen) == len(samples):
            return some.mixed(x, weights[:, fitting])
        maps, shares = torch.cat([samples[i] for i in chosen]), torch.cat([rows[i] for i in chosen])[:, fitting]
        results.update(zip(chosen, some.mixed(maps, shares).split(1), strict=True))
    return torch.cat([results[i] for i in range(len(samples))])
