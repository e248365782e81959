import copy

import pytest
import torch
from conformance import check_operator, loaded, operators
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tolerances import BFLOAT16, FLOAT32, FLOAT64, close
from widefield.nn import DepthwiseConv2d
from widefield.nn.deform import DCNv3, DeformConv2d, default_groups, why_not
from widefield.ops.deform import BACKENDS

CASES = [name for name in operators() if name.startswith("dcnv3_module")]


def settled(layer, dtype=torch.float64):
    """Randomize every parameter: a new layer has offsets of zero, where it is not differentiable."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
    return layer.to(dtype)


def plain(layer, x):
    """Compute the layer by convolutions and a loop over shifted maps, for offsets of zero."""
    s = layer.sampling
    features = layer.dw_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    mask = layer.mask(features).unflatten(-1, (s.groups, -1)).softmax(-1)
    value = nn.functional.pad(layer.input_proj(x), (0, 0, *4 * (s.padding,)))
    rows, columns = features.shape[1:3]
    parts = []
    for i in range(s.kernel_size):  # columns in the outer loop
        for j in range(s.kernel_size):
            top, left = j * s.dilation, i * s.dilation
            part = value[:, top :: s.stride, left :: s.stride][:, :rows, :columns]
            parts.append(part.unflatten(-1, (s.groups, -1)))
    y = (torch.stack(parts, -2) * mask[..., None]).sum(-2).flatten(-2)
    return layer.output_proj(y)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_fixtures(name, backend):
    case = operators()[name]
    config = case["config"]
    layer = DCNv3(
        config["channels"],
        config["kernel"],
        config["dw_kernel"],
        config["stride"],
        config["pad"],
        config["dilation"],
        config["groups"],
        config["offset_scale"],
        config["center_feature_scale"],
        config["remove_center"],
        backend=backend,
    )
    assert list(layer.state_dict()) == list(case["state_dict"])
    check_operator(loaded(layer, case), case)


@given(
    size=st.tuples(st.integers(3, 8), st.integers(3, 8)),
    kernel=st.sampled_from((1, 3, 5)),
    dw=st.sampled_from((None, 3, 5, 7)),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    more=st.integers(-1, 2),
    groups=st.sampled_from((1, 2)),
)
@settings(deadline=None, max_examples=30)
def test_any_stride_and_padding_with_offsets_of_zero(size, kernel, dw, stride, dilation, more, groups):
    reach = dilation * (kernel // 2)
    dw = max(dw or kernel, 3)
    pad = max(reach + more, reach - dw // 2, 0)
    if min(size) + 2 * pad <= 2 * reach:
        pad = reach
    layer = settled(DCNv3(4, kernel, dw, stride, pad, dilation, groups))
    nn.init.zeros_(layer.offset.weight)
    nn.init.zeros_(layer.offset.bias)
    x = torch.randn(2, *size, 4, dtype=torch.double)
    y = layer(x)
    conv = nn.Conv2d(4, 4, kernel, stride, pad, dilation)
    assert y.shape[1:3] == conv(torch.zeros(1, 4, *size)).shape[2:]
    close(y, plain(layer, x), FLOAT64)


@pytest.mark.parametrize("arguments", [{}, {"stride": 2}, {"stride": 3, "pad": 2}, {"pad": 0}, {"dilation": 2}])
def test_depthwise_branch_and_center_lie_where_the_grid_does(arguments):
    """Shifting the image shifts the output, and a gate of 1 returns the input at the grid's center."""
    layer = settled(DCNv3(4, groups=2, center_feature_scale=True, **arguments))
    stride = layer.sampling.stride
    for parameter in layer.offset.parameters():
        parameter.data *= 0.2  # keeps points inside the map
    x = torch.randn(1, 36, 36, 4, dtype=torch.double)
    moved = torch.roll(x, (stride, 2 * stride), (1, 2))
    margin = 3 + 6 // stride
    inner = slice(margin, -margin)
    close(torch.roll(layer(x), (1, 2), (1, 2))[:, inner, inner], layer(moved)[:, inner, inner], FLOAT64)
    nn.init.zeros_(layer.center_feature_scale_proj_weight)
    nn.init.constant_(layer.center_feature_scale_proj_bias, 1e3)
    nn.init.zeros_(layer.mask.weight)
    center = torch.full_like(layer.mask.bias, -1e3).unflatten(0, (2, -1))
    center[:, center.shape[1] // 2] = 0
    layer.mask.bias.data = center.flatten()
    nn.init.zeros_(layer.offset.weight)
    nn.init.zeros_(layer.offset.bias)
    gated = layer(x)
    nn.init.constant_(layer.center_feature_scale_proj_bias, -1e3)
    close(gated, layer(x), FLOAT64)  # the only point of the mask is the center


def test_starts_on_the_regular_grid_with_equal_weights():
    layer = DCNv3(32, groups=2, center_feature_scale=True)
    for parameter in (*layer.offset.parameters(), *layer.mask.parameters(), layer.input_proj.bias):
        assert not parameter.any()
    assert not layer.center_feature_scale_proj_weight.any()
    bound = (6 / 64) ** 0.5  # xavier_uniform
    assert 0.95 * bound < layer.output_proj.weight.abs().max() <= bound
    places, weights = layer.points(torch.randn(1, 4, 5, 32))
    assert torch.equal(weights, torch.full((1, 4, 5, 2, 9), 1 / 9))
    assert places[0, 2, 3, 1].tolist() == [[3 + dx, 2 + dy] for dx in (-1, 0, 1) for dy in (-1, 0, 1)]


@pytest.mark.parametrize("scale", [False, True])
def test_every_parameter_learns_from_the_second_step_on(scale):
    layer = DCNv3(16, groups=2, center_feature_scale=scale)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    x, target = torch.randn(2, 6, 6, 16), torch.randn(2, 6, 6, 16)
    for step in range(2):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        still = {name.split(".")[0] for name, p in layer.named_parameters() if not p.grad.any()}
        gate = {"center_feature_scale_proj_weight", "center_feature_scale_proj_bias"}
        assert still - gate == ({"dw_conv"} if step == 0 else set())
        optimizer.step()


def test_derivatives():
    layer = settled(DCNv3(4, groups=2, center_feature_scale=True))
    x = torch.randn(1, 3, 4, 4, dtype=torch.double, requires_grad=True)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def f(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(f, (x, *parameters), fast_mode=True)


def test_autocast_and_state_dict():
    layer = settled(DCNv3(32, groups=2, center_feature_scale=True), torch.float32)
    nn.init.normal_(layer.offset.weight, std=0.01)
    twin = DCNv3(32, groups=2, center_feature_scale=True)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(2, 7, 6, 32)
    expected = layer(x)
    assert torch.equal(twin(x), expected)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    close(y, expected, BFLOAT16)
    assert layer(x[:0]).shape == (0, 7, 6, 32)


def test_norm_and_activation_can_be_others():
    layer = DCNv3(8, norm_layer=nn.BatchNorm2d, act_layer=nn.SiLU)
    assert "dw_conv.1.1.running_mean" in layer.state_dict()
    assert layer(torch.randn(2, 4, 4, 8)).shape == (2, 4, 4, 8)
    assert repr(DCNv3(8, 5, stride=2, offset_scale=2.0)).startswith(
        "DCNv3(\n  8, kernel_size=5, stride=2, groups=4, offset_scale=2.0\n"
    )


CONVOLUTIONS = [
    nn.Conv2d(32, 32, 3, padding=1),
    nn.Conv2d(32, 48, 3, stride=2, padding=1, bias=False),
    nn.Conv2d(24, 40, 5, padding="same", dilation=2, groups=8),
    nn.Conv2d(16, 16, 7, padding=3, groups=16),
    nn.Conv2d(16, 8, 3),
    nn.Conv2d(3, 8, 5, stride=3, padding="valid"),
    DepthwiseConv2d(32, 32, 3, stride=2, padding=1),
]


@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_takes_the_place_of_a_convolution(conv, memory_format):
    assert why_not(conv) is None
    layer = DeformConv2d.from_conv2d(conv)
    x = torch.randn(2, conv.in_channels, 13, 12).contiguous(memory_format=memory_format)
    y, before = layer(x), conv(x)
    assert y.shape == before.shape
    assert y.is_contiguous(memory_format=memory_format)
    close(y, DCNv3.forward(layer, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), FLOAT32)


def test_a_conversion_keeps_device_dtype_mode_and_what_is_frozen():
    conv = nn.Conv2d(32, 32, 3, padding=1, device="meta", dtype=torch.bfloat16).eval()
    layer = DeformConv2d.from_conv2d(conv, groups=4, offset_scale=2.0, center_feature_scale=True, backend="gather")
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}
    assert not layer.training
    assert all(p.requires_grad for p in layer.parameters())
    assert (layer.sampling.groups, layer.sampling.offset_scale, layer.backend) == (4, 2.0, "gather")
    conv = nn.Conv2d(32, 32, 3, padding=1, dtype=torch.double)
    conv.weight.requires_grad_(False)
    layer = DeformConv2d.from_conv2d(conv)
    assert not any(p.requires_grad for p in layer.parameters())
    assert layer.training
    assert {p.dtype for p in layer.parameters()} == {torch.double}


def test_groups_are_of_16_channels_where_they_can_be():
    found = {c: default_groups(c) for c in (3, 16, 24, 31, 40, 64, 80, 96, 97, 112)}
    assert found == {3: 1, 16: 1, 24: 1, 31: 1, 40: 2, 64: 4, 80: 5, 96: 6, 97: 1, 112: 7}


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Linear(3, 3), "a Linear, not a plain"),
        (nn.ConvTranspose2d(4, 4, 3), "a ConvTranspose2d"),
        (nn.Conv2d(4, 4, (3, 5)), "not square"),
        (nn.Conv2d(4, 4, 4), "kernel size is 4"),
        (nn.Conv2d(4, 4, 1), "kernel size is 1"),
        (nn.Conv2d(4, 4, 3, stride=(1, 2)), r"stride \(1, 2\)"),
        (nn.Conv2d(4, 4, 3, dilation=(1, 2)), r"dilation \(1, 2\) differs"),
        (nn.Conv2d(4, 4, 3, padding=(0, 1)), r"padding \(0, 1\) differs"),
        (nn.Conv2d(4, 4, 3, padding_mode="reflect", padding=1), "'reflect'"),
        (nn.Conv2d(4, 4, 3, dilation=2), r"padding is \(0, 0\), and the offsets of a grid with dilation 2 need more"),
    ],
)
def test_convolutions_that_cannot_be_replaced(conv, reason):
    with pytest.raises(ValueError, match=reason):
        DeformConv2d.from_conv2d(conv)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"channels": 0}, ValueError, "channels must be at least 1"),
        ({"groups": 3}, ValueError, "channels=8 and groups=3"),
        ({"groups": 2.0}, TypeError, "groups must be an integer"),
        ({"kernel_size": 2}, ValueError, "kernel_size=2 and dilation=1 has no center"),
        ({"dw_kernel_size": 4}, ValueError, "dw_kernel_size must be odd"),
        (
            {"pad": 0, "dilation": 3},
            ValueError,
            "pad=0 .* reaches 3 pixels needs a dw_kernel_size of at least 7; got 3",
        ),
        ({"pad": -1}, ValueError, "padding must be at least 0"),
        ({"out_channels": 0}, ValueError, "out_channels must be at least 1"),
        ({"kernel_size": 1, "remove_center": True}, ValueError, "remove_center needs"),
        ({"backend": "bag"}, ValueError, "Did you mean 'bags'"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        DCNv3(**{"channels": 8, **arguments})


def test_bad_inputs_are_refused():
    with pytest.raises(ValueError, match=r"must be \(N, H, W, 8\); got shape \(2, 8, 4, 4\).*permute"):
        DCNv3(8)(torch.zeros(2, 8, 4, 4))
    with pytest.raises(ValueError, match=r"must be \(N, 8, H, W\); got shape \(2, 4, 4, 8\)"):
        DeformConv2d(8, 8, 3)(torch.zeros(2, 4, 4, 8))
