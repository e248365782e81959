"""Published files of pose models load in full or are refused with the reason; pose models are saved as such files."""

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dense import pose_configs
from dense.networks import faster_rcnn
from dense.pose_configs import NAMES, SWAPPED
from dense.published_files import (
    FIXTURE_NAMES,
    FIXTURES,
    NORMED,
    backbone_of,
    made_weights,
    network,
    official,
    same,
    saved,
    segmenter,
    write,
)
from widefield import LargeKernel, convert, dense
from widefield.dense import _pose_config

HEAD = json.loads((FIXTURES / "dense" / "heatmap_head.json").read_text())["state_dict"]
IMAGES = torch.randn(1, 3, 64, 48, generator=torch.Generator().manual_seed(0))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pose(backbone="test_convnext", keypoints=17, channels=(8, 8, 8), **options):
    return dense.HeatmapPose(backbone, keypoints, channels=channels, **options)


def refusal(model, path, **options):
    """Return the message of a refusal; check that nothing changed."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"The model is unchanged") as caught:
        dense.load_checkpoint(model, path, **options)
    assert same(model.state_dict(), before)
    return str(caught.value)


def made(folder, model=None, **options):
    return made_weights(saved(model or pose(), folder, **options))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return made(tmp_path_factory.mktemp("pose"))


# Names


def test_saved_names_and_shapes_of_the_head_are_published(tmp_path):
    weights = saved(pose(network("hornet_tiny_7x7"), channels=(32, 32, 32)), tmp_path)
    head = {key: list(value.shape) for key, value in weights.items() if key.startswith("head.")}
    assert head == HEAD
    old = saved(pose(network("hornet_tiny_7x7"), channels=(32, 32, 32)), tmp_path, mmpose="0.x")
    assert {key.replace("keypoint_head.", "head.") for key in old} == set(weights)
    assert {key.partition(".")[0] for key in old} == {"backbone", "keypoint_head"}


@pytest.mark.parametrize("name", [name for name in FIXTURE_NAMES if name in NORMED])
def test_the_norm_after_the_last_stage_has_its_published_number(name, tmp_path):
    weights = saved(pose(network(name)), tmp_path)
    assert {key[:14] for key in weights if re.match(r"backbone\.norm\d", key)} == {"backbone.norm3."[:14]}


# Loading


@pytest.mark.parametrize("prefix", ["head.", "keypoint_head."])
@pytest.mark.parametrize("name", FIXTURE_NAMES)
def test_files_of_every_family_load_and_are_described(name, prefix, tmp_path):
    """Published backbones have norms after all four stages, of which pose models read the last."""
    model = pose(network(name))
    expected = made(tmp_path, model)
    content = {key.replace("head.", prefix, 1) if key.startswith("head.") else key: value
               for key, value in expected.items()}  # fmt: skip
    unread = [f"backbone.norm{stage}.{part}" for stage in range(3) for part in ("weight", "bias")]
    if name in NORMED:
        content |= dict.fromkeys(unread, torch.ones(8))
    assert backbone_of(content).keys() == official(name).keys()
    path = write(content, tmp_path / "file.pth")
    report = dense.load_checkpoint(model, path)
    assert set(report.loaded) == set(model.state_dict())
    assert report.fresh == ()
    assert set(report.skipped) == (set(unread) if name in NORMED else set())
    assert same(saved(model, tmp_path), expected)
    info = dense.inspect_checkpoint(path)
    assert (info.pose, info.num_keypoints, info.published, info.convention) == ("HeatmapPose", 17, True, None)
    assert (info.segmenter, info.detector, info.num_classes) == (None, None, None)


def test_names_of_mmpretrain_and_averages_load(tmp_path):
    """mmpose takes ConvNeXt from mmpretrain. Hooks store copies of the moving average."""
    model = pose(network("convnext_tiny"))
    content = made(tmp_path, model, names="mmpretrain")
    assert any(".depthwise_conv." in key for key in content)
    copies = {f"ema_{key.replace('.', '_')}": value + 1 for key, value in content.items()}
    path = write(content | copies, tmp_path / "file.pth", ema_state_dict={"steps": torch.tensor(3)})
    report = dense.load_checkpoint(model, path)
    assert set(report.skipped) == set(copies)
    assert same(saved(model, tmp_path, names="mmpretrain"), content)


def test_loaded_models_compute_the_same(file, tmp_path):
    one, other = pose(), pose()
    for model in (one, other):
        dense.load_checkpoint(model, write(file, tmp_path / "file.pth"))
    with torch.no_grad():
        torch.testing.assert_close(one.eval()(IMAGES), other.eval()(IMAGES), rtol=0, atol=0)
        assert one(IMAGES).abs().max() > 0


def test_parts_and_other_numbers_of_keypoints(file, tmp_path):
    path = write(file, tmp_path / "file.pth")
    model = pose(keypoints=14)
    message = refusal(model, path)
    assert "The file has 17 key points, the model 14: build the model with num_keypoints=17" in message
    report = dense.load_checkpoint(model, path, fresh_classifier=True)
    assert set(report.fresh) == {"head.final_layer.weight", "head.final_layer.bias"}
    report = dense.load_checkpoint(model, path, parts="backbone")
    assert {key.partition(".")[0] for key in report.loaded} == {"backbone"}
    assert {key.partition(".")[0] for key in report.skipped} == {"head"}
    detector = faster_rcnn("test_convnext")
    assert "It is a pose file; parts='backbone' loads its backbone" in refusal(detector, path)
    assert dense.load_checkpoint(detector, path, parts="backbone").loaded


def test_backbones_of_segmenters_load(tmp_path):
    path = write(made(tmp_path, segmenter("convnext_tiny")), tmp_path / "file.pth")
    model = pose(network("convnext_tiny"))
    assert "It is a segmentation file; parts='backbone'" in refusal(model, path)
    report = dense.load_checkpoint(model, path, parts="backbone")
    assert "backbone.norm0.weight" in report.loaded
    number = torch.load(path, weights_only=True)["state_dict"]["backbone.norm3.weight"]
    assert torch.equal(model.backbone.norm0.weight, number)


# Meaning


@pytest.mark.parametrize(
    ("text", "kind", "shift"),
    [
        (pose_configs.version_0(), "msra", True),
        (pose_configs.version_0(target="sigma=2, unbiased_encoding=True", post_process="unbiased"), "unbiased", True),
        (pose_configs.version_0(encoding="use_udp=True,", target="sigma=2, encoding='UDP'", shift=False), "udp", False),
        (pose_configs.version_1(), "msra", True),
        (pose_configs.version_1("sigma=3, type='MSRAHeatmap', unbiased=True", shift=False), "unbiased", False),
        (pose_configs.version_1("sigma=3, type='UDPHeatmap', blur_kernel_size=17"), "udp", True),
    ],
)
def test_configurations_are_read(file, text, kind, shift, tmp_path):
    old = "keypoint_head" in text
    path = write(file, tmp_path / "file.pth", meta={"config" if old else "cfg": text})
    found = dense.load_checkpoint(pose(kind=kind), path).convention
    assert found == dense.inspect_checkpoint(path).convention
    blur = 17 if "blur_kernel_size=17" in text else 11
    codec = ((256, 192), (64, 48), 2) if old else ((384, 288), (96, 72), 3)
    assert found.codec == dense.HeatmapCodec(*codec, kind, blur)
    assert found.shift_heatmaps is shift
    assert found.mean == pytest.approx(MEAN, abs=1e-6)
    assert found.std == pytest.approx(STD, abs=1e-6)
    assert (found.keypoints, found.swapped) == ((NAMES, SWAPPED) if old else (None, None))
    assert f"kind='{kind}'" in str(found)


def test_configurations_in_json_are_read(file, tmp_path):
    coding = {"type": "UDPHeatmap", "input_size": [192, 256], "heatmap_size": [48, 64], "sigma": 2}
    config = {"model": {"type": "TopdownPoseEstimator", "head": {"type": "HeatmapHead", "decoder": coding}}}
    path = write(file, tmp_path / "file.pth", meta={"cfg": json.dumps(config)})
    found = dense.inspect_checkpoint(path).convention
    assert found == dense.PoseConvention(codec=dense.HeatmapCodec((256, 192), (64, 48), 2, "udp"))


def test_key_points_of_version_1_are_read_with_arrays_next_to_them(file, tmp_path):
    meta = pose_configs.dataset_meta() | {"sigmas": np.ones(17, np.float32), "keypoint_colors": np.zeros((17, 3))}
    path = write(file, tmp_path / "file.pth", meta={"cfg": pose_configs.version_1(), "dataset_meta": meta})
    found = dense.inspect_checkpoint(path).convention
    assert (found.keypoints, found.swapped) == (NAMES, SWAPPED)


@pytest.mark.parametrize(
    "meta",
    [
        pose_configs.dataset_meta(NAMES[:14], SWAPPED[:14]),  # another number than heatmaps
        pose_configs.dataset_meta() | {"keypoint_id2name": {0: "nose", 2: "chin"}},
        pose_configs.dataset_meta() | {"keypoint_id2name": ["nose"]},
    ],
)
def test_names_that_cannot_be_those_of_the_heatmaps_are_left_out(file, meta, tmp_path):
    path = write(file, tmp_path / "file.pth", meta={"dataset_meta": meta})
    assert dense.inspect_checkpoint(path).convention is None


def test_pairs_that_do_not_pair_are_left_out(file, tmp_path):
    meta = pose_configs.dataset_meta() | {"flip_indices": [1, 2, 0, *range(3, 17)]}
    found = dense.inspect_checkpoint(write(file, tmp_path / "file.pth", meta={"dataset_meta": meta})).convention
    assert (found.keypoints, found.swapped) == (NAMES, None)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_damaged_configurations_do_not_stop_anything(data):
    """Any text may stand there: what cannot be understood is not known."""
    text = data.draw(st.sampled_from([pose_configs.version_0(), pose_configs.version_1()]))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(len(text), start + 40)))
        text = text[:start] + data.draw(st.text("()[]{}'\"=:,.-e9 \n", max_size=12)) + text[end:]
    found = _pose_config.convention(text)
    assert isinstance(found, dense.PoseConvention)
    for reading in (_pose_config.head_type, _pose_config.other_coding):
        assert reading(text) is None or isinstance(reading(text), str)
    assert _pose_config.is_bgr(text) in (True, False)


@pytest.mark.parametrize(
    "field",
    [
        "mean=[0.1.2, 3, 4]",
        "mean=[-1, 2, 3]",
        "mean=[1e999, 2, 3]",
        f"mean=[{'9' * 400}, 2, 3]",
        "mean=[1, 2]",
        "mean=",
    ],
)
def test_means_that_are_none_are_left_out(field):
    text = f"data_preprocessor = dict({field}, std=[1, 1, 1], bgr_to_rgb=True)"
    assert _pose_config.convention(text).mean is None


def test_formatted_lists_of_newer_mmengine_are_read():
    text = "codec = dict(\n    heatmap_size=(\n        48,\n        64,\n    ),\n    input_size=(\n        192,\n"
    text += "        256,\n    ),\n    sigma=2,\n    type='MSRAHeatmap')\n"
    assert _pose_config.convention(text).codec == dense.HeatmapCodec((256, 192), (64, 48), 2)


@pytest.mark.parametrize("version", ["0.x", "1.x"])
@pytest.mark.parametrize("kind", ["msra", "unbiased", "udp"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_what_is_saved_is_read_again(version, kind, suffix, tmp_path):
    convention = dense.PoseConvention(
        NAMES, SWAPPED, dense.HeatmapCodec((384, 288), (96, 72), 2.5, kind, 17), kind != "udp", MEAN, STD
    )
    path = tmp_path / f"file.{suffix}"
    dense.save_checkpoint(pose(), path, pose=convention, mmpose=version)
    found = dense.load_checkpoint(pose(kind=kind), path, pose=convention).convention
    assert found.mean == pytest.approx(MEAN, abs=1e-8)
    assert found.std == pytest.approx(STD, abs=1e-8)
    assert (found.keypoints, found.swapped, found.codec, found.shift_heatmaps) == (
        NAMES, SWAPPED, convention.codec, convention.shift_heatmaps
    )  # fmt: skip


def test_conventions_are_checked(tmp_path):
    with pytest.raises(ValueError, match="must be unique; 'a' appears twice"):
        dense.PoseConvention(["a", "b", "a"])
    with pytest.raises(TypeError, match="must be a sequence of names; got 'nose'"):
        dense.PoseConvention("nose")
    with pytest.raises(ValueError, match="0 becomes 1, and 1 does not become 0"):
        dense.PoseConvention(["a", "b", "c"], [1, 2, 0])
    with pytest.raises(ValueError, match="one entry for each of 3 key points; got 2"):
        dense.PoseConvention(["a", "b", "c"], [1, 0])
    with pytest.raises(ValueError, match="mean must have three numbers"):
        dense.PoseConvention(mean=[0.5])
    with pytest.raises(ValueError, match="one entry for each of the model's 17 key points; got 2"):
        dense.save_checkpoint(pose(), tmp_path / "file.pth", pose=dense.PoseConvention(["a", "b"]))
    with pytest.raises(ValueError, match=r"mmpose must be one of '1\.x', '0\.x'; got '2'"):
        dense.save_checkpoint(pose(), tmp_path / "file.pth", mmpose="2")
    with pytest.raises(TypeError, match="a UPerNet has none: leave it out"):
        dense.save_checkpoint(segmenter("van_b0"), tmp_path / "file.pth", pose=dense.PoseConvention())
    dense.save_checkpoint(segmenter("van_b0"), tmp_path / "file.pth")
    with pytest.raises(TypeError, match="a UPerNet has none: leave it out"):
        dense.load_checkpoint(segmenter("van_b0"), tmp_path / "file.pth", pose=dense.PoseConvention())


# Refusals of weights that fit


def test_another_order_of_key_points_is_refused(file, tmp_path):
    """The dictionary counts from 0, so the place is the number of the heatmap."""
    meta = pose_configs.dataset_meta(("nose", *NAMES[:4:-1], *NAMES[1:5]))
    path = write(file, tmp_path / "file.pth", meta={"dataset_meta": meta})
    expected = dense.PoseConvention(NAMES)
    message = refusal(pose(), path, pose=expected)
    assert "has the key point 'right_ankle' at place 1, and 'left_eye' is expected" in message
    assert dense.load_checkpoint(pose(), path, pose=expected, parts="backbone").loaded
    assert dense.load_checkpoint(pose(), path, pose=expected, fresh_classifier=True).loaded
    assert dense.load_checkpoint(pose(), path).convention.keypoints == tuple(meta["keypoint_id2name"].values())


def test_another_kind_of_heatmaps_is_refused(file, tmp_path):
    text = pose_configs.version_0(encoding="use_udp=True,", target="sigma=2, encoding='UDP'", shift=False)
    path = write(file, tmp_path / "file.pth", meta={"config": text})
    message = refusal(pose(), path)
    assert (
        "its heatmaps are of the kind 'udp', and this model has kind='msra': build the model with kind='udp'" in message
    )
    assert dense.load_checkpoint(pose(kind="udp", sigma=3), path).loaded
    assert dense.load_checkpoint(pose(), path, fresh_classifier=True).loaded
    assert dense.load_checkpoint(pose(), path, parts="backbone").loaded


def test_other_images_are_refused(file, tmp_path):
    path = write(file, tmp_path / "bgr.pth", meta={"cfg": pose_configs.version_1(rgb=False)})
    for parts in (None, "backbone"):
        assert "channels blue, green, red" in refusal(pose(), path, parts=parts)
    assert dense.load_checkpoint(pose(), path, parts="head").loaded
    half = dense.PoseConvention(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    path = write(file, tmp_path / "rgb.pth", meta={"cfg": pose_configs.version_1()})
    assert "and (0.5, 0.5, 0.5) is expected" in refusal(pose(), path, pose=half)
    assert dense.load_checkpoint(pose(), path, pose=dense.PoseConvention(mean=MEAN, std=STD)).loaded


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (pose_configs.version_0(head="AESimpleHead"), "its head is a AESimpleHead"),
        (pose_configs.version_1(head="AssociativeEmbeddingHead"), "its head is a AssociativeEmbeddingHead"),
        (pose_configs.version_1(head="IntegralRegressionHead"), "its head is a IntegralRegressionHead"),
        (pose_configs.version_1("heatmap_type='combined', sigma=3, type='UDPHeatmap'"), "UDP's maps of offsets"),
        (pose_configs.version_0(encoding="target_type='CombinedTarget',"), "UDP's maps of offsets"),
        (pose_configs.version_0(target="encoding='Megvii', kernel=(11, 11)"), "coded by Megvii's rules"),
        (pose_configs.version_1("kernel_size=(11, 11), type='MegviiHeatmap'"), "coded by MegviiHeatmap"),
    ],
)
def test_heads_whose_outputs_mean_something_else_are_refused(file, text, reason, tmp_path):
    path = write(file, tmp_path / "file.pth", meta={"config": text})
    assert reason in refusal(pose(), path)
    assert dense.load_checkpoint(pose(), path, parts="backbone").loaded


# Refusals of weights that do not fit


def replaced(file, old, new):
    return {key.replace(old, new): value for key, value in file.items()}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda file: replaced(file, "head.final_layer", "head.fc"), "is one linear layer"),
        (lambda file: replaced(file, "head.final_layer", "head.mlp_head_x"), "classifies coordinates (SimCC"),
        (lambda file: file | {"head.cls_x.weight": torch.zeros(2, 2)}, "classifies coordinates (SimCC"),
        (lambda file: replaced(file, "head.final_layer", "keypoint_head.final_layers.0"), "associative embedding"),
        (lambda file: replaced(file, "head.final_layer", "head.multi_final_layers.0"), "has several stages"),
        (lambda file: replaced(file, "head.", "head.simplebaseline_head."), "regresses coordinates"),
        (lambda file: replaced(file, "head.final_layer", "keypoint_head.final_layer.3"), "between the deconvolutions"),
        (lambda file: replaced(file, "head.", "roi_head."), "It is a detection file"),
        (lambda file: {key: value for key, value in file.items() if "head" not in key}, "a backbone alone"),
        (lambda file: file | {"backbone.stage2.0.branches.0.0.conv1.weight": torch.zeros(1)}, "is an HRNet"),
        (lambda file: file | {"backbone.conv2.conv.weight": torch.zeros(1)}, "convolution to 1280 channels"),
    ],
)
def test_the_reason_is_given(file, change, reason, tmp_path):
    message = refusal(pose(), write(change(file), tmp_path / "file.pth"))
    assert reason in message
    assert "does not fit this HeatmapPose" in message


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: pose(channels=()), "build the model with channels=()"),
        (lambda: pose(channels=(8, 16)), "build the model with channels=(8, 16)"),
        (lambda: pose(channels=(8, 8, 8, 8)), "build the model with channels=(8, 8, 8, 8)"),
    ],
)
def test_other_deconvolutions_are_named(model, reason, tmp_path):
    assert reason in refusal(pose(), write(made(tmp_path, model()), tmp_path / "file.pth"))


def test_other_kernels_are_named(file, tmp_path):
    file = dict(file)
    file["head.deconv_layers.3.weight"] = torch.zeros(8, 8, 2, 2)
    file["head.final_layer.weight"] = torch.zeros(17, 8, 3, 3)
    message = refusal(pose(), write(file, tmp_path / "file.pth"))
    assert "The file's deconvolutions have kernels of 2x2 and 4x4, those here of 4x4" in message
    assert "The file's last layer has kernels of 3x3, ours of 1x1" in message


def test_converted_models_are_not_saved(tmp_path):
    converted = convert(pose().eval(), LargeKernel(13))
    with pytest.raises(ValueError, match="could not load this model"):
        dense.save_checkpoint(converted, tmp_path / "file.pth")
