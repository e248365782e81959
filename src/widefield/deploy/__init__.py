"""Export trained models to files that run without widefield, verified; and quantize them."""

from widefield.deploy._trace import ROUTING
from widefield.deploy.export import PACKAGES, Check, Export, export
from widefield.deploy.info import ModelInfo
from widefield.deploy.quantize import LOSSY, NOISY, Flips, Quantization, QuantizedKernel, RoundedLayer, quantize
from widefield.deploy.record import Deployed
from widefield.deploy.runtime import FORMATS, Runtime, load
from widefield.deploy.throughput import Speed, measure_throughput

__all__ = [
    "FORMATS",
    "LOSSY",
    "NOISY",
    "PACKAGES",
    "ROUTING",
    "Check",
    "Deployed",
    "Export",
    "Flips",
    "ModelInfo",
    "Quantization",
    "QuantizedKernel",
    "RoundedLayer",
    "Runtime",
    "Speed",
    "export",
    "load",
    "measure_throughput",
    "quantize",
]
