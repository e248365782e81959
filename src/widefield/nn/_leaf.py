"""Layers that torch.fx takes as they are, as it takes those of torch.nn."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn


def is_symbolic(x: Any) -> bool:
    """Return whether torch.fx traces the call, and x stands for a tensor."""
    return isinstance(x, fx.Proxy)


def recorded(module: nn.Module, x: Any) -> Tensor:
    """Record a call of ``module`` in the graph that is traced, and return the symbol of its output."""
    output: Tensor = x.tracer.create_proxy("call_module", x.tracer.path_of_module(module), (x,), {})
    return output
