"""Report the backend that each pass of a call would use, and why it would not use the others."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from widefield._checks import Expert
from widefield.ops import _backend, _sparse, depthwise, mixture
from widefield.ops._autocast import autocast_dtype
from widefield.ops._bank import Plan
from widefield.ops._problem import STEPS, Problem, has_numbers, problem_of
from widefield.report import Report

_COULD = "it could, but is not the fastest here"


@dataclass(frozen=True)
class Choice:
    """One decision about a call: what is used, why, and what speaks against every alternative."""

    step: str
    """"forward", "input_grad" or "weight_grad". Mixtures also have "mixture", how the experts are combined, and if they
    are sparse "samples", how samples are grouped. Passes of one group of several end in its kernel size: "forward 3x3".
    """
    backend: str
    reason: str
    others: Mapping[str, str]
    """Alternative -> why not."""


@dataclass(frozen=True)
class Explanation(Report):
    """How a call of an operator would be computed; prints as text."""

    operator: str
    choices: tuple[Choice, ...]

    def __getitem__(self, step: str) -> Choice:
        for choice in self.choices:
            if choice.step == step:
                return choice
        raise KeyError(f"{step!r}; there are {', '.join(repr(c.step) for c in self.choices)}")

    def summary(self) -> str:
        """Return the operator's name."""
        return self.operator

    def rows(self) -> list[dict[str, str]]:
        """Return one row per decision."""
        return [
            {
                "pass": choice.step,
                "backend": choice.backend,
                "because": choice.reason,
                "not": "; ".join(f"{other}: {reason}" for other, reason in choice.others.items()) or "-",
            }
            for choice in self.choices
        ]

    def __str__(self) -> str:
        lines = [self.operator]
        for choice in self.choices:
            lines.append(f"  {choice.step}: {choice.backend} ({choice.reason})")
            lines += [f"      not {other}: {reason}" for other, reason in choice.others.items()]
        return "\n".join(lines)


def explain(op: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Explanation:
    """Explain which backend each pass of ``op(*args, **kwargs)`` would use, and why not the others. Computes nothing.

    Args:
        op: :func:`depthwise_conv2d`, :func:`mixture_conv2d` or :func:`bank_conv2d`.
        args, kwargs: the arguments of the call. Tensors on the meta device are treated as tensors on the CPU.

    Raises:
        ValueError: another operator, or arguments that the operator refuses.
    """
    known: dict[Callable[..., Tensor], Callable[..., Iterator[Choice]]] = {
        depthwise.depthwise_conv2d: _depthwise,
        mixture.mixture_conv2d: _mixture,
        mixture.bank_conv2d: _bank,
    }
    if op not in known:
        names = ", ".join(f.__name__ for f in known)
        raise ValueError(f"explain knows {names}; got {getattr(op, '__name__', op)!r}.")
    given = inspect.signature(op).bind(*args, **kwargs)
    given.apply_defaults()
    return Explanation(op.__name__, tuple(known[op](**given.arguments)))


def _depthwise(**given: Any) -> Iterator[Choice]:
    for problem in depthwise.plan(**given):
        yield _choice(problem.step, given["backend"], problem)


def _bank(*, bank: Tensor, bias_bank: Tensor | None, **given: Any) -> Iterator[Choice]:
    return _mixture(kernels=bank, biases=bias_bank, **given)


def _mixture(
    *,
    x: Tensor,
    kernels: Sequence[Tensor] | Tensor,
    biases: Sequence[Tensor] | Tensor | None,
    weights: Tensor,
    sparse: bool,
    **options: Any,
) -> Iterator[Choice]:
    plan = mixture.planned(x, kernels, biases, weights, **options)
    others = {way: _COULD for way in ("merged", "branches") if way != plan.way}
    if plan.way != "routed":
        example = kernels if isinstance(kernels, Tensor) else kernels[0]
        reason = mixture.why_not_routed(x, example, None, weights, plan)
        others["routed"] = reason or "both are timed at the first call"
    yield Choice("mixture", plan.way, plan.reason, others)
    groups = [(plan.taps, x.shape[0])]
    if plan.way == "branches":
        size, dilation = max(plan.experts, key=lambda expert: expert[1] * (expert[0] - 1))
        groups = [(size, x.shape[0])]  # that of the largest expert
        if sparse:
            yield _chosen(weights)
    else:
        dilation = plan.step
        if sparse and plan.by_kind:
            yield Choice("samples", "together", "experts of one kind are mixed before they are padded", {})
        elif sparse:
            sorting = _sparse.sort(x, weights, plan)
            groups = [(taps, len(samples)) for taps, samples in sorting.buckets.items()]
            yield _sorted(sorting, plan, groups)
    if plan.depthwise and plan.way != "routed":
        shared = plan.way == "branches"
        for taps, count in groups:
            for step in STEPS:
                problem = _pass(step, x, count, (taps, dilation), plan.stride, shared=shared)
                yield _choice(step if len(groups) == 1 else f"{step} {taps}x{taps}", "auto", problem)


def _chosen(weights: Tensor) -> Choice:
    if not has_numbers(weights):
        return Choice("samples", "all", "the routing weights have no values here", {"chosen": "nothing tells them"})
    counts = ", ".join(map(str, (weights != 0).sum(0).tolist()))
    return Choice("samples", "chosen", f"experts compute {counts} of {len(weights)} samples", {"all": "it is sparse"})


def _sorted(sorting: _sparse.Sorting, plan: Plan, groups: Sequence[tuple[int, int]]) -> Choice:
    if sorting.is_plain(plan):
        return Choice("samples", "together", sorting.reason, {"sorted": "it would cost more than it saves"})
    shown = ", ".join(f"{count} with {taps}x{taps}" for taps, count in groups)
    return Choice("samples", "sorted", f"{shown}: {sorting.reason}", {"together": "it would cost more"})


def _pass(step: str, x: Tensor, batch: int, expert: Expert, stride: int, *, shared: bool) -> Problem:
    """Return one pass of the depthwise convolution of ``batch`` samples with one kernel, or with one kernel each."""
    (taps, dilation), channels = expert, x.shape[1]
    padding = dilation * (taps // 2)
    geometry = (stride,) * 2, (padding,) * 2, (dilation,) * 2
    size = (batch, *x.shape[1:])
    problem = problem_of(step, x, size, (1 if shared else batch, channels, taps, taps), *geometry)
    return problem._replace(dtype=autocast_dtype(x) or x.dtype)


def _choice(name: str, backend: str, problem: Problem) -> Choice:
    taken, reason = (backend, "asked for") if backend != "auto" else _backend.choose(problem)
    others = {
        other: _backend.why_not(other, problem) or _COULD for other in _backend.BACKENDS if other not in ("auto", taken)
    }
    return Choice(name, taken, reason, others)
