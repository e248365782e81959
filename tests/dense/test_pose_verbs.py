"""convert, specialize, reparameterize, trim, export and quantize on whole pose models."""

import json

import pytest
import timm
import torch
from torch import nn

import widefield
from tolerances import KEYPOINT_PIXELS, NETWORK, close
from widefield import deploy
from widefield.dense import DecodedKeypoints, HeatmapPose, ServedPose
from widefield.dense.heatmap_codec import CODECS
from widefield.surgery import anatomy, compare

SIZE = (64, 96)
CONVERSIONS = {
    "mixtures": widefield.MoRF((3, 7)),
    "masks": widefield.GMConv(stem="none"),
    "a dynamic mask in the stem": widefield.GMConv(stem="dynamic", body="static"),
}


def made(backbone="test_resnet", kind="msra", keypoints=5):
    """Return a pose model whose norms and heatmaps are those of a trained one in size."""
    torch.manual_seed(0)
    return trained(HeatmapPose(backbone, keypoints, channels=(16, 16), kind=kind))


@torch.no_grad()
def trained(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.uniform_(0.5, 1.5)
    for parameter in model.head.parameters():
        if parameter.ndim == 4:
            parameter.mul_(100)
    return model.eval()


def noise(count=2, size=SIZE):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(3))


def labeled(model, count=3, size=SIZE):
    """Return a batch with the model's own key points as labels."""
    images = noise(count, size)
    with torch.no_grad():
        points = model.decode(model(images), size).points
    return {"image": images, "keypoints": torch.cat((points, torch.ones_like(points[..., :1])), 2)}


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_heads_are_left_alone(name):
    model = made(name)
    parts = anatomy(model)
    assert {parts.part(key) for key, _ in model.head.named_parameters(prefix="head")} == {"head"}
    steps = widefield.plan(model, widefield.GMConv()).replaced
    assert steps
    assert all(step.name.startswith("backbone.") for step in steps)


@torch.no_grad()
@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversions_keep_the_key_points(name):
    plain = made()
    apart = compare(plain, widefield.convert(plain, CONVERSIONS[name]).eval(), noise())
    assert apart.agreement == 1.0
    assert apart.within(NETWORK)


def test_a_converted_network_makes_a_pose_model():
    torch.manual_seed(0)
    trunk = widefield.convert(timm.create_model("test_resnet", features_only=True), widefield.MoRF((3, 5)))
    model, reports = made(trunk), []
    widefield.reparameterize(model, noise(), report=reports.append)
    assert reports[0].difference.agreement == 1.0
    assert reports[0].difference.keypoints == 10
    assert "100.00% of 10 key points within a pixel" in str(reports[0])
    folded = [layer.name for layer in reports[0].fused]
    assert {"head.deconv_layers.0", "head.deconv_layers.3"} <= set(folded)


def test_from_a_converted_pose_model_to_a_trimmed_one():
    model = widefield.convert(made(), widefield.MoRF((3, 7), init="random"), "*layer4*").eval()
    batch, reports = labeled(model), []
    static = widefield.specialize(model, [batch], report=reports.append)
    assert reports[-1].measured.score == "PCK"
    assert reports[-1].measured.scores[0] == 1.0
    assert reports[-1].predicted.keypoints == 15
    assert "within a pixel" in reports[-1].rows()[0]
    fused = widefield.reparameterize(static, batch["image"], report=reports.append)
    assert reports[-1].difference.agreement == 1.0
    widefield.trim(fused, 0.1, loader=[batch], report=reports.append)
    assert reports[-1].change.score == "PCK"
    assert {"within a pixel", "PCK"} <= set(reports[-1].totals())
    assert reports[-1].verified < NETWORK


@torch.no_grad()
@pytest.mark.parametrize("kind", CODECS)
def test_graphs_compute_what_the_model_decodes(kind):
    model = made(kind=kind)
    images = noise(3)
    expected = model.decode(model(images), SIZE)
    inside = ServedPose(model)(images)
    close(inside["keypoints"], expected.points, NETWORK)
    close(inside["scores"], expected.scores, NETWORK)
    close(ServedPose(model, "outside")(images)["heatmaps"], model(images), NETWORK)


class Still(nn.Module):
    """A head that has seen the key points already."""

    num_keypoints = 3

    def __init__(self, heatmaps):
        super().__init__()
        self.heatmaps = heatmaps

    def forward(self, x):
        return self.heatmaps


@pytest.mark.parametrize("kind", ["unbiased", "udp"])
def test_graphs_give_pixels_of_the_crops(kind):
    model = HeatmapPose("test_resnet", 3, channels=(8, 8, 8, 8), kind=kind, sigma=1.5).eval()
    points = torch.tensor([[[11.3, 20.0], [80.5, 47.75], [50.0, 33.1]]], dtype=torch.float64)
    heatmaps, _ = model.codec(SIZE).encode(points, torch.ones(1, 3))
    model.head = Still(heatmaps)
    found = ServedPose(model)(torch.zeros(1, 3, *SIZE))["keypoints"]
    assert (found - points).abs().max() < 0.1


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [(".onnx", "msra"), pytest.param(".xml", "udp", marks=pytest.mark.slow), (".pt2", "unbiased")],
)
def test_files_find_the_key_points_of_the_model(suffix, kind, tmp_path):
    if suffix == ".xml":
        pytest.importorskip("openvino")
    model, path = made(kind=kind), tmp_path / f"model{suffix}"
    batch = labeled(model)
    names = ["a", "b", "c", "d", "e"]
    done = widefield.export(model, path, batch["image"], loader=[batch], classes=names)
    assert {check.shape[0] for check in done.checks} == {1, 3, 8}
    assert all(check.agreement == 1.0 for check in done.checks)
    assert sum(check.keypoints for check in done.checks) == 5 * (1 + 3 + 8 + 3)
    assert max(check.distance for check in done.checks) <= KEYPOINT_PIXELS
    rows = done.rows()
    assert "within a pixel" in rows[0]
    stored = json.loads(path.with_name(f"{path.name}.json").read_text())
    assert stored["pose"] == {"decoding": "inside", "kind": kind, "blur": 11}
    assert stored["detection"] is None
    assert stored["classes"] == names
    runtime, images = deploy.load(path), noise(5)
    points, scores = runtime(images)
    with torch.no_grad():
        expected = model.decode(model(images), SIZE)
    assert (points - expected.points).abs().max() <= KEYPOINT_PIXELS
    close(scores, expected.scores, NETWORK)
    assert compare(model, runtime, [batch]).scores == (1.0, 1.0)
    if suffix != ".pt2":
        assert isinstance(runtime(images), DecodedKeypoints)
        assert done.outputs == ("keypoints", "scores")


def test_files_may_return_heatmaps(tmp_path):
    model, path = made(kind="udp"), tmp_path / "model.onnx"
    done = widefield.export(model, path, noise(), decoding="outside")
    assert done.outputs == ("heatmaps",)
    assert done.pose["decoding"] == "outside"
    assert all(check.agreement == 1.0 for check in done.checks)
    with torch.no_grad():
        close(deploy.load(path)(noise(3)), model(noise(3)), NETWORK)
    with pytest.raises(ValueError, match="decoding"):
        widefield.export(model, path, noise(), decoding="elsewhere")


@pytest.mark.slow
@pytest.mark.parametrize("kind", CODECS)
@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_files_of_any_size_find_the_key_points_of_the_model(suffix, kind, tmp_path):
    if suffix == ".xml":
        pytest.importorskip("openvino")
    model, path = made(kind=kind), tmp_path / f"model{suffix}"
    done = widefield.export(model, path, noise(), dynamic=("batch", "size"))
    assert len({check.shape for check in done.checks}) == 9
    runtime = deploy.load(path)
    for size in ((64, 64), (75, 129)):
        with torch.no_grad():
            expected = model.decode(model(noise(3, size)), size)
        assert (runtime(noise(3, size)).points - expected.points).abs().max() <= KEYPOINT_PIXELS


def test_files_of_any_size_come_from_small_crops(tmp_path):
    model, path = made(), tmp_path / "model.onnx"
    images = noise(2, (64, 32))  # the coarsest map has a side of 1
    done = widefield.export(model, path, images, dynamic=("batch", "size"))
    assert len({check.shape for check in done.checks}) == 9
    with torch.no_grad():
        expected = model.decode(model(noise()), SIZE)
    assert (deploy.load(path)(noise()).points - expected.points).abs().max() <= KEYPOINT_PIXELS


def test_a_file_with_other_key_points_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(ServedPose, "forward", lambda self, x: {
        "keypoints": self.decoder(self.head(self.backbone(x)[0]), x).points + 4,
        "scores": self.decoder(self.head(self.backbone(x)[0]), x).scores,
    })  # fmt: skip
    with pytest.raises(RuntimeError, match=r"0\.00% of 5 key points within a pixel"):
        widefield.export(made(), tmp_path / "model.pt2", noise())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["msra", pytest.param("udp", marks=pytest.mark.slow)])
def test_backbones_are_rounded_and_heads_are_not(kind, tmp_path):
    model, path = made(kind=kind), tmp_path / "model.onnx"
    fused = widefield.reparameterize(model, noise())
    batch = labeled(fused, 4)
    done = widefield.quantize(fused, path, [batch], compare_layers=1)
    floating = [kernel.name for kernel in done.kernels if kernel.kept_float]
    assert [name for name in floating if not name.startswith(("head.", "decoder"))] == []
    assert "head.final_layer" in floating
    assert all(layer.name.startswith(("backbone.", "images")) for layer in done.layers)
    assert done.outputs == ("keypoints", "scores")
    assert done.change.keypoints == 20
    assert done.change.score == "PCK"
    assert done.change.scores[0] == 1.0
    runtime = deploy.load(path)
    again = compare(fused, runtime, [batch])
    assert (again.agreement, again.scores) == (done.change.agreement, done.change.scores)
