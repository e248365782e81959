"""Small detectors with a trained look: every image has detections, with different scores."""

import torch

from dense.networks import TWO_STAGE
from widefield import dense


def retinanet(backbone="test_resnet", classes=3, **options):
    return dense.RetinaNet(backbone, classes, **{"neck_channels": 8, "num_convs": 1, **options})


def fcos(backbone="test_resnet", classes=3, **options):
    return dense.FCOS(backbone, classes, **{"neck_channels": 64, "num_convs": 1, **options})


ONE_STAGE = (retinanet, fcos)
DETECTORS = (*TWO_STAGE, *ONE_STAGE)


def trained(model):
    """Return a detector in evaluation mode with weights that spread its scores, and with statistics in its norms."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.copy_(0.1 * torch.randn(module.running_mean.shape, generator=g))
                module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=g))
        for name, parameter in model.named_parameters():
            if name.endswith(("fc_cls.weight", "fc_reg.weight", "rpn_cls.weight")):
                parameter.normal_(std=0.3, generator=g)
            elif name.endswith(("retina_cls.weight", "conv_cls.weight", "retina_reg.weight")):
                parameter.normal_(std=0.1, generator=g)
            elif name.endswith(("retina_cls.bias", "conv_cls.bias")):
                parameter.fill_(-1.0)
    return model.eval()


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))
