"""Checks of whole two-stage detectors: maps, proposals, outputs, losses, gradients, detections, masks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dense import box_checks, mmdet_configs
from dense.detection_checks import check_detections, targets_of
from dense.mmdet_configs import Settings
from dense.roi_checks import FLOAT32, accuracy, built_box_head, built_mask_head, ellipses
from dense.rules import WITHIN, Differences, images
from dense.segmentation_checks import REMARKS, built_fpn, built_trunk, fill_through_files
from widefield import dense
from widefield.dense._trunk_keys import trunk_names
from widefield.dense.boxes import BoxCoder, Sampler
from widefield.dense.detection_rules import DetectionRules
from widefield.dense.detector import Detections, Targets
from widefield.dense.faster_rcnn import TwoStageDetector
from widefield.dense.mask_head import paste_masks
from widefield.dense.roi import RoISample, batched, roi_features
from widefield.dense.roi_head import RoIHead
from widefield.dense.rpn import ProposalLimits, RPNHead

Document = Mapping[str, Any]

# Configurations


def _sampler(config: Settings, *, with_truth: bool) -> Sampler:
    config.expect("type", "RandomSampler")
    config.expect("neg_pos_ub", -1)
    config.expect("add_gt_as_proposals", with_truth)
    found = Sampler(config.take("num"), config.take("pos_fraction"))
    config.done()
    return found


def _limits(config: Settings) -> ProposalLimits:
    found = ProposalLimits(
        config.take("nms_pre"),
        config.take("max_per_img"),
        mmdet_configs.nms_threshold(config),
        config.take("min_bbox_size", 0),
    )
    config.expect("nms_across_levels", False)
    config.take("nms_post")  # without effect since version 2.0
    config.done()
    return found


def _built_rpn(document: Document, differences: Differences) -> RPNHead:
    config = Settings("rpn_cfg", document["rpn_cfg"], differences)
    train = Settings("train_cfg.rpn", document["train_cfg"]["rpn"], differences)
    config.expect("type", "RPNHead")
    config.expect("num_convs", 1)
    config.take("init_cfg")
    coder = config.inner("bbox_coder")
    coder.expect("type", "DeltaXYWHBBoxCoder")
    coder.expect("target_means", [0.0] * 4)
    if mmdet_configs.cross_entropy_weight(config, "loss_cls", sigmoid=True) != 1:
        config.unknown("loss_cls.loss_weight", "other than 1")
    loss = mmdet_configs.box_loss(config)
    if loss["kind"] not in ("l1", "smooth_l1") or loss["weight"] != 1:
        config.unknown("loss_bbox", loss)
    border = train.take("allowed_border", -1)
    train.expect("pos_weight", -1)
    train.expect("debug", False)
    head = RPNHead(
        config.take("in_channels"),
        channels=config.take("feat_channels"),
        anchors=box_checks.built_anchors(config.take("anchor_generator")),
        coder=BoxCoder(tuple(coder.take("target_stds"))),
        assigner=box_checks.built_assigner(train.take("assigner")),
        sampler=_sampler(train.inner("sampler"), with_truth=False),
        allowed_border=None if border < 0 else border,
        smooth_l1_beta=loss.get("beta"),
        for_training=_limits(Settings("train_cfg.rpn_proposal", document["train_cfg"]["rpn_proposal"], differences)),
        for_testing=_limits(Settings("test_cfg.rpn", document["test_cfg"]["rpn"], differences)),
    )
    for part in (coder, config, train):
        part.done()
    return head


def _extractor(config: Settings, size: int) -> tuple[int, ...]:
    """Take an extractor of RoI features; return the strides of its levels."""
    config.expect("type", "SingleRoIExtractor")
    config.expect("finest_scale", 56)
    layer = config.inner("roi_layer")
    layer.expect("type", "RoIAlign")
    layer.expect("output_size", size)
    layer.expect("sampling_ratio", 0)
    layer.done()
    config.take("out_channels")
    strides = tuple(config.take("featmap_strides"))
    config.done()
    return strides


def _listed(entry: Any) -> list[Any]:
    return list(entry) if isinstance(entry, list) else [entry]


def _built_roi_head(document: Document, differences: Differences) -> tuple[RoIHead, DetectionRules]:
    config = Settings("roi_head_cfg", document["roi_head_cfg"], differences)
    kind = config.left["type"]
    config.expect("type", "StandardRoIHead", "CascadeRoIHead")
    stages = config.take("num_stages", 1)
    boxes = [
        built_box_head(Settings(f"bbox_head[{i}]", entry, differences))
        for i, entry in enumerate(_listed(config.take("bbox_head")))
    ]
    strides = _extractor(config.inner("bbox_roi_extractor"), boxes[0].roi_size)
    masks = []
    if config.left.get("mask_head"):
        entry = config.take("mask_head")
        entries = entry if isinstance(entry, list) else [entry] * stages
        masks = [built_mask_head(Settings(f"mask_head[{i}]", one, differences)) for i, one in enumerate(entries)]
        if strides != _extractor(config.inner("mask_roi_extractor"), masks[0].roi_size):
            config.unknown("mask_roi_extractor.featmap_strides", "other than those for boxes")
    trains = [Settings(f"train_cfg.rcnn[{i}]", e, differences) for i, e in enumerate(_listed(config.take("train_cfg")))]
    assigners = [box_checks.built_assigner(train.take("assigner")) for train in trains]
    samplers = [_sampler(train.inner("sampler"), with_truth=True) for train in trains]
    for train in trains:
        train.expect("mask_size", masks[0].mask_size if masks else 28)
        train.expect("pos_weight", -1)
        train.expect("debug", False)
        train.done()
    rules = mmdet_configs.test_rules(Settings("test_cfg.rcnn", config.take("test_cfg"), differences))
    common: dict[str, Any] = {"strides": strides, "sampler": samplers[0]}
    weights = config.take("stage_loss_weights", [1] * stages)
    config.done()
    if kind == "StandardRoIHead":
        return RoIHead(boxes[0], masks[0] if masks else None, assigners=assigners, **common), rules
    return RoIHead(boxes, masks, assigners=assigners, weights=weights, **common), rules


def backbone_options(document: Document, differences: Differences) -> dict[str, Any]:
    """Take the configuration of a backbone; return which arguments of detectors follow from it."""
    config = Settings("backbone_cfg", document.get("backbone_cfg", {}), differences)
    frozen, norm_eval = config.take("frozen_stages", -1), config.take("norm_eval", False)
    config.expect("style", "pytorch")
    for name in ("type", "depth", "depths", "dims", "num_stages", "norm_cfg", "layer_scale_init_value"):
        config.take(name)  # the state dict shows them
    for name in ("drop_path_rate", "init_cfg", "pretrained", "with_cp"):  # without effect in evaluation mode
        config.take(name)
    config.expect("out_indices", [0, 1, 2, 3])
    config.done()
    return {"frozen_stages": max(frozen, 0), "norm_eval": norm_eval}


def built_detector(document: Document, differences: Differences) -> TwoStageDetector:
    """Return the detector that a file describes.

    The class of the library makes the model; parts that depend on the configuration take the place of its own.
    """
    options = backbone_options(document, differences)
    roi, rules = _built_roi_head(document, differences)
    neck = built_fpn(Settings("neck_cfg", document["neck_cfg"], differences))
    word = document["model"].split("_")[0]
    classes: dict[str, type[dense.FasterRCNN] | type[dense.CascadeRCNN]] = {
        "faster": dense.FasterRCNN, "mask": dense.MaskRCNN, "cascade": dense.CascadeRCNN,
    }  # fmt: skip
    if word == "cascade":
        options["masks"] = bool(roi.mask_heads)
    model = classes[word](built_trunk(document), roi.box_heads[0].num_classes, **options)
    differences.equal("neck_cfg.in_channels", list(model.backbone.channels), list(neck.in_channels))
    differences.equal("masks", bool(roi.mask_heads), model.has_masks)
    model.neck, model.roi_head, model.rpn_head = neck, roi, _built_rpn(document, differences)
    model.rules = rules
    return model


# Results


def check_two_stage(document: Document, differences: Differences) -> None:
    """Check a whole two-stage detector."""
    model = built_detector(document, differences)
    fill_through_files(model, document["state_dict"], differences)
    differences.equal("params", sum(p.numel() for p in model.parameters()), document["params"])
    batch = document["batch"]
    x = images(batch["shape"][2:], batch["shape"][0])
    targets = targets_of(batch["images"], differences, "batch.images")
    if model.has_masks:
        targets = [entry._replace(masks=ellipses(entry.boxes, entry.size or (0, 0))) for entry in targets]
    differences.fields("batch", batch, ("shape", "images", "gt_masks"))
    maps = _check_maps(model, x, document, differences)
    _check_losses(model, x, maps, targets, document, differences)
    with torch.no_grad():
        sizes = [entry.size or (0, 0) for entry in targets]
        proposals = model.rpn_head.proposals(model.rpn_head(maps), sizes, training=False)
        if "proposals_test" in document:
            found = [Detections(entry.boxes, entry.scores, entry.scores.long()) for entry in proposals]
            check_detections("proposals_test", found, document["proposals_test"], differences)
        outputs = next((name for name in document if re.fullmatch(OUTPUTS, name)), "")
        if outputs:
            first = proposals[0].boxes[: int(outputs.split("first")[1].split("_")[0])]
            _check_outputs(outputs, model, maps, first, document[outputs], differences)
        for name, out in (("detections", None), ("detections_rescaled", [e["ori_shape"] for e in batch["images"]])):
            if name in document:
                found = model(x, sizes=sizes, out_sizes=out)
                _check_found(name, found, document[name], differences)
    known = ("train_cfg", "test_cfg", "roi_head_cfg", "rpn_cfg", "neck_cfg", "backbone_cfg", "params", "batch",
             "backbone_features", "fpn_features", "rpn_objectness", "rpn_deltas", "losses_eval_mode", "sampled",
             "total_loss", "proposals_test", outputs, "detections", "detections_rescaled", "grad_l2", "state_dict",
             *REMARKS)  # fmt: skip
    differences.fields("the file", document, known)


OUTPUTS = r"roi_head_outputs_first\d+_proposals_of_image0"
"""Field of the outputs of box and mask heads."""


def _check_maps(model: TwoStageDetector, x: Tensor, document: Document, differences: Differences) -> list[Tensor]:
    features = model.backbone(x)
    maps: list[Tensor] = model.neck(features)
    outputs = model.rpn_head(maps)
    found = {
        "backbone_features": features,
        "fpn_features": maps,
        "rpn_objectness": outputs.objectness,
        "rpn_deltas": outputs.deltas,
    }
    for name, levels in found.items():
        for level, (one, expected) in enumerate(zip(levels, document[name], strict=True)):
            differences.summary(f"{name}[{level}]", one, expected)
    return maps


def _check_losses(
    model: TwoStageDetector,
    x: Tensor,
    maps: Sequence[Tensor],
    targets: Sequence[Targets],
    document: Document,
    differences: Differences,
) -> None:
    """Check losses in evaluation mode, how many boxes were sampled, and norms of gradients."""
    first, second = _Counts(model.rpn_head.sampler), _Counts(model.roi_head.sampler)
    model.rpn_head.sampler, model.roi_head.sampler = first, second
    accuracies: list[float] = []
    for head in model.roi_head.box_heads:
        _listen(head, accuracies)
    prepared = model.prepared(x, targets)
    values = model.losses(maps, prepared)
    differences.equal("sampled", [*first.found, *second.found], document["sampled"])
    found: dict[str, Any] = {name: value.item() for name, value in values.items()}
    levels = model.rpn_head.losses_by_level(model.rpn_head(maps), prepared)
    found |= {name: value.tolist() for name, value in levels.items()}
    prefixes = [""] if len(accuracies) == 1 else [f"s{stage}." for stage in range(len(accuracies))]
    found |= {f"{prefix}acc": value for prefix, value in zip(prefixes, accuracies, strict=True)}
    for name, value in document["losses_eval_mode"].items():
        if name in found:
            within = FLOAT32 if name.endswith("loss_mask") else WITHIN
            differences.numbers(f"losses_eval_mode.{name}", found[name], value, within)
        else:
            differences.lines.append(f"losses_eval_mode: the field {name!r} is unknown, so it is not checked")
    total = torch.stack(list(values.values())).sum()
    differences.numbers("total_loss", total.item(), document["total_loss"], FLOAT32 if model.has_masks else WITHIN)
    if "grad_l2" in document:
        total.backward()
        check_gradients(model, document["grad_l2"], differences)


class _Counts:
    """A sampler that notes how many boxes it chose."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.found: list[dict[str, int]] = []

    def __call__(self, assignment: Any) -> Any:
        sample = self.sampler(assignment)
        self.found.append({"pos": len(sample.positive), "neg": len(sample.negative)})
        return sample


def _listen(head: Any, accuracies: list[float]) -> None:
    """Make a box head note its accuracy whenever it computes losses."""
    losses = head.losses

    def noting(logits: Tensor, deltas: Tensor, samples: Sequence[RoISample]) -> dict[str, Tensor]:
        accuracies.append(accuracy(logits, samples))
        found: dict[str, Tensor] = losses(logits, deltas, samples)
        return found

    head.losses = noting


def check_gradients(model: dense.Detector, expected: Document, differences: Differences) -> None:
    """Check norms of gradients by published names."""
    names = trunk_names(model.backbone).names
    grads = {
        f"backbone.{names[key.removeprefix('backbone.')]}" if key.startswith("backbone.") else key: parameter.grad
        for key, parameter in model.named_parameters()
    }
    for name, norm in expected.items():
        grad = grads.get(name)
        differences.numbers(f"grad_l2.{name}", None if grad is None else grad.norm().item(), norm)


def _check_outputs(
    where: str,
    model: TwoStageDetector,
    maps: Sequence[Tensor],
    boxes: Tensor,
    expected: Document,
    differences: Differences,
) -> None:
    """Check what the heads of every stage say about the first proposals."""
    roi: Any = model.roi_head
    heads, masks = roi.box_heads, roi.mask_heads
    differences.equal(f"{where}: stages", len(heads), len(expected))
    rois = batched([boxes])
    for stage, head in enumerate(heads):
        wanted = expected[f"stage{stage}"]
        features = roi_features(maps, rois, roi.strides, head.roi_size)
        logits, deltas = head(features)
        found = {"roi_features": features, "cls_score": logits, "bbox_pred": deltas}
        if masks:
            found["mask_logits"] = masks[stage](roi_features(maps, rois, roi.strides, masks[stage].roi_size))
        for name, value in found.items():
            differences.summary(f"{where}.stage{stage}.{name}", value, wanted[name])
        differences.fields(f"{where}.stage{stage}", wanted, (*found, *REMARKS))


def _check_found(
    where: str, found: Sequence[Detections], expected: Sequence[Document], differences: Differences
) -> None:
    """Check detections and the areas of their masks."""
    check_detections(where, found, expected, differences, known=("mask_pixels", "mask_size"))
    for number, (entry, wanted) in enumerate(zip(found, expected, strict=True)):
        if "mask_pixels" not in wanted or entry.masks is None:
            differences.equal(f"{where}[{number}]: masks", entry.masks is not None, "mask_pixels" in wanted)
        else:
            pixels = paste_masks(entry.masks, entry.boxes, wanted["mask_size"]).sum((1, 2)).tolist()
            compare = sorted if wanted.get("smallest_score_gap") == 0 else list  # equal scores come in any order
            differences.equal(f"{where}[{number}].mask_pixels", compare(pixels), compare(wanted["mask_pixels"]))


CHECKS = dict.fromkeys(("faster", "mask", "cascade"), check_two_stage)
"""First word of a model's name -> check."""
