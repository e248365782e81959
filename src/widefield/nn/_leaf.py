"""Layers as leaves of torch.fx: symbolic tracing records one call, as it does for the layers of torch.nn."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch import fx

ENTERS = "enters_widefield_layers"
"""A tracer with this attribute set to True traces the operations inside of layers instead."""

_Forward = TypeVar("_Forward", bound=Callable[..., Any])


def leaf(forward: _Forward) -> _Forward:
    """Make the ``forward`` of a layer one node in the graphs of torch.fx.

    Layers need it if they look at shapes, which symbols do not have.
    """

    @functools.wraps(forward)
    def recorded_or_run(self: Any, x: Any) -> Any:
        if isinstance(x, fx.Proxy) and not getattr(x.tracer, ENTERS, False):
            return _recorded(self, x)
        return forward(self, x)

    return recorded_or_run  # type: ignore[return-value]


def _recorded(layer: Any, x: fx.Proxy) -> Any:
    tracer: Any = x.tracer
    if tracer.root is layer:
        raise TypeError(
            f"torch.fx records a {type(layer).__name__} as one call, so it cannot be the root of a trace: trace a "
            "model that contains it, such as torch.nn.Sequential(layer)."
        )
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (x,), {})
