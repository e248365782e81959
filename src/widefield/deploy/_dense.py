"""Export detectors and pose models: as graphs with outputs of fixed shapes, which are read back to be compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from widefield import _checks
from widefield.dense import Detector, HeatmapPose, ServedDetector, ServedPose
from widefield.dense.served_pose import DECODING
from widefield.dense.serving import NMS
from widefield.deploy.runtime import Runtime
from widefield.surgery.anatomy import anatomy

LEAST_CELLS = 3
"""Rows and columns that the coarsest map must have when a graph for any size is traced. Those of 1 become constants."""


def is_detector(model: nn.Module) -> bool:
    """Return whether a model is a detector of :mod:`widefield.dense`, which can be a graph of fixed shapes."""
    return isinstance(model, Detector)


def served(model: nn.Module, format: str, *, nms: str = "inside", decoding: str = "inside") -> nn.Module:
    """Return a detector or pose model as a graph with outputs of fixed shapes; other models as they are.

    Args:
        model: any.
        format: of the file.
        nms: of detectors; see :class:`widefield.dense.ServedDetector`.
        decoding: of pose models; see :class:`widefield.dense.ServedPose`.

    Raises:
        ValueError: an unknown option, or a format that cannot hold non-maximum suppression.
    """
    _checks.choice("nms", nms, NMS)
    _checks.choice("decoding", decoding, DECODING)
    if isinstance(model, HeatmapPose):
        return ServedPose(model, decoding)
    if not isinstance(model, Detector):
        return model
    if format == "pt2":
        raise ValueError(
            "archives of PyTorch (.pt2) hold no non-maximum suppression that runs without widefield: write a detector "
            "as .onnx or .xml."
        )
    return ServedDetector(model, nms)


def reading(graph: nn.Module, exported: Runtime) -> Callable[[Tensor], Any]:
    """Return a callable that runs a file and returns what can be compared: the detections of each image, or outputs."""
    if not isinstance(graph, ServedDetector):
        return exported

    def answer(images: Tensor) -> Any:
        return graph.detections(exported.named(images))

    return answer


def heads_of(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return which of these layers are part of the heads."""
    parts = anatomy(model)
    return [name for name in dict.fromkeys(names) if parts.part(name) == "head"]


def rules_of(graph: nn.Module) -> dict[str, Any]:
    """Return where the last suppression of a detector's graph is, and its rules; or how a pose model's is decoded."""
    if isinstance(graph, ServedPose):
        return graph.rules
    return {"nms": graph.nms, **vars(graph.rules)} if isinstance(graph, ServedDetector) else {}


def traceable(model: nn.Module, x: Tensor, dynamic: Sequence[str]) -> Tensor:
    """Return an example from which a graph for any size can be traced: for dense models, an enlarged one."""
    if "size" not in dynamic or not isinstance(model, (ServedDetector, ServedPose)):
        return x
    side = LEAST_CELLS * model.largest_stride
    return F.pad(x, (0, max(0, side - x.shape[3]), 0, max(0, side - x.shape[2])))
