"""Published files of detectors load in full or are refused with the reason; detectors are saved as such files."""

import json
import re

import pytest
import timm
import torch
from torch import nn

from dense.networks import cascade_mask_rcnn, cascade_rcnn, faster_rcnn, mask_rcnn
from dense.published_files import FIXTURE_NAMES, FIXTURES, made_weights, network, same, saved, segmenter, write
from widefield import dense

FCOS_KEYS = json.loads((FIXTURES / "dense" / "fcos_head.json").read_text())["state_dict"]
IMAGES = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def fcos(backbone="test_convnext", classes=3, **options):
    return dense.FCOS(backbone, classes, **{"neck_channels": 64, **options})


def retinanet(backbone="test_convnext", classes=3, **options):
    return dense.RetinaNet(backbone, classes, **{"neck_channels": 16, **options})


BUILDERS = (faster_rcnn, mask_rcnn, cascade_rcnn, cascade_mask_rcnn, retinanet, fcos)
KINDS = ("FasterRCNN", "MaskRCNN", "CascadeRCNN", "CascadeRCNN", "RetinaNet", "FCOS")


def refusal(model, path, **options):
    """Return the message of a refusal; check that nothing changed."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"The model is unchanged") as caught:
        dense.load_checkpoint(model, path, **options)
    assert same(model.state_dict(), before)
    return str(caught.value)


# Names


@pytest.mark.parametrize(
    ("fixture", "build"),
    [
        ("mask_rcnn_convnext_tiny_fpn", lambda: mask_rcnn(network("convnext_tiny"), 80)),
        (
            "cascade_mask_rcnn_convnext_tiny_fpn_giou_4conv1fc",
            lambda: cascade_mask_rcnn(network("convnext_tiny"), 80),
        ),
    ],
)
def test_saved_names_are_those_of_whole_published_models(fixture, build, tmp_path):
    published = json.loads((FIXTURES / "dense" / f"{fixture}.json").read_text())["state_dict"]
    weights = saved(build(), tmp_path)
    assert weights.keys() == published.keys()
    assert {key: value.ndim for key, value in weights.items()} == {key: len(shape) for key, shape in published.items()}


@pytest.mark.slow
def test_saved_names_and_shapes_are_the_published_ones_at_full_width(tmp_path):
    published = json.loads((FIXTURES / "dense" / "faster_rcnn_resnet50_fpn.json").read_text())["state_dict"]
    weights = saved(dense.FasterRCNN("resnet50", 80), tmp_path)
    assert {key: list(value.shape) for key, value in weights.items()} == published


def test_saved_names_of_fcos_are_published(tmp_path):
    weights = saved(fcos(), tmp_path)
    assert {key for key in weights if key.startswith("bbox_head.")} == set(FCOS_KEYS)
    assert {key.partition(".")[0] for key in weights} == {"backbone", "neck", "bbox_head"}


# Loading


@pytest.mark.parametrize(("build", "kind"), list(zip(BUILDERS, KINDS, strict=True)))
def test_files_of_every_detector_load_and_are_described(build, kind, tmp_path):
    made = made_weights(saved(build(), tmp_path))
    path = write(made, tmp_path / "file.pth", meta={"CLASSES": ("a", "b", "c"), "mmdet_version": "2.28.0"})
    model = build()
    report = dense.load_checkpoint(model, path)
    assert set(report.loaded) == set(model.state_dict())
    assert (report.fresh, report.skipped, report.classes) == ((), (), ("a", "b", "c"))
    assert same(saved(model, tmp_path), made)
    info = dense.inspect_checkpoint(path)
    assert (info.detector, info.segmenter, info.num_classes, info.published) == (kind, None, 3, True)
    newer = {"meta": {"dataset_meta": {"CLASSES": ["a", "b", "c"]}, "cfg": "", "mmengine_version": "0.10.0"},
             "state_dict": made, "message_hub": {}, "ema_state_dict": {}}  # fmt: skip
    torch.save(newer, tmp_path / "newer.pth")
    assert dense.load_checkpoint(build(), tmp_path / "newer.pth").classes == ("a", "b", "c")


@pytest.mark.parametrize("name", FIXTURE_NAMES)
@pytest.mark.parametrize("build", [mask_rcnn, fcos])
def test_backbones_of_every_family_load(name, build, tmp_path):
    made = made_weights(saved(build(network(name)), tmp_path))
    model = build(network(name))
    assert set(dense.load_checkpoint(model, write(made, tmp_path / "file.pth")).loaded) == set(model.state_dict())
    assert same(saved(model, tmp_path), made)


@pytest.mark.parametrize("name", ["convnext_tiny", "van_b0", "replknet_31b", "moganet_xtiny"])
def test_backbones_give_the_maps_that_segmenters_give(name, tmp_path):
    """Published detection code of these families has the norms of its segmentation code."""
    model = segmenter(name)
    dense.save_checkpoint(model, tmp_path / "segmenter.pth")
    detector = mask_rcnn(network(name))
    report = dense.load_checkpoint(detector, tmp_path / "segmenter.pth", parts="backbone")
    assert all(key.startswith("backbone.") for key in report.loaded)
    with torch.no_grad():
        for one, other in zip(detector.eval().backbone(IMAGES), model.eval().backbone(IMAGES), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_one_stage_detectors_leave_the_norm_that_they_do_not_read(tmp_path):
    two_stage = mask_rcnn(network("convnext_tiny"))
    norms = {key: value for key, value in saved(two_stage, tmp_path).items() if re.match(r"backbone\.norm\d", key)}
    assert {key[:14] for key in norms} == {f"backbone.norm{stage}" for stage in range(4)}
    model = fcos(network("convnext_tiny"))
    file = saved(model, tmp_path) | norms
    report = dense.load_checkpoint(model, write(file, tmp_path / "file.pth"))
    assert report.skipped == ("backbone.norm0.weight", "backbone.norm0.bias")


def test_the_first_names_of_fcos_load(tmp_path):
    model = fcos()
    file = made_weights(saved(model, tmp_path))
    old = {re.sub(r"bbox_head\.conv_(cls|reg|centerness)", r"bbox_head.fcos_\1", key): value
           for key, value in file.items()}  # fmt: skip
    assert "bbox_head.fcos_centerness.bias" in old
    path = write(old, tmp_path / "old.pth")
    assert dense.inspect_checkpoint(path).detector == "FCOS"
    dense.load_checkpoint(model, path)
    assert same(saved(model, tmp_path), file)


@pytest.mark.parametrize(
    ("build", "fresh"),
    [
        (faster_rcnn, {"roi_head.bbox_head.fc_cls", "roi_head.bbox_head.fc_reg"}),
        (mask_rcnn, {"roi_head.bbox_head.fc_cls", "roi_head.bbox_head.fc_reg", "roi_head.mask_head.conv_logits"}),
        (cascade_rcnn, {f"roi_head.bbox_head.{stage}.fc_cls" for stage in range(3)}),
        (retinanet, {"bbox_head.retina_cls"}),
        (fcos, {"bbox_head.conv_cls"}),
    ],
)
def test_another_number_of_classes_keeps_the_last_layers(build, fresh, tmp_path):
    file = made_weights(saved(build(classes=5), tmp_path))
    path = write(file, tmp_path / "file.pth")
    model = build()
    assert "The file has 5 classes, the model 3: build the model with num_classes=5" in refusal(model, path)
    report = dense.load_checkpoint(model, path, fresh_classifier=True)
    assert {key.rpartition(".")[0] for key in report.fresh} == fresh
    assert set(report.fresh) == set(report.skipped)
    with torch.no_grad():
        model.eval()(IMAGES)


def test_parts(tmp_path):
    path = write(made_weights(saved(mask_rcnn(), tmp_path)), tmp_path / "file.pth")
    model = faster_rcnn()
    report = dense.load_checkpoint(model, path, parts=("backbone", "neck", "rpn_head"))
    assert {key.partition(".")[0] for key in report.loaded} == {"backbone", "neck", "rpn_head"}
    assert {key.partition(".")[0] for key in report.skipped} == {"roi_head"}


# Refusals


@pytest.mark.parametrize(
    ("build", "file", "hint"),
    [
        (faster_rcnn, mask_rcnn, "The file holds a MaskRCNN, the model is a FasterRCNN"),
        (fcos, mask_rcnn, "The file holds a MaskRCNN, the model is an FCOS"),
        (retinanet, fcos, "The file holds an FCOS, the model is a RetinaNet"),
        (lambda: faster_rcnn(box_head="4conv1fc"), faster_rcnn, "build the model with box_head='shared2fc'"),
        (faster_rcnn, lambda: faster_rcnn(box_head="4conv1fc"), "build the model with box_head='4conv1fc'"),
        (faster_rcnn, lambda: faster_rcnn(class_agnostic=True), "build the model with class_agnostic=True"),
        (cascade_rcnn, lambda: cascade_rcnn(class_agnostic=False), "build the model with class_agnostic=False"),
        (fcos, lambda: fcos(conv_bias=True), "build the model with conv_bias=True"),
        (lambda: fcos(conv_bias=True), fcos, "build the model with conv_bias=False"),
        (lambda: mask_rcnn("test_convnext"), mask_rcnn, "ResNet with a deep stem, the model's a ConvNeXt"),
        (faster_rcnn, lambda: segmenter("convnext_tiny"), "It is a segmentation file; parts='backbone'"),
        (lambda: segmenter("convnext_tiny"), fcos, "It is a detection file; parts='backbone'"),
    ],
)
def test_the_reason_is_given(build, file, hint, tmp_path):
    path = write(made_weights(saved(file(), tmp_path)), tmp_path / "file.pth")
    assert hint in refusal(build(), path)


def test_unknown_detectors_are_named_as_such(tmp_path):
    file = saved(fcos(), tmp_path)
    other = {key.replace("conv_centerness", "atss_centerness"): value for key, value in file.items()}
    assert "The file holds another detector" in refusal(fcos(), write(other, tmp_path / "file.pth"))
    assert dense.inspect_checkpoint(tmp_path / "file.pth").detector is None


@pytest.mark.parametrize("cascade", [False, True])
def test_files_of_version_1_are_refused_but_for_their_backbone(cascade, tmp_path):
    build = cascade_rcnn if cascade else faster_rcnn
    file = made_weights(saved(build(), tmp_path))
    old = {key.replace("roi_head.", ""): value for key, value in file.items()}  # the heads were not nested
    path = write(old, tmp_path / "old.pth", meta={"mmdet_version": "1.2.0"})
    message = refusal(build(), path)
    assert "it is of mmdetection 1.x, which has the background as class 0" in message
    assert len(dense.load_checkpoint(build(), path, parts="backbone").loaded) > 20


CONFIG = "model = dict(type='FCOS', bbox_head=dict(type='FCOSHead', {}), backbone=dict(type='ResNet', style='{}'))"


def with_config(model, folder, text, key="config"):
    return write(saved(model, folder), folder / "file.pth", meta={key: text})


def test_anchors_of_version_1_are_refused(tmp_path):
    text = "bbox_head=dict(type='RetinaHead', anchor_ratios=[0.5, 1.0, 2.0], octave_base_scale=4)"
    assert "mmdetection 1.x" in refusal(fcos(), with_config(fcos(), tmp_path, text))
    text = "anchor_generator=dict(type='LegacyAnchorGenerator', center_offset=0.5)"
    assert "mmdetection 1.x" in refusal(fcos(), with_config(fcos(), tmp_path, text, "cfg"))


@pytest.mark.parametrize("parts", [None, "backbone"])
def test_resnets_with_other_strides_are_refused(parts, tmp_path):
    path = with_config(fcos("test_resnet"), tmp_path, CONFIG.format("norm_on_bbox=False", "caffe"))
    assert "strides in the 1x1 convolutions (style='caffe')" in refusal(fcos("test_resnet"), path, parts=parts)
    dense.load_checkpoint(fcos("test_resnet"), with_config(fcos("test_resnet"), tmp_path, CONFIG.format("", "pytorch")))


def test_settings_that_change_what_weights_mean_are_compared(tmp_path):
    tricks = {"distances": "relu", "centerness_on": "boxes"}
    text = CONFIG.format("norm_on_bbox=True, centerness_on_reg=True", "pytorch")
    path = with_config(fcos(), tmp_path, text)
    assert "norm_on_bbox=True, and this FCOS has distances='exp': build it with distances='relu'" in refusal(
        fcos(), path
    )
    assert "build it with centerness_on='boxes'" in refusal(fcos(distances="relu"), path)
    dense.load_checkpoint(fcos(**tricks), path)
    plain = with_config(fcos(), tmp_path, CONFIG.format("", "pytorch"))
    assert "build it with distances='exp'" in refusal(fcos(**tricks), plain)


def test_only_models_of_dense_are_taken(tmp_path):
    path = write(saved(fcos(), tmp_path), tmp_path / "file.pth")
    with pytest.raises(TypeError, match=r"must be a segmenter, detector or pose model.*got Linear"):
        dense.load_checkpoint(nn.Linear(1, 1), path)
    with pytest.raises(ValueError, match="one of 'backbone', 'neck', 'bbox_head'; got 'head'"):
        dense.load_checkpoint(fcos(), path, parts="head")
    converted = fcos(timm.create_model("test_convnext", features_only=True))
    with pytest.raises(ValueError, match="classes must have one entry for each of the model's 3 classes; got 2"):
        dense.save_checkpoint(converted, path, classes=["a", "b"])
