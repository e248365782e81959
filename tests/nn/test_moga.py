import copy

import pytest
import torch
from conformance import check_operator, loaded, operators
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck
from torch.nn import functional as F

import widefield
from tolerances import BFLOAT16, FLOAT32, FLOAT64, NETWORK, close
from widefield.bench import cost
from widefield.nn.depthwise import DepthwiseConv2d
from widefield.nn.moga import (
    ChannelAggregationFFN,
    FusedChannelAggregationFFN,
    MultiOrderDWConv,
    MultiOrderGatedAggregation,
    why_not,
)

LAYERS = {
    "moga_multi_order_depthwise": lambda: MultiOrderDWConv(8),
    "moga_spatial_aggregation": lambda: MultiOrderGatedAggregation(8),
    "moga_channel_aggregation": lambda: ChannelAggregationFFN(4, 8),
}


def lively(layer):
    """Set larger scales: they start at 1e-5."""
    for name, parameter in layer.named_parameters():
        if name.endswith("scale"):
            nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("name", LAYERS)
def test_is_the_official_layer(name):
    case = operators()[name]
    layer = LAYERS[name]()
    assert all((p == 1e-5).all() for key, p in layer.named_parameters() if key.endswith("scale"))
    assert list(layer.state_dict()) == list(case["state_dict"])
    check_operator(loaded(layer.double(), case), case)
    if name == "moga_channel_aggregation":
        check_operator(layer.fuse(), case)
    else:
        assert (layer.value if hasattr(layer, "value") else layer).splits == (1, 3, 4)


def in_a_row(layer, x):
    """Compute MultiOrderDWConv with F.conv2d, one share at a time."""
    parts = []
    for index, part in enumerate(layer.DW_conv0(x).split(layer.splits, 1)):
        if index:
            conv = getattr(layer, f"DW_conv{index}")
            size, d = conv.kernel_size[0], conv.dilation[0]
            part = F.conv2d(part, conv.weight, conv.bias, padding=d * (size - 1) // 2, dilation=d, groups=part.shape[1])
        parts.append(part)
    return F.conv2d(torch.cat(parts, 1), layer.PW_conv.weight, layer.PW_conv.bias)


@settings(deadline=None, max_examples=20)
@given(
    channels=st.integers(2, 20),
    dilations=st.tuples(*[st.integers(1, 3)] * 3),
    split=st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(1, 4)),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
)
def test_any_split_of_the_channels(channels, dilations, split, size):
    if channels * min(split[1:]) < sum(split):
        return
    layer = MultiOrderDWConv(channels, dilations, split).double()
    assert sum(layer.splits) == channels
    assert layer.splits[1:] == tuple(channels * part // sum(split) for part in split[1:])
    x = torch.randn(2, channels, *size, dtype=torch.double)
    close(layer(x), in_a_row(layer, x), FLOAT64)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients(name):
    layer = lively(LAYERS[name]()).double()
    channels = 4 if name == "moga_channel_aggregation" else 8
    x = torch.randn(1, channels, 3, 4, dtype=torch.double, requires_grad=True)

    def run(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(dict(layer.named_parameters()), parameters, strict=True)), x)

    assert gradcheck(run, (x, *layer.parameters()), fast_mode=True)


def test_shares_see_5_13_and_23_pixels_far():
    layer = MultiOrderDWConv(8).double()
    layer.PW_conv = nn.Identity()
    for parameter in layer.parameters():
        nn.init.ones_(parameter) if parameter.ndim > 1 else nn.init.zeros_(parameter)
    x = torch.zeros(1, 8, 33, 33, dtype=torch.double)
    x[..., 16, 16] = 1
    seen = layer(x)[0].amax(1) > 0  # channels, columns
    assert [columns.nonzero().squeeze().aminmax() for columns in seen] == [
        (16 - reach, 16 + reach) for reach in (2, 6, 6, 6, 11, 11, 11, 11)
    ]


def test_the_spatial_aggregation_adds_its_input():
    layer = lively(MultiOrderGatedAggregation(16, dilations=(2, 1, 1), split=(0, 1, 1)))
    assert [conv.dilation[0] for conv in layer.modules() if isinstance(conv, DepthwiseConv2d)] == [2, 1, 1]
    x = torch.randn(2, 16, 9, 7)
    close(layer(x) - x, layer.aggregate(x), FLOAT32)
    y = layer.proj_1(x)
    y = F.silu(y + layer.sigma.scale * (y - F.adaptive_avg_pool2d(y, 1)))
    close(layer.aggregate(x), layer.proj_2(F.silu(layer.gate(y)) * F.silu(layer.value(y))), FLOAT32)


@settings(deadline=None, max_examples=15)
@given(
    channels=st.integers(1, 9),
    hidden=st.integers(1, 20),
    kernel_size=st.sampled_from([1, 3, (5, 1)]),
    scale=st.sampled_from([0.0, 1e-5, -1.0, 2.5]),
)
def test_the_decomposition_of_channels_folds_away(channels, hidden, kernel_size, scale):
    layer = ChannelAggregationFFN(channels, hidden, kernel_size).double().eval()
    nn.init.constant_(layer.sigma.scale, scale)
    before = copy.deepcopy(layer.state_dict())
    fused = layer.fuse()
    x = torch.randn(2, channels, 6, 5, dtype=torch.double)
    close(fused(x), layer(x), 1e-12)
    assert isinstance(fused, FusedChannelAggregationFFN)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    assert not {p.data_ptr() for p in fused.parameters()} & {p.data_ptr() for p in layer.parameters()}
    assert not any(module.training for module in fused.modules())
    fused(x).square().sum().backward()
    assert all(p.grad is not None for p in fused.parameters())


def test_fuse_costs_no_more_and_refuses_training():
    layer = ChannelAggregationFFN(8, 32)
    with pytest.raises(RuntimeError, match=r"call model\.eval\(\) first"):
        layer.fuse()
    layer.eval().requires_grad_(False)
    fused = layer.fuse()
    assert not any(p.requires_grad for p in fused.parameters())
    x = torch.randn(1, 8, 10, 10)
    assert cost(fused, x).macs == cost(layer, x).macs
    assert cost(layer, x).parameters - cost(fused, x).parameters == 32 - 8


def test_in_a_network_of_ones_own():
    net = nn.Sequential(nn.Conv2d(3, 16, 4, 4), MultiOrderGatedAggregation(16), ChannelAggregationFFN(16, 48))
    lively(net).eval()
    x = torch.randn(2, 3, 32, 32)
    fused = widefield.reparameterize(net, x)
    assert widefield.compare(net, fused, x).relative <= NETWORK
    assert not any(isinstance(m, ChannelAggregationFFN) for m in fused.modules())
    batch = torch.export.Dim("batch", min=1, max=16)
    program = torch.export.export(fused, (x,), dynamic_shapes=({0: batch},))
    close(program.module()(x[:1]), fused(x[:1]), FLOAT32)


@pytest.mark.parametrize("name", LAYERS)
def test_layouts_an_empty_batch_and_autocast(name):
    layer = lively(LAYERS[name]())
    x = torch.randn(2, 4 if name == "moga_channel_aggregation" else 8, 9, 12)
    expected = layer(x)
    last = layer(x.contiguous(memory_format=torch.channels_last))
    close(last, expected, FLOAT32)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert layer(x[:0]).shape == (0, *x.shape[1:])
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        close(layer(x), expected, BFLOAT16)
    close(layer.bfloat16()(x.bfloat16()), expected, BFLOAT16)


def test_small_scales_count_under_autocast():
    layer = MultiOrderGatedAggregation(8).sigma
    x = torch.randn(1, 8, 4, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, x.mean((2, 3), keepdim=True))
    assert y.dtype == torch.float32
    assert not torch.equal(y, x.float())


@pytest.mark.parametrize("kind", [nn.Conv2d, DepthwiseConv2d])
@pytest.mark.parametrize("size", [3, 7])
def test_takes_the_place_of_a_depthwise_convolution(kind, size):
    options = {"padding": 2 * (size // 2), "dilation": 2, "dtype": torch.double}
    conv = nn.Conv2d(12, 12, size, groups=12, **options) if kind is nn.Conv2d else kind(12, 12, size, **options)
    conv.eval().weight.requires_grad_(False)
    assert why_not(conv) is None
    layer = MultiOrderGatedAggregation.from_conv2d(conv, dilations=(1, 1, 2), split=(1, 1, 2))
    assert not layer.training
    assert layer.value.splits == (3, 3, 6)
    assert layer.value.DW_conv2.dilation == (2, 2)
    assert {p.dtype for p in layer.parameters()} == {torch.double}
    assert not any(p.requires_grad for p in layer.parameters())
    x = torch.randn(2, 12, 15, 14, dtype=torch.double)
    assert layer(x).shape == conv(x).shape
    assert not torch.allclose(layer(x), conv(x), atol=1e-2)  # the function is not kept, as documented
    fast = MultiOrderGatedAggregation.from_conv2d(DepthwiseConv2d(8, 8, 3, padding="same", backend="aten"))
    assert fast.value.DW_conv1.backend == "aten"
    assert fast.training


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Linear(8, 8), "it is a Linear"),
        (nn.Conv2d(8, 8, 3, padding=1), "it is not depthwise"),
        (nn.Conv2d(8, 8, 3, 2, 1, groups=8), r"its stride is \(2, 2\)"),
        (nn.Conv2d(8, 8, 3, groups=8), r"its padding is \(0, 0\), which does not keep"),
        (nn.Conv2d(8, 8, (3, 5), padding=(1, 1), groups=8), r"its padding is \(1, 1\), which does not keep"),
        (nn.Conv2d(8, 8, 3, padding="valid", groups=8), "its padding is valid, which does not keep"),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8, padding_mode="reflect"), "its padding mode is 'reflect'"),
        (nn.Conv2d(2, 2, 3, padding=1, groups=2), r"it has 2 channels, too few for a split of \(1, 3, 4\)"),
    ],
)
def test_says_why_not(conv, reason):
    with pytest.raises(ValueError, match=f"cannot become a MultiOrderGatedAggregation: .*{reason}"):
        MultiOrderGatedAggregation.from_conv2d(conv)


@pytest.mark.parametrize("padding", ["same", (1, 2)])
def test_has_no_reason_against(padding):
    assert why_not(nn.Conv2d(8, 8, (3, 5), padding=padding, groups=8)) is None


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MultiOrderDWConv(2), ValueError, r"\(1, 3, 4\) of 2 gives \(1, 0, 1\)"),
        (lambda: MultiOrderDWConv(8, split=(1, 0, 3)), ValueError, "every entry of split must be at least 1; got 0"),
        (lambda: MultiOrderDWConv(8, split=(1, 3)), ValueError, r"split must have three entries.*got \(1, 3\)"),
        (lambda: MultiOrderDWConv(8, dilations=(1, 2, 0)), ValueError, "every entry of dilations must be at least 1"),
        (lambda: MultiOrderGatedAggregation(8, dilations=2), ValueError, "dilations must have three entries.*got 2"),
        (lambda: MultiOrderGatedAggregation(8.0), TypeError, "channels must be an integer"),
        (lambda: MultiOrderGatedAggregation(8, backend="cuda"), ValueError, "backend must be one of"),
        (lambda: ChannelAggregationFFN(8, 0), ValueError, "hidden must be at least 1; got 0"),
        (lambda: ChannelAggregationFFN(8, 8, 3.0), TypeError, "kernel_size must be an integer"),
        (lambda: ChannelAggregationFFN(8, 8, 4), ValueError, "kernel_size must be odd.*; got 4"),
        (lambda: MultiOrderDWConv(8)(torch.randn(1, 7, 4, 4)), ValueError, r"must be \(N, 8, H, W\)"),
        (lambda: MultiOrderGatedAggregation(8)(torch.randn(8, 4, 4)), ValueError, r"Add the batch dimension"),
        (lambda: ChannelAggregationFFN(8, 9)(torch.randn(1, 9, 4, 4)), ValueError, r"must be \(N, 8, H, W\)"),
    ],
)
def test_bad_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_shows_how_it_splits():
    assert "MultiOrderDWConv(\n    64 = 8 + 24 + 32" in repr(MultiOrderGatedAggregation(64))
