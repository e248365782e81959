"""Checks of whole one-stage detectors: maps, outputs, losses, gradients, detections."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dense import mmdet_configs
from dense.anchor_head_checks import built_retina_head
from dense.detection_checks import built_fcos_head, check_detections, check_loss_values, targets_of
from dense.mmdet_configs import Settings
from dense.rules import Differences, images
from dense.segmentation_checks import REMARKS, built_fpn, built_trunk, fill_through_files
from dense.two_stage_checks import backbone_options, check_gradients
from widefield import dense

Document = Mapping[str, Any]

HEAD = ("bbox_head_cfg", "head_cfg")
"""Names of the head's configuration."""

LOSSES = ("losses_eval_mode", "losses")
"""Names of the losses."""

UNREAD = "backbone.norm0."
"""The norm after the first stage, which published backbones have and one-stage detectors do not read."""

Detector = dense.RetinaNet | dense.FCOS


def built_detector(document: Document, differences: Differences) -> tuple[Detector, dict[str, float], dict[str, Any]]:
    """Return the detector that a file describes, the factors of its losses and its rules of evaluation."""
    options = backbone_options(document, differences)
    neck = built_fpn(Settings("neck_cfg", document["neck_cfg"], differences))
    named = next(name for name in HEAD if name in document)
    config = Settings(named, document[named], differences)
    training = Settings("train_cfg", document.get("train_cfg") or {}, differences)
    rules = mmdet_configs.test_rules(Settings("test_cfg", document["test_cfg"], differences))
    model: Detector
    if document["model"].startswith("retinanet"):
        head, weights = built_retina_head(config, training)
        model = dense.RetinaNet(built_trunk(document), head.num_classes, **rules, **options)
        model.neck, model.bbox_head = neck, head
    else:
        points, weights = built_fcos_head(config)
        model = dense.FCOS(built_trunk(document), points.num_classes, **rules, **options)
        model.neck, model.bbox_head = neck, points
    differences.equal("neck_cfg.in_channels", list(model.backbone.channels), list(neck.in_channels))
    return model, weights, rules


def check_one_stage(document: Document, differences: Differences) -> None:
    """Check a whole one-stage detector."""
    model, weights, _ = built_detector(document, differences)
    published = document["state_dict"]
    state = {name: shape for name, shape in published.items() if not name.startswith(UNREAD)}
    fill_through_files(model, state, differences)
    unread = sum(shape[0] for name, shape in published.items() if name.startswith(UNREAD))
    differences.equal("params", sum(p.numel() for p in model.parameters()) + unread, document["params"])
    batch = document["batch"]
    x = images(batch["shape"][2:], batch["shape"][0])
    targets = targets_of(batch["images"], differences, "batch.images")
    differences.fields("batch", batch, ("shape", "images", "gt_masks"))
    features = model.backbone(x)
    maps: list[Tensor] = model.neck(features)
    outputs = model.bbox_head(maps)
    named: dict[str, Sequence[Tensor]] = {"backbone_features": features, "fpn_features": maps}
    named |= dict(zip(("cls_scores", "bbox_preds", "centernesses"), outputs, strict=False))
    for name, levels in named.items():
        for level, (one, expected) in enumerate(zip(levels, document.get(name, ()), strict=name in document)):
            differences.summary(f"{name}[{level}]", one, expected)
    _check_losses(model, weights, maps, model.prepared(x, targets), document, differences)
    sizes = [target.size or (0, 0) for target in targets]
    with torch.no_grad():
        for name, out in (("detections", None), ("detections_rescaled", [e["ori_shape"] for e in batch["images"]])):
            if name in document:
                found = model(x, sizes=sizes, out_sizes=out)
                check_detections(name, found, document[name], differences)
    known = ("backbone_cfg", "neck_cfg", "train_cfg", "test_cfg", "params", "batch", "total_loss", "detections",
             "detections_rescaled", "grad_l2", "state_dict", *HEAD, *LOSSES, *named, *REMARKS)  # fmt: skip
    differences.fields("the file", document, known)


def _check_losses(
    model: Detector,
    weights: Mapping[str, float],
    maps: Sequence[Tensor],
    targets: Sequence[dense.Targets],
    document: Document,
    differences: Differences,
) -> None:
    """Check losses of outputs in evaluation mode, their sum, and norms of gradients."""
    values = {name: weights[name] * value for name, value in model.losses(maps, targets).items()}
    for field in LOSSES:
        found = {name: value.item() for name, value in values.items()}
        check_loss_values(field, found, document.get(field, {}), differences)
    total = torch.stack(list(values.values())).sum()
    if "total_loss" in document:
        differences.numbers("total_loss", total.item(), document["total_loss"])
    if "grad_l2" in document:
        total.backward()
        check_gradients(model, document["grad_l2"], differences)


CHECKS: Mapping[str, Callable[[Document, Differences], None]] = dict.fromkeys(("retinanet", "fcos"), check_one_stage)
"""First word of a model's name -> check."""
