"""Every conversion on whole networks, and errors for invalid configurations."""

import copy
import re

import pytest
import timm
import torch
import torchvision
from test_convert import unsettled
from torch import nn

import widefield
from tolerances import NETWORK, close
from widefield import bench
from widefield.nn import (
    DecomposedConv2d,
    DeformConv2d,
    DepthwiseConv2d,
    DilatedReparamConv2d,
    DynamicGMConv2d,
    GMConv2d,
    InceptionDWConv2d,
    LargeKernelConv2d,
    MoRFConv2d,
)
from widefield.nn.mixers import TOKEN_MIXERS
from widefield.surgery import MoRF, TokenMixer, compare, convert, plan, reparameterize, specialize, trim


def create(name, **arguments):
    if name.startswith("tv:"):
        return unsettled(torchvision.models.get_model(name[3:], **arguments))
    return unsettled(timm.create_model(name, num_classes=7, **arguments))


def layers(model, kind):
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def preserved(model, converted, x):
    return widefield.compare(model, converted, x).relative


# GMConv


@pytest.mark.parametrize(
    ("name", "stem", "body"),
    [("resnet18", 1, 16), ("mobilenetv2_100", 1, 17), ("tv:alexnet", 1, 4), ("convnext_atto", 1, 12)],
)
def test_gmconv_puts_dynamic_masks_in_the_stem_static_ones_in_the_body_and_changes_nothing(name, stem, body):
    model, x = create(name), torch.randn(2, 3, 72, 64)
    converted = widefield.convert(model, widefield.GMConv())
    assert len(layers(converted, DynamicGMConv2d)) == stem
    assert len(layers(converted, GMConv2d)) == body
    assert preserved(model, converted, x) <= NETWORK
    more = sum(p.numel() for n, p in converted.named_parameters() if "predictor" not in n)
    assert more - sum(p.numel() for p in model.parameters()) == body  # one sigma each
    with torch.no_grad():
        for module in layers(converted, GMConv2d).values():
            module.sigma.fill_(1.5)
    assert preserved(model, converted, x) > NETWORK
    fused = widefield.reparameterize(converted, x)
    assert not layers(fused, GMConv2d)
    assert preserved(converted, fused, x) <= NETWORK


def test_gmconv_fused_static_layers_cost_what_the_model_did():
    model = create("resnet18")
    fused = widefield.reparameterize(widefield.convert(model, widefield.GMConv(stem="static")))
    norms = sum(p.numel() for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    x = torch.empty(1, 3, 64, 64, device="meta")
    before, after = bench.cost(model.to("meta"), x), bench.cost(fused.to("meta"), x)
    assert after.macs == before.macs
    # Each norm of two parameters per channel became a bias of one. 1x1 convolutions get no mask and keep their norms.
    kept = sum(p.numel() for m in fused.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    assert after.parameters == before.parameters - (norms - kept) // 2


def test_gmconv_kinds_and_where_can_be_chosen():
    model = create("resnet18")
    assert not layers(widefield.convert(model, widefield.GMConv(stem="none")), DynamicGMConv2d)
    only_stem = widefield.convert(model, widefield.GMConv(body="none"))
    assert list(layers(only_stem, (GMConv2d, DynamicGMConv2d))) == ["conv1"]
    dynamic = widefield.convert(model, widefield.GMConv(body="dynamic", predict="sigma"), where="layer4.*")
    assert len(layers(dynamic, DynamicGMConv2d)) == 4
    with pytest.raises(ValueError, match="the config has 'none' for it"):
        widefield.convert(model, widefield.GMConv(stem="none", body="none"))


# LargeKernel


def test_the_slides_convnext():
    """Slides, 31-29-27-13: 32M parameters, 6.1G MACs."""
    model = timm.create_model("convnext_tiny").eval()
    converted = widefield.convert(model, widefield.LargeKernel((31, 29, 27, 13), small=5))
    sizes = [module.lkb_origin.conv.kernel_size[0] for module in layers(converted, LargeKernelConv2d).values()]
    assert sizes == [31] * 3 + [29] * 3 + [27] * 9 + [13] * 3
    fused = widefield.reparameterize(converted, torch.randn(1, 3, 64, 64))
    cost = bench.cost(fused.to("meta"), torch.empty(1, 3, 224, 224, device="meta"))
    assert round(cost.parameters / 1e6) == 32
    assert round(cost.macs / 1e9, 1) == 6.1


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("convnext_atto", (17, 15, 13, 9)),
        ("tv:convnext_tiny", (9, 9, 9, 7)),
        ("mobilenetv2_100", 11),
    ],
)
def test_large_kernels_keep_the_function(name, sizes, norm):
    model, x = create(name), torch.randn(2, 3, 64, 72)
    config = widefield.LargeKernel(sizes, small=3, norm=norm)
    converted = widefield.convert(model, config)
    assert preserved(model, converted, x) <= NETWORK
    assert preserved(converted, widefield.reparameterize(converted, x), x) <= NETWORK
    if not norm:
        both = copy.deepcopy(model), converted
        torch.manual_seed(1)
        one = both[0].train()(x)
        torch.manual_seed(1)
        close(both[1].train()(x), one, NETWORK)


def test_sizes_go_by_the_stages_that_hold_depthwise_convolutions():
    """timm counts five features of a MobileNetV2, and all five stages have depthwise convolutions."""
    model = create("mobilenetv2_100")
    with pytest.raises(ValueError, match=r"has 2 sizes, but .* are in 5 stages: pass one size for each stage, or one"):
        widefield.convert(model, widefield.LargeKernel((9, 7)))
    converted = widefield.convert(model, widefield.LargeKernel((3, 5, 7, 9, 11), small=None))
    found = layers(converted, LargeKernelConv2d)
    sizes = {name.split(".")[1]: module.lkb_origin.conv.kernel_size[0] for name, module in found.items()}
    assert sizes == {"0": 3, "1": 5, "2": 7, "3": 9, "4": 9, "5": 11, "6": 11}


def test_without_feature_info_a_stage_ends_where_the_width_changes():
    model = nn.Sequential(*(nn.Conv2d(c, c, 3, padding=1, groups=c) for c in (4, 4, 8, 4)))
    converted = widefield.convert(model, widefield.LargeKernel((5, 7, 9), small=None), where="*")
    assert [layer.lkb_origin.conv.kernel_size[0] for layer in converted] == [5, 5, 7, 9]


def test_a_kernel_that_is_larger_than_the_new_one_stays_and_the_plan_says_so():
    plan = widefield.plan(create("convnext_atto"), widefield.LargeKernel((5, 7, 9, 11)))
    assert {step.reason for step in plan.passed_over if "conv_dw" in step.name} == {
        "its 7x7 kernel does not fit into one of 5x5"
    }
    assert len(plan.replaced) == 10
    every = widefield.plan(create("convnext_atto"), widefield.LargeKernel((5, 7, 9, 11), init="random"))
    assert len(every.replaced) == 12


def test_branches_of_the_other_papers():
    model, x = create("convnext_atto"), torch.randn(2, 3, 64, 64)
    dilated = widefield.convert(model, widefield.LargeKernel((17, 15, 13, 11), branches="dilated"))
    assert len(layers(dilated, DilatedReparamConv2d)) == 12
    assert preserved(model, dilated, x) <= NETWORK
    assert preserved(dilated, widefield.reparameterize(dilated, x), x) <= NETWORK
    with pytest.raises(ValueError, match="its 7x7 kernel does not fit into one of 51x5"):
        widefield.convert(model, widefield.LargeKernel(51, branches="bands"))
    bands = widefield.convert(model, widefield.LargeKernel((51, 49, 47, 13), branches="bands", init="random"))
    assert len(layers(bands, DecomposedConv2d)) == 12
    assert preserved(bands, widefield.reparameterize(bands, x), x) <= NETWORK
    narrow = nn.Conv2d(4, 4, (9, 3), padding=(4, 1), groups=4).eval()
    held = widefield.convert(narrow, widefield.LargeKernel(11, branches="bands"), where="*")
    assert preserved(narrow, held, torch.randn(1, 4, 12, 12)) <= NETWORK


def test_dense_convolutions_get_no_large_kernels():
    with pytest.raises(ValueError, match="it is not depthwise"):
        widefield.convert(create("resnet18"), widefield.LargeKernel(31))


# New initializations


def test_inception_split_and_deformable_take_the_place_and_train():
    model, x = create("convnext_atto"), torch.randn(2, 3, 64, 64)
    shape = model(x).shape
    for config, kind in ((widefield.InceptionSplit(), InceptionDWConv2d), (widefield.Deformable(), DeformConv2d)):
        converted = widefield.convert(model, config).train()
        assert len(layers(converted, kind)) == 12
        y = converted(x)
        assert y.shape == shape
        y.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in converted.parameters())


@pytest.mark.parametrize("mixer", ["attention", "focal", "gnconv", "lka", "moga", "pooling"])
def test_other_token_mixers_take_the_place_of_depthwise_convolutions(mixer):
    model, x = create("convnext_atto"), torch.randn(2, 3, 64, 64)
    converted = widefield.convert(model, widefield.TokenMixer(mixer)).train()
    kind = type(TOKEN_MIXERS[mixer](40, 0))
    assert len(layers(converted, kind)) == 12
    y = converted(x)
    assert y.shape == model(x).shape
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in converted.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: widefield.GMConv(stem="dynamc"), "stem must be one of .*'dynamic'"),
        (lambda: widefield.GMConv(init="keep"), "init must be one of"),
        (lambda: widefield.GMConv(sigma=0.0), "sigma"),
        (lambda: widefield.GMConv(predict="sigma3"), "predict"),
        (lambda: widefield.LargeKernel(()), "kernel_sizes is empty"),
        (lambda: widefield.LargeKernel((31, 30)), "odd.*got 30"),
        (lambda: widefield.LargeKernel(7, small=9), "small must not exceed"),
        (lambda: widefield.LargeKernel(7, branches="dilted"), "branches must be one of .*'dilated'"),
        (lambda: widefield.LargeKernel(7, branches="dilated", norm=False), "norm=False is for branches='small'"),
        (lambda: widefield.LargeKernel(19, branches="dilated"), "got 19: give branches="),
        (lambda: widefield.LargeKernel(7, init="keep"), "init must be one of"),
        (lambda: widefield.InceptionSplit(branch_ratio=0.5), "branch_ratio"),
        (lambda: widefield.Deformable(groups=0), "groups"),
        (lambda: widefield.TokenMixer("lca"), "mixer must be one of .*Did you mean 'lka'"),
    ],
)
def test_bad_arguments_are_refused_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "config",
    [
        widefield.GMConv(), widefield.LargeKernel((31, 29, 27, 13)), widefield.LargeKernel([9, (7, 5)]),
        widefield.InceptionSplit(), widefield.Deformable(),
    ],
    ids=lambda config: type(config).__name__,
)  # fmt: skip
def test_configs_are_values(config):
    assert config == copy.deepcopy(config)
    assert hash(config) == hash(copy.deepcopy(config))


@pytest.mark.parametrize("verb", [plan, convert])
@pytest.mark.parametrize(
    ("config", "got", "call"),
    [
        ("morf", "'morf'", "MoRF()"),
        ("large_kernel", "'large_kernel'", "LargeKernel(kernel_sizes=...)"),
        (MoRF, "the class MoRF", "MoRF()"),
        (TokenMixer, "the class TokenMixer", "TokenMixer(mixer=...)"),
        (MoRFConv2d, "the class MoRFConv2d", "MoRF()"),
        (DepthwiseConv2d(3, 3, 3, padding=1), "an object of type DepthwiseConv2d", "FastDepthwise()"),
        (DynamicGMConv2d, "the class DynamicGMConv2d", "GMConv()"),
    ],
)
def test_what_is_not_a_conversion_is_refused_with_the_right_call(verb, config, got, call):
    with pytest.raises(TypeError, match=re.escape(f"got {got}. Call {verb.__name__}(model, {call}).")):
        verb(nn.Conv2d(3, 3, 3), config)


@pytest.mark.parametrize("config", ["transformer", 3, None, nn.Conv2d])
def test_what_resembles_no_conversion_lists_all(config):
    with pytest.raises(
        TypeError,
        match=r"Call convert\(model, MoRF\(\) or .*TokenMixer\(mixer=\.\.\.\) or .*Resize\(kernel_size=\.\.\.\)\)",
    ):
        convert(nn.Conv2d(3, 3, 3), config)


def test_guessed_arguments_lead_to_the_right_ones():
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)).eval()
    for call, guess, right in (
        (lambda: MoRF(kernel_size=7), "kernel_size", "kernel_sizes"),
        (lambda: MoRF(rooting="soft"), "rooting", "routing"),
        (lambda: convert(model, MoRF(), layers="1"), "layers", "where"),
        (lambda: plan(model, conversion=MoRF()), "conversion", "config"),
        (lambda: convert(model, MoRF(), in_place=True), "in_place", "inplace"),
        (lambda: reparameterize(model, input_size=8), "input_size", "example_input"),
        (lambda: trim(model, data=[]), "data", "loader"),
        (lambda: trim(model, input_size=8), "input_size", "example_input"),
        (lambda: specialize(model, dataloader=[]), "dataloader", "loader"),
        (lambda: compare(model, model, x=torch.ones(1)), "x", "images"),
    ):
        with pytest.raises(TypeError, match=rf"has no argument '{guess}'\. Did you mean '{right}'\? It takes "):
            call()
    with pytest.raises(TypeError, match=r"plan\(\) has no argument 'colorful'\. It takes model, config, where\."):
        plan(model, MoRF(), colorful=True)
