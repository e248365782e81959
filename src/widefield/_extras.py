"""Say which extra of the package installs a module that is missing."""

from __future__ import annotations

import importlib.util

MODULES = {
    "argcomplete": ("argcomplete", "completion"),
    "accelerate": ("accelerate", "train"),
    "jsonargparse": ("jsonargparse", "train"),
    "sklearn": ("scikit-learn", "train"),
    "tensorboard": ("tensorboard", "train"),
    "torchmetrics": ("torchmetrics", "train"),
    "onnx": ("onnx", "export"),
    "onnx_ir": ("onnxscript", "export"),
    "onnxruntime": ("onnxruntime", "export"),
    "onnxscript": ("onnxscript", "export"),
    "openvino": ("openvino", "openvino"),
    "aiohttp": ("aiohttp", "remote"),
    "s3fs": ("s3fs", "remote"),
    "gcsfs": ("gcsfs", "remote"),
    "skimage": ("scikit-image", "photographs"),
}
"""Module -> the package that has it, and the extra that installs the package."""


def need(*modules: str) -> None:
    """Raise ModuleNotFoundError, with the extra to install, for the first of these modules that is not installed."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise _missing(module)


def explained(error: ModuleNotFoundError) -> ModuleNotFoundError:
    """Return an error about a module of an extra as one that names the extra; others are returned as they are."""
    module = (error.name or "").partition(".")[0]
    return _missing(module) if module in MODULES else error


def _missing(module: str) -> ModuleNotFoundError:
    package, extra = MODULES[module]
    return ModuleNotFoundError(f"{package} is not installed: pip install 'widefield[{extra}]'.", name=module)
