"""The parts of a model: plain and wrapped networks, detectors, segmentation models; and the default plans."""

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
from torch import nn

from tolerances import NETWORK
from widefield.surgery import Anatomy, FastDepthwise, GMConv, LargeKernel, MoRF, anatomy, compare, convert, plan
from widefield.surgery.anatomy import is_inside


class Wrapped(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x):
        for part in self.children():
            x = part(x)
        return x


def conv():
    return nn.Conv2d(3, 3, 3)


def same_conv():
    return nn.Conv2d(8, 8, 3, padding=1)


def torchvisions(name):
    flat = hasattr(torchvision.models, name) or hasattr(torchvision.models.video, name)
    backbone = {} if flat else {"weights_backbone": None}
    with torch.device("meta"):
        return torchvision.models.get_model(name, weights=None, **backbone)


def timms(name, **options):
    with torch.device("meta"):
        return timm.create_model(name, **options)


@pytest.mark.parametrize(
    ("name", "backbone", "stem", "stages", "necks", "heads"),
    [
        ("fasterrcnn_resnet50_fpn", "backbone.body", "conv1", 4, ["backbone.fpn"], ["rpn", "roi_heads"]),
        ("fasterrcnn_mobilenet_v3_large_320_fpn", "backbone.body", "0.0", 0, ["backbone.fpn"], ["rpn", "roi_heads"]),
        ("maskrcnn_resnet50_fpn_v2", "backbone.body", "conv1", 4, ["backbone.fpn"], ["rpn", "roi_heads"]),
        ("keypointrcnn_resnet50_fpn", "backbone.body", "conv1", 4, ["backbone.fpn"], ["rpn", "roi_heads"]),
        ("retinanet_resnet50_fpn", "backbone.body", "conv1", 4, ["backbone.fpn"], ["head"]),
        ("fcos_resnet50_fpn", "backbone.body", "conv1", 4, ["backbone.fpn"], ["head"]),
        ("ssd300_vgg16", "backbone.features", "0", 0, ["backbone.extra"], ["head"]),
        ("ssdlite320_mobilenet_v3_large", "backbone.features", "0.0.0", 0, ["backbone.extra"], ["head"]),
        ("deeplabv3_resnet50", "backbone", "conv1", 4, [], ["classifier"]),
        ("lraspp_mobilenet_v3_large", "backbone", "0.0", 0, [], ["classifier"]),
        ("r3d_18", "", "stem", 4, [], ["fc"]),
        ("resnet18", "", "conv1", 4, [], ["fc"]),
        ("swin_t", "", "features.0.0", 0, [], ["head"]),
        ("vit_b_16", "encoder", "conv_proj", 0, [], ["heads"]),
    ],
)
def test_torchvisions(name, backbone, stem, stages, necks, heads):
    found = anatomy(torchvisions(name))
    assert found.backbone == backbone
    before_the_encoder = name == "vit_b_16"
    assert found.stem == ((stem,) if before_the_encoder else (f"{backbone}.{stem}".lstrip("."),))
    assert [stage.name for stage in found.stages] == [f"{backbone}.layer{n + 1}".lstrip(".") for n in range(stages)]
    assert [*found.necks] == necks
    assert [*found.heads] == heads


@pytest.mark.parametrize(
    ("name", "stem", "reader", "first", "reductions", "heads"),
    [
        ("convnext_atto", "stem", "stem.0", "stages.0", [4, 8, 16, 32], ["head"]),
        ("resnet50d", "conv1", "conv1.0", "act1", [2, 4, 8, 16, 32], ["fc"]),
        ("efficientnet_b0", "conv_stem", "conv_stem", "blocks.0", [2, 4, 8, 16, 32], ["conv_head", "classifier"]),
        ("maxvit_pico_rw_256", "stem", "stem.conv1", "stem", [2, 4, 8, 16, 32], ["head"]),
        ("test_vit", "patch_embed", "patch_embed.proj", "blocks.0", [16] * 6, ["head"]),
        ("vgg11", "features.0", "features.0", "features.1", [1, 2, 4, 8, 16, 32], ["pre_logits", "head"]),
        ("hrnet_w18_small", "conv1", "conv1", None, [], ["classifier"]),  # its feature_info has no module names
    ],
)
def test_timms(name, stem, reader, first, reductions, heads):
    found = anatomy(timms(name))
    assert (found.backbone, found.stem, found.readers) == ("", (stem,), (reader,))
    assert [stage.reduction for stage in found.stages] == reductions
    assert next((stage.name for stage in found.stages), None) == first
    assert [*found.heads] == heads
    twice = anatomy(nn.Sequential(nn.Identity(), Wrapped(net=timms(name), loss=nn.Identity())))
    inner = "1.net."
    assert (twice.backbone, twice.stem, twice.readers) == ("1.net", (inner + stem,), (inner + reader,))
    assert [stage.name for stage in twice.stages] == [inner + stage.name for stage in found.stages]
    assert [stage.channels for stage in twice.stages] == [stage.channels for stage in found.stages]
    assert [*twice.heads] == [inner + head for head in heads]


def test_features_only_keeps_stages_under_their_new_names():
    found = anatomy(timms("convnext_atto", features_only=True, out_indices=(1, 2)))
    assert [stage.name for stage in found.stages] == ["stages_0", "stages_1", "stages_2"]
    assert (found.backbone, found.stem, found.readers, found.heads) == ("", ("stem_0",), ("stem_0",), ())
    found = anatomy(Wrapped(encoder=Wrapped(model=timms("test_vit", features_only=True)), decoder=conv(), fc=conv()))
    assert found.backbone == "encoder.model"
    assert [stage.name for stage in found.stages] == [f"encoder.model.model.blocks.{n}" for n in range(6)]
    assert (found.necks, found.heads) == (("decoder",), ("fc",))


@pytest.mark.parametrize(
    ("encoder", "backbone", "stem", "last"),
    [
        ("resnet18", "encoder", ("encoder.conv1",), "encoder.layer4"),
        ("tu-resnet18", "encoder.model", ("encoder.model.conv1",), "encoder.model.layer4"),
        ("tu-test_convnext", "encoder.model", ("encoder.model.stem_0",), "encoder.model.stages_3"),
    ],
)
def test_segmentation_models_pytorch(encoder, backbone, stem, last):
    model = smp.Unet(encoder, encoder_weights=None).eval()
    found = anatomy(model)
    assert (found.backbone, found.stem, found.stages[-1].name) == (backbone, stem, last)
    assert (found.necks, found.heads) == (("decoder",), ("segmentation_head",))
    default = plan(model, MoRF((3, 5, 7)))
    assert default.replaced
    assert all(found.part(step.name) == "body" for step in default.replaced)
    reasons = {step.name: step.reason for step in default.passed_over}
    assert "part of the neck (decoder), and the default" in reasons["decoder.blocks.0.conv1.0"]
    assert "part of the head (segmentation_head)" in reasons["segmentation_head.0"]
    x = torch.randn(1, 3, 64, 64)
    assert compare(model, convert(model, MoRF((3, 5, 7))), x).relative < NETWORK


def test_names_nearest_to_the_root_and_earlier_ones_win():
    assert anatomy(Wrapped(image_encoder=conv(), encoder=conv())).backbone == "encoder"
    assert anatomy(Wrapped(model=Wrapped(trunk=conv(), neck=Wrapped(encoder=conv())))).backbone == "model.trunk"
    assert anatomy(Wrapped(head=conv(), body=Wrapped(body=conv(), tail=conv()))).backbone == "body.body"


def test_repeated_names_are_not_backbones_and_repeated_groups_are_not_stages():
    blocks = nn.Sequential(*(Wrapped(body=conv(), skip=conv()) for _ in range(3)))
    assert anatomy(Wrapped(stem=conv(), blocks=blocks)).backbone == ""
    assert anatomy(Wrapped(first=timms("test_resnet"), second=timms("test_vit"))).backbone == ""
    blocks = nn.Sequential(*(Wrapped(layer1=conv(), layer2=conv()) for _ in range(3)))
    assert anatomy(Wrapped(stem=conv(), blocks=blocks)).stages == ()


def test_every_branch_of_a_stem_reads_the_image():
    model = timm.create_model("repvgg_a0", in_chans=6)
    assert anatomy(model).readers == ("stem.conv_kxk.conv", "stem.conv_1x1.conv")
    assert anatomy(nn.Conv2d(8, 8, 3)).readers == ()
    assert anatomy(Wrapped(stem=nn.Conv2d(8, 8, 3), head=conv())).heads == ("head",)


def test_parts_and_stages_of_modules_and_parameters():
    model = Wrapped(net=timms("efficientnet_b0"), neck=conv(), project=conv())
    found = anatomy(model)
    parts = ["stem", "body", "head", "neck", "head"]
    names = ["net.conv_stem", "net.blocks.3.0.conv_pw.weight", "net.classifier.bias", "neck.weight", "project"]
    assert [found.part(name) for name in names] == parts
    assert [found.stage_of(name) for name in names] == [0, 3, None, None, None]
    assert [found.in_backbone(name) for name in names] == [True, True, False, False, False]
    assert found.root_of("net.classifier.bias") == "net.classifier"
    assert found.root_of("net.blocks.3.0.conv_pw.weight") == ""
    assert found.stage_of("net.blocks.6") == 4
    assert found.stage_of("net.blocks") is None
    assert found == anatomy(model)
    assert isinstance(found, Anatomy)


def test_stages_are_counted_over_the_given_convolutions():
    found = anatomy(Wrapped(net=timms("convnext_atto"), neck=conv()))
    names = ["net.stages.1.blocks.0.conv_dw", "net.stages.3.blocks.0.conv_dw", "neck"]
    assert found.count_stages(names) == dict(zip(names, range(3), strict=True))
    found = anatomy(nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3)))
    assert found.count_stages(["0", "1", "2"]) == {"0": 0, "1": 0, "2": 1}


def test_what_is_inside():
    assert is_inside("a.b", "a.b")
    assert is_inside("a.b.c", "a.b")
    assert not is_inside("a.bc", "a.b")
    assert is_inside("", "")
    assert is_inside("a", "")


# Default plans


def test_large_kernels_by_stage_see_a_wrapped_network_as_the_bare_one():
    config = LargeKernel((31, 29, 27, 13))
    bare = timm.create_model("convnext_atto")
    head = nn.Conv2d(320, 320, 7, padding=3, groups=320)
    wrapped = Wrapped(backbone=timm.create_model("convnext_atto", features_only=True), head=head)
    expected = [step.after for step in plan(bare, config).replaced]
    assert [step.after for step in plan(wrapped, config).replaced] == expected
    assert "part of the head (head)" in plan(wrapped, config).steps[-1].reason
    with pytest.raises(ValueError, match="5 stages"):
        plan(wrapped, config, where="*")


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "ssdlite320_mobilenet_v3_large", "deeplabv3_resnet50"])
@pytest.mark.parametrize("config", [MoRF((3, 5, 7)), FastDepthwise(), GMConv(init="random")], ids=repr)
def test_defaults_convert_the_backbone_of_torchvisions_models(name, config):
    model = torchvisions(name)
    found = anatomy(model)
    if isinstance(config, FastDepthwise) and "mobilenet" not in name:
        assert not plan(model, config).replaced
        return
    steps = plan(model, config).steps
    parts = {found.part(step.name) for step in steps if step.after is not None}
    assert parts == ({"body", "stem"} if config.takes_stem else {"body"})
    for step in steps:
        if "kernel size is 1" not in str(step.reason) and not found.in_backbone(step.name):
            assert f"{found.root_of(step.name)}), and the default converts the backbone only" in step.reason


def test_the_default_leaves_the_whole_stem_and_where_reaches_it():
    model = timms("resnet50d")
    config = MoRF((3, 5, 7), init="random")
    reasons = {step.name: step.reason for step in plan(model, config).passed_over}
    assert reasons["conv1.0"] == "it reads the image itself"
    assert reasons["conv1.3"] == "it is part of the stem (conv1), and the default converts the backbone only"
    assert [step.name for step in plan(model, config, "conv1.*").replaced] == ["conv1.0", "conv1.3", "conv1.6"]


def test_a_model_with_nothing_to_convert_in_its_backbone_lists_the_rest():
    model = Wrapped(backbone=nn.Conv2d(3, 8, 3, padding=1), neck=same_conv(), head=same_conv())
    with pytest.raises(ValueError, match=r"the default matches no convolution .* could match: backbone, neck, head\."):
        convert(model, MoRF((3, 5)))
