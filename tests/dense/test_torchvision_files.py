"""Weights of torchvision's detectors load with their classes in order, and give torchvision's detections."""

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection import FCOS as TorchvisionFCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from tolerances import FLOAT64, close
from widefield import dense

CHANNELS = 64
IMAGES = torch.randn(1, 3, 128, 256, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def trunk():
    torch.manual_seed(5)
    return torchvision.models.resnet18(weights=None)


def pyramid(layers, extra):
    """Return torchvision's ResNet-18 with a narrow pyramid."""
    names = {f"layer{index}": str(place) for place, index in enumerate(layers)}
    widths = [64 * 2 ** (index - 1) for index in layers]
    return BackboneWithFPN(trunk(), names, widths, CHANNELS, extra)


def noisy(model):
    """Return the model in float64 and evaluation mode, with weights that give various scores."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "head" in name and parameter.ndim >= 2 and parameter.shape[0] != CHANNELS:
                value = torch.randn(parameter.shape, generator=generator) * 0.1
                parameter.copy_(value - value.mean(tuple(range(1, value.ndim)), keepdim=True))
            elif "bbox_reg.bias" in name:
                parameter.fill_(1.0)
    return model.double().eval()


def written(model, path):
    torch.save(model.state_dict(), path)
    return path


class Unchanged(nn.Module):
    """Stand for torchvision's resizing and normalization: images are used as they are."""

    def forward(self, images, targets=None):
        sizes = [tuple(image.shape[-2:]) for image in images]
        return torchvision.models.detection.image_list.ImageList(torch.stack(list(images)), sizes), targets

    def postprocess(self, result, _sizes, _original):
        return result


# FCOS


def theirs_fcos(classes):
    anchors = AnchorGenerator(((8,), (16,), (32,), (64,), (128,)), ((1.0,),) * 5)
    body = pyramid((2, 3, 4), LastLevelP6P7(CHANNELS, CHANNELS))
    model = TorchvisionFCOS(body, classes, anchor_generator=anchors, score_thresh=0.0, nms_thresh=0.6,
                            detections_per_img=50, topk_candidates=100_000)  # fmt: skip
    model.transform = Unchanged()
    return noisy(model)


def ours_fcos(classes, **options):
    settings = {"conv_bias": True, "centerness_on": "boxes", "distances": "relu", "point_offset": 0.0,
                "score_threshold": 0.0, "nms_threshold": 0.6, "max_per_image": 50, "candidates": 100_000}  # fmt: skip
    return dense.FCOS(trunk(), classes, neck_channels=CHANNELS, **{**settings, **options})


def test_fcos_gives_the_same_detections_with_the_settings_of_torchvision(tmp_path):
    theirs = theirs_fcos(7)
    ours = ours_fcos(6)
    report = dense.load_checkpoint(ours, written(theirs, tmp_path / "fcos.pth"))
    assert report.fresh == report.skipped == ()
    assert "converted from torchvision's" in str(report)
    with torch.no_grad():
        (expected,) = theirs(list(IMAGES))
        (found,) = ours.double().eval()(IMAGES)
    # torchvision does not train its class 0, and keeps boxes without area.
    rows = (expected["labels"] > 0) & (expected["boxes"][:, 2:] > expected["boxes"][:, :2]).all(1)
    count = int(rows.sum())
    assert 20 < count <= len(found.boxes) == 50
    close(found.scores[:count], expected["scores"][rows] ** 2, FLOAT64)
    close(found.boxes[:count], expected["boxes"][rows], FLOAT64)
    assert torch.equal(found.labels[:count] + 1, expected["labels"][rows])
    assert len(found.labels.unique()) > 2
