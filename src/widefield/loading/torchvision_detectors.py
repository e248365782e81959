"""Build torchvision's detectors as those of ``widefield.dense``, with the weights that torchvision publishes."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from widefield import _checks, _history, dense

_KINDS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "fasterrcnn_resnet50_fpn": ("FasterRCNN", {}),
    "maskrcnn_resnet50_fpn": ("MaskRCNN", {}),
    "retinanet_resnet50_fpn": ("RetinaNet", {"extra": "on_output", "relu_before_extra": True}),
    "retinanet_resnet50_fpn_v2": ("RetinaNet", {"norm": "group", "relu_before_extra": True}),
    "fcos_resnet50_fpn": (
        "FCOS",
        {"conv_bias": True, "centerness_on": "boxes", "distances": "relu", "point_offset": 0.0, "nms_threshold": 0.6},
    ),
}
"""torchvision's name -> the class in ``widefield.dense``, and its arguments."""
_FROZEN_NORMS = "COCO_V1"
"""These weights were trained with frozen batch norms whose eps was 0."""
TEST_SCALE = (1333, 800)
"""(longer side, shorter side) of the rectangle that torchvision fits images into, without antialiasing."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def torchvision_detectors() -> list[str]:
    """Return the names of torchvision's detection models, also of those that cannot be built here."""
    from torchvision.models import detection, list_models

    return list(list_models(module=detection))


def build_detector(name: str, given: Mapping[str, Any], *, pretrained: bool) -> tuple[nn.Module, tuple[str, ...]]:
    """Return a detector of torchvision's, and the names of its classes.

    It has 80 classes by default: COCO's categories, without the background and the ten ids that were never used.

    Args:
        name: torchvision's.
        given: further arguments of the class in ``widefield.dense``, such as ``score_threshold``.
        pretrained: download the published weights.

    Raises:
        ValueError: a model that cannot be built here.
        TypeError: an argument that the class does not have.
    """
    if name not in _KINDS:
        raise ValueError(
            f"torchvision's {name} cannot be built here: its RPN, its norms or its backbone are others. "
            f"There are {', '.join(_KINDS)}."
        )
    kind, arguments = _KINDS[name]
    options = {"num_classes": len(coco_categories(name)), **arguments, **given}
    classes = _checks.integer("num_classes", options.pop("num_classes"))
    model: nn.Module = getattr(dense, kind)("resnet50", classes, **options)
    if pretrained:
        _load(model, name)
    names = coco_categories(name)
    return model, names if classes == len(names) else ()


def coco_categories(name: str) -> tuple[str, ...]:
    """Return the names of the 80 categories of COCO in the order of their ids."""
    from torchvision.models import get_model_weights

    listed = get_model_weights(name).DEFAULT.meta["categories"]
    return tuple(category for category in listed if category not in ("__background__", "N/A"))


def _load(model: nn.Module, name: str) -> None:
    from torchvision.models import get_model_weights

    published = get_model_weights(name).DEFAULT
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"{name}.pth")
        torch.save(published.get_state_dict(progress=False, check_hash=True), file)
        dense.load_checkpoint(model, file)
    if published.name == _FROZEN_NORMS:
        inside = model.get_submodule("backbone").named_modules()
        norms = {f"backbone.{name}": norm for name, norm in inside if isinstance(norm, nn.BatchNorm2d)}
        for norm in norms.values():
            norm.eps = 0.0
        _history.note(model, "set", attribute="eps", value=0.0, layers=list(norms))
