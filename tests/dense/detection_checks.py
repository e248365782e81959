"""Checks of one-stage detection heads, and what all checks of detectors share: objects, losses, detections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dense import mmdet_configs
from dense.mmdet_configs import Settings
from dense.rules import Differences, features
from dense.segmentation_checks import REMARKS, check_module
from widefield.dense.detector import Detections, Targets
from widefield.dense.fcos import RANGES, FCOSHead, centerness_of

Document = Mapping[str, Any]

CROWD = ("bboxes_ignore", "gt_bboxes_ignore", "ignore")
"""Names of crowd regions."""

# Objects and detections


def targets_of(images: Sequence[Document], differences: Differences, where: str = "images") -> list[Targets]:
    """Return the objects of a batch, in float64."""
    found = []
    for number, image in enumerate(images):
        crowd = [box for name in CROWD for box in image.get(name) or ()]
        boxes = torch.tensor([*image["bboxes"], *crowd], dtype=torch.float64).reshape(-1, 4)
        labels = torch.tensor([*image["labels"], *([0] * len(crowd))])
        is_crowd = torch.arange(len(labels)) >= len(image["labels"])
        found.append(Targets(boxes, labels, None, is_crowd, tuple(image["img_shape"])))
        known = ("bboxes", "labels", "img_shape", "pad_shape", "ori_shape", *CROWD)
        differences.fields(f"{where}[{number}]", image, known)
    return found


def rescaled(found: Sequence[Detections], images: Sequence[Document]) -> list[Detections]:
    """Return detections in pixels of the files; sizes are (height, width)."""
    scaled = []
    for entry, image in zip(found, images, strict=True):
        height, width = (out / own for out, own in zip(image["ori_shape"], image["img_shape"], strict=True))
        scaled.append(entry._replace(boxes=entry.boxes * entry.boxes.new_tensor([width, height, width, height])))
    return scaled


def check_detections(
    where: str,
    found: Sequence[Detections],
    expected: Sequence[Document],
    differences: Differences,
    known: Sequence[str] = (),
) -> None:
    """Check the detections of every image. ``known``: fields that the caller checks."""
    differences.equal(f"{where}: number of images", len(found), len(expected))
    for number, (entry, wanted) in enumerate(zip(found, expected, strict=False)):
        check_boxes(f"{where}[{number}]", entry, wanted, differences, known)


def check_boxes(
    where: str, found: Detections, expected: Document, differences: Differences, known: Sequence[str] = ()
) -> None:
    """Check boxes, scores and, if the file has them, labels."""
    differences.equal(f"{where}.count", len(found.boxes), expected["count"])
    if len(found.boxes) != expected["count"]:
        return
    if expected.get("smallest_score_gap") == 0:  # boxes of equal scores come in any order
        found = _in_order_of(found, expected)
    differences.summary(f"{where}.bboxes", found.boxes, expected["bboxes"])
    differences.summary(f"{where}.scores", found.scores, expected["scores"])
    if "labels" in expected:
        differences.equal(f"{where}.labels", found.labels.tolist(), expected["labels"])
    for name, values in (("first_bboxes", found.boxes), ("first_scores", found.scores)):
        if name in expected:
            first = values[: len(expected[name])].tolist()
            differences.numbers(f"{where}.{name}", first, expected[name])
    if expected.get("smallest_score_gap"):
        gap = -found.scores.diff().max().item()
        differences.numbers(f"{where}.smallest_score_gap", float(f"{gap:.1e}"), expected["smallest_score_gap"])
    fields = ("count", "bboxes", "scores", "labels", "first_bboxes", "first_scores", "smallest_score_gap")
    differences.fields(where, expected, (*fields, *known, *REMARKS))


def _in_order_of(found: Detections, expected: Document) -> Detections:
    """Reorder detections of equal scores like those of the file, by label and, where it shows them, by box."""
    left = list(range(len(found.boxes)))
    order = []
    for place in range(len(found.boxes)):
        equal = [i for i in left if abs(found.scores[i] - found.scores[left[0]]) < 1e-12]
        wanted = expected["labels"][place] if "labels" in expected else None
        same = [i for i in equal if wanted is None or found.labels[i] == wanted] or equal
        shown = expected.get("first_bboxes", ())
        if place < len(shown):
            box = found.boxes.new_tensor(shown[place])
            same.sort(key=lambda i: (found.boxes[i] - box).abs().max().item())
        order.append(same[0])
        left.remove(same[0])
    masks = None if found.masks is None else found.masks[order]
    return Detections(found.boxes[order], found.scores[order], found.labels[order], masks)


def by_level(rows: Tensor, maps: Sequence[Tensor], per_cell: int = 1) -> list[Tensor]:
    """Return what images have at their points or anchors, (N, P, ...), level by level, each (N * P_i, ...)."""
    counts = [x.shape[-2] * x.shape[-1] * per_cell for x in maps]
    return [part.flatten(0, 1) for part in rows.split(counts, 1)]


def check_loss_values(where: str, found: Mapping[str, Any], expected: Document, differences: Differences) -> None:
    """Check losses by name: a number, or a list by level whose sum is compared if the library has just the sum."""
    for name, value in expected.items():
        if name not in found:
            differences.lines.append(f"{where}: the field {name!r} is unknown, so it is not checked")
        elif isinstance(value, list) and not isinstance(found[name], list):
            differences.numbers(f"{where}.{name}", found[name], sum(value))
        else:
            differences.numbers(f"{where}.{name}", found[name], value)


# FCOS


def built_fcos_head(config: Settings) -> tuple[FCOSHead, dict[str, float]]:
    """Return the FCOS head of a configuration, and the factors of its losses."""
    config.expect("type", "FCOSHead")
    strides = config.take("strides", (4, 8, 16, 32, 64))
    ranges = config.take("regress_ranges")
    sampling, radius = config.take("center_sampling", False), config.take("center_sample_radius", 1.5)
    focal = mmdet_configs.focal_loss(config)
    boxes = mmdet_configs.box_loss(config, default="IoULoss")
    centerness = mmdet_configs.cross_entropy_weight(config, "loss_centerness", sigmoid=True)
    coder = config.inner("bbox_coder", {"type": "DistancePointBBoxCoder"})
    coder.expect("type", "DistancePointBBoxCoder")
    coder.expect("clip_border", True)
    coder.done()
    config.take("init_cfg")
    config.expect("dcn_on_last_conv", False)
    config.expect("conv_cfg", None)
    channels = config.take("feat_channels", 256)
    bias = config.take("conv_bias", "auto")
    norm = mmdet_configs.norm_of(config, default={"type": "GN", "num_groups": 32})
    head = FCOSHead(
        config.take("in_channels"),
        config.take("num_classes"),
        channels=channels,
        num_convs=config.take("stacked_convs", 4),
        strides=strides,
        ranges=RANGES if ranges is None else mmdet_configs.pairs(ranges),
        norm=norm,
        conv_bias=norm is not None and bias is True,
        centerness_on="boxes" if config.take("centerness_on_reg", False) else "classification",
        distances="relu" if config.take("norm_on_bbox", False) else "exp",
        center_radius=radius if sampling else None,
        box_loss=str(boxes["kind"]),
        alpha=focal["alpha"],
        gamma=focal["gamma"],
    )
    config.done()
    weights = {"loss_cls": focal["weight"], "loss_bbox": boxes["weight"], "loss_centerness": centerness}
    return head, weights


def check_fcos_head(document: Document, differences: Differences) -> None:
    """Check an FCOS head: outputs, targets, losses, detections."""
    head, weights = built_fcos_head(Settings("config", document["config"], differences))
    rules = mmdet_configs.test_rules(Settings("test_cfg", document["test_cfg"], differences))
    training = Settings("train_cfg", document.get("train_cfg") or {}, differences)
    for name in ("assigner", "sampler", "allowed_border", "pos_weight", "debug"):  # FCOS reads none of them
        training.take(name)
    training.done()
    check_module(head, document["prefix"], document, differences)
    targets = targets_of(document["images"], differences)
    with torch.no_grad():
        outputs = head(features(document["feature_shapes"]))
        named = {"cls_scores": outputs.logits, "bbox_preds": outputs.distances, "centernesses": outputs.centerness}
        for name, levels in named.items():
            for level, (found, expected) in enumerate(zip(levels, document[name], strict=True)):
                differences.summary(f"{name}[{level}]", found, expected)
        losses = head.losses(outputs, targets)
        found = head.detections(outputs, [target.size or (0, 0) for target in targets], **rules)
    if "losses" in document:
        values = {name: weights[name] * value.item() for name, value in losses.items()}
        check_loss_values("losses", values, document["losses"], differences)
    if "targets" in document:
        _check_fcos_targets(head, outputs.logits, targets, document["targets"], differences)
    for name, entries in (("detections", found), ("detections_rescaled", rescaled(found, document["images"]))):
        if name in document:
            check_detections(name, entries, document[name], differences)
    known = ("config", "train_cfg", "test_cfg", "feature_shapes", "images", *named, "losses", "targets", "detections",
             "detections_rescaled", "params", "state_dict", *REMARKS)  # fmt: skip
    differences.fields("the file", document, known)


def _check_fcos_targets(
    head: FCOSHead, maps: Sequence[Tensor], targets: Sequence[Targets], expected: Document, differences: Differences
) -> None:
    """Check what points learn; the file has level by level, in each image by image."""
    made = [head.targets(maps, target.boxes[~target.crowd], target.labels[~target.crowd]) for target in targets]
    labels = by_level(torch.stack([entry.labels for entry in made]), maps)
    distances = by_level(torch.stack([entry.distances for entry in made]), maps)
    factors = head.strides if head.distances == "relu" else (1,) * len(labels)
    positive = [(level < head.num_classes).nonzero().flatten() for level in labels]
    wanted = [rows[own] / by for rows, own, by in zip(distances, positive, factors, strict=True)]
    differences.equal("targets.positives_per_level", [len(own) for own in positive], expected["positives_per_level"])
    differences.equal("targets.label_sums", [int(level.sum()) for level in labels], expected["label_sums"])
    for level, (own, first) in enumerate(zip(positive, expected["positive_indices"], strict=True)):
        differences.equal(f"targets.positive_indices[{level}]", own[: len(first)].tolist(), first)
    for level, (found, summary) in enumerate(zip(wanted, expected["bbox_targets_of_positives"], strict=True)):
        differences.summary(f"targets.bbox_targets_of_positives[{level}]", found, summary)
    if "centerness" in expected:
        differences.summary("targets.centerness", centerness_of(torch.cat(wanted)), expected["centerness"])
    known = ("positives_per_level", "label_sums", "positive_indices", "bbox_targets_of_positives", "centerness")
    differences.fields("targets", expected, (*known, *REMARKS))


CHECKS = {"FCOSHead": check_fcos_head}
"""Kind -> check."""
