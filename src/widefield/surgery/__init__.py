"""Change the layers of any model: convert, re-parameterise."""

from widefield.surgery.convert import Conversion, FastDepthwise, MoRF, Plan, Step, convert, plan
from widefield.surgery.reparameterize import Difference, compare, reparameterize

__all__ = [
    "Conversion",
    "Difference",
    "FastDepthwise",
    "MoRF",
    "Plan",
    "Step",
    "compare",
    "convert",
    "plan",
    "reparameterize",
]
