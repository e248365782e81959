"""Make layers leaves of torch.fx: symbolic tracing records one call, as for the layers of torch.nn.

Layers need this if they read shapes, which symbols do not have. Their ``forward`` begins with::

    if is_symbolic(x):
        return recorded(self, x)

A decorator would be shorter, but all layers would share its code, and torch.compile limits the number of versions of
each piece of code.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, fx, nn

ENTERS = "enters_widefield_layers"
"""A tracer with this attribute set to True traces the operations inside of layers instead."""


def is_symbolic(x: Any) -> bool:
    """Return whether torch.fx traces the call, and x stands for a tensor."""
    return isinstance(x, fx.Proxy) and not getattr(x.tracer, ENTERS, False)


def recorded(layer: nn.Module, x: Any) -> Tensor:
    """Record a call of ``layer`` in the graph that is traced, and return the symbol of its output.

    Raises:
        TypeError: ``layer`` is itself what is traced.
    """
    if x.tracer.root is layer:
        raise TypeError(
            f"torch.fx records a {type(layer).__name__} as one call, so it cannot be the root of a trace: trace a "
            "model that contains it, such as torch.nn.Sequential(layer)."
        )
    return cast(Tensor, x.tracer.create_proxy("call_module", x.tracer.path_of_module(layer), (x,), {}))
