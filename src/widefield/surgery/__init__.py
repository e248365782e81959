"""Change the layers of any model: convert, re-parameterise."""

from widefield.surgery.conversions import (
    Conversion,
    Deformable,
    FastDepthwise,
    GMConv,
    InceptionSplit,
    LargeKernel,
    MoRF,
    Place,
    TokenMixer,
)
from widefield.surgery.convert import Plan, Step, convert, plan
from widefield.surgery.outputs import Change, Difference, compare, measure_change
from widefield.surgery.reparameterize import reparameterize
from widefield.surgery.sparsity import DynamicSparsity
from widefield.surgery.walk import fuse_layers

__all__ = [
    "Change",
    "Conversion",
    "Deformable",
    "Difference",
    "DynamicSparsity",
    "FastDepthwise",
    "GMConv",
    "InceptionSplit",
    "LargeKernel",
    "MoRF",
    "Place",
    "Plan",
    "Step",
    "TokenMixer",
    "compare",
    "convert",
    "fuse_layers",
    "measure_change",
    "plan",
    "reparameterize",
]
