"""Provide layers; those that can be reparameterized have ``fuse() -> nn.Module``."""

from widefield.nn.deform import DCNv3, DeformConv2d
from widefield.nn.depthwise import DepthwiseConv2d
from widefield.nn.elastic import ElasticConv2d
from widefield.nn.gmconv import DynamicGMConv2d, GMConv2d
from widefield.nn.gnconv import GlobalLocalFilter, GnConv
from widefield.nn.grn import GRN
from widefield.nn.inception import InceptionDWConv2d
from widefield.nn.large_kernel import DecomposedConv2d, DilatedReparamConv2d, LargeKernelConv2d
from widefield.nn.lka import LKA, LKAAttention
from widefield.nn.moga import ChannelAggregationFFN, MultiOrderDWConv, MultiOrderGatedAggregation
from widefield.nn.morf import FusedMoRFConv2d, MoRFConv2d
from widefield.nn.recompute import Recomputing
from widefield.nn.reparam import ConvNorm, ReparamConv2d
from widefield.nn.router import Router, load_balancing
from widefield.nn.same import DepthwiseConv2dSame, SameAligned

__all__ = [
    "GRN",
    "LKA",
    "ChannelAggregationFFN",
    "ConvNorm",
    "DCNv3",
    "DecomposedConv2d",
    "DeformConv2d",
    "DepthwiseConv2d",
    "DepthwiseConv2dSame",
    "DilatedReparamConv2d",
    "DynamicGMConv2d",
    "ElasticConv2d",
    "FusedMoRFConv2d",
    "GMConv2d",
    "GlobalLocalFilter",
    "GnConv",
    "InceptionDWConv2d",
    "LKAAttention",
    "LargeKernelConv2d",
    "MoRFConv2d",
    "MultiOrderDWConv",
    "MultiOrderGatedAggregation",
    "Recomputing",
    "ReparamConv2d",
    "Router",
    "SameAligned",
    "load_balancing",
]
