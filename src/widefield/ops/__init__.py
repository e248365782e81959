"""Provide operators on tensors; each has a plain PyTorch implementation as the reference for its other backends."""

from widefield.ops.deform import dcnv3
from widefield.ops.depthwise import depthwise_conv2d
from widefield.ops.explain import Choice, Explanation, explain
from widefield.ops.mixture import bank_conv2d, mixture_conv2d
from widefield.ops.per_sample import per_sample_conv2d

__all__ = [
    "Choice",
    "Explanation",
    "bank_conv2d",
    "dcnv3",
    "depthwise_conv2d",
    "explain",
    "mixture_conv2d",
    "per_sample_conv2d",
]
