"""Checks of the fixtures of the second stage alone: box heads and mask heads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dense import box_checks, mmdet_configs
from dense.box_checks import tensor
from dense.detection_checks import check_boxes, check_loss_values
from dense.mmdet_configs import Settings
from dense.rules import Differences
from dense.segmentation_checks import REMARKS, check_module
from widefield.dense.box_head import BOX_LOSSES, BoxHead, probabilities
from widefield.dense.boxes import Sampler
from widefield.dense.detector import Targets
from widefield.dense.mask_head import FCNMaskHead, mask_targets, paste_masks
from widefield.dense.roi import RoISample, sampled_rois
from widefield.dense.roi_head import Selection

Document = Mapping[str, Any]

SIZE = (128, 160)
"""Height and width of the image of heads that are described alone."""

EVERY = Sampler(100000)
"""Nothing is left out."""

FLOAT32 = 1e-7
"""OpenMMLab computes the loss of masks in float32."""


def drawn(seed: int, *shape: int) -> Tensor:
    """Return normal numbers, float64 from float32."""
    numbers = np.random.Generator(np.random.PCG64(seed)).standard_normal(shape)
    return torch.from_numpy(numbers.astype(np.float32)).double()


def seed_of(text: str) -> int:
    """Return the seed in a description such as "PCG64(2000).standard_normal(...)"."""
    return int(re.findall(r"PCG64\((\d+)\)", text)[0])


def ellipses(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the masks of the ellipses inscribed in boxes, bool (M, H, W)."""
    center, radius = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    y, x = (torch.arange(side, dtype=boxes.dtype) + 0.5 for side in size)
    across = ((x - center[:, 0, None]) / radius[:, 0, None]) ** 2
    return across[:, None] + (((y - center[:, 1, None]) / radius[:, 1, None]) ** 2)[:, :, None] <= 1


# Box heads


def built_box_head(config: Settings) -> BoxHead:
    """Return the box head of a configuration."""
    kind = config.take("type")
    config.take("init_cfg")
    convs, fcs = {"Shared2FCBBoxHead": (0, 2), "Shared4Conv1FCBBoxHead": (4, 1)}.get(kind, (0, 0))
    config.left["type"] = kind
    config.expect("type", "Shared2FCBBoxHead", "Shared4Conv1FCBBoxHead", "ConvFCBBoxHead")
    layers = (config.take("num_shared_convs", convs), config.take("num_shared_fcs", fcs))
    kinds = {(0, 2): "shared2fc", (4, 1): "4conv1fc"}
    if layers not in kinds:
        config.unknown("layers", layers)
    coder = config.inner("bbox_coder")
    coder.expect("type", "DeltaXYWHBBoxCoder")
    coder.expect("target_means", [0.0] * 4, (0.0,) * 4)
    stds = coder.take("target_stds")
    coder.done()
    if mmdet_configs.cross_entropy_weight(config, "loss_cls", sigmoid=False) != 1:
        config.unknown("loss_cls.loss_weight", "other than 1")
    loss = mmdet_configs.box_loss(config)
    if loss["kind"] not in BOX_LOSSES:
        config.unknown("loss_bbox", loss)
    config.expect("reg_decoded_bbox", loss["kind"] in ("iou", "giou"))
    channels = config.take("in_channels")
    head = BoxHead(
        channels,
        config.take("num_classes"),
        kind=kinds.get(layers, "shared2fc"),
        class_agnostic=config.take("reg_class_agnostic", False),
        box_loss=loss["kind"],
        stds=stds,
        roi_size=config.take("roi_feat_size", 7),
        channels=config.take("fc_out_channels", 1024),
        conv_channels=config.take("conv_out_channels", 256),
        norm=mmdet_configs.norm_of(config),
        beta=loss.get("beta", 1.0),
        box_weight=loss["weight"],
    )
    config.done()
    return head


def check_box_heads(document: Document, differences: Differences) -> None:
    """Check every case of a file of box heads."""
    differences.fields("the file", document, ("cases",))
    for number, case in enumerate(document["cases"]):
        _check_box_head(f"cases[{number}]", case, differences)


def _check_box_head(where: str, case: Document, differences: Differences) -> None:
    head = built_box_head(Settings(f"{where}.config", case["config"], differences))
    check_module(head, case["prefix"], {"params": _count(case), **case}, differences)
    truth, labels = tensor(case["gt_bboxes"]), torch.tensor(case["gt_labels"])
    target = Targets(truth, labels, None, torch.zeros(len(labels), dtype=torch.bool), SIZE)
    assigner = box_checks.built_assigner(case["assigner"])
    sample = sampled_rois(tensor(case["proposals"]), target, assigner, EVERY, head.num_classes)
    differences.numbers(f"{where}.sampled_rois", sample.boxes.tolist(), case["sampled_rois"])
    differences.equal(f"{where}.labels", sample.labels.tolist(), case["labels"])
    differences.equal(f"{where}.label_weights", [1.0] * len(sample.labels), case["label_weights"])
    known = len(sample.objects)
    wanted = sample.truth if head.compares_boxes else head.coder.encode(sample.positive, sample.truth)
    rest = len(sample.boxes) - known
    rows = torch.cat((wanted, wanted.new_zeros(rest, 4)))
    differences.numbers(f"{where}.bbox_targets", rows.tolist(), case["bbox_targets"])
    differences.equal(f"{where}.bbox_weights", [[1.0] * 4] * known + [[0.0] * 4] * rest, case["bbox_weights"])
    width = case["config"]["in_channels"]
    with torch.no_grad():
        shape = (len(sample.boxes), width, head.roi_size, head.roi_size)
        logits, deltas = head(drawn(seed_of(case["roi_input"]), *shape))
    differences.summary(f"{where}.cls_score", logits, case["cls_score"])
    differences.summary(f"{where}.bbox_pred", deltas, case["bbox_pred"])
    losses = {name: value.item() for name, value in head.losses(logits, deltas, [sample]).items()}
    check_loss_values(f"{where}.losses", {**losses, "acc": accuracy(logits, [sample])}, case["losses"], differences)
    select = Selection(0.05, 0.5, case["detections"]["count"])  # the file does not state the limits
    found = select(head.decode(sample.boxes, deltas, SIZE), probabilities(logits))
    check_boxes(f"{where}.detections", found, case["detections"], differences)
    name = "refined_all_rois_for_next_stage"
    refined = head.refined(sample.boxes, logits, deltas, SIZE, sample.labels)
    differences.numbers(f"{where}.{name}", refined.tolist(), case[name])
    read = ("config", "proposals", "gt_bboxes", "gt_labels", "assigner", "sampled_rois", "labels", "label_weights",
            "bbox_targets", "bbox_weights", "cls_score", "bbox_pred", "losses", "detections", "state_dict", "params",
            name, *REMARKS)  # fmt: skip
    differences.fields(where, case, read)


def _count(case: Document) -> int:
    """Return the number of parameters by the shapes of the state dict."""
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    return sum(int(np.prod(shape)) for key, shape in case["state_dict"].items() if not key.endswith(buffers))


def accuracy(logits: Tensor, samples: Sequence[RoISample]) -> float:
    """Return the accuracy of RoIs in per cent, in float32."""
    labels = torch.cat([sample.labels for sample in samples])
    correct = (logits.argmax(1) == labels).sum(dtype=torch.float32)
    return (correct * (100.0 / (len(labels) + torch.finfo(torch.float32).eps))).item()


# Mask heads


def built_mask_head(config: Settings) -> FCNMaskHead:
    """Return the mask head of a configuration."""
    config.expect("type", "FCNMaskHead")
    config.take("init_cfg")
    loss = config.inner("loss_mask", {"type": "CrossEntropyLoss", "use_mask": True})
    loss.expect("type", "CrossEntropyLoss")
    loss.expect("use_mask", True)
    loss.expect("loss_weight", 1.0)
    loss.done()
    config.expect("conv_kernel_size", 3)
    size = config.take("mask_size", 2 * config.take("roi_feat_size", 14))
    channels = config.take("in_channels")
    head = FCNMaskHead(
        channels,
        config.take("num_classes"),
        channels=config.take("conv_out_channels", channels),
        num_convs=config.take("num_convs", 4),
        roi_size=size // 2,
        class_agnostic=config.take("class_agnostic", False),
    )
    config.done()
    return head


def check_mask_head(document: Document, differences: Differences) -> None:
    """Check a mask head: targets, outputs, loss, pasted masks."""
    head = built_mask_head(Settings("config", document["config"], differences))
    check_module(head, document["prefix"], {"params": _count(document), **document}, differences)
    truth, labels = tensor(document["gt_bboxes"]), torch.tensor(document["labels"])
    positives, objects = tensor(document["positives"]), torch.tensor(document["assigned"])
    crowd = torch.zeros(len(truth), dtype=torch.bool)
    height, width = (int(side) for side in re.findall(r"on (\d+)x(\d+)", document["gt_masks"])[0])
    target = Targets(truth, labels, ellipses(truth, (height, width)), crowd, (height, width))
    sample = RoISample(positives, labels[objects], objects, truth[objects], crowd[objects])
    masks = mask_targets(sample, target, head.mask_size)
    differences.equal("mask_target_ones", masks.sum((1, 2)).tolist(), document["mask_target_ones"])
    rows = [name for name in document if name.startswith("mask_target_rows_instance")]
    for name in rows:
        differences.equal(name, masks[int(name.rpartition("instance")[2])].sum(1).tolist(), document[name])
    with torch.no_grad():
        shape = (len(positives), document["config"]["in_channels"], head.roi_size, head.roi_size)
        logits = head(drawn(seed_of(document["roi_input"]), *shape))
        loss = head.loss(logits, [sample], [target]).item()
    differences.summary("logits", logits, document["logits"])
    differences.numbers("loss", loss, document["loss"], FLOAT32)
    moved, third = (torch.tensor(json.loads(row)).double() for row in re.findall(r"\[[^]]*\]", document["paste_boxes"]))
    boxes = truth + moved
    boxes[2] = third
    for name, case in document["paste"].items():
        _check_paste(f"paste.{name}", head.of_labels(logits, labels).sigmoid(), boxes, case, differences)
    known = ("config", "gt_bboxes", "positives", "assigned", "labels", "mask_target_ones", *rows, "logits", "loss",
             "paste", "state_dict", "params", *REMARKS)  # fmt: skip
    differences.fields("the file", document, known)


def _check_paste(where: str, masks: Tensor, boxes: Tensor, case: Document, differences: Differences) -> None:
    scaled = boxes / torch.tensor(case["scale_factor"] * 2, dtype=boxes.dtype)
    pasted = paste_masks(masks, scaled, case["ori_shape"])
    differences.numbers(f"{where}.bboxes_after", scaled.tolist(), case["bboxes_after"])
    differences.equal(f"{where}.pixels", pasted.sum((1, 2)).tolist(), case["pixels"])
    rows = [name for name in case if name.startswith("row_sums_instance")]
    for name in rows:
        differences.equal(f"{where}.{name}", pasted[int(name.rpartition("instance")[2])].sum(1).tolist(), case[name])
    differences.fields(where, case, ("ori_shape", "scale_factor", "bboxes_after", "pixels", *rows))


CHECKS = {"bbox_heads": check_box_heads, "FCNMaskHead": check_mask_head}
"""Kind of file -> check."""
