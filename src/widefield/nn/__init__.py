"""Layers, one idea a file. A layer that can be re-parameterised has ``fuse() -> nn.Module``."""

from widefield.nn.depthwise import DepthwiseConv2d
from widefield.nn.morf import FusedMoRFConv2d, MoRFConv2d
from widefield.nn.reparam import ConvNorm, DecomposedConv2d, DilatedReparamConv2d, LargeKernelConv2d, ReparamConv2d
from widefield.nn.router import Router, load_balancing

__all__ = [
    "ConvNorm",
    "DecomposedConv2d",
    "DepthwiseConv2d",
    "DilatedReparamConv2d",
    "FusedMoRFConv2d",
    "LargeKernelConv2d",
    "MoRFConv2d",
    "ReparamConv2d",
    "Router",
    "load_balancing",
]
