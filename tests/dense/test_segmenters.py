"""Segmenters: logits for images of any size, in both modes; heads, necks and how they start."""

import copy
from functools import cache

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dense.networks import BUILDERS, Maps, deeplab, fcn, features, semantic_fpn, upernet, without_gradient
from tolerances import FLOAT64, NETWORK, close
from widefield import dense
from widefield.dense.layers import AdaptivePool, resize
from widefield.surgery import anatomy


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("size", [(64, 64), (65, 97), (33, 40), (70, 35)])
def test_logits_have_the_size_of_the_images(build, size):
    model = build()
    images = torch.randn(2, 3, *size)
    assert model.eval()(images).shape == (2, 5, *size)
    output = model.train()(images)
    if model.auxiliary_head is None:
        assert output.shape == (2, 5, *size)
    else:
        assert isinstance(output, dense.SegmentationLogits)
        assert output.out.shape == output.aux.shape == (2, 5, *size)


@pytest.mark.parametrize("build", BUILDERS)
def test_the_forward_pass_resizes_what_the_heads_give(build):
    model = build().double().eval()
    images = torch.randn(1, 3, 61, 64, dtype=torch.float64)
    out, aux = model.forward_heads(images)
    expected = F.interpolate(out, (61, 64), mode="bilinear", align_corners=False)
    assert torch.equal(model(images), expected)
    assert (aux is None) == (model.auxiliary_head is None)
    if aux is not None:
        assert aux.shape[:2] == (1, 5)


@pytest.mark.parametrize("build", BUILDERS)
def test_corners_are_aligned_everywhere_or_nowhere(build):
    torch.manual_seed(0)
    plain = build(align_corners=False).double().eval()
    aligned = build(plain.backbone, align_corners=True).double().eval()
    aligned.load_state_dict(plain.state_dict())
    assert (plain.align_corners, aligned.align_corners) == (False, True)
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert (plain(images) - aligned(images)).abs().max() > 1e-6
    logits = aligned.forward_heads(images).out
    full = aligned(images)
    for index in (0, -1):  # aligned corners keep the values of the corner pixels
        close(full[..., index, index], logits[..., index, index], FLOAT64)


@pytest.mark.parametrize("build", BUILDERS)
def test_training_gives_every_parameter_a_gradient(build):
    for options in ({}, {"stage_norms": "batch"}):
        assert without_gradient(build(**options), torch.randn(2, 3, 64, 64)) == []


@pytest.mark.parametrize("build", BUILDERS)
def test_copies_and_state_dicts(build):
    model = build().eval()
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(copy.deepcopy(model)(images), model(images))
    other = build().eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images), model(images))


def test_without_an_auxiliary_head_training_gives_a_tensor():
    for build in (upernet, deeplab, fcn):
        model = build(auxiliary=False).train()
        assert model.auxiliary_head is None
        assert isinstance(model(torch.randn(2, 3, 64, 64)), torch.Tensor)
        assert without_gradient(model, torch.randn(2, 3, 64, 64)) == []


def test_a_linear_head_sees_one_pixel_of_the_map():
    model = fcn(Maps(), channels=None, num_convs=0, concat_input=False, auxiliary=False, out_indices=(0,)).eval()
    assert model.decode_head.channels == model.backbone.channels[0]
    images = torch.randn(1, 3, 32, 32, requires_grad=True)
    model.decode_head(model.backbone(images))[0, 0, 4, 4].backward()
    assert images.grad.abs().sum((0, 1)).nonzero().aminmax()[0].item() >= 15  # the 3x3 of stride 4 at row 16


def test_an_fcn_on_one_map_has_no_second_one_for_the_auxiliary_head():
    with pytest.raises(ValueError, match=r"out_indices=\(0,\) leaves one map; pass auxiliary=False"):
        fcn(Maps(), out_indices=(0,))


def test_module_backbones_serve_every_segmenter():
    for backbone in (Maps(), features(), Maps(container=tuple)):
        for build in BUILDERS:
            assert build(copy.deepcopy(backbone)).eval()(torch.randn(1, 3, 40, 72)).shape == (1, 5, 40, 72)


def test_fewer_maps_than_four_serve_too():
    images = torch.randn(2, 3, 32, 40)
    for build, out_indices in ((upernet, (1, 2, 3)), (deeplab, (0, 3)), (semantic_fpn, (1, 2)), (fcn, (0, 2))):
        model = build(Maps(), out_indices=out_indices)
        assert model.eval()(images).shape == (2, 5, 32, 40)
        assert without_gradient(model, images) == []
    assert upernet("resnet56_cifar", out_indices=(0, 1, 2), depths=(1, 1, 1)).eval()(images).shape == (2, 5, 32, 40)


@pytest.mark.parametrize("build", BUILDERS)
def test_heads_have_the_dtype_and_device_of_the_backbone(build):
    model = build(features("test_resnet").to(torch.float64))
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    model = build(features("test_resnet").to("meta", torch.bfloat16))
    assert model.eval()(torch.zeros(1, 3, 64, 64, device="meta", dtype=torch.bfloat16)).shape == (1, 5, 64, 64)


def test_output_strides_and_dilations():
    assert deeplab().backbone.strides == (4, 8, 8, 8)
    assert deeplab().decode_head.dilations == (1, 12, 24, 36)
    sixteen = deeplab(output_stride=16)
    assert sixteen.backbone.strides == (4, 8, 16, 16)
    assert sixteen.decode_head.dilations == (1, 6, 12, 18)
    assert deeplab(Maps()).decode_head.dilations == (1, 3, 6, 9)
    assert deeplab(Maps(), dilations=(1, 2)).decode_head.dilations == (1, 2)
    with pytest.raises(ValueError, match="coarsest map has stride 32, not output_stride=16"):
        deeplab(Maps(), output_stride=16)
    with pytest.raises(ValueError, match="van_b0 has no output_stride"):
        deeplab("van_b0")
    assert deeplab("van_b0", output_stride=32, depths=(1, 1, 1, 1)).decode_head.dilations == (1, 3, 6, 9)


def test_wrong_images_and_arguments_are_refused():
    with pytest.raises(ValueError, match=r"images must be \(N, C, H, W\); got shape \(3, 64, 64\)"):
        upernet()(torch.randn(3, 64, 64))
    with pytest.raises(ValueError, match="num_classes"):
        upernet(classes=0)
    with pytest.raises(ValueError, match="dropout"):
        upernet(dropout=1.5)
    with pytest.raises(TypeError, match=r"has an argument 'chanels'\. Did you mean 'channels'"):
        upernet(chanels=3)
    with pytest.raises(ValueError, match="feature_strides must hold a stride for each of 2 levels"):
        dense.FPNHead((8, 8), 5, feature_strides=(4,))
    with pytest.raises(ValueError, match="in_channels=8 and channels=4 must be equal"):
        dense.FCNHead(8, 5, channels=4, num_convs=0)
    with pytest.raises(ValueError, match="must both be 0"):
        dense.DepthwiseSeparableASPPHead(8, 5, c1_in_channels=0)
    with pytest.raises(ValueError, match="built for 4 maps; got 1"):
        dense.UPerHead((8, 8, 8, 8), 5, channels=8)([torch.zeros(1, 8, 4, 4)])


# Anatomy


def encoder(name):
    return smp.encoders.get_encoder(name, weights=None)


@pytest.mark.parametrize(
    ("model", "backbone", "stages", "necks"),
    [
        (lambda: upernet(), "backbone.body", "stages_3", [f"backbone.norm{i}" for i in range(4)]),
        (lambda: upernet("van_b0", depths=(1, 1, 1, 1)), "backbone.body", None, []),
        (lambda: semantic_fpn("test_resnet"), "backbone.body", "layer4", ["neck"]),
        (lambda: deeplab("test_resnet"), "backbone.body", "layer4", []),
        (lambda: upernet(torchvision.models.resnet18(weights=None)), "backbone.body", "layer4", []),
        (lambda: upernet(timm.create_model("test_resnet")), "backbone.body", "model.layer4", []),
        (lambda: upernet(encoder("resnet18")), "backbone.body", "layer4", []),
        (lambda: deeplab(encoder("tu-test_resnet")), "backbone.body.model", "layer4", []),
    ],
)
def test_anatomy_knows_the_parts_of_segmenters(model, backbone, stages, necks):
    built = model()
    found = anatomy(built)
    heads = ["decode_head"] + ["auxiliary_head"] * (built.auxiliary_head is not None)
    assert (found.backbone, [*found.necks], [*found.heads]) == (backbone, necks, heads)
    assert len(found.stages) >= 4
    if stages is not None:
        assert found.stages[-1].name == f"{backbone}.{stages}"
    assert found.part("decode_head.conv_seg.weight") == "head"
    assert {found.part(name) for name, _ in built.named_parameters()} == {"stem", "body", "head"} | (
        {"neck"} if necks else set()
    )


# Layers


class Pooled(nn.Module):
    """Adaptive pooling to every side of UPerNet's head."""

    def __init__(self):
        super().__init__()
        self.pools = nn.ModuleList(AdaptivePool(size) for size in (1, 2, 3, 6))

    def forward(self, x):
        return [pool(x) for pool in self.pools]


@cache
def exported_pools():
    """Return a graph of the pooling, exported once with dynamic height and width."""
    sizes = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    return torch.export.export(Pooled(), (torch.zeros(2, 3, 8, 9).double(),), dynamic_shapes=(sizes,)).module()


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 13), st.integers(2, 13))
def test_pooling_is_adaptive_pooling_also_when_exported(height, width):
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    for found, exported, size in zip(Pooled()(x), exported_pools()(x), (1, 2, 3, 6), strict=True):
        expected = F.adaptive_avg_pool2d(x, size)
        close(found, expected, FLOAT64)
        close(exported, expected, FLOAT64)


def test_initial_values_are_openmmlabs():
    torch.manual_seed(0)
    model = dense.UPerNet("test_convnext", 150, channels=64)
    for head in (model.decode_head, model.auxiliary_head):
        assert head.conv_seg.weight.std().item() == pytest.approx(0.01, rel=0.1)
        assert not head.conv_seg.bias.any()
    conv = model.decode_head.fpn_bottleneck
    assert conv.conv.bias is None
    assert conv.conv.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)
    assert conv.bn.weight.eq(1).all()
    assert not conv.bn.bias.any()
    neck = dense.FPN((32, 64), 64)
    bound = (6 / (64 * 9 + 64 * 9)) ** 0.5
    weight = neck.fpn_convs[0].conv.weight
    assert weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert not neck.fpn_convs[0].conv.bias.any()


def test_modules_have_openmmlabs_names():
    keys = {name for name, _ in dense.ConvModule(4, 8, 3).named_parameters()}
    assert keys == {"conv.weight", "bn.weight", "bn.bias"}
    keys = {name for name, _ in dense.ConvModule(4, 32, 3, norm="group").named_parameters()}
    assert keys == {"conv.weight", "gn.weight", "gn.bias"}
    plain = dense.ConvModule(4, 8, 3, norm=None, activation=False)
    assert {name for name, _ in plain.named_parameters()} == {"conv.weight", "conv.bias"}
    assert (plain(torch.randn(1, 4, 8, 8)) < 0).any()
    with pytest.raises(ValueError, match="norm must be one of"):
        dense.ConvModule(4, 8, 3, norm="layer")


# The neck


def test_extra_levels_of_the_neck():
    maps = [torch.randn(1, width, *size) for width, size in zip((4, 8, 12), ((20, 14), (10, 7), (5, 4)), strict=True)]
    for extra in ("max_pool", "on_input", "on_lateral", "on_output"):
        neck = dense.FPN((4, 8, 12), 6, num_outs=5, extra=extra)
        levels = neck(maps)
        assert [tuple(x.shape[2:]) for x in levels] == [(20, 14), (10, 7), (5, 4), (3, 2), (2, 1)]
        assert len(neck.fpn_convs) == (3 if extra == "max_pool" else 5)
        assert without_gradient(neck, maps) == []
    assert len(dense.FPN((4, 8, 12), 6, start_level=1)(maps)) == 2
    assert len(dense.FPN((4, 8, 12), 6, end_level=1)(maps)) == 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_outs": 2}, "num_outs"),
        ({"start_level": 3}, "start_level"),
        ({"start_level": 2, "end_level": 1}, "end_level=1 is before start_level=2"),
        ({"end_level": 1, "num_outs": 4}, "extra levels need the last map"),
        ({"extra": "on_outputs"}, "Did you mean 'on_output'"),
    ],
)
def test_levels_out_of_range_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        dense.FPN((4, 8, 12), 6, **options)


# Compilers


@pytest.mark.parametrize("build", BUILDERS)
def test_graphs_with_dynamic_sizes(build):
    torch.manual_seed(0)
    model = build("test_resnet").eval()
    images = torch.randn(2, 3, 64, 96)
    sizes = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    with torch.no_grad():
        graph = torch.export.export(model, (images,), dynamic_shapes=(sizes,)).module()
        for size in ((2, 64, 96), (3, 96, 160), (2, 70, 101)):
            other = torch.randn(size[0], 3, *size[1:])
            close(graph(other), model(other), NETWORK)


@pytest.mark.slow
@pytest.mark.parametrize("build", BUILDERS)
def test_compiled_training_steps(build):
    torch.manual_seed(0)
    model = build("test_resnet").double().train()
    model.decode_head.dropout = None
    if model.auxiliary_head is not None:
        model.auxiliary_head.dropout = None
    twin = torch.compile(copy.deepcopy(model), backend="aot_eager")
    for size in ((64, 64), (70, 96)):
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        for found, expected in zip(twin(images), model(images), strict=True):
            close(found, expected, FLOAT64)


def test_resizing_is_bilinear_without_antialiasing():
    x = torch.randn(1, 2, 9, 7, dtype=torch.float64)
    expected = F.interpolate(x, (4, 15), mode="bilinear", align_corners=True)
    assert torch.equal(resize(x, (4, 15), True), expected)


@pytest.mark.parametrize("build", BUILDERS)
def test_half_precision_logits_are_resized_in_float32(build):
    """Resized in half precision, the logits of classes tie at many pixels."""
    torch.manual_seed(0)
    model = build(features("test_resnet").bfloat16(), dropout=0.0)
    images = torch.randn(2, 3, 64, 96, dtype=torch.bfloat16)
    for train in (False, True):
        heads = model.train(train).forward_heads(images)
        output = model(images)
        found = output if isinstance(output, tuple) else (output,)
        assert len(found) == (2 if train and heads.aux is not None else 1)
        for ours, coarse in zip(found, heads, strict=False):
            assert coarse.dtype == torch.bfloat16
            assert torch.equal(ours, F.interpolate(coarse.float(), (64, 96), mode="bilinear"))
