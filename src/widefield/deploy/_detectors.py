"""Export detectors: as graphs with outputs of fixed shapes, whose detections are read back to be compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from widefield.deploy.runtime import Runtime
from widefield.surgery.anatomy import anatomy

LEAST_CELLS = 3
"""Rows and columns that the coarsest map must have when a graph for any size is traced. Those of 1 become constants."""


def is_detector(model: nn.Module) -> bool:
    """Return whether a model is a detector of ``widefield.dense``, which can be served as a graph."""
    return callable(getattr(model, "served", None))


def served(model: Any, nms: str, format: str) -> nn.Module:
    """Return a detector as a graph, see :class:`widefield.dense.ServedDetector`.

    Raises ValueError for a format that cannot hold non-maximum suppression.
    """
    if format == "pt2":
        raise ValueError(
            "archives of PyTorch (.pt2) hold no non-maximum suppression that runs without widefield: write a detector "
            "as .onnx or .xml."
        )
    graph: nn.Module = model.served(nms)
    return graph


def reading(graph: Any, exported: Runtime) -> Callable[[Tensor], Any]:
    """Return a callable that runs a file and returns the detections of each image."""

    def answer(images: Tensor) -> Any:
        return graph.detections(exported.named(images))

    return answer


def heads_of(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return which of these layers are part of the heads."""
    parts = anatomy(model)
    return [name for name in dict.fromkeys(names) if parts.part(name) == "head"]


def rules_of(graph: Any) -> dict[str, Any]:
    """Return where the last suppression of a graph is, and its rules."""
    return {"nms": graph.nms, **graph.rules}


def traceable(model: Any, x: Tensor, dynamic: Sequence[str]) -> Tensor:
    """Return an example from which a graph for any size can be traced: of detectors, an enlarged one."""
    stride = getattr(model, "largest_stride", 0)
    if "size" not in dynamic or not stride:
        return x
    side = LEAST_CELLS * stride
    return F.pad(x, (0, max(0, side - x.shape[3]), 0, max(0, side - x.shape[2])))
