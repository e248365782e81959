"""convert, specialize, reparameterize, trim, export and quantize on whole detectors."""

import copy
import json

import pytest
import timm
import torch

import widefield
from dense.detectors import DETECTORS, fcos, noise, retinanet, trained
from dense.networks import cascade_mask_rcnn, cascade_rcnn, faster_rcnn, mask_rcnn
from tolerances import NETWORK
from widefield import deploy
from widefield.surgery import anatomy, compare
from widefield.surgery.detections import detections

ANY_SIZE = ("batch", "size")
CONVERSIONS = {
    "mixtures": widefield.MoRF((3, 7)),
    "masks": widefield.GMConv(stem="none"),
    "a dynamic mask in the stem": widefield.GMConv(stem="dynamic", body="static"),
}


def made(build=faster_rcnn, **options):
    torch.manual_seed(0)
    return trained(build(**options))


def labeled(model, *shape):
    """Return a batch with some of the model's own detections as objects."""
    images = noise(*shape)
    with torch.no_grad():
        found = model(images)
    return {
        "image": images,
        "boxes": [one.boxes[:4] for one in found],
        "labels": [one.labels[:4] for one in found],
        "crowd": [torch.zeros(len(one.labels[:4]), dtype=torch.bool) for one in found],
    }


@pytest.mark.parametrize("build", DETECTORS, ids=lambda build: build.__name__)
def test_necks_and_heads_are_left_alone(build):
    model = build()
    parts = anatomy(model)
    assert parts.backbone == "backbone.body"
    assert {parts.part(name) for name, _ in model.neck.named_parameters(prefix="neck")} == {"neck"}
    heads = [name for name, _ in model.named_parameters() if name.split(".")[0] not in ("backbone", "neck")]
    assert {parts.part(name) for name in heads} == {"head"}
    steps = widefield.plan(model, widefield.GMConv()).replaced
    assert steps
    assert all(step.name.startswith("backbone.body.") for step in steps)
    asked = widefield.plan(model, widefield.GMConv(), ["neck.*", "*_head.*"]).replaced
    assert {step.name.split(".")[0] for step in asked} >= {"neck"}
    assert len({step.name.split(".")[0] for step in asked}) > 1


@torch.no_grad()
@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversions_before_and_after_building_keep_the_detections(name):
    plain = made()
    after = widefield.convert(plain, CONVERSIONS[name]).eval()
    apart = compare(plain, after, noise(2, 3, 64, 64))
    assert apart.agreement == 1.0
    assert apart.within(NETWORK)


def test_a_converted_network_makes_a_detector():
    torch.manual_seed(0)
    trunk = widefield.convert(timm.create_model("test_resnet", features_only=True), widefield.MoRF((3, 5)))
    model = trained(faster_rcnn(trunk))
    assert compare(model, widefield.reparameterize(model, noise(2, 3, 64, 64)), noise(2, 3, 64, 64)).within(NETWORK)


def test_from_a_converted_detector_to_a_trimmed_one():
    model = made(mask_rcnn, test_proposals=40, max_per_image=20)
    model = trained(widefield.convert(model, widefield.MoRF((3, 7), init="random"), "*layer4*"))
    batch, reports = labeled(model, 2, 3, 64, 64), []
    static = widefield.specialize(model, [batch], report=reports.append)
    assert reports[-1].measured.score == "box AP"
    assert reports[-1].measured.scores[0] > 0.5
    fused = widefield.reparameterize(static, batch["image"], report=reports.append)
    assert reports[-1].difference.agreement == 1.0
    assert reports[-1].difference.detections > 20
    widefield.trim(fused, 0.1, loader=[batch], report=reports.append)
    assert reports[-1].change.score == "box AP"
    assert "found by both" in reports[-1].totals()
    assert reports[-1].verified < NETWORK


def test_a_detector_that_finds_nothing_is_verified_on_its_best_boxes():
    model = made(retinanet)
    model.score_threshold = 0.999
    reports = []
    widefield.reparameterize(model, noise(1, 3, 64, 64), report=reports.append)
    assert reports[0].difference.detections > 100
    assert model.score_threshold == 0.999


@pytest.mark.parametrize("build", [faster_rcnn, mask_rcnn, cascade_rcnn, retinanet, fcos])
def test_detectors_that_find_nothing_are_compared_on_their_best_boxes(build):
    model, images = made(build, score_threshold=0.999), noise(1, 3, 64, 64)
    other = copy.deepcopy(model)
    same = compare(model, other, images)
    assert same.detections > 20
    assert same.agreement == 1.0
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name.endswith(("fc_cls.weight", "retina_cls.weight", "conv_cls.weight")):
                parameter.copy_(parameter.roll(1, 0))
    assert compare(model, other, [images]).agreement < 0.9
    assert model.score_threshold == other.score_threshold == 0.999


def test_archives_of_pytorch_hold_no_suppression(tmp_path):
    with pytest.raises(ValueError, match=r"write a detector as \.onnx or \.xml"):
        widefield.export(made(), tmp_path / "model.pt2", noise(1, 3, 64, 64))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "suffix"),
    [
        (faster_rcnn, ".xml"),
        (mask_rcnn, ".onnx"),
        (cascade_rcnn, ".onnx"),
        (cascade_mask_rcnn, ".xml"),
        (retinanet, ".xml"),
        (fcos, ".onnx"),
    ],
)
def test_files_of_any_batch_and_size_find_what_the_model_finds(build, suffix, tmp_path):
    if suffix == ".xml":
        pytest.importorskip("openvino")
    model = made(build)
    batch = labeled(model, 2, 3, 64, 96)
    path = tmp_path / f"model{suffix}"
    done = widefield.export(model, path, batch["image"], dynamic=ANY_SIZE, loader=[batch], classes=["a", "b", "c"])
    assert all(check.agreement == 1.0 for check in done.checks)
    assert len({check.shape for check in done.checks}) == 7
    assert done.checks[-1].ap_before == done.checks[-1].ap_after > 0.5
    assert "box AP" in str(done)
    stored = json.loads(path.with_name(f"{path.name}.json").read_text())
    assert stored["detection"] == {"nms": "inside", **vars(model.rules)}
    assert stored["classes"] == ["a", "b", "c"]
    runtime = deploy.load(path)
    for shape in ((1, 3, 64, 64), (3, 3, 129, 75)):  # also maps of a single cell
        images = noise(*shape)
        found = runtime(images)
        assert len(detections(found)) == shape[0]
        assert compare(model, runtime, images).within(NETWORK)
    assert (found[0].masks is not None) == model.has_masks


@pytest.mark.slow
@pytest.mark.parametrize("build", [cascade_rcnn, fcos])
def test_files_with_the_suppression_outside_give_the_candidates(build, tmp_path):
    model = made(build)
    done = widefield.export(model, tmp_path / "model.onnx", noise(1, 3, 64, 64), nms="outside")
    assert done.detection["nms"] == "outside"
    assert done.outputs == ("boxes", "scores")
    assert all(check.agreement == 1.0 for check in done.checks)
    boxes, scores = deploy.load(tmp_path / "model.onnx")(noise(2, 3, 64, 64))
    assert boxes.shape[:2] == scores.shape[:2]


@pytest.mark.slow
def test_a_file_of_a_detector_that_finds_nothing_is_not_written(tmp_path):
    model = made(score_threshold=0.9999)
    with pytest.raises(ValueError, match="finds nothing in noise or in the images given"):
        widefield.export(model, tmp_path / "model.onnx", noise(1, 3, 64, 64))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_eight_bits_round_backbone_and_neck_and_keep_the_heads(tmp_path):
    model = widefield.reparameterize(made(), noise(2, 3, 64, 96))
    batch = labeled(model, 2, 3, 64, 96)
    done = deploy.quantize(model, tmp_path / "int8.onnx", [batch], dynamic=ANY_SIZE, compare_layers=1)
    parts = {kernel.name: kernel.kept_float for kernel in done.kernels}
    assert {name.split(".")[0] for name, kept in parts.items() if not kept} == {"backbone", "neck"}
    assert {name.split(".")[0] for name, kept in parts.items() if kept} == {"rpn_head", "roi_head"}
    assert len(parts) == len(done.kernels)
    assert done.change.score == "box AP"
    assert done.change.agreement > 0.5
    assert done.bytes < done.bytes_before
    assert compare(model, deploy.load(tmp_path / "int8.onnx"), [batch]) == done.change
