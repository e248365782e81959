"""Change the layers of any model: convert, reparameterize, specialize, trim."""

from widefield.surgery.anatomy import Anatomy, Stage, anatomy
from widefield.surgery.compare import Difference, NothingToCompareError, compare
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
from widefield.surgery.elastic import Elastic, Resize, choose_sizes, draw_sizes, elastic_layers
from widefield.surgery.reparameterize import NothingToFuseError, reparameterize
from widefield.surgery.reparameterize_report import FusedLayer, LeftLayer, Reparameterization
from widefield.surgery.sparsity import DynamicSparsity
from widefield.surgery.specialize import RoutedLayer, Specialization, specialize
from widefield.surgery.trim import trim
from widefield.surgery.trim_report import TrimmedKernel, Trimming
from widefield.surgery.walk import fuse_layers

__all__ = [
    "Anatomy",
    "Conversion",
    "Deformable",
    "Difference",
    "DynamicSparsity",
    "Elastic",
    "FastDepthwise",
    "FusedLayer",
    "GMConv",
    "InceptionSplit",
    "LargeKernel",
    "LeftLayer",
    "MoRF",
    "NothingToCompareError",
    "NothingToFuseError",
    "Place",
    "Plan",
    "Reparameterization",
    "Resize",
    "RoutedLayer",
    "Specialization",
    "Stage",
    "Step",
    "TokenMixer",
    "TrimmedKernel",
    "Trimming",
    "anatomy",
    "choose_sizes",
    "compare",
    "convert",
    "draw_sizes",
    "elastic_layers",
    "fuse_layers",
    "plan",
    "reparameterize",
    "specialize",
    "trim",
]
