"""Small segmenters and backbones for tests."""

import timm
import torch
from torch import nn

from widefield import dense

SMALL = {"channels": 16}


def upernet(backbone="test_convnext", classes=5, **options):
    return dense.UPerNet(backbone, classes, **{**SMALL, "auxiliary_channels": 8, **options})


def deeplab(backbone="test_resnet", classes=5, **options):
    return dense.DeepLabV3Plus(backbone, classes, **{**SMALL, "c1_channels": 8, "auxiliary_channels": 8, **options})


def semantic_fpn(backbone="test_convnext", classes=5, **options):
    return dense.SemanticFPN(backbone, classes, **{**SMALL, "neck_channels": 24, **options})


BUILDERS = (upernet, deeplab, semantic_fpn)


def features(name="test_convnext", **options):
    return timm.create_model(name, features_only=True, **options)


class Maps(nn.Module):
    """Return maps of strides 4, 8, 16 and 32 in a container, after whatever ``first`` makes of the image."""

    def __init__(self, widths=(8, 12, 16, 20), container=list, first=()):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(*pair, 3, 4 if index == 0 else 2, 1)
            for index, pair in enumerate(zip((3, *widths), widths, strict=False))
        )
        self.container, self.first = container, first

    def forward(self, x):
        maps = [make(x) for make in self.first]
        for conv in self.convs:
            x = conv(x)
            maps.append(x)
        return self.container(maps)


def without_gradient(model, images):
    """Return the names of the parameters that a step of training leaves without a gradient."""
    model.train()
    output = model(images)
    tensors = [x for x in output if x is not None] if isinstance(output, (tuple, list)) else [output]
    torch.stack([x.square().mean() for x in tensors]).sum().backward()
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
