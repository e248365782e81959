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
from tolerances import BFLOAT16, FLOAT32, FLOAT64, close
from widefield.nn import DepthwiseConv2d
from widefield.nn.lka import LKA, LKAAttention, why_not

KERNELS = st.tuples(st.integers(1, 30), st.integers(1, 5))


@pytest.mark.parametrize(("name", "layer"), [("lka", LKA(4)), ("van_attention", LKAAttention(3))])
def test_is_the_official_layer(name, layer):
    case = operators()[name]
    assert list(layer.state_dict()) == list(case["state_dict"])
    check_operator(loaded(layer, case), case)


def plain(layer, x):
    """Compute the layer with F.conv2d, with paddings derived from the span of the taps."""
    y = x
    for conv in (layer.conv0, layer.conv_spatial):
        (k, _), (d, _) = conv.kernel_size, conv.dilation
        y = F.conv2d(y, conv.weight, conv.bias, padding=d * (k - 1) // 2, dilation=d, groups=x.shape[1])
    return x * F.conv2d(y, layer.conv1.weight, layer.conv1.bias)


@settings(deadline=None, max_examples=30)
@given(kernel=KERNELS, channels=st.integers(1, 4), size=st.tuples(st.integers(1, 14), st.integers(1, 14)))
def test_equals_three_convolutions_and_a_product(kernel, channels, size):
    layer = LKA(channels, *kernel).double()
    x = torch.randn(2, channels, *size, dtype=torch.double)
    close(layer(x), plain(layer, x), FLOAT64)


@pytest.mark.parametrize(
    ("kernel_size", "dilation", "taps", "sees"),
    [
        # rows of the paper's table on K and d, with its parameters: an even number of taps 2 apart is centered
        (7, 2, (3, 4), 9),
        (14, 3, (5, 5), 17),
        (21, 3, (5, 7), 23),
        (28, 4, (7, 7), 31),
        (10, 3, (5, 5), 17),  # 10 pixels in steps of 3 need 4 taps, which cannot be centered
        (5, 1, (1, 5), 5),
        (4, 1, (1, 5), 5),
        (1, 3, (5, 1), 5),
    ],
)
def test_the_decomposition(kernel_size, dilation, taps, sees):
    layer = LKA(2, kernel_size, dilation)
    assert (layer.conv0.kernel_size[0], layer.conv_spatial.kernel_size[0]) == taps
    assert layer.conv0.kernel_size == (2 * dilation - 1,) * 2
    assert layer.conv0.dilation == (1, 1)
    assert layer.conv_spatial.dilation == (dilation, dilation)
    assert layer.receptive_field == sees
    assert f"receptive_field={sees}" in repr(layer)


@settings(deadline=None, max_examples=30)
@given(kernel=KERNELS)
def test_sees_every_pixel_of_its_receptive_field_and_none_else(kernel):
    layer = LKA(1, *kernel).double()
    for name, parameter in layer.named_parameters():
        nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
    reach = layer.receptive_field
    assert reach >= kernel[0]
    x = torch.zeros(1, 1, reach + 4, reach + 4, dtype=torch.double)
    x[..., reach // 2 + 2, reach // 2 + 2] = 1
    reached = layer.attention(x)[0, 0] > 0.5
    assert reached[2:-2, 2:-2].all()
    assert reached.sum() == reach**2


def test_one_kernel_is_the_pair_in_the_middle_of_a_map_only():
    layer = LKA(3).double()
    for conv in (layer.conv0, layer.conv_spatial):
        nn.init.zeros_(conv.bias)
    x = torch.randn(1, 3, 50, 50, dtype=torch.double)
    pair = layer.conv_spatial(layer.conv0(x))
    small = layer.conv0.weight.transpose(0, 1)
    spread = torch.zeros(1, 3, 19, 19, dtype=torch.double)
    spread[..., ::3, ::3] = layer.conv_spatial.weight.transpose(0, 1)
    kernel = F.conv2d(spread, small.flip(-1, -2).transpose(0, 1), padding=4, groups=3).transpose(0, 1)
    assert kernel.shape[-2:] == (layer.receptive_field,) * 2
    one = F.conv2d(x, kernel, padding=11, groups=3)
    inside = (..., slice(11, -11), slice(11, -11))
    close(one[inside], pair[inside], FLOAT64)
    assert (one - pair).abs().max() > 1e-3


@pytest.mark.parametrize("kind", [LKA, LKAAttention])
def test_gradients(kind):
    layer = kind(2, 7, 2).double()
    x = torch.randn(2, 2, 5, 4, dtype=torch.double, requires_grad=True)

    def run(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(dict(layer.named_parameters()), parameters, strict=True)), x)

    assert gradcheck(run, (x, *layer.parameters()))


@pytest.mark.parametrize("kind", [LKA, LKAAttention])
def test_channels_last_an_empty_batch_copies_and_autocast(kind):
    layer = kind(8)
    x = torch.randn(2, 8, 9, 12)
    expected = layer(x)
    close(layer(x.contiguous(memory_format=torch.channels_last)), expected, FLOAT32)
    assert layer(x[:0]).shape == (0, 8, 9, 12)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        close(layer(x), expected, BFLOAT16)
    expected.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in layer.parameters())


def test_reparameterize_leaves_the_function_and_gives_plain_convolutions():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), LKAAttention(8)).eval()
    x = torch.randn(2, 3, 20, 20)
    served = widefield.reparameterize(net, x)
    close(served(x), net(x), FLOAT32)
    assert not any(isinstance(module, DepthwiseConv2d) for module in served.modules())


@pytest.mark.parametrize("kind", [LKA, LKAAttention])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), ValueError, "channels must be at least 1; got 0"),
        ((4, 0), ValueError, "kernel_size must be at least 1; got 0"),
        ((4, 21.0), TypeError, r"kernel_size must be an integer; got 21\.0"),
        ((4, 21, 0), ValueError, "dilation must be at least 1; got 0"),
    ],
)
def test_bad_arguments_are_refused(kind, arguments, error, message):
    with pytest.raises(error, match=message):
        kind(*arguments)


def test_bad_backends_and_inputs_are_refused():
    with pytest.raises(ValueError, match=r"backend must be one of .* got 'cuda'"):
        LKA(4, backend="cuda")
    with pytest.raises(ValueError, match=r"the input must be \(N, 4, H, W\); got shape \(1, 3, 8, 8\)"):
        LKA(4)(torch.randn(1, 3, 8, 8))


def depthwise(**options):
    return nn.Conv2d(6, 6, groups=6, **{"kernel_size": 7, "padding": 3, **options})


@pytest.mark.parametrize(
    ("conv", "sees"),
    [
        (depthwise(), 11),  # 5 taps, and 3 taps that are 3 apart
        (depthwise(padding="same", bias=False), 11),
        (depthwise(dilation=3, padding=9), 23),  # 19 pixels
        (depthwise(kernel_size=(3, 21), padding=(1, 10), padding_mode="reflect"), 23),
        (depthwise(kernel_size=1, padding="valid"), 5),
        (DepthwiseConv2d(6, 6, 21, padding="same"), 23),
    ],
    ids=str,
)
def test_a_gate_takes_the_place_of_a_depthwise_convolution_and_sees_as_far(conv, sees):
    assert why_not(conv) is None
    layer = LKA.from_conv2d(conv.eval())
    assert layer.receptive_field == sees >= max(k for k in conv.kernel_size)
    assert not layer.training
    x = torch.randn(2, 6, 24, 25)
    assert layer(x).shape == conv(x).shape
    # quadratic in the input, except for the biases: the function of conv is not kept
    for part in (layer.conv0, layer.conv_spatial, layer.conv1):
        nn.init.zeros_(part.bias)
    close(layer(2 * x), 4 * layer(x), FLOAT32)


def test_a_gate_in_place_is_made_for_the_convolution():
    conv = depthwise(dtype=torch.double).requires_grad_(False)
    layer = LKA.from_conv2d(conv, 28, 4, backend="aten")
    assert layer.receptive_field == 31
    assert layer.conv0.backend == layer.conv_spatial.backend == "aten"
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert not any(p.requires_grad for p in layer.parameters())
    assert layer.training


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Linear(3, 3), "it is a Linear"),
        (nn.Conv2d(4, 8, 3, padding=1), "it is not depthwise: 4 input channels, 8 output channels, groups=1"),
        (depthwise(stride=2), r"its stride is \(2, 2\), and a gate has one value for each pixel"),
        (depthwise(padding=2), r"its padding is \(2, 2\), with which it does not keep the size"),
        (depthwise(padding="valid"), "its padding is 'valid'"),
        (depthwise(kernel_size=(7, 5)), r"its padding is \(3, 3\)"),
    ],
    ids=str,
)
def test_what_a_gate_cannot_replace_is_named(module, reason):
    assert why_not(module) is not None
    with pytest.raises(ValueError, match=f"cannot be an LKA: {reason}"):
        LKA.from_conv2d(module)
