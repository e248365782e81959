"""Export detectors: as graphs with outputs of fixed shapes, whose detections are read back to be compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from widefield.dense import Detector, ServedDetector
from widefield.deploy.runtime import Runtime
from widefield.surgery.anatomy import anatomy

LEAST_CELLS = 3
"""Rows and columns that the coarsest map must have when a graph for any size is traced. Those of 1 become constants."""


def is_detector(model: nn.Module) -> bool:
    """Return whether a model is a detector of :mod:`widefield.dense`, which can be a graph of fixed shapes."""
    return isinstance(model, Detector)


def served(model: nn.Module, nms: str, format: str) -> ServedDetector:
    """Return a detector as a graph, see :class:`widefield.dense.ServedDetector`.

    Raises ValueError for a format that cannot hold non-maximum suppression.
    """
    if format == "pt2":
        raise ValueError(
            "archives of PyTorch (.pt2) hold no non-maximum suppression that runs without widefield: write a detector "
            "as .onnx or .xml."
        )
    return ServedDetector(cast(Detector, model), nms)


def reading(graph: nn.Module, exported: Runtime) -> Callable[[Tensor], Any]:
    """Return a callable that runs a file and returns the detections of each image."""

    def answer(images: Tensor) -> Any:
        return cast(ServedDetector, graph).detections(exported.named(images))

    return answer


def heads_of(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return which of these layers are part of the heads."""
    parts = anatomy(model)
    return [name for name in dict.fromkeys(names) if parts.part(name) == "head"]


def rules_of(graph: nn.Module) -> dict[str, Any]:
    """Return where the last suppression of a graph is, and its rules."""
    served = cast(ServedDetector, graph)
    return {"nms": served.nms, **vars(served.rules)}


def traceable(model: nn.Module, x: Tensor, dynamic: Sequence[str]) -> Tensor:
    """Return an example from which a graph for any size can be traced: of detectors, an enlarged one."""
    if "size" not in dynamic or not isinstance(model, ServedDetector):
        return x
    side = LEAST_CELLS * model.largest_stride
    return F.pad(x, (0, max(0, side - x.shape[3]), 0, max(0, side - x.shape[2])))
