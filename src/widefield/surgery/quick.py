"""Run plain large depthwise convolutions with our operator while a model is checked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from widefield.nn import DepthwiseConv2d
from widefield.nn.depthwise import why_not
from widefield.surgery.walk import hooked, replace

_TAPS = 49
"""Kernels with more taps are slow in PyTorch: a reparameterized RepLKNet-31B takes three times as long as before."""


def quicker(layer: nn.Module) -> nn.Module:
    """Return a layer that computes the same, with the same parameters; ``layer`` itself unless it is slow.

    Only plain ``torch.nn.Conv2d`` layers with large depthwise kernels are slow.
    """
    conv: Any = layer
    if why_not(layer) is not None or hooked(layer) or "forward" in vars(layer):
        return layer
    if conv.kernel_size[0] * conv.kernel_size[1] <= _TAPS:
        return layer
    return DepthwiseConv2d.from_conv2d(conv)


def slow_layers(root: nn.Module) -> dict[nn.Module, nn.Module]:
    """Return the slow layers of a model with what :func:`quicker` makes of them; none if it is compiled."""
    if any("_orig_mod" in module._modules for module in root.modules()):  # it would be compiled again
        return {}
    found = {module: quicker(module) for module in root.modules()}
    return {module: other for module, other in found.items() if other is not module}


@contextmanager
def quick(root: nn.Module) -> Iterator[nn.Module]:
    """Yield a model with its :func:`slow_layers` replaced; they are back when the block ends."""
    found = slow_layers(root)
    fast = replace(root, found)
    try:
        yield fast
    finally:
        replace(fast, {other: module for module, other in found.items()})
