import copy

import pytest
import timm
import torch
from conformance import array, check_operator, loaded, operators
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck

import widefield
from tolerances import BFLOAT16, FLOAT32, FLOAT64, NETWORK, close
from widefield.bench import cost
from widefield.nn import DepthwiseConv2d
from widefield.nn.inception import InceptionDWConv2d, lacks_room, why_not

TIMM = timm.models.inception_next.InceptionDWConv2d


@pytest.mark.parametrize("name", ["inception_dwconv", "inception_dwconv_quarter"])
def test_is_the_paper_s_layer(name):
    case = operators()[name]
    config = case["config"]
    layer = InceptionDWConv2d(config["dim"], config["square_kernel"], config["band_kernel"], config["branch_ratio"])
    assert list(layer.state_dict()) == list(case["state_dict"])
    assert layer.splits[1] == config["branch_channels"]
    check_operator(loaded(layer.double(), case), case)


@settings(deadline=None, max_examples=20)
@given(
    channels=st.integers(3, 24),
    square=st.sampled_from([1, 3, 5]),
    band=st.sampled_from([1, 3, 7, 11]),
    ratio=st.sampled_from([0.125, 0.25, 1 / 3]),
    dilation=st.integers(1, 3),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
)
def test_equals_timm_s_layer_on_its_weights(channels, square, band, ratio, dilation, size):
    assume(lacks_room(channels, ratio) is None)
    theirs = TIMM(channels, square, band, ratio, dilation).double()
    ours = InceptionDWConv2d(channels, square, band, ratio, dilation).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, channels, *size, dtype=torch.double)
    close(ours(x), theirs(x), FLOAT64)


def test_gradients():
    layer = InceptionDWConv2d(8, 3, 5, 0.25).double()
    x = torch.randn(2, 8, 4, 5, dtype=torch.double, requires_grad=True)

    def run(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(dict(layer.named_parameters()), parameters, strict=True)), x)

    assert gradcheck(run, (x, *layer.parameters()))


def test_channels_last_an_empty_batch_and_autocast():
    layer = InceptionDWConv2d(16)
    x = torch.randn(2, 16, 9, 12)
    expected = layer(x)
    close(layer(x.contiguous(memory_format=torch.channels_last)), expected, FLOAT32)
    assert layer(x[:0]).shape == (0, 16, 9, 12)
    with torch.autocast("cpu", torch.bfloat16):
        close(layer(x), expected, BFLOAT16)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    assert repr(layer).startswith("InceptionDWConv2d(\n  16 = 10 + 2 + 2 + 2")


def split_by_hand(conv, layer):
    """Return the split as one KxK kernel: a delta in unchanged channels, a cropped kernel in the others."""
    size = conv.kernel_size[0]
    middle = size // 2
    same, square, row, _ = layer.splits
    weight, bias = torch.zeros_like(conv.weight), conv.bias.detach().clone()
    weight[:same, :, middle, middle] = 1
    bias[:same] = 0
    spans = (
        (slice(middle - 1, middle + 2), slice(middle - 1, middle + 2)),
        (slice(middle, middle + 1), slice(None)),
        (slice(None), slice(middle, middle + 1)),
    )
    starts = (same, same + square, same + square + row)
    for start, (rows, columns) in zip(starts, spans, strict=True):
        part = slice(start, start + square)
        weight[part, :, rows, columns] = conv.weight.detach()[part, :, rows, columns]
    return weight, bias


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("kind", [nn.Conv2d, DepthwiseConv2d])
def test_a_split_keeps_the_weights_that_remain(kind, dilation):
    options = {"padding": 3 * dilation, "dilation": dilation, "dtype": torch.double}
    conv = (
        nn.Conv2d(18, 18, 7, groups=18, **options)
        if kind is nn.Conv2d
        else DepthwiseConv2d(18, 18, 7, backend="aten", **options)
    )
    conv.eval()
    assert why_not(conv) is None
    layer = InceptionDWConv2d.from_conv2d(conv, branch_ratio=0.25)
    assert not layer.training
    assert [part.kernel_size for part in layer.branches()] == [(3, 3), (1, 7), (7, 1)]
    assert {part.backend for part in layer.branches()} == {getattr(conv, "backend", "auto")}
    weight, bias = split_by_hand(conv, layer)
    x = torch.randn(2, 18, 15, 14, dtype=torch.double)
    expected = nn.functional.conv2d(x, weight, bias, padding=3 * dilation, dilation=dilation, groups=18)
    close(layer(x), expected, FLOAT64)
    assert not torch.equal(layer(x), conv(x))  # the function is not kept
    assert all(p.requires_grad for p in layer.parameters())


def test_a_split_with_longer_bands_starts_them_with_zeros():
    conv = nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False).requires_grad_(False)
    layer = InceptionDWConv2d.from_conv2d(conv, band_kernel_size=9)
    assert list(layer.state_dict()) == ["dwconv_hw.weight", "dwconv_w.weight", "dwconv_h.weight"]
    assert torch.equal(layer.dwconv_w.weight[0, 0, 0], nn.functional.pad(conv.weight[6, 0, 2], (2, 2)))
    assert torch.equal(layer.dwconv_h.weight[0, 0, :, 0], nn.functional.pad(conv.weight[7, 0, :, 2], (2, 2)))
    assert torch.equal(layer.dwconv_hw.weight[0, 0], conv.weight[5, 0, 1:4, 1:4])
    assert not any(p.requires_grad for p in layer.parameters())


def test_one_kernel_instead_would_cost_what_the_docstring_says():
    layer = InceptionDWConv2d(64, device="meta")
    conv = nn.Conv2d(64, 64, 11, padding=5, groups=64, device="meta")
    x = torch.randn(1, 64, 14, 14, device="meta")
    assert cost(conv, x).macs / cost(layer, x).macs == pytest.approx(31, abs=0.5)


def test_in_a_network_reparameterize_gives_plain_convolutions():
    model = nn.Sequential(nn.Conv2d(3, 16, 4, 4), InceptionDWConv2d(16), nn.BatchNorm2d(16)).eval()
    x = torch.randn(1, 3, 32, 32)
    plain = widefield.reparameterize(model, x)
    assert {type(part) for part in plain[1].children()} == {nn.Conv2d}
    close(plain(x), model(x), NETWORK)


def test_takes_the_weights_of_timm_s_networks():
    state = timm.create_model("inception_next_tiny").stages[0].blocks[0].token_mixer.state_dict()
    InceptionDWConv2d(96).load_state_dict(state)


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Linear(3, 3), "it is a Linear"),
        (nn.Conv2d(4, 8, 3, groups=4), "it is not depthwise: 4 input channels, 8 output channels"),
        (nn.Conv2d(8, 8, (3, 5), padding=(1, 2), groups=8), r"not square and odd \(3x5\)"),
        (nn.Conv2d(8, 8, 4, padding=1, groups=8), r"not square and odd \(4x4\)"),
        (nn.Conv2d(8, 8, 3, 2, 1, groups=8), r"its stride is \(2, 2\)"),
        (nn.Conv2d(8, 8, 3, padding=1, dilation=(1, 2), groups=8), "differs between the axes"),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8, padding_mode="reflect"), "its padding mode is 'reflect'"),
        (nn.Conv2d(8, 8, 3, groups=8), r"its padding is \(0, 0\), and 1"),
        (DepthwiseConv2d(8, 8, 3, 2, 1), "its stride"),
    ],
)
def test_says_why_not(conv, reason):
    with pytest.raises(ValueError, match=f"cannot be an InceptionDWConv2d: .*{reason}"):
        InceptionDWConv2d.from_conv2d(conv)


def test_bad_arguments():
    with pytest.raises(
        ValueError, match=r"branch_ratio=0.125 does not fit 7 channels: a branch would have no channel of its 7"
    ):
        InceptionDWConv2d(7)
    with pytest.raises(ValueError, match=r"three branches would take 12 of its 8 channels"):
        InceptionDWConv2d(8, branch_ratio=0.5)
    with pytest.raises(ValueError, match=r"band_kernel_size must be odd, .* got 10"):
        InceptionDWConv2d(8, band_kernel_size=10)
    with pytest.raises(TypeError, match="square_kernel_size must be an integer"):
        InceptionDWConv2d(8, square_kernel_size=3.0)
    with pytest.raises(ValueError, match="backend must be one of"):
        InceptionDWConv2d(8, backend="cuda")
    with pytest.raises(ValueError, match=r"must be \(N, 8, H, W\); got shape \(1, 7, 4, 4\)"):
        InceptionDWConv2d(8)(torch.randn(1, 7, 4, 4))


def test_the_fixture_s_numbers_are_not_trivial():
    case = operators()["inception_dwconv"]
    x, y = array(case["input"]), array(case["output"])
    assert torch.equal(x[:, :10], y[:, :10])
    assert not torch.equal(x[:, 10:], y[:, 10:])
