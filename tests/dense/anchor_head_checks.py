"""Checks of the fixtures of RetinaNet's head, and how heads with anchors are built from configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dense import mmdet_configs
from dense.box_checks import built_anchors, built_assigner
from dense.detection_checks import by_level, check_detections, check_loss_values, rescaled, targets_of
from dense.mmdet_configs import Settings
from dense.rules import Differences, features
from dense.segmentation_checks import REMARKS, check_module
from widefield.dense.boxes import BoxCoder
from widefield.dense.detector import size_of
from widefield.dense.retinanet import RetinaHead

Document = Mapping[str, Any]


def coder_of(config: Settings) -> BoxCoder:
    """Take a box coder."""
    coder = config.inner("bbox_coder")
    coder.expect("type", "DeltaXYWHBBoxCoder")
    coder.expect("target_means", [0.0, 0.0, 0.0, 0.0])
    coder.expect("clip_border", True)
    stds = coder.take("target_stds", (1.0, 1.0, 1.0, 1.0))
    coder.done()
    return BoxCoder(tuple(stds))


def beta_of(loss: Mapping[str, Any], config: Settings) -> float | None:
    """Return the beta of a smooth L1 loss, None for L1; other losses are unknown."""
    if loss["kind"] not in ("l1", "smooth_l1"):
        config.unknown("loss_bbox", loss)
    return loss.get("beta")


def border_of(rules: Settings) -> float | None:
    """Take the border that anchors may leave the image by."""
    border = rules.take("allowed_border", -1)
    return None if border < 0 else border


def built_retina_head(config: Settings, rules: Settings) -> tuple[RetinaHead, dict[str, float]]:
    """Return the head of a configuration and its rules of training, and the factors of its losses."""
    config.expect("type", "RetinaHead")
    config.take("init_cfg")
    focal = mmdet_configs.focal_loss(config)
    boxes = mmdet_configs.box_loss(config)
    sampler = rules.inner("sampler")
    sampler.expect("type", "PseudoSampler")
    sampler.done()
    rules.expect("pos_weight", -1)
    rules.expect("debug", False)
    config.expect("conv_cfg", None)
    config.expect("reg_decoded_bbox", False)
    channels = config.take("feat_channels", 256)
    head = RetinaHead(
        config.take("in_channels"),
        config.take("num_classes"),
        channels=channels,
        num_convs=config.take("stacked_convs", 4),
        norm=mmdet_configs.norm_of(config),
        anchors=built_anchors(config.take("anchor_generator")),
        coder=coder_of(config),
        assigner=built_assigner(rules.take("assigner")),
        allowed_border=border_of(rules),
        smooth_l1_beta=beta_of(boxes, config),
        alpha=focal["alpha"],
        gamma=focal["gamma"],
    )
    config.done()
    rules.done()
    return head, {"loss_cls": focal["weight"], "loss_bbox": boxes["weight"]}


def check_retina_head(document: Document, differences: Differences) -> None:
    """Check a RetinaNet head: outputs, targets, losses, detections."""
    config = Settings("config", document["config"], differences)
    head, weights = built_retina_head(config, Settings("train_cfg", document["train_cfg"], differences))
    rules = mmdet_configs.test_rules(Settings("test_cfg", document["test_cfg"], differences))
    check_module(head, document["prefix"], document, differences)
    targets = targets_of(document["images"], differences)
    with torch.no_grad():
        outputs = head(features(document["feature_shapes"]))
        named = {"cls_scores": outputs.logits, "bbox_preds": outputs.deltas}
        for name, levels in named.items():
            for level, (found, expected) in enumerate(zip(levels, document[name], strict=True)):
                differences.summary(f"{name}[{level}]", found, expected)
        losses = head.losses_by_level(outputs, targets)
        found = head.detections(outputs, [size_of(target) for target in targets], **rules)
    if "losses" in document:
        values = {name: (weights[name] * value).tolist() for name, value in losses.items()}
        check_loss_values("losses", values, document["losses"], differences)
    if "targets" in document:
        made = [head.targets(outputs.logits, target) for target in targets]
        _check_targets(head, outputs.logits, made, document["targets"], differences)
    for name, entries in (("detections", found), ("detections_rescaled", rescaled(found, document["images"]))):
        if name in document:
            check_detections(name, entries, document[name], differences)
    known = ("config", "train_cfg", "test_cfg", "feature_shapes", "images", *named, "losses", "targets", "detections",
             "detections_rescaled", "params", "state_dict", *REMARKS)  # fmt: skip
    differences.fields("the file", document, known)


def _check_targets(head: RetinaHead, maps: Any, made: Any, expected: Document, differences: Differences) -> None:
    """Check what anchors learn, level by level; the file has zeros for anchors without an object."""
    labels = torch.stack([entry.labels for entry in made])
    deltas = torch.zeros(*labels.shape, 4, dtype=torch.float64)
    for image, entry in enumerate(made):
        deltas[image, entry.positive] = entry.deltas
    per_cell = head.anchors.per_cell
    levels = by_level(labels, maps, per_cell)
    positive = [int(((level >= 0) & (level < head.num_classes)).sum()) for level in levels]
    differences.equal("targets.positives_per_level", positive, expected["positives_per_level"])
    sums = [float((level >= 0).sum()) for level in levels]
    differences.numbers("targets.weight_sums", sums, expected["weight_sums"])
    for level, (found, summary) in enumerate(
        zip(by_level(deltas, maps, per_cell), expected["bbox_targets"], strict=True)
    ):
        rows = found.unflatten(0, (len(made), -1))
        differences.summary(f"targets.bbox_targets[{level}]", rows, summary)
    count = float(sum(max(len(entry.positive), 1) for entry in made))
    differences.numbers("targets.avg_factor", count, expected["avg_factor"])
    known = ("positives_per_level", "weight_sums", "bbox_targets", "avg_factor", *REMARKS)
    differences.fields("targets", expected, known)


CHECKS = {"RetinaHead": check_retina_head}
"""Kind -> check."""
