import copy

import pytest
import torch
from conformance import array, check_operator, loaded, operators
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import widefield
from tolerances import BFLOAT16, FLOAT32, FLOAT64, NETWORK, close
from widefield.bench import cost
from widefield.nn import DepthwiseConv2d
from widefield.nn.gnconv import GatedRecursion, GlobalLocalFilter, GnConv, highest_order, why_not


def settled(layer):
    """Return the layer with all parameters changed, including norms and biases."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 0.3 if parameter.ndim == 1 else 0, 0.5)
    return layer.eval()


def layers(case):
    config = case["config"]
    if "order" not in config:
        return GlobalLocalFilter(config["dim"], config["h"], config["w"])
    filters = (config["h"], config["w"]) if "h" in config else None
    return GnConv(config["dim"], config["order"], scale=config["scale"], global_filter=filters)


@pytest.mark.parametrize("name", ["gnconv_order2", "gnconv_order3", "gnconv_order5", "gnconv_order4_gf"])
def test_is_the_official_layer_and_so_is_its_merged_form(name):
    case = operators()[name]
    layer = layers(case)
    assert list(layer.widths) == case["config"]["dims"]
    assert list(layer.state_dict()) == list(case["state_dict"])
    check_operator(loaded(layer, case), case)
    check_operator(layer.fuse(), case)


@pytest.mark.parametrize("name", ["global_local_filter", "global_local_filter_resized"])
def test_is_the_official_filter(name):
    case = operators()[name]
    layer = layers(case)
    assert list(layer.state_dict()) == list(case["state_dict"])
    check_operator(loaded(layer, case), case)
    layer.resize(*case["input"]["shape"][2:])  # the first has this size already
    check_operator(layer, case)


@settings(deadline=None, max_examples=20)
@given(
    order=st.integers(1, 4),
    multiple=st.integers(1, 3),
    kernel=st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3, 7])),
    scale=st.sampled_from([1.0, 0.5, 1 / 3]),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_equals_the_recursion_written_out(order, multiple, kernel, scale, size):
    channels = multiple * 2 ** (order - 1)
    layer = settled(GnConv(channels, order, kernel, scale).double())
    x = torch.randn(2, channels, *size, dtype=torch.double)
    parts = layer.proj_in(x)
    p, start = parts[:, :multiple], multiple
    for k in range(order):
        width = multiple * 2**k
        if k:
            p = layer.pws[k - 1](p)
        q, taps = parts[:, start : start + width], slice(start - multiple, start - multiple + width)
        conv = layer.dwconv
        padding = kernel[0] // 2, kernel[1] // 2
        p = p * scale * F.conv2d(q, conv.weight[taps], conv.bias[taps], padding=padding, groups=width)
        start += width
    assert start == parts.shape[1]
    close(layer(x), layer.proj_out(p), FLOAT64)


def circular(x, layer):
    """Convolve half of the channels with circular kernels as large as the map, without spectra."""
    gains = torch.view_as_complex(layer.complex_weight.detach().contiguous())
    kernels = torch.fft.irfft2(gains, s=x.shape[2:])
    height, width = x.shape[2:]
    y = torch.zeros_like(x)
    for row in range(height):
        for column in range(width):
            y += kernels[:, row, column, None, None] * x.roll((row, column), (2, 3))
    return y


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 1), (6, 1)])
def test_a_global_filter_is_a_circular_convolution_whose_channels_take_turns_with_the_local_ones(size):
    layer = settled(GlobalLocalFilter(6, size[0], size[1] // 2 + 1).double())
    x = torch.randn(2, 6, *size, dtype=torch.double)
    z = layer.pre_norm(x)
    local = F.conv2d(z[:, :3], layer.dw.weight, padding=1, groups=3)
    y = torch.zeros_like(x)
    y[:, 0::2], y[:, 1::2] = local, circular(z[:, 3:], layer)
    close(layer(x), layer.post_norm(y), FLOAT64)


@pytest.mark.parametrize("size", [(7, 9), (3, 10), (1, 1)])
def test_filters_are_interpolated_bilinearly_from_corner_to_corner(size):
    layer = settled(GlobalLocalFilter(4, 5, 4).double())
    target = size[0], size[1] // 2 + 1
    old, new = layer.complex_weight.detach(), torch.zeros(2, *target, 2, dtype=torch.double)
    for row in range(target[0]):
        for column in range(target[1]):
            i = row * 4 / max(target[0] - 1, 1)
            j = column * 3 / max(target[1] - 1, 1)
            a, b = min(int(i), 3), min(int(j), 2)
            u, v = i - a, j - b
            upper = (1 - v) * old[:, a, b] + v * old[:, a, b + 1]
            new[:, row, column] = (1 - u) * upper + u * ((1 - v) * old[:, a + 1, b] + v * old[:, a + 1, b + 1])
    x = torch.randn(2, 4, *size, dtype=torch.double)
    expected = layer(x)
    layer.requires_grad_(False)
    layer.resize(*size)
    close(layer.complex_weight, new, FLOAT64)
    close(layer(x), expected, FLOAT64)
    assert not layer.complex_weight.requires_grad


@pytest.mark.parametrize("filters", [None, (4, 3), (3, 2)])
def test_gradients(filters):
    layer = settled(GnConv(4, 2 if filters is None else 1, 3, 0.5, filters).double())
    x = torch.randn(2, 4, 4, 3, dtype=torch.double, requires_grad=True)
    names = list(dict(layer.named_parameters()))

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()))


def test_an_order_is_a_degree():
    """Without biases an output of order n grows with power n + 1 of its input."""
    for order in range(1, 6):
        layer = settled(GnConv(16, order, 3).double())
        for name, parameter in layer.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
        x = torch.randn(1, 16, 5, 5, dtype=torch.double)
        close(layer(2 * x) / 2 ** (order + 1), layer(x), FLOAT64)


@pytest.mark.parametrize("filters", [None, (4, 3)])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_merging_is_exact_and_makes_weights_that_are_not_mistaken(filters, scale):
    layer = settled(GnConv(8, 2, 5, scale, filters).double())
    layer.pws.requires_grad_(False)
    before = copy.deepcopy(layer.state_dict())
    fused = layer.fuse()
    x = torch.randn(2, 8, 6, 7, dtype=torch.double)
    close(fused(x), layer(x), 1e-12)
    assert type(fused) is GatedRecursion
    assert not hasattr(fused, "fuse")
    assert not any(module.training for module in fused.modules())
    assert not {p.data_ptr() for p in fused.parameters()} & {p.data_ptr() for p in layer.parameters()}
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    assert [p.requires_grad for p in fused.parameters()] == [p.requires_grad for p in layer.parameters()]
    with pytest.raises(RuntimeError, match=r"dwconv\.scaled"):
        layer.load_state_dict(fused.state_dict())
    with pytest.raises(RuntimeError, match=r"call model\.eval\(\) first"):
        layer.train().fuse()


def test_in_a_network_reparameterize_merges_it():
    model = nn.Sequential(nn.Conv2d(3, 16, 4, 4), GnConv(16, 3, scale=1 / 3)).eval()
    x = torch.randn(1, 3, 32, 32)
    merged = widefield.reparameterize(model, x)
    assert merged[1].state_dict().keys() == model[1].fuse().state_dict().keys()
    assert not type(merged[1]).__module__.startswith("widefield")
    close(merged(x), model(x), NETWORK)


@pytest.mark.parametrize("filters", [None, (7, 5), (14, 8)])
def test_layouts_copies_an_empty_batch_and_autocast(filters):
    layer = settled(GnConv(16, 3, 7, 1 / 3, filters))
    x = torch.randn(2, 16, 7, 9)
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    assert layer(x[:0]).shape == (0, 16, 7, 9)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        y.square().sum().backward()
    assert y.dtype == torch.bfloat16
    close(y, expected, BFLOAT16)
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    last = layer.to(memory_format=torch.channels_last)
    close(last(x.contiguous(memory_format=torch.channels_last)), expected, FLOAT32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_spectra_are_computed_in_float32_at_least(dtype, autocast):
    layer = settled(GlobalLocalFilter(4, 6, 4))
    x = torch.randn(2, 4, 5, 7)  # lengths without transforms in narrow types
    seen = []
    rfft2 = torch.fft.rfft2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.fft, "rfft2", lambda x, **options: seen.append(x.dtype) or rfft2(x, **options))
        expected = layer(x)
        double = copy.deepcopy(layer).double()(x.double())
        if autocast:
            with torch.autocast("cpu", dtype):
                y = layer(x.to(dtype))
        else:
            y = layer.to(dtype)(x.to(dtype))
            assert y.dtype == dtype
    assert seen == [torch.float32, torch.float64, torch.float32]
    close(expected, double, FLOAT32)
    close(y, expected, BFLOAT16)


@pytest.mark.parametrize("filters", [None, (6, 4)])
def test_export_for_maps_of_any_size_the_stored_one_too(filters):
    layer = settled(GnConv(8, 2, 3, 1 / 3, filters)).fuse()
    sizes = {i: torch.export.Dim(name, min=2, max=32) for i, name in ((0, "batch"), (2, "height"), (3, "width"))}
    program = torch.export.export(layer, (torch.randn(3, 8, 9, 12),), dynamic_shapes=({"x": sizes}["x"],))
    for shape in ((2, 8, 9, 12), (5, 8, 6, 6), (3, 8, 14, 20)):
        x = torch.randn(shape)
        close(program.module()(x), layer(x), FLOAT32)
    close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x), FLOAT32)


# As a replacement for convolutions


@pytest.mark.parametrize("kind", [nn.Conv2d, DepthwiseConv2d])
@pytest.mark.parametrize("kernel", [(5, 5), (3, 7)])
def test_takes_the_place_of_a_depthwise_convolution(kind, kernel):
    padding = kernel[0] // 2, kernel[1] // 2
    if kind is nn.Conv2d:
        conv = nn.Conv2d(24, 24, kernel, padding=padding, groups=24, dtype=torch.double)
    else:
        conv = DepthwiseConv2d(24, 24, kernel, padding=padding, backend="aten", dtype=torch.double)
    conv.eval().requires_grad_(False)
    assert why_not(conv) is None
    layer = GnConv.from_conv2d(conv, scale=1 / 3)
    assert layer.widths == (3, 6, 12, 24)  # 24 can be halved three times
    assert (layer.scale, layer.dwconv.kernel_size, layer.dwconv.backend) == (
        1 / 3,
        kernel,
        getattr(conv, "backend", "auto"),
    )
    assert not layer.training
    assert not any(p.requires_grad for p in layer.parameters())
    x = torch.randn(2, 24, 8, 9, dtype=torch.double)
    assert layer(x).shape == conv(x).shape
    assert not torch.allclose(layer(x), conv(x))  # the function is not kept
    assert GnConv.from_conv2d(conv, 2, kernel_size=9).dwconv.kernel_size == (9, 9)
    assert isinstance(GnConv.from_conv2d(conv, 2, global_filter=(8, 5)).dwconv, GlobalLocalFilter)


def test_a_layer_on_the_meta_device_stays_there():
    layer = GnConv.from_conv2d(nn.Conv2d(16, 16, 3, padding=1, groups=16, device="meta"))
    assert {p.device.type for p in layer.parameters()} == {"meta"}


def test_orders_by_channels():
    assert [highest_order(channels) for channels in (1, 2, 12, 24, 64)] == [1, 2, 3, 4, 5]
    assert highest_order(64, 3) == 3


def test_costs_what_the_docstring_says():
    x = torch.empty(1, 64, 14, 14, device="meta")
    for order in range(1, 7):
        with torch.device("meta"):
            layer = GnConv(64, order, 7)
        inner = 2 / 3 * 64**2 * (1 - 4 ** (1 - order))
        assert cost(layer, x).macs / 14**2 == pytest.approx(3 * 64**2 + inner + 49 * sum(layer.widths))
        assert sum(p.numel() for p in layer.pws.parameters() if p.ndim > 1) == pytest.approx(inner)


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Linear(3, 3), "it is a Linear"),
        (nn.Conv2d(4, 8, 3, padding=1, groups=4), "it is not depthwise: 4 input channels, 8 output channels"),
        (nn.Conv2d(8, 8, 3, 2, 1, groups=8), r"its stride is \(2, 2\), and a gate is as large"),
        (nn.Conv2d(8, 8, 3, 1, 2, 2, groups=8), r"its dilation is \(2, 2\), and the gates' kernel has none"),
        (nn.Conv2d(8, 8, 4, padding=1, groups=8), r"its kernel size is even \(4x4\)"),
        (nn.Conv2d(8, 8, 3, groups=8), r"its padding is \(0, 0\)"),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8, padding_mode="reflect"), "its padding mode is 'reflect'"),
    ],
)
def test_says_why_not(conv, reason):
    with pytest.raises(ValueError, match=f"cannot become a GnConv: .*{reason}"):
        GnConv.from_conv2d(conv)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GnConv(24), ValueError, r"divisible by 16, to be halved 4 times for order=5; got 24\. .* at most 4"),
        (lambda: GnConv(7, 2), ValueError, r"divisible by 2, .*; got 7\. Use an order of at most 1"),
        (lambda: GnConv(16, 0), ValueError, "order must be at least 1; got 0"),
        (lambda: GnConv(16, 2.0), TypeError, r"order must be an integer; got 2\.0"),
        (lambda: GnConv(16, 2, 4), ValueError, "kernel_size must be odd.*got 4"),
        (lambda: GnConv(16, 2, scale=-1), ValueError, r"scale must be from 0\.0 to inf; got -1"),
        (
            lambda: GnConv(16, 5, global_filter=(4, 3)),
            ValueError,
            r"half of 31 channels: .* divisible by 32 for order=5",
        ),
        (lambda: GnConv(16, 2, global_filter=(4, 0)), ValueError, "global_filter must be at least 1; got 0"),
        (lambda: GnConv(16, 2, backend="cuda"), ValueError, "backend must be one of"),
        (
            lambda: GnConv(8, 2)(torch.randn(1, 7, 4, 4)),
            ValueError,
            r"must be \(N, 8, H, W\); got shape \(1, 7, 4, 4\)",
        ),
        (lambda: GlobalLocalFilter(5), ValueError, "channels must be even, half for each kind of filter; got 5"),
        (lambda: GlobalLocalFilter(4, 0), ValueError, "height must be at least 1; got 0"),
        (lambda: GlobalLocalFilter(4, 4, "3"), TypeError, "width must be an integer; got '3'"),
        (lambda: GlobalLocalFilter(4)(torch.randn(4, 5, 5)), ValueError, r"must be \(N, 4, H, W\).*x\[None\]"),
        (lambda: GlobalLocalFilter(4).resize(0, 4), ValueError, "height must be at least 1; got 0"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_shows_its_arguments():
    assert repr(GnConv(8, 3, scale=1 / 3)).startswith("GnConv(\n  2 + 4 + 8, scale=0.3333")
    assert repr(GlobalLocalFilter(4, 6, 5)).startswith("GlobalLocalFilter(\n  4, 6, 5")


def test_the_fixture_needs_the_interpolation():
    case = operators()["global_local_filter_resized"]
    assert array(case["state_dict"]["complex_weight"]).shape[1:3] != (5, 5)
