import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import group_parameters
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import widefield
from tolerances import FLOAT32, FLOAT64, close
from widefield.models.mobilenetv2_lk import STATED
from widefield.nn import DepthwiseConv2d, LargeKernelConv2d


def depthwise(model):
    """Return name -> the module that replaces timm's depthwise convolution."""
    return {name: module for name, module in model.named_modules() if name.endswith(".conv_dw")}


def settled(model):
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean, 0, 0.1)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.normal_(norm.weight, 1, 0.1)
            nn.init.normal_(norm.bias, 0, 0.1)
    return model.eval()


def counts(**arguments):
    """Parameters in millions and multiply-adds in millions at 224x224, merged."""
    with torch.device("meta"):
        model = timm.create_model("mobilenetv2_lk", **arguments).eval()
        for name, module in depthwise(model).items():
            model.set_submodule(name, module.fuse())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    return sum(p.numel() for p in model.parameters()) / 1e6, counter.get_total_flops() / 2e6


def test_it_is_registered_and_says_where_it_comes_from():
    assert timm.list_models("mobilenetv2_lk") == list(STATED)
    model = timm.create_model("mobilenetv2_lk", kernel_sizes=3)
    assert model.pretrained_cfg["architecture"] == "mobilenetv2_lk"
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model("mobilenetv2_lk", pretrained=True)


def test_with_kernels_of_3_it_is_timms_network():
    ours, theirs = timm.create_model("mobilenetv2_lk", kernel_sizes=3), timm.create_model("mobilenetv2_100")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    close(ours.eval()(x), theirs.eval()(x), FLOAT32)
    for name, p in timm.create_model("mobilenetv2_lk", kernel_sizes=7, small_kernel=0).named_parameters():
        expected = theirs.get_parameter(name)
        if name.endswith("conv_dw.weight"):
            assert p.std().item() == pytest.approx((2 / 49) ** 0.5, rel=0.1)  # timm's initialization of a 7x7
        assert p.shape[:2] == expected.shape[:2]


@pytest.mark.parametrize("small_kernel", [0, 3, 5])
def test_every_depthwise_convolution_is_replaced(small_kernel):
    layers = depthwise(timm.create_model("mobilenetv2_lk", kernel_sizes=13, small_kernel=small_kernel))
    assert len(layers) == 17
    strides = []
    for layer in layers.values():
        assert isinstance(layer, LargeKernelConv2d if small_kernel else DepthwiseConv2d)
        convolutions = [conv for conv, _ in layer.branches()] if small_kernel else [layer]
        assert [conv.kernel_size[0] for conv in convolutions] == [13, small_kernel][: len(convolutions)]
        strides.append(convolutions[0].stride[0])
    assert strides == [1, 2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1]


def test_the_last_stage_alone():
    """Table 4: only the large kernels have a parallel small kernel."""
    layers = depthwise(timm.create_model("mobilenetv2_lk", kernel_sizes=(3, 3, 3, 3, 13)))
    large = [name for name, layer in layers.items() if isinstance(layer, LargeKernelConv2d)]
    assert large == ["blocks.5.0.conv_dw", "blocks.5.1.conv_dw", "blocks.5.2.conv_dw", "blocks.6.0.conv_dw"]
    each = depthwise(timm.create_model("mobilenetv2_lk", kernel_sizes=(5, 7, 9, 11, 13), small_kernel=0))
    sizes = [each[f"blocks.{i}.0.conv_dw"].kernel_size[0] for i in range(7)]
    assert sizes == [5, 7, 9, 11, 11, 13, 13]


def normalized(y, norm):
    return F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


@pytest.mark.parametrize("name", ["2.0", "2.1"])
@pytest.mark.parametrize("small_kernel", [0, 3])
def test_every_branch_is_normalized_once_and_activated_after_the_sum(name, small_kernel):
    model = settled(timm.create_model("mobilenetv2_lk", kernel_sizes=7, small_kernel=small_kernel)).double()
    block = model.blocks.get_submodule(name)
    x = torch.randn(2, block.conv_pw.in_channels, 9, 8).double()
    inner = F.relu6(normalized(block.conv_pw(x), block.bn1))
    branches = block.conv_dw.branches() if small_kernel else [(block.conv_dw, block.bn2)]
    total = 0
    for conv, norm in branches:
        padding = conv.kernel_size[0] // 2
        total = total + normalized(F.conv2d(inner, conv.weight, None, conv.stride, padding, 1, conv.groups), norm)
    y = normalized(block.conv_pwl(F.relu6(total)), block.bn3)
    close(block(x), y + x if block.has_skip else y, FLOAT64)
    first = model.blocks[0][0].bn1  # the other kind of block
    assert isinstance(first, nn.ReLU6 if small_kernel else nn.BatchNorm2d)


def test_shortcuts_can_be_left_out():
    model, without = (timm.create_model("mobilenetv2_lk", shortcut=shortcut) for shortcut in (True, False))
    assert sum(block.has_skip for stage in model.blocks for block in stage) == 10
    assert not any(block.has_skip for stage in without.blocks for block in stage)
    without.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert (model.eval()(x) - without.eval()(x)).abs().max() > 0


@pytest.mark.parametrize("arguments", [{}, {"kernel_sizes": (3, 3, 3, 3, 7)}, {"shortcut": False}], ids=str)
def test_reparameterization_keeps_the_function(arguments):
    model = settled(timm.create_model("mobilenetv2_lk", num_classes=7, **arguments)).double()
    x = torch.randn(2, 3, 64, 32).double()
    fused = widefield.reparameterize(model, x)
    assert not any(isinstance(m, LargeKernelConv2d) for m in fused.modules())
    close(fused(x), model(x), FLOAT64)
    assert any(isinstance(m, LargeKernelConv2d) for m in model.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())


def test_timms_network_with_its_weights_grows_by_conversion():
    """Without norms in the branches, as the block has one: the function is kept, and everything merges."""
    model = settled(timm.create_model("mobilenetv2_100", num_classes=7)).double()
    larger = widefield.convert(model, widefield.LargeKernel(13, small=3, norm=False))
    x = torch.randn(2, 3, 64, 32).double()
    close(larger(x), model(x), FLOAT64)
    fused = widefield.reparameterize(larger, x)
    close(fused(x), model(x), FLOAT64)
    assert any(isinstance(m, nn.BatchNorm2d) for m in larger.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    close(larger.train()(x), model.train()(x), FLOAT64)


@pytest.mark.parametrize(
    ("arguments", "millions", "macs"),
    [
        ({"kernel_sizes": 3}, 3.50, 301),
        ({"kernel_sizes": 9}, 4.01, 467),
        ({"kernel_sizes": 13}, 4.64, 669),
        ({"kernel_sizes": (3, 3, 3, 3, 7)}, 3.64, 308),
        ({"kernel_sizes": (3, 3, 3, 3, 13)}, 4.05, 328),
    ],
)
def test_counts_are_those_in_the_docs(arguments, millions, macs):
    parameters, operations = counts(**arguments)
    assert parameters == pytest.approx(millions, abs=0.005)
    assert operations == pytest.approx(macs, abs=0.5)


def test_behaves_as_everywhere_in_timm():
    model = timm.create_model("mobilenetv2_lk", in_chans=1, num_classes=7, drop_rate=0.1, drop_path_rate=0.1).eval()
    x = torch.randn(2, 1, 75, 90)
    assert model(x).shape == (2, 7)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    features = timm.create_model("mobilenetv2_lk", features_only=True, out_indices=(1, 4))
    assert [tuple(f.shape) for f in features(torch.randn(1, 3, 64, 64))] == [(1, 24, 16, 16), (1, 320, 2, 2)]
    assert features.feature_info.channels() == [24, 320]
    groups = group_parameters(model, model.group_matcher())
    assert len(groups) == 19  # the stem, 17 blocks, and the classifier; the last norm belongs to the last block
    assert "classifier.weight" in groups[18]


@pytest.mark.parametrize("output_stride", [8, 16])
def test_an_output_stride_dilates_both_kernels_like_timms(output_stride):
    ours = timm.create_model("mobilenetv2_lk", kernel_sizes=(3, 3, 3, 3, 9), output_stride=output_stride, num_classes=7)
    theirs = timm.create_model("mobilenetv2_100", output_stride=output_stride)
    expected = {name: (conv.stride, conv.dilation) for name, conv in depthwise(theirs).items()}
    for name, layer in depthwise(ours).items():
        convs = [conv for conv, _ in layer.branches()] if isinstance(layer, LargeKernelConv2d) else [layer]
        assert {(conv.stride, conv.dilation) for conv in convs} == {expected[name]}
    assert {stride_and_dilation[1][0] for stride_and_dilation in expected.values()} > {1}
    model, x = settled(ours).double(), torch.randn(2, 3, 72, 64).double()
    assert model.forward_features(x).shape[2:] == (-(-72 // output_stride), 64 // output_stride)
    fused = widefield.reparameterize(model, x)
    assert not any(isinstance(m, LargeKernelConv2d) for m in fused.modules())
    close(fused(x), model(x), FLOAT64)


def test_norm_arguments_reach_the_branches():
    layer = depthwise(timm.create_model("mobilenetv2_lk", bn_eps=1e-3, bn_momentum=0.01))["blocks.3.1.conv_dw"]
    assert {(norm.eps, norm.momentum) for _, norm in layer.branches()} == {(1e-3, 0.01)}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kernel_sizes": (13, 13)}, ValueError, r"one for each of 5 stages; got \(13, 13\)"),
        ({"kernel_sizes": 12}, ValueError, "kernel_sizes must be odd.*; got 12"),
        ({"kernel_sizes": (3, 3, 3, 3, 4)}, ValueError, "kernel_sizes must be odd.*; got 4"),
        ({"kernel_sizes": (3, 3, 3, 3, 7.0)}, TypeError, "must be an integer; got 7.0"),
        ({"small_kernel": 4}, ValueError, "small must be odd.*; got 4"),
        ({"small_kernel": -3}, ValueError, "small_kernel must be at least 0; got -3"),
        ({"pad_type": "same"}, ValueError, "cannot put a large kernel in the place of Conv2dSame"),
        ({"norm_layer": "layernorm2d"}, ValueError, "a LayerNormAct2d follows it, not a batch norm"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        timm.create_model("mobilenetv2_lk", **arguments)
