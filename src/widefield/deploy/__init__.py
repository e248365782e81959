"""From a trained model to what serves it: files that run without widefield, verified."""

from widefield.deploy._trace import ROUTING
from widefield.deploy.export import PACKAGES, Check, Export, export
from widefield.deploy.quantize import Flips, Quantization, QuantizedKernel, quantize
from widefield.deploy.runtime import FORMATS, Runtime, load
from widefield.deploy.throughput import Speed, measure_throughput

__all__ = [
    "FORMATS",
    "PACKAGES",
    "ROUTING",
    "Check",
    "Export",
    "Flips",
    "Quantization",
    "QuantizedKernel",
    "Runtime",
    "Speed",
    "export",
    "load",
    "measure_throughput",
    "quantize",
]
