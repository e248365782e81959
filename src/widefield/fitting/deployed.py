"""Export the network of a fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from widefield.data import SampleSet
from widefield.deploy import ModelInfo, export
from widefield.surgery import NothingToFuseError, reparameterize

if TYPE_CHECKING:
    from widefield.fitting.result import FitResult

MODEL = "model.onnx"


def export_model(result: FitResult, images: Tensor, val: SampleSet) -> str:
    """Write ``model.onnx`` and its record into the fit's folder; return why it could not be done, or an empty text.

    Args:
        result: of the fit.
        images: (N, C, H, W), an example.
        val: the val split, for class names and normalization.
    """
    model = result.model()
    with torch.no_grad():
        try:
            model = reparameterize(model, images[:1])
        except NothingToFuseError:
            pass
        except (RuntimeError, ValueError) as error:
            return f"{MODEL} is not written: {error}"
    skeleton = getattr(val, "skeleton", None)
    names = skeleton.names if skeleton is not None else getattr(val, "object_classes", None) or val.classes
    height, width = images.shape[2:]
    size = (int(height), int(width))
    info = ModelInfo(tuple(names) or None, tuple(val.mean) or None, tuple(val.std) or None, size)
    try:
        export(model, result.folder / MODEL, images[:1], info=info)
    except (RuntimeError, ValueError, TypeError) as error:
        return f"{MODEL} is not written: {error}"
    return ""
