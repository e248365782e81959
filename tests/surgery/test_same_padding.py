"""TensorFlow's "SAME" padding, which depends on the input size: converting, merging and trimming, at every size."""

import itertools

import pytest
import timm
import torch
from test_convert import unsettled
from timm.layers import ScaledStdConv2dSame, StdConv2dSame, create_conv2d
from timm.layers.conv2d_same import Conv2dSame
from torch import nn

import widefield
from tolerances import FLOAT64, NETWORK, close
from widefield.nn import DepthwiseConv2dSame, MoRFConv2d, SameAligned
from widefield.nn.same import phase

PRESERVING = {
    "mixture": widefield.MoRF((3, 5, 7)),
    "fast": widefield.FastDepthwise(),
    "mask": widefield.GMConv(body="static"),
    "dynamic mask": widefield.GMConv(body="dynamic"),
    "large": widefield.LargeKernel(9),
    "rectangular": widefield.LargeKernel(((9, 7),), norm=False),
    "dilated": widefield.LargeKernel(9, branches="dilated"),
    "bands": widefield.LargeKernel(9, branches="bands", small=5),
}
SHAPES = [(3, 2, 1), (5, 2, 1), (5, 3, 1), (5, 4, 1), (3, 1, 1), (3, 2, 2)]
SIZES = list(itertools.product((8, 9, 11), (7, 10, 13)))


def network(size, stride, dilation=1, channels=24):
    torch.manual_seed(0)
    conv = Conv2dSame(channels, channels, size, stride, 0, dilation, channels)
    return unsettled(nn.Sequential(nn.Conv2d(3, channels, 1), conv, nn.BatchNorm2d(channels))).double()


def agree(first, second, tolerance=FLOAT64):
    for height, width in SIZES:
        x = torch.randn(2, 3, height, width).double()
        close(first(x), second(x), tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PRESERVING)
def test_conversions_keep_the_function_for_every_size(name, shape):
    model, config = network(*shape), PRESERVING[name]
    if shape[2] > 1 and isinstance(config, widefield.LargeKernel):
        with pytest.raises(ValueError, match="its dilation is"):
            widefield.convert(model, config, where="1")
        return
    converted = widefield.convert(model, config, where="1")
    assert type(converted[1]) is not Conv2dSame
    agree(converted, model)
    fused = widefield.reparameterize(converted, torch.randn(1, 3, 9, 10).double())
    agree(fused, model)
    agree(widefield.trim(fused, 0.0), model)


@pytest.mark.parametrize("name", ["fast", "mask", "large", "rectangular", "dilated"])
def test_merged_they_are_timms_convolution_again(name):
    model = network(3, 2)
    converted = widefield.convert(model, PRESERVING[name], where="1")
    fused = widefield.reparameterize(converted, torch.randn(1, 3, 9, 10).double())
    assert [type(layer) for layer in fused] == [nn.Conv2d, Conv2dSame, nn.Identity]
    trimmed = widefield.trim(fused, 1e-6)  # sums of dilated branches have rounding errors
    assert (type(trimmed[1]), trimmed[1].kernel_size) == (Conv2dSame, (3, 3))


def test_a_mixture_takes_the_norm_behind_it_and_is_specialized():
    model, x = network(3, 2), torch.randn(2, 3, 9, 10).double()
    mixture = widefield.convert(model, widefield.MoRF((3, 5)), where="1")
    assert isinstance(mixture[1], SameAligned)
    assert isinstance(mixture[1].layer, MoRFConv2d)
    fused = widefield.reparameterize(mixture, x)
    assert isinstance(fused[2], nn.Identity)
    static = widefield.reparameterize(widefield.specialize(mixture, [x]), x)
    assert type(static[1]) is Conv2dSame
    agree(fused, model)
    agree(static, model)


def test_fast_depthwise_keeps_parameters_and_keys():
    model = network(3, 2)
    fast = widefield.convert(model, widefield.FastDepthwise(), where="1", inplace=True)
    assert type(fast[1]) is DepthwiseConv2dSame
    assert set(fast.state_dict()) == set(network(3, 2).state_dict())
    agree(fast, network(3, 2))
    mixture = widefield.convert(fast, widefield.MoRF((3, 5)), where="1")
    agree(mixture, fast)


@pytest.mark.parametrize(("size", "stride", "least"), [(9, 2, 3), (8, 2, 2), (9, 4, 5), (8, 5, 6), (7, 7, 7)])
def test_trimming_stops_where_the_padding_would_be_cut(size, stride, least):
    model = network(size, stride)
    with torch.no_grad():
        keep = torch.zeros(size, size, dtype=torch.double)
        keep[(size - 1) // 2 : size // 2 + 1, (size - 1) // 2 : size // 2 + 1] = 1
        model[1].weight.mul_(keep)
    reports = []
    if size == least:
        trimmed = widefield.trim(model, 0.0, report=reports.append)
        assert "'SAME' padding would move its outputs" in reports[0].kernels[0].left
    else:
        trimmed = widefield.trim(model, 0.0)
    assert trimmed[1].kernel_size == (least, least)
    agree(trimmed, model)


@pytest.mark.parametrize("side", [1, 2, 3, 4])
def test_taps_that_never_meet_the_map_go(side):
    model, reports = network(9, 2), []
    trimmed = widefield.trim(model, 0.0, example_input=side, report=reports.append)
    x = torch.randn(2, 3, side, side).double()
    close(trimmed(x), model(x), FLOAT64)
    assert reports[0].kernels[0].after < (9, 9)


def test_the_phase_is_that_of_tensorflow():
    # TensorFlow's documentation: 13 pixels, 6 taps, stride 5 are padded by 1 before and 2 after. The same holds for odd
    # kernels.
    for side, stride, size in itertools.product(range(1, 12), range(1, 5), (5, 7)):
        total = max((-(-side // stride) - 1) * stride + size - side, 0)
        assert phase(side, stride) == size // 2 - total // 2


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (Conv2dSame(8, 8, 4, 2, groups=8), "its kernel size is even"),
        (Conv2dSame(8, 8, 3, 5, groups=8), "its kernel of 3x3 is smaller than its stride"),
        (StdConv2dSame(8, 8, 3, 2), "it is a StdConv2dSame, which standardizes its kernel in every call"),
        (ScaledStdConv2dSame(8, 8, 3, 2), "it is a ScaledStdConv2dSame, which standardizes"),
    ],
)
@pytest.mark.parametrize("config", [widefield.MoRF((5, 7)), widefield.GMConv()])
def test_what_has_no_center_or_computes_its_kernel_stays_with_the_reason(config, conv, reason):
    (step,) = widefield.plan(nn.Sequential(conv), config, where="0").steps
    assert reason in step.reason
    with pytest.raises(ValueError, match=reason):
        widefield.convert(nn.Sequential(conv), config, where="0")


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "tf_mixnet_s", "tf_mobilenetv3_small_minimal_100"])
def test_networks_of_tensorflow_are_converted_whole(name):
    model = unsettled(timm.create_model(name, num_classes=5))
    depthwise = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    plan = widefield.plan(model, widefield.LargeKernel(11))
    assert len(plan.replaced) == len(depthwise)
    assert any("SameAligned(LargeKernelConv2d(" in step.after for step in plan.replaced)
    converted = widefield.convert(model, widefield.LargeKernel(11))
    fused = widefield.reparameterize(converted, torch.randn(2, 3, 48, 48))
    for size in ((48, 48), (47, 51)):
        x = torch.randn(2, 3, *size)
        close(converted(x), model(x), NETWORK)
        close(fused(x), model(x), NETWORK)


def test_a_strided_stem_is_masked():
    stem = create_conv2d(3, 8, 3, stride=2, padding="same")
    converted = widefield.convert(nn.Sequential(stem).double(), widefield.GMConv())
    assert isinstance(converted[0], SameAligned)
    agree(converted, nn.Sequential(stem).double())


@pytest.mark.parametrize("side", [8, 9])
def test_what_follows_may_change_the_map_in_place(side, tmp_path):
    """A view cannot be changed after no_grad. Its export uses scatter, which onnxruntime cannot run there."""
    conv = Conv2dSame(8, 8, 3, 2, groups=8)
    model = widefield.convert(nn.Sequential(nn.Conv2d(3, 8, 1), conv, nn.ReLU6(inplace=True)), widefield.MoRF((3, 5)))
    x = torch.randn(2, 3, side, side)
    with torch.no_grad():
        y = model[1](model[0](x))
    y.mul_(torch.ones(1, requires_grad=True)).sum().backward()
    layout = torch.channels_last
    assert model[1](model[0](x.to(memory_format=layout))).is_contiguous(memory_format=layout)
    served = widefield.reparameterize(model.eval(), x)
    exported = widefield.export(served, tmp_path / "model.onnx", x, dynamic=("batch", "size"))
    assert "ScatterND" not in exported.operators
