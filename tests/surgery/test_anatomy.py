"""Where a model's backbone is: in wrappers, detectors, segmentation models, and nowhere but in itself."""

import pytest
import timm
import torch
import torchvision
from torch import nn

from widefield.surgery.anatomy import backbone_name, is_inside


class Wrapped(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def conv():
    return nn.Conv2d(3, 3, 3)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fasterrcnn_resnet50_fpn", "backbone.body"),
        ("fasterrcnn_mobilenet_v3_large_320_fpn", "backbone.body"),
        ("maskrcnn_resnet50_fpn_v2", "backbone.body"),
        ("keypointrcnn_resnet50_fpn", "backbone.body"),
        ("retinanet_resnet50_fpn", "backbone.body"),
        ("fcos_resnet50_fpn", "backbone.body"),
        ("ssd300_vgg16", "backbone.features"),
        ("ssdlite320_mobilenet_v3_large", "backbone.features"),
        ("deeplabv3_resnet50", "backbone"),
        ("lraspp_mobilenet_v3_large", "backbone"),
        ("r3d_18", ""),
        ("resnet18", ""),
        ("swin_t", ""),
        ("vit_b_16", "encoder"),
    ],
)
def test_torchvisions(name, expected):
    kind = {"weights_backbone": None} if "backbone" in expected else {}
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, **kind)
    assert backbone_name(model) == expected


def test_timms_in_wrappers_and_alone():
    model = timm.create_model("test_resnet")
    assert backbone_name(model) == ""
    assert backbone_name(nn.Sequential(nn.Identity(), model)) == "1"
    assert backbone_name(Wrapped(net=Wrapped(model=model, head=conv()), loss=nn.Identity())) == "net.model"
    features = timm.create_model("test_resnet", features_only=True)
    assert backbone_name(features) == ""
    assert backbone_name(Wrapped(backbone=features, neck=conv(), head=conv())) == "backbone"
    assert backbone_name(Wrapped(encoder=Wrapped(model=features), decoder=conv())) == "encoder.model"


def test_names_nearest_to_the_root_and_earlier_ones_win():
    assert backbone_name(Wrapped(image_encoder=conv(), encoder=conv())) == "encoder"
    assert backbone_name(Wrapped(model=Wrapped(trunk=conv(), transformer=Wrapped(encoder=conv())))) == "model.trunk"
    assert backbone_name(Wrapped(head=conv(), body=Wrapped(body=conv(), tail=conv()))) == "body.body"


def test_blocks_that_call_a_part_so_are_no_backbone():
    blocks = nn.Sequential(*(Wrapped(body=conv(), skip=conv()) for _ in range(3)))
    assert backbone_name(Wrapped(stem=conv(), blocks=blocks)) == ""
    assert backbone_name(Wrapped(first=timm.create_model("test_resnet"), second=timm.create_model("test_vit"))) == ""


def test_what_is_inside():
    assert is_inside("a.b", "a.b")
    assert is_inside("a.b.c", "a.b")
    assert not is_inside("a.bc", "a.b")
    assert is_inside("", "")
    assert is_inside("a", "")


@pytest.mark.parametrize(("encoder", "expected"), [("resnet18", "encoder"), ("tu-resnet18", "encoder.model")])
def test_segmentation_models_pytorch(encoder, expected):
    smp = pytest.importorskip("segmentation_models_pytorch")
    assert backbone_name(smp.Unet(encoder, encoder_weights=None)) == expected
