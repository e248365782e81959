"""The checks read the settings of other configurations, and report those that they cannot read."""

import copy
import json
import tempfile
from pathlib import Path

import pytest
import timm
import torch

from dense import (
    anchor_head_checks,
    conformance,
    detection_checks,
    one_stage_checks,
    roi_checks,
    segmentation_checks,
    two_stage_checks,
)
from dense.mmdet_configs import Settings
from dense.rules import Differences, images
from widefield import dense

FOLDER = Path(__file__).parents[1] / "fixtures" / "conformance" / "dense"
TRICKS = {
    "norm_on_bbox": True,
    "centerness_on_reg": True,
    "conv_bias": True,
    "center_sampling": True,
    "loss_bbox": {"type": "GIoULoss", "loss_weight": 1.5},
    "strides": [4, 8, 16, 32, 64],
    "regress_ranges": [[-1, 32], [32, 64], [64, 128], [128, 256], [256, 1e8]],
    "loss_cls": {"type": "FocalLoss", "use_sigmoid": True, "gamma": 1.5, "alpha": 0.5, "loss_weight": 1.0},
}


def document(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


def settings(config, found=None):
    differences = found or Differences()
    return Settings("config", config, differences), differences


def test_published_tricks_of_fcos():
    config, differences = settings({**document("fcos_head")["config"], **TRICKS})
    head, weights = detection_checks.built_fcos_head(config)
    assert (head.distances, head.centerness_on, head.center_radius, head.box_loss) == ("relu", "boxes", 1.5, "giou")
    assert (head.strides, head.ranges) == ((4, 8, 16, 32, 64), (32, 64, 128, 256))
    assert (head.alpha, head.gamma, weights["loss_bbox"]) == (0.5, 1.5, 1.5)
    assert head.cls_convs[0].conv.bias is not None
    assert not differences.lines


def test_training_rules_of_other_detectors_mean_nothing_to_fcos(tmp_path):
    changed = document("fcos_head") | {"train_cfg": {"allowed_border": -1, "assigner": {"type": "MaxIoUAssigner"}}}
    (tmp_path / "file.json").write_text(json.dumps(changed))
    assert conformance.check(tmp_path / "file.json").lines == []


def test_other_settings_of_retinanet():
    given = document("retinanet_head")
    config = {
        **given["config"],
        "num_classes": 20,
        "stacked_convs": 2,
        "norm_cfg": {"type": "GN", "num_groups": 32, "requires_grad": True},
        "loss_bbox": {"type": "SmoothL1Loss", "beta": 0.11, "loss_weight": 2.0},
        "anchor_generator": {"type": "AnchorGenerator", "scales": [4, 6], "ratios": [1.0], "strides": [8, 16]},
    }
    rules = {**given["train_cfg"], "allowed_border": 0}
    differences = Differences()
    head, weights = anchor_head_checks.built_retina_head(
        Settings("config", config, differences), Settings("train_cfg", rules, differences)
    )
    assert (head.allowed_border, head.smooth_l1_beta, weights["loss_bbox"]) == (0, 0.11, 2.0)
    assert head.anchors.scales == (4, 6)
    assert head.retina_cls.out_channels == 40
    assert hasattr(head.cls_convs[1], "gn")
    assert not differences.lines


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"loss_bbox": {"type": "SmoothL1Loss", "beta": 0.5, "loss_weight": 2.0}}, ("smooth_l1", 0.5, 2.0)),
        ({"loss_bbox": {"type": "GIoULoss", "loss_weight": 12.0}, "reg_decoded_bbox": True}, ("giou", 1.0, 12.0)),
        ({"loss_bbox": {"type": "IoULoss", "loss_weight": 10.0}, "reg_decoded_bbox": True}, ("iou", 1.0, 10.0)),
    ],
)
def test_other_losses_of_box_heads(changes, found):
    config, differences = settings({**document("bbox_heads")["cases"][0]["config"], **changes})
    head = roi_checks.built_box_head(config)
    assert (head.box_loss, head.beta, head.box_weight) == found
    assert not differences.lines


@pytest.mark.parametrize(
    ("model", "backbone", "name"),
    [
        ("faster_rcnn_resnet101_fpn", {"type": "ResNet", "depth": 101}, "resnet101"),
        ("cascade_rcnn_r101_fpn", {"type": "ResNet", "depth": 101}, "resnet101"),
        ("cascade_mask_rcnn_convnext_small_fpn_giou", {"type": "FBConvNeXt"}, "convnext_small"),
        ("mask_rcnn_hornet_tiny_7x7_fpn", {}, "hornet_tiny_7x7"),
        ("mask_rcnn_x", {"type": "FBConvNeXt"}, "convnext_tiny"),
    ],
)
def test_backbones_by_name_or_configuration(model, backbone, name):
    assert segmentation_checks._trunk_name({"model": model, "backbone_cfg": backbone}) == name


def test_other_necks_and_rois_of_whole_models():
    given = document("faster_rcnn_resnet50_fpn")
    given["neck_cfg"] |= {"out_channels": 64, "add_extra_convs": "on_output"}
    given["train_cfg"]["rpn_proposal"] |= {"nms_across_levels": False, "nms_post": 1000}  # of mmdetection 2.x
    given["rpn_cfg"] |= {"in_channels": 64, "feat_channels": 32}
    given["roi_head_cfg"]["bbox_head"] |= {"in_channels": 64, "num_classes": 7}
    differences = Differences()
    given["state_dict"] = {}
    model = two_stage_checks.built_detector(given, differences)
    assert (model.neck.extra, model.neck.out_channels) == ("on_output", 64)
    assert model.rpn_head.rpn_conv.weight.shape[:2] == (32, 64)
    assert model.num_classes == 7
    assert not differences.lines


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("fcos_head", ("config", "dcn_on_last_conv"), True),
        ("fcos_head", ("config", "loss_bbox", "type"), "DIoULoss"),
        ("fcos_head", ("test_cfg", "nms", "type"), "soft_nms"),
        ("fcos_head", ("config", "surprise"), 1),
        ("retinanet_head", ("train_cfg", "sampler", "type"), "OHEMSampler"),
        ("retinanet_head", ("config", "bbox_coder", "target_means"), [0.1, 0, 0, 0]),
        ("mask_head", ("config", "upsample_cfg"), {"type": "carafe"}),
        ("fpn", ("cases", 0, "config", "upsample_cfg"), {"mode": "bilinear"}),
        ("bbox_heads", ("cases", 0, "config", "num_cls_fcs"), 1),
    ],
)
def test_settings_that_are_not_known_are_reported(name, path, value, tmp_path):
    changed = copy.deepcopy(document(name))
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (tmp_path / "file.json").write_text(json.dumps(changed))
    lines = conformance.check(tmp_path / "file.json").lines
    assert any((str(path[-1]) in line and "unknown" in line) or repr(value) in line for line in lines), lines


def _summary(tensor):
    flat = tensor.detach().flatten()
    return {"shape": [*tensor.shape], "l2": flat.norm().item(), "first": flat[:8].tolist(), "last": flat[-4:].tolist()}


def _whole(kind, head, test):
    """Return a document in the form of the whole models, of a narrow network with numbers of this library."""
    given = {
        "model": f"{kind}_convnext_tiny_fpn",
        "neck_cfg": {"type": "FPN", "in_channels": [4, 8, 12, 16], "out_channels": 64, "start_level": 1,
                     "add_extra_convs": "on_output", "relu_before_extra_convs": True, "num_outs": 5},
        "bbox_head_cfg": {**head, "in_channels": 64, "feat_channels": 64, "num_classes": 4, "stacked_convs": 1},
        "train_cfg": document("retinanet_head")["train_cfg"] if kind == "retinanet" else None,
        "test_cfg": {**test, "score_thr": 0.3},
        "batch": {"shape": [1, 3, 64, 96], "images": [{"bboxes": [[4, 5, 60, 50]], "labels": [2],
                  "img_shape": [60, 90], "ori_shape": [120, 45]}]},
    }  # fmt: skip
    widths = {"dims": (4, 8, 12, 16), "depths": (1, 1, 1, 1)}
    options = {"neck_channels": 64, "num_convs": 1}
    if kind == "retinanet":
        options |= {"extra": "on_output", "relu_before_extra": True}
    build = dense.RetinaNet if kind == "retinanet" else dense.FCOS
    built = build(timm.create_model("convnext_tiny", features_only=True, **widths), 4, **options)
    given["state_dict"] = state_of(built)
    model, weights, _ = one_stage_checks.built_detector(given, Differences())
    segmentation_checks.fill_through_files(model, given["state_dict"], Differences())
    x = images((64, 96))
    maps = model.maps(x)
    targets = detection_checks.targets_of(given["batch"]["images"], Differences())
    losses = {name: weights[name] * value.item() for name, value in model.losses(maps, targets).items()}
    given["state_dict"] |= {"backbone.norm0.weight": [4], "backbone.norm0.bias": [4]}  # the published code has them
    (found,) = model(x, sizes=[(60, 90)])
    detections = {"count": len(found.boxes), "bboxes": _summary(found.boxes), "scores": _summary(found.scores),
                  "labels": found.labels.tolist()}  # fmt: skip
    return given | {
        "params": sum(p.numel() for p in model.parameters()) + 8,
        "fpn_features": [_summary(level) for level in maps],
        "cls_scores": [_summary(level) for level in model.bbox_head(maps).logits],
        "losses_eval_mode": losses,
        "detections": [detections],
    }


def state_of(model):
    with tempfile.TemporaryDirectory() as folder:
        dense.save_checkpoint(model, Path(folder) / "model.pth")
        state = torch.load(Path(folder) / "model.pth", weights_only=True)["state_dict"]
    return {key: [*value.shape] for key, value in state.items()}


@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
def test_whole_one_stage_detectors_are_understood(kind, tmp_path):
    head, test = (document(f"{kind}_head")[name] for name in ("config", "test_cfg"))
    made = _whole(kind, head, test)
    (tmp_path / "file.json").write_text(json.dumps(made))
    differences = conformance.check(tmp_path / "file.json")
    assert differences.lines == []
    assert made["detections"][0]["count"] > 3
    made["losses_eval_mode"]["loss_cls"] += 1e-5
    made["fpn_features"][4]["l2"] += 1e-5
    (tmp_path / "file.json").write_text(json.dumps(made))
    assert len(conformance.check(tmp_path / "file.json").lines) == 2
