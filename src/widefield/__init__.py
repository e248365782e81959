"""Receptive fields in convolutional networks.

Importing the package registers its models in timm. Everything else is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import widefield.models  # noqa: F401  registers the models in timm

if TYPE_CHECKING:
    from widefield.deploy import export, quantize
    from widefield.nn import (
        GRN,
        LKA,
        ChannelAggregationFFN,
        DCNv3,
        DecomposedConv2d,
        DeformConv2d,
        DepthwiseConv2d,
        DilatedReparamConv2d,
        DynamicGMConv2d,
        FusedMoRFConv2d,
        GlobalLocalFilter,
        GMConv2d,
        GnConv,
        InceptionDWConv2d,
        LargeKernelConv2d,
        LKAAttention,
        MoRFConv2d,
        MultiOrderDWConv,
        MultiOrderGatedAggregation,
        load_balancing,
    )
    from widefield.ops import dcnv3, depthwise_conv2d, explain, mixture_conv2d, per_sample_conv2d
    from widefield.surgery import (
        Deformable,
        DynamicSparsity,
        FastDepthwise,
        GMConv,
        InceptionSplit,
        LargeKernel,
        MoRF,
        TokenMixer,
        compare,
        convert,
        measure_change,
        plan,
        reparameterize,
        specialize,
        trim,
    )

__version__ = "0.1.0"

_HOMES = {
    "ChannelAggregationFFN": "widefield.nn",
    "DCNv3": "widefield.nn",
    "DecomposedConv2d": "widefield.nn",
    "DeformConv2d": "widefield.nn",
    "Deformable": "widefield.surgery",
    "DepthwiseConv2d": "widefield.nn",
    "DilatedReparamConv2d": "widefield.nn",
    "DynamicGMConv2d": "widefield.nn",
    "DynamicSparsity": "widefield.surgery",
    "FastDepthwise": "widefield.surgery",
    "FusedMoRFConv2d": "widefield.nn",
    "GMConv": "widefield.surgery",
    "GMConv2d": "widefield.nn",
    "GRN": "widefield.nn",
    "GlobalLocalFilter": "widefield.nn",
    "GnConv": "widefield.nn",
    "InceptionDWConv2d": "widefield.nn",
    "InceptionSplit": "widefield.surgery",
    "LKA": "widefield.nn",
    "LKAAttention": "widefield.nn",
    "LargeKernel": "widefield.surgery",
    "LargeKernelConv2d": "widefield.nn",
    "MoRF": "widefield.surgery",
    "MoRFConv2d": "widefield.nn",
    "MultiOrderDWConv": "widefield.nn",
    "MultiOrderGatedAggregation": "widefield.nn",
    "TokenMixer": "widefield.surgery",
    "compare": "widefield.surgery",
    "convert": "widefield.surgery",
    "dcnv3": "widefield.ops",
    "depthwise_conv2d": "widefield.ops",
    "explain": "widefield.ops",
    "export": "widefield.deploy",
    "load_balancing": "widefield.nn",
    "measure_change": "widefield.surgery",
    "mixture_conv2d": "widefield.ops",
    "per_sample_conv2d": "widefield.ops",
    "plan": "widefield.surgery",
    "quantize": "widefield.deploy",
    "reparameterize": "widefield.surgery",
    "specialize": "widefield.surgery",
    "trim": "widefield.surgery",
}
_ROOMS = ("analysis", "bench", "data", "deploy", "models", "nn", "ops", "report", "runs", "surgery", "tasks", "train")

__all__ = [
    "GRN",
    "LKA",
    "ChannelAggregationFFN",
    "DCNv3",
    "DecomposedConv2d",
    "DeformConv2d",
    "Deformable",
    "DepthwiseConv2d",
    "DilatedReparamConv2d",
    "DynamicGMConv2d",
    "DynamicSparsity",
    "FastDepthwise",
    "FusedMoRFConv2d",
    "GMConv",
    "GMConv2d",
    "GlobalLocalFilter",
    "GnConv",
    "InceptionDWConv2d",
    "InceptionSplit",
    "LKAAttention",
    "LargeKernel",
    "LargeKernelConv2d",
    "MoRF",
    "MoRFConv2d",
    "MultiOrderDWConv",
    "MultiOrderGatedAggregation",
    "TokenMixer",
    "compare",
    "convert",
    "dcnv3",
    "depthwise_conv2d",
    "explain",
    "export",
    "load_balancing",
    "measure_change",
    "mixture_conv2d",
    "per_sample_conv2d",
    "plan",
    "quantize",
    "reparameterize",
    "specialize",
    "trim",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"widefield.{name}")
    raise AttributeError(f"module 'widefield' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS, "__version__"])
