"""Tell detectors in checkpoint files apart, and explain why one does not fit a model."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from torch import Size, Tensor, nn

from widefield.dense._checkpoint_files import Checkpoint
from widefield.dense._torchvision import is_torchvision, outputs_of, to_openmmlab
from widefield.dense.fcos import FCOSHead

_DETECTORS = {
    "CascadeRCNN": r"roi_head\.bbox_head\.\d\.fc_cls\.",
    "MaskRCNN": r"roi_head\.mask_head\.conv_logits\.",
    "FasterRCNN": r"roi_head\.bbox_head\.fc_cls\.",
    "RetinaNet": r"bbox_head\.retina_cls\.",
    "FCOS": r"bbox_head\.conv_centerness\.",
}
"""Detector -> start of weights that only it has; the first that is found counts."""

CLASSIFIER = (
    r"roi_head\.bbox_head\.(?:\d\.)?fc_(?:cls|reg)\.|roi_head\.mask_head\.(?:\d\.)?conv_logits\.|"
    r"bbox_head\.(?:retina_cls|conv_cls)\."
)
"""Weights whose shape depends on the number of classes, of boxes only if there is one per class."""

_HEADS = ("rpn_head.", "roi_head.", "bbox_head.", "mask_head.")

_CAFFE = r"\bstyle\W{1,4}caffe"
"""In a configuration: a ResNet with its strides in the 1x1 convolutions. Its weights have the usual names."""

_LEGACY = r"\banchor_(?:ratios|scales)\b|\bLegacy(?:AnchorGenerator|DeltaXYWHBBoxCoder)"
"""In a configuration: anchors and box coding of mmdetection 1.x."""


def detector_of(names: Iterable[str]) -> str | None:
    """Return the name of the detector that has these weights, or None if it is not known."""
    names = list(names)
    return next((kind for kind, start in _DETECTORS.items() if any(re.match(start, name) for name in names)), None)


def classes_of(shapes: Mapping[str, Size]) -> int | None:
    """Return the number of classes of a detector, without the background, or None if it is not known."""
    for name in ("roi_head.bbox_head.fc_cls.bias", "roi_head.bbox_head.0.fc_cls.bias"):
        if name in shapes:
            return shapes[name][0] - 1
    if {"bbox_head.retina_cls.bias", "bbox_head.retina_reg.bias"} <= shapes.keys():
        return 4 * shapes["bbox_head.retina_cls.bias"][0] // shapes["bbox_head.retina_reg.bias"][0]
    return shapes["bbox_head.conv_cls.bias"][0] if "bbox_head.conv_cls.bias" in shapes else None


def usual_name(name: str) -> str:
    """Return the name in mmdetection 3.x: FCOS had others for its last layers at first."""
    return re.sub(r"^bbox_head\.fcos_(cls|reg|centerness)\.", r"bbox_head.conv_\1.", name)


# Files of other libraries and versions


def in_openmmlab_form(file: Checkpoint, num_classes: int | None = None) -> Checkpoint:
    """Return a file with OpenMMLab's names and order of classes; only torchvision's files change.

    Args:
        file: the file.
        num_classes: of the model that is to take it; see :func:`widefield.dense._torchvision.to_openmmlab`.
    """
    if not is_torchvision(file.weights):
        return file
    weights: dict[str, Tensor] = to_openmmlab(file.weights, num_classes)
    count = classes_of({name: value.shape for name, value in weights.items()})
    outputs = outputs_of(file.weights)
    chosen = "" if count == outputs - 1 else f"; the {count} categories of COCO were chosen from {outputs} outputs"
    note = f"names and order of classes were converted from torchvision's{chosen}"
    return Checkpoint(file.path, weights, file.skipped, file.classes, file.palette, file.config, converted=note)


def refusal(file: Checkpoint, model: nn.Module, parts: Collection[str] | None = None) -> str | None:
    """Return why a file must not be loaded although its weights may fit, or None.

    Args:
        file: the file, in OpenMMLab's form.
        model: the model that is to take it.
        parts: the parts to load; None for all.
    """
    if re.search(_CAFFE, file.config) and "backbone.layer1.0.conv1.weight" in file.weights:
        return (
            "its ResNet has the strides in the 1x1 convolutions (style='caffe'), this one in the 3x3 convolutions. "
            "The weights would fit and compute something else. Take a file with style='pytorch'."
        )
    if parts is not None and set(parts) <= {"backbone", "neck"}:
        return None
    head = model._modules.get("bbox_head")
    return _of_version_1(file) or (_of_fcos(file, head) if isinstance(head, FCOSHead) else None)


def _of_version_1(file: Checkpoint) -> str | None:
    names = [name for name in file.weights if name.startswith(_HEADS)]
    flat = any(name.startswith(("bbox_head.fc_cls.", "bbox_head.0.", "bbox_head.shared_fcs.")) for name in names)
    if not names or not (flat or re.search(_LEGACY, file.config)):
        return None
    return (
        "it is of mmdetection 1.x, which has the background as class 0, rounded anchors, and boxes one pixel larger. "
        "Its weights would give other boxes. Take a file of mmdetection 2.x or 3.x; parts='backbone' loads its "
        "backbone."
    )


def _of_fcos(file: Checkpoint, head: FCOSHead) -> str | None:
    """Compare settings of FCOS that change what weights mean but not their shapes."""
    settings = (
        ("norm_on_bbox", "distances", head.distances == "relu", ("exp", "relu")),
        ("centerness_on_reg", "centerness_on", head.centerness_on == "boxes", ("classification", "boxes")),
    )
    for theirs, ours, found, names in settings:
        wanted = re.search(rf"\b{theirs}\W{{1,4}}True\b", file.config) is not None
        if re.search(r"\bFCOSHead\b", file.config) and wanted is not found:
            return (
                f"it was trained with {theirs}={wanted}, and this FCOS has {ours}={names[found]!r}: build it with "
                f"{ours}={names[wanted]!r}."
            )
    return None


# Explaining differences


def details(
    missing: Iterable[str], unknown: Iterable[str], model: Mapping[str, Size], file: Mapping[str, Size]
) -> list[str]:
    """Return sentences that say why the heads of two detectors differ, and what to do.

    Args:
        missing: the model's names that the file lacks.
        unknown: the file's names that the model lacks.
        model, file: their names and shapes.
    """
    found = []
    missing, unknown = list(missing), list(unknown)
    ours, theirs = classes_of(model), classes_of(file)
    if ours and theirs and ours != theirs:
        found.append(
            f"The file has {theirs} classes, the model {ours}: build the model with num_classes={theirs}, or keep its "
            "own last layers with fresh_classifier=True."
        )
    if any(name.startswith("rpn_head.rpn_conv.1.") for name in unknown):
        found.append("The file's RPN has two convolutions (torchvision's v2 models), RPNs here have one.")
    if any(re.match(r"neck\.lateral_convs\.\d\.bn\.", name) for name in unknown):
        found.append("The file's feature pyramid has batch norms, those of detectors here have none.")
    for kinds in ((unknown, missing), (missing, unknown)):
        convs = [any(".shared_convs." in name for name in names) for names in kinds]
        if convs == [True, False]:
            wanted = "4conv1fc" if kinds[0] is unknown else "shared2fc"
            found.append(f"The file has another box head: build the model with box_head={wanted!r}.")
    if _agnostic(model) is not None and _agnostic(file) is not None and _agnostic(model) != _agnostic(file):
        agnostic = _agnostic(file)
        boxes = "one box for all classes" if agnostic else "a box for each class"
        found.append(f"The file predicts {boxes}: build the model with class_agnostic={agnostic}.")
    if any(re.match(r"bbox_head\.(?:cls|reg)_convs\.\d\.conv\.bias", name) for name in (*missing, *unknown)):
        biased = any(name.endswith("_convs.0.conv.bias") for name in unknown)
        if any(".gn." in name for name in file) == any(".gn." in name for name in model):
            found.append(f"Convolutions of the file's head have {'a' if biased else 'no'} bias: build the model with "
                         f"conv_bias={biased}.")  # fmt: skip
    return found


def _agnostic(shapes: Mapping[str, Size]) -> bool | None:
    for name in ("roi_head.bbox_head.fc_reg.bias", "roi_head.bbox_head.0.fc_reg.bias"):
        if name in shapes:
            return shapes[name][0] == 4
    return None
