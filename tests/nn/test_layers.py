"""Common properties of all layers of widefield.nn, by the registry in layers.py."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from layers import LAYERS, example, lived
from torch import fx, nn
from torch.func import functional_call, grad, vmap

import widefield
from tolerances import FLOAT32, NETWORK, close
from widefield import nn as wnn

every_layer = pytest.mark.parametrize("name", LAYERS)
NOT_MADE = {"ReparamConv2d"}  # the base class of sums of branches
WRAPPERS = {
    "ConvNorm",
    "SameAligned",
    "FusedMoRFConv2d",
}  # use the device and dtype of the source layer
CONVOLUTIONS = [name for name in LAYERS if name.endswith(("Conv2d", "Conv2dSame")) and name not in WRAPPERS]
CONVOLUTIONS.remove("InceptionDWConv2d")  # its kernels have three sizes
FUSED = [name for name, case in LAYERS.items() if hasattr(case.make(), "fuse")]


def test_the_registry_is_complete():
    layers = {name for name in wnn.__all__ if isinstance(getattr(wnn, name), type)}
    layers = {name for name in layers if issubclass(getattr(wnn, name), nn.Module)}
    assert set(LAYERS) == layers - NOT_MADE
    assert {name: type(case.make()).__name__ for name, case in LAYERS.items()} == {name: name for name in LAYERS}


# Constructors


@every_layer
def test_device_and_dtype(name):
    layer = LAYERS[name].make(device="meta", dtype=torch.float64)
    assert {(t.device.type, t.dtype) for t in layer.parameters()} == {("meta", torch.float64)}
    assert {t.device.type for t in layer.buffers()} <= {"meta"}
    if name not in WRAPPERS and name != "DeformConv2d":  # passes them on
        parameters = inspect.signature(getattr(wnn, name)).parameters
        for keyword in ("device", "dtype"):
            assert parameters[keyword].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_positional_arguments_are_those_of_conv2d(name):
    order = [p for p in inspect.signature(nn.Conv2d).parameters if p not in ("device", "dtype")]
    parameters = inspect.signature(getattr(wnn, name)).parameters.values()
    positional = [
        p.name.replace("kernel_sizes", "kernel_size") for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    assert len(positional) >= 4
    assert positional == order[: len(positional)]


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1, "dilation": 2, "bias": False}], ids=str)
@pytest.mark.parametrize("kind", [wnn.DepthwiseConv2d, wnn.GMConv2d, wnn.DynamicGMConv2d])
def test_a_layer_is_made_anew_from_the_attributes_of_conv2d(kind, options):
    x = torch.randn(2, 6, 13, 12)
    layer, conv = kind(6, 6, 5, groups=6, **options), nn.Conv2d(6, 6, 5, groups=6, **options)
    assert layer(x).shape == conv(x).shape
    twin = type(layer)(
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
        layer.groups, layer.bias is not None, layer.padding_mode,
    )  # fmt: skip
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x))


@pytest.mark.parametrize("kind", [wnn.DepthwiseConv2d, wnn.DepthwiseConv2dSame])
@pytest.mark.parametrize("arguments", [(4, 8, 3), (4, 4, 3, 1, 1, 1, 1), (4, 4, 3, 1, 1, 1, 2)], ids=str)
def test_other_numbers_of_channels_and_groups_are_refused(kind, arguments):
    with pytest.raises(ValueError, match=r"in_channels == out_channels == groups; got in_channels=4.*torch.nn.Conv2d"):
        kind(*arguments)


# fuse()


def tensors(module):
    return [*module.parameters(), *module.buffers()]


@pytest.mark.parametrize("name", FUSED)
def test_fuse_keeps_the_function_and_shares_nothing(name):
    layer = lived(LAYERS[name].make())
    with pytest.raises(RuntimeError, match=rf"this {name} is in training mode: call model.eval\(\) first"):
        layer.train().fuse()
    layer.eval()
    before = copy.deepcopy(layer.state_dict())
    x = example(name)
    expected = layer(x)
    fused = layer.fuse()
    assert not any(part.training for part in fused.modules())
    close(fused(x), expected, NETWORK)
    theirs = {t.untyped_storage().data_ptr() for t in tensors(layer)}
    assert theirs.isdisjoint(t.untyped_storage().data_ptr() for t in tensors(fused))
    with torch.no_grad():
        for tensor in tensors(fused):
            tensor.zero_()
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("name", FUSED)
def test_fused_parameters_require_gradients_where_their_sources_do(name):
    layer = LAYERS[name].make().eval()
    assert all(p.requires_grad for p in layer.fuse().parameters())
    layer.requires_grad_(False)
    assert not any(p.requires_grad for p in layer.fuse().parameters())
    norms = {id(p) for part in layer.modules() if "Norm" in type(part).__name__ for p in part.parameters(recurse=False)}
    for parameter in layer.parameters():  # one at a time; norms do not count
        if id(parameter) in norms:
            continue
        parameter.requires_grad_(True)
        fused = layer.fuse()
        assert any(p.requires_grad for p in fused.parameters())
        fused(example(name)).square().sum().backward()  # these get gradients
        parameter.requires_grad_(False)


# Common tools for the layers of torch.nn


@every_layer
def test_copies_pickles_and_files(name):
    layer, x = lived(LAYERS[name].make()).eval(), example(name)
    expected, file = layer(x), io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    with torch.no_grad():
        twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)]
        for parameter in layer.parameters():
            parameter.zero_()
    for twin in twins:
        assert torch.equal(twin(x), expected)


@every_layer
def test_functional_calls_gradients_of_each_sample_and_vmap(name):
    layer, x = lived(LAYERS[name].make()).eval(), example(name, 3)
    parameters = {key: value.detach() for key, value in layer.named_parameters()}

    def loss(values, sample):
        return functional_call(layer, values, (sample[None],)).square().sum()

    close(vmap(lambda sample: functional_call(layer, parameters, (sample[None],))[0])(x), layer(x), NETWORK)
    each = vmap(grad(loss), (None, 0))(parameters, x)
    layer(x).square().sum().backward()
    for key, parameter in layer.named_parameters():
        total = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        close(each[key].sum(0), total, NETWORK)
    emptied = {key: torch.zeros_like(value) for key, value in parameters.items()}
    assert not torch.equal(functional_call(layer, emptied, (x,)), layer(x))


@pytest.mark.slow
def test_many_kinds_of_layers_compile_in_one_process():
    """torch.compile limits the versions of each piece of code, so layers must not share their forward."""
    for name, case in LAYERS.items():
        layer, x = case.make().eval(), example(name)
        close(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x), FLOAT32)


@every_layer
def test_torch_fx_takes_layers_as_parts_of_a_model(name):
    layer, x = lived(LAYERS[name].make()).eval(), example(name)
    graph = fx.symbolic_trace(nn.Sequential(layer, nn.ReLU()))
    close(graph(x), layer(x).relu(), FLOAT32)
    assert graph(example(name, 5)).shape[0] == 5
    calls = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    if calls == ["0", "1"]:
        with pytest.raises(TypeError, match=rf"records a {name} as one call.*torch.nn.Sequential\(layer\)"):
            fx.symbolic_trace(layer)
    else:  # of several layers, each of which is a leaf
        close(fx.symbolic_trace(layer)(x), layer(x), FLOAT32)


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
@pytest.mark.parametrize(
    "conversion",
    [
        widefield.FastDepthwise(),
        widefield.MoRF((3, 5, 7)),
        widefield.GMConv(),
        widefield.LargeKernel(9),
        widefield.Elastic((3, 5)),
        widefield.InceptionSplit(),
        widefield.Deformable(),
        widefield.TokenMixer("lka"),
    ],
    ids=lambda conversion: type(conversion).__name__,
)
def test_converted_and_reparameterized_models_behave_under_the_same_tools(conversion):
    mixer = nn.Conv2d(16, 16, 3, padding=1, groups=16)
    model = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.BatchNorm2d(16), mixer, nn.BatchNorm2d(16), nn.GELU()).eval()
    model, x = widefield.convert(model, conversion), torch.randn(2, 3, 32, 32)
    for candidate in (model, widefield.reparameterize(model, x)):
        y = candidate(x)
        close(fx.symbolic_trace(candidate)(x), y, NETWORK)
        traced = torch.jit.trace(candidate, x)
        close(traced(x[:1]), y[:1], NETWORK)
        close(pickle.loads(pickle.dumps(candidate))(x), y, FLOAT32)
        close(vmap(lambda image, net=candidate: net(image[None])[0])(x), y, NETWORK)
