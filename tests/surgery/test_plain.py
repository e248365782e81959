"""The result of reparameterize loads, traces and quantizes without widefield."""

import copy
import io
import subprocess
import sys

import pytest
import timm
import torch
import torchvision
from test_convert import unsettled
from timm.layers.conv2d_same import Conv2dSame
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx

import widefield
from tolerances import BFLOAT16, FLOAT64, NETWORK, close
from widefield.nn import LKA, DeformConv2d, DepthwiseConv2d, MultiOrderGatedAggregation
from widefield.surgery import NothingToFuseError

# torch.ao (2.14) leaves the ids of freed objects in TorchScript's table of builtins. A list that is later allocated at
# one of these addresses counts as an operator, and scripting any Conv2d fails at random.
_BUILTINS = torch.jit._builtins._get_builtin_table()
for _freed in [key for key, name in _BUILTINS.items() if name.startswith("quantized_decomposed::")]:
    del _BUILTINS[_freed]


class Same(nn.Module):
    """A strided layer with TensorFlow's "SAME" padding, as in timm's ``tf_*`` models."""

    def __init__(self):
        super().__init__()
        self.stem, self.spatial = nn.Conv2d(3, 16, 1), Conv2dSame(16, 16, 5, 2, groups=16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.spatial(self.stem(x).relu()).mean((2, 3)))


CONVERSIONS = {
    "fast": widefield.FastDepthwise(),
    "masks": widefield.GMConv(stem="static"),
    "small": widefield.LargeKernel(7),
    "without norm": widefield.LargeKernel(7, norm=False),
    "dilated": widefield.LargeKernel(7, branches="dilated"),
    "bands": widefield.LargeKernel(7, branches="bands", small=7),
    "inception": widefield.InceptionSplit(),
    "deformable": widefield.Deformable(),
    **{name: widefield.TokenMixer(name) for name in ("conv", "gmconv", "gnconv", "large_kernel", "lka", "moga")},
}
ROUTED = {
    "mixtures": (widefield.MoRF((3, 5, 7)), {"FusedMoRFConv2d", "Router"}),
    "dynamic masks": (widefield.GMConv(body="dynamic"), {"DynamicGMConv2d", "SigmaPredictor"}),
}
NETWORKS = {
    "two layers": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, groups=8)),
    "mobilenet": lambda: torchvision.models.mobilenet_v2(width_mult=0.35, num_classes=5),
    "same": Same,
    "convnext": lambda: timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(16, 16, 24, 32), num_classes=5),
}


def ours(model):
    return {type(m).__name__ for m in model.modules() if type(m).__module__.startswith("widefield")}


def converted(network, config):
    torch.manual_seed(0)
    return widefield.convert(unsettled(NETWORKS[network]()), config)


@pytest.mark.parametrize("network", ["mobilenet", "convnext"])
@pytest.mark.parametrize("name", CONVERSIONS)
def test_one_call_leaves_no_class_of_ours(network, name):
    if (network, name) == ("mobilenet", "bands"):
        pytest.skip("the bands hold no kernel of a larger network's size")  # 7x7 bands of width 7 are one kernel
    model, x = converted(network, CONVERSIONS[name]), torch.randn(2, 3, 32, 32)
    assert ours(model)
    reports = []
    fused = widefield.reparameterize(model, x, report=reports.append)
    assert ours(fused) == set()
    close(fused(x), model(x), NETWORK)
    modules = dict(fused.named_modules())
    for layer in reports[0].fused:
        assert type(modules[layer.name]).__name__ == layer.after
    with pytest.raises(NothingToFuseError, match="has nothing to fuse"):
        widefield.reparameterize(fused, x)


@pytest.mark.parametrize("name", ROUTED)
def test_only_routing_is_left_of_routed_models(name):
    config, left = ROUTED[name]
    model, x = converted("mobilenet", config), torch.randn(2, 3, 32, 32)
    fused = widefield.reparameterize(model, x)
    assert ours(fused) == left
    static = widefield.reparameterize(widefield.specialize(model, [x]), x)
    assert ours(static) == set()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", ROUTED)
@pytest.mark.parametrize("network", ["mobilenet", "same"])
def test_fx_takes_layers_that_route_as_leaves(network, name, merged):
    model, x = converted(network, ROUTED[name][0]), torch.randn(2, 3, 32, 32)
    if merged:
        model = widefield.reparameterize(model, x)
    graph = torch.fx.symbolic_trace(model)
    assert ours(graph) & ours(model) & {"MoRFConv2d", "FusedMoRFConv2d", "DynamicGMConv2d"}
    for images in (x, torch.randn(1, 3, 37, 38)):
        close(graph(images), model(images), NETWORK)
    observed = quantize_fx.prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("fbgemm"), (x,))
    observed(x)
    assert quantize_fx.convert_fx(observed)(x).shape == model(x).shape


@pytest.mark.parametrize("name", ["deformable", "small", "bands"])
def test_nothing_of_ours_is_left_where_padding_is_that_of_tensorflow(name):
    model, x = converted("same", CONVERSIONS[name]), torch.randn(2, 3, 32, 32)
    fused = widefield.reparameterize(model, x)
    assert ours(fused) == set()
    for size in (32, 37, 38, 39):
        images = torch.randn(1, 3, size, size + 1)
        close(fused(images), model(images), NETWORK)


def test_what_is_left_runs_where_widefield_is_not_installed(tmp_path):
    x, paths = torch.randn(2, 3, 32, 32), []
    for name in ("masks", "dilated", "inception", "deformable", "lka", "gnconv", "moga"):
        fused = widefield.reparameterize(converted("two layers", CONVERSIONS[name]), x)
        paths.append(tmp_path / f"{name}.pt")
        with torch.no_grad():
            torch.save((fused, x, fused(x)), paths[-1])
    code = """
import sys, torch
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "widefield":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
for path in sys.argv[1:]:
    model, x, y = torch.load(path, weights_only=False)
    assert (model(x) - y).abs().max() <= 1e-5 * y.abs().max(), path
"""
    subprocess.run([sys.executable, "-c", code, *map(str, paths)], check=True, cwd=tmp_path)


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning"
)
@pytest.mark.parametrize("name", ["small", "masks", "deformable", "lka", "gnconv"])
def test_torchs_own_tools_take_what_is_left(name):
    x = torch.randn(2, 3, 32, 32)
    network = "mobilenet" if name in ("small", "masks") else "two layers"  # exporters are slow on large graphs
    fused = widefield.reparameterize(converted(network, CONVERSIONS[name]), x)
    expected = fused(x)
    close(torch.fx.symbolic_trace(fused)(x), expected, NETWORK)
    close(torch.jit.script(fused)(x), expected, NETWORK)
    torch.onnx.export(fused, (x,), io.BytesIO(), dynamo=False)
    observed = quantize_fx.prepare_fx(copy.deepcopy(fused), get_default_qconfig_mapping("fbgemm"), (x,))
    observed(x)
    assert quantize_fx.convert_fx(observed)(x).shape == expected.shape


@pytest.mark.parametrize(
    "make", [lambda: LKA(8), lambda: MultiOrderGatedAggregation(8), lambda: DepthwiseConv2d(8, 8, 5, padding="same")]
)
def test_the_root_keeps_its_keys(make):
    layer, x = make().eval(), torch.randn(2, 8, 12, 12)
    fused = widefield.reparameterize(layer, x)
    assert ours(fused) == set()
    assert set(fused.state_dict()) == set(layer.state_dict())
    close(fused(x), layer(x), NETWORK)


def test_a_layer_whose_other_methods_are_used_stays():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.lka = LKA(8)

        def forward(self, x):
            return self.lka.attention(x)

    model, x, reports = Gate().eval(), torch.randn(2, 8, 12, 12), []
    fused = widefield.reparameterize(model, x, report=reports.append)
    assert ours(fused) == {"LKA"}
    assert [(left.name, left.kind) for left in reports[0].left] == [("lka", "LKA")]
    assert "uses its other methods" in reports[0].left[0].reason
    close(fused(x), model(x), NETWORK)


def test_what_is_left_trains_and_is_trimmed():
    x = torch.randn(2, 3, 32, 32)
    fused = widefield.reparameterize(converted("mobilenet", CONVERSIONS["lka"]), x)
    trimmed = widefield.trim(fused, 0.0)
    close(trimmed(x), fused(x), NETWORK)
    fused.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in fused.parameters())


SAMPLED = {
    "one group": {},
    "strided": {"stride": 2, "groups": 2},
    "without padding": {"padding": 0},
    "dilated": {"dilation": 2, "groups": 4},
    "without center": {"remove_center": True},
    "wide, gated": {"kernel_size": 5, "offset_scale": 2.0, "center_feature_scale": True, "groups": 2},
}


@pytest.mark.parametrize("name", SAMPLED)
def test_deformable_sampling_becomes_grid_sample(name):
    torch.manual_seed(0)
    layer = DeformConv2d(8, 6, **{"kernel_size": 3, **SAMPLED[name]}).double().eval()
    for parameter in layer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    fused = widefield.reparameterize(layer, torch.randn(2, 8, 9, 8).double())
    assert ours(fused) == set()
    assert set(fused.state_dict()) == set(layer.state_dict())
    for x in (torch.randn(3, 8, 12, 7), torch.randn(1, 8, 6, 9).contiguous(memory_format=torch.channels_last)):
        close(fused(x.double()), layer(x.double()), FLOAT64)
        close(copy.deepcopy(fused).float()(x), layer(x.double()).float(), NETWORK)  # its dtype may change afterwards
        close(copy.deepcopy(fused).bfloat16()(x.bfloat16()), copy.deepcopy(layer).bfloat16()(x.bfloat16()), BFLOAT16)
