"""Convert the weights of torchvision's detectors to OpenMMLab's names and order of classes.

torchvision has the background as class 0. OpenMMLab has it last in two-stage detectors, and not at all in the others.
Names and layouts were read in torchvision 0.29, ``torchvision.models.detection``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

COCO_OUTPUTS = 91
"""Classes of a torchvision model that was trained on COCO: ids from 0 to 90, the background first."""

COCO_IDS = tuple(i for i in range(1, COCO_OUTPUTS) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
"""Ids of COCO's 80 categories. The others were never used."""

COCO_CLASSES = len(COCO_IDS)

_RETINANET = "head.classification_head."
_FCOS = "head.regression_head.bbox_ctrness."

_NAMES = (
    (r"backbone\.body\.", "backbone."),
    (r"backbone\.fpn\.extra_blocks\.p6\.", "neck.fpn_convs.3.conv."),
    (r"backbone\.fpn\.extra_blocks\.p7\.", "neck.fpn_convs.4.conv."),
    (r"backbone\.fpn\.inner_blocks\.(\d)\.1\.", r"neck.lateral_convs.\1.bn."),
    (r"backbone\.fpn\.inner_blocks\.(\d)\.(?:0\.)?", r"neck.lateral_convs.\1.conv."),
    (r"backbone\.fpn\.layer_blocks\.(\d)\.1\.", r"neck.fpn_convs.\1.bn."),
    (r"backbone\.fpn\.layer_blocks\.(\d)\.(?:0\.)?", r"neck.fpn_convs.\1.conv."),
    (r"rpn\.head\.conv\.(?:0\.0\.)?(?!\d)", "rpn_head.rpn_conv."),
    (r"rpn\.head\.conv\.(\d)\.0\.", r"rpn_head.rpn_conv.\1.conv."),
    (r"rpn\.head\.cls_logits\.", "rpn_head.rpn_cls."),
    (r"rpn\.head\.bbox_pred\.", "rpn_head.rpn_reg."),
    (r"roi_heads\.box_head\.(?:fc6|5)\.", "roi_head.bbox_head.shared_fcs.0."),
    (r"roi_heads\.box_head\.fc7\.", "roi_head.bbox_head.shared_fcs.1."),
    (r"roi_heads\.box_head\.(\d)\.0\.", r"roi_head.bbox_head.shared_convs.\1.conv."),
    (r"roi_heads\.box_head\.(\d)\.1\.", r"roi_head.bbox_head.shared_convs.\1.bn."),
    (r"roi_heads\.box_predictor\.cls_score\.", "roi_head.bbox_head.fc_cls."),
    (r"roi_heads\.box_predictor\.bbox_pred\.", "roi_head.bbox_head.fc_reg."),
    *((rf"roi_heads\.mask_head\.mask_fcn{i + 1}\.", f"roi_head.mask_head.convs.{i}.conv.") for i in range(4)),
    (r"roi_heads\.mask_head\.(\d)\.0\.", r"roi_head.mask_head.convs.\1.conv."),
    (r"roi_heads\.mask_head\.(\d)\.1\.", r"roi_head.mask_head.convs.\1.bn."),
    (r"roi_heads\.mask_predictor\.conv5_mask\.", "roi_head.mask_head.upsample."),
    (r"roi_heads\.mask_predictor\.mask_fcn_logits\.", "roi_head.mask_head.conv_logits."),
)
"""(start of torchvision's name, OpenMMLab's), of all but the heads of one-stage detectors. The first that fits counts.

The second form of a name is that of files from before 2022.
"""

_BRANCH = r"head\.(classification|regression)_head\.conv\."
_SHORT = {"classification": "cls", "regression": "reg"}


def is_torchvision(weights: Mapping[str, Tensor]) -> bool:
    """Return whether these are the weights of one of torchvision's detectors with a feature pyramid."""
    return all(any(key.startswith(f"backbone.{part}.") for key in weights) for part in ("body", "fpn"))


def outputs_of(weights: Mapping[str, Tensor]) -> int:
    """Return the number of classes of a torchvision detector, with the background; 0 if it is not known."""
    two_stage = weights.get("roi_heads.box_predictor.cls_score.bias")
    if two_stage is not None:
        return len(two_stage)
    logits, boxes = (weights.get(f"head.{name}.bias") for name in _LAST)
    return 0 if logits is None or boxes is None else 4 * len(logits) // len(boxes)


_LAST = ("classification_head.cls_logits", "regression_head.bbox_reg")


def to_openmmlab(weights: Mapping[str, Tensor], num_classes: int | None = None) -> dict[str, Tensor]:
    """Return the weights under OpenMMLab's names, with its classes in its order.

    Keys without an equivalent keep their names.

    Args:
        weights: of a torchvision detector.
        num_classes: of the model that takes them. If it is 80 and the file has COCO's 91 outputs, the outputs of the
            ids without a category are left out.
    """
    outputs = outputs_of(weights)
    coco = outputs == COCO_OUTPUTS and num_classes == COCO_CLASSES
    classes = COCO_IDS if coco else range(1, outputs)
    fcos = any(key.startswith(_FCOS) for key in weights)
    found: dict[str, Tensor] = {}
    for key, value in weights.items():
        name = _name(key, fcos)
        found[name] = _reordered(name, value, classes, outputs)
        if name.endswith(".running_var"):  # frozen norms have no counter
            counter = name.replace("running_var", "num_batches_tracked")
            found.setdefault(counter, torch.zeros((), dtype=torch.int64))
    if fcos:
        found |= {f"bbox_head.scales.{level}.scale": torch.ones(()) for level in range(5)}
    return found


def _name(key: str, fcos: bool) -> str:
    if key.startswith("head."):
        return _one_stage_name(key, fcos)
    for pattern, template in _NAMES:
        start = re.match(pattern, key)
        if start:
            return start.expand(template) + key[start.end() :]
    return key


def _one_stage_name(key: str, fcos: bool) -> str:
    nested = re.fullmatch(rf"{_BRANCH}(\d+)\.([01])\.(\w+)", key)  # blocks of convolution, norm and ReLU
    if nested:
        branch, index, part, leaf = nested.groups()
        return f"bbox_head.{_SHORT[branch]}_convs.{index}.{('conv', 'gn')[int(part)]}.{leaf}"
    flat = re.fullmatch(rf"{_BRANCH}(\d+)\.(\w+)", key)  # a sequence of all layers
    if flat:
        block, part = divmod(int(flat[2]), 3 if fcos else 2)
        return f"bbox_head.{_SHORT[flat[1]]}_convs.{block}.{('conv', 'gn')[part]}.{flat[3]}"
    own = "conv" if fcos else "retina"
    names = {f"{_LAST[0]}.": f"{own}_cls.", f"{_LAST[1]}.": f"{own}_reg.", f"{_FCOS[5:]}": "conv_centerness."}
    for theirs, ours in names.items():
        if key.startswith(f"head.{theirs}"):
            return f"bbox_head.{ours}{key[5 + len(theirs) :]}"
    return key


def _reordered(name: str, value: Tensor, classes: Sequence[int], outputs: int) -> Tensor:
    """Return a weight with OpenMMLab's rows."""
    part = name.rpartition(".")[0]
    index = torch.tensor(classes, device=value.device)
    if part == "roi_head.bbox_head.fc_cls":
        return torch.cat((value.index_select(0, index), value[:1]))
    if part in ("roi_head.mask_head.conv_logits", "bbox_head.conv_cls"):
        return value.index_select(0, index)
    if part == "roi_head.bbox_head.fc_reg" and len(value) == 4 * outputs:
        return value.reshape(outputs, 4, *value.shape[1:]).index_select(0, index).flatten(0, 1)
    if part == "bbox_head.retina_cls":
        return value.reshape(-1, outputs, *value.shape[1:]).index_select(1, index).flatten(0, 1)
    return value
