"""Which way a call would take through the backends, and why not the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
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
        mixture.bank_conv2d: _mixture,
    }
    if op not in known:
        names = ", ".join(f.__name__ for f in known)
        raise ValueError(f"explain knows {names}; got {getattr(op, '__name__', op)!r}.")
    return Explanation(op.__name__, tuple(known[op](*args, **kwargs)))


def _depthwise(*args: Any, **kwargs: Any) -> list[Choice]:
    return [_choice(kwargs.get("backend", "auto"), problem) for problem in depthwise.plan(*args, **kwargs)]


def _mixture(*args: Any, **kwargs: Any) -> list[Choice]:
    way, reason, others, problems = mixture.plan(*args, **kwargs)
    return [Choice("mixture", way, reason, others), *(_choice("auto", problem) for problem in problems)]


def _choice(backend: str, problem: Problem) -> Choice:
    problem = problem._replace(device=torch.device("cpu")) if problem.device.type == "meta" else problem
    taken, reason = (backend, "asked for") if backend != "auto" else _backend.choose(problem)
    others = {
        other: _backend.why_not(other, problem) or "it could, but is not the fastest here"
        for other in _backend.BACKENDS
        if other not in ("auto", taken)
    }
    return Choice(problem.step, taken, reason, others)
