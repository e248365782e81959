"""The verbs on torchvision's detectors: they change the backbone and are verified on detections."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import widefield
from tolerances import NETWORK
from widefield.surgery import anatomy, compare

IMAGES = torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(1))


def made(kind):
    """Return a small detector in evaluation mode, with norms and biases as after training."""
    torch.manual_seed(0)
    if kind == "ssdlite":
        model = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
    else:
        single = kind == "retinanet"
        levels = {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)} if single else {}
        trunk = resnet_fpn_backbone(
            backbone_name="resnet18", weights=None, trainable_layers=5, norm_layer=nn.BatchNorm2d, **levels
        )
        build = detection.RetinaNet if single else detection.FasterRCNN
        few = {} if single else {"rpn_post_nms_top_n_test": 40, "box_detections_per_img": 20}
        model = build(trunk, num_classes=4, min_size=48, max_size=64, **few)
    g = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(0.1 * torch.randn(module.running_mean.shape, generator=g))
            module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=g))
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 and "head" not in name:
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=g))
    return model.eval()


@pytest.fixture(scope="module")
def faster():
    return made("faster")


@pytest.mark.parametrize(
    ("kind", "backbone", "necks", "heads"),
    [
        ("faster", "backbone.body", ("backbone.fpn",), ("rpn", "roi_heads")),
        ("retinanet", "backbone.body", ("backbone.fpn",), ("head",)),
        ("ssdlite", "backbone.features", ("backbone.extra",), ("head",)),
    ],
)
def test_the_default_converts_the_backbone_alone(kind, backbone, necks, heads):
    parts = anatomy(model := made(kind))
    assert (parts.backbone, parts.necks, parts.heads) == (backbone, necks, heads)
    steps = widefield.plan(model, widefield.MoRF(kernel_sizes=(3, 5))).replaced
    assert steps
    assert all(step.name.startswith(f"{backbone}.") for step in steps)


def test_conversions_keep_the_detections(faster):
    for config in (widefield.MoRF(kernel_sizes=(3, 5)), widefield.GMConv()):
        apart = compare(faster, widefield.convert(faster, config).eval(), IMAGES)
        assert apart.agreement == 1.0
        assert apart.within(NETWORK)


def test_specialize_reports_box_ap_and_reparameterize_the_detections(faster):
    routed = widefield.convert(faster, widefield.MoRF(kernel_sizes=(3, 5)), "backbone.body.layer4.0.*").eval()
    with torch.no_grad():
        found = faster(list(IMAGES))
    targets = [{"boxes": one["boxes"][:3], "labels": one["labels"][:3]} for one in found]
    reports = []
    static = widefield.specialize(routed, [(list(IMAGES), targets)], report=reports.append)
    done = reports.pop()
    assert done.measured.score == "box AP"
    assert done.measured.scores is not None
    assert done.predicted is None
    assert "found by both" in done.rows()[0]
    assert "of 80 detections found by both, box AP" in done.summary()
    widefield.reparameterize(static, IMAGES, report=reports.append)
    assert reports[0].difference.agreement == 1.0
    assert "detections found by both; tolerance" in reports[0].summary()


def test_a_detector_that_finds_nothing_in_noise_is_reparameterized_and_trimmed():
    reports, model = [], made("retinanet")
    with torch.no_grad():
        assert not any(len(one["scores"]) for one in model(IMAGES))
    fused = widefield.reparameterize(model, IMAGES, report=reports.append)
    assert reports.pop().difference.detections > 100
    assert fused.score_thresh == model.score_thresh == 0.05
    conv = fused.backbone.body.layer1[0].conv1
    with torch.no_grad():
        conv.weight[:, :, [0, 2]] = 0
        conv.weight[:, :, :, [0, 2]] = 0
    widefield.trim(fused, 0.0, example_input=IMAGES, report=reports.append)
    assert "backbone.body.layer1.0.conv1" in [kernel.name for kernel in reports[0].trimmed()]
    assert reports[0].verified < NETWORK


class Drifting(nn.Module):
    """A box predictor whose scores depend on how often it was called."""

    def __init__(self, predictor):
        super().__init__()
        self.predictor, self.calls = predictor, 0

    def forward(self, x):
        self.calls += 1
        scores, boxes = self.predictor(x)
        return scores + 0.05 * self.calls * torch.arange(4), boxes


def test_a_reparameterization_that_changes_detections_is_refused(faster):
    model = copy.deepcopy(faster)
    model.roi_heads.box_predictor = Drifting(model.roi_heads.box_predictor).eval()
    with pytest.raises(RuntimeError, match=r"with .*% of .* detections found by both"):
        widefield.reparameterize(model, IMAGES)
