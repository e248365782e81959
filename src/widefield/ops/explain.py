"""Which way a call would take through the backends, and why not the others."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from widefield.ops import _backend, depthwise, mixture
from widefield.ops._problem import Problem


@dataclass(frozen=True)
class Choice:
    """One pass: the backend that computes it, why, and what speaks against every other one."""

    step: str
    """"forward", "input_grad" or "weight_grad"; of a mixture also "mixture", how the experts are put together."""
    backend: str
    reason: str
    others: Mapping[str, str]
    """Backend -> why not."""


@dataclass(frozen=True)
class Explanation:
    """What a call of an operator would do; prints as text."""

    operator: str
    choices: tuple[Choice, ...]

    def __getitem__(self, step: str) -> Choice:
        for choice in self.choices:
            if choice.step == step:
                return choice
        raise KeyError(f"{step!r}; there are {', '.join(repr(c.step) for c in self.choices)}")

    def __str__(self) -> str:
        lines = [self.operator]
        for choice in self.choices:
            lines.append(f"  {choice.step}: {choice.backend} ({choice.reason})")
            lines += [f"      not {other}: {reason}" for other, reason in choice.others.items()]
        return "\n".join(lines)


def explain(op: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend each pass of ``op(*args, **kwargs)`` would take, and why the others not. Computes nothing.

    Args:
        op: :func:`depthwise_conv2d`, :func:`mixture_conv2d` or :func:`bank_conv2d`.
        args, kwargs: what it would be called with; tensors may be on the meta device, and are then taken as CPU ones.

    Raises:
        ValueError: another operator, or arguments that it would refuse.
    """
    known: dict[Callable[..., Tensor], Callable[..., list[Choice]]] = {
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


def _depthwise(**given: Any) -> list[Choice]:
    return [_choice(given["backend"], problem) for problem in depthwise.plan(**given)]


def _mixture(*, sparse: bool, **given: Any) -> list[Choice]:
    way, reason, others, problems = mixture.plan(**given)
    return [Choice("mixture", way, reason, others), *(_choice("auto", problem) for problem in problems)]


def _bank(*, bank: Tensor, bias_bank: Tensor | None, experts: Sequence[tuple[int, int]], **given: Any) -> list[Choice]:
    dilations = [dilation for _, dilation in experts]
    return _mixture(kernels=bank, biases=bias_bank, dilations=dilations, experts=experts, **given)


def _choice(backend: str, problem: Problem) -> Choice:
    taken, reason = (backend, "asked for") if backend != "auto" else _backend.choose(problem)
    others = {
        other: _backend.why_not(other, problem) or "it could, but is not the fastest here"
        for other in _backend.BACKENDS
        if other not in ("auto", taken)
    }
    return Choice(problem.step, taken, reason, others)
