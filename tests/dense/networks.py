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


def fcn(backbone="test_convnext", classes=5, **options):
    return dense.FCN(backbone, classes, **{**SMALL, "auxiliary_channels": 8, **options})


BUILDERS = (upernet, deeplab, semantic_fpn, fcn)


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


TINY = {"neck_channels": 8, "box_channels": 32}


def faster_rcnn(backbone="test_resnet", classes=3, **options):
    return dense.FasterRCNN(backbone, classes, **{**TINY, **options})


def mask_rcnn(backbone="test_resnet", classes=3, **options):
    return dense.MaskRCNN(backbone, classes, **{**TINY, **options})


def cascade_rcnn(backbone="test_resnet", classes=3, **options):
    return dense.CascadeRCNN(backbone, classes, **{**TINY, **options})


def cascade_mask_rcnn(backbone="test_convnext", classes=3, **options):
    published = {"masks": True, "box_head": "4conv1fc", "class_agnostic": False, "box_loss": "giou"}
    return dense.CascadeRCNN(backbone, classes, **{**TINY, **published, **options})


TWO_STAGE = (faster_rcnn, mask_rcnn, cascade_rcnn, cascade_mask_rcnn)


def objects(*boxes, labels=None, size=(64, 64), crowd=None):
    """Return the targets of one image: boxes, each with a mask that fills it."""
    rows = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    labels = torch.zeros(len(boxes), dtype=torch.long) if labels is None else torch.tensor(labels)
    y, x = (torch.arange(side) + 0.5 for side in size)
    x1, y1, x2, y2 = rows[:, :, None, None].unbind(1)
    masks = (x > x1) & (x < x2) & (y[:, None] > y1) & (y[:, None] < y2)
    crowd = torch.zeros(len(boxes), dtype=torch.bool) if crowd is None else crowd
    return dense.Targets(rows, labels, masks, crowd, size)
