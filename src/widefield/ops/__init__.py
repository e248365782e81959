"""Operators: tensors in, tensors out. Each has a plain-torch form that is the oracle of its other backends."""

from widefield.ops.mixture import bank_conv2d, mixture_conv2d

__all__ = ["bank_conv2d", "mixture_conv2d"]
