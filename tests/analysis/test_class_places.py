"""What a segmentation model says at a pixel or in a region: its effective receptive field, and its class activation."""

import json

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from headed import UNet, shaken
from torch import nn

from tolerances import FLOAT32, FLOAT64, close
from widefield.analysis import (
    ClassAt,
    ClassIn,
    class_activation,
    effective_receptive_field,
    interactions,
    translation_stability,
)

NAMES = ("sky", "tree", "road", "car")


@pytest.fixture
def unet():
    return shaken(UNet()).double()


@pytest.fixture
def images():
    return torch.randn(3, 3, 16, 24, dtype=torch.float64)


def gradients(model, images, score):
    """Return the positive gradients of ``score(logits (K, H, W))``, summed over channels and averaged over images."""
    found = []
    for image in images:
        leaf = image.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(score(model(leaf[None])[0]), leaf)
        found.append(gradient.clamp(min=0).sum(0))
    return torch.stack(found).mean(0)


@pytest.mark.parametrize("label", [None, 2])
@pytest.mark.parametrize(("y", "x"), [(None, None), (3, 20), (0, 0)])
def test_the_field_of_a_pixel_is_the_gradient_of_its_class_logit(unet, images, label, y, x):
    result = effective_receptive_field(unet, images, targets=ClassAt(label, y, x), classes=NAMES, batch_size=2)
    row, column = (8, 12) if y is None else (y, x)
    chosen = unet(images)[:, :, row, column].argmax(1).tolist() if label is None else [label] * 3

    classes = iter(chosen)
    expected = gradients(unet, images, lambda logits: logits[next(classes), row, column])
    close(torch.from_numpy(result.scores * result.peak), expected, FLOAT64)
    assert result.position == (row, column)
    assert result.about["labels"] == chosen
    named = "largest class" if label is None else "road"
    assert result.rows()[0]["layer"] == f"{named} at pixel {(row, column)}"
    json.dumps(result.to_dict(), allow_nan=False)


def test_squares_are_centered_on_the_pixel():
    model = nn.Conv2d(1, 2, 3, padding=1).double()
    nn.init.ones_(model.weight)
    result = effective_receptive_field(model, torch.randn(1, 1, 9, 9), targets=ClassAt(1, 2, 6))
    assert result.theoretical.center == (2, 6)
    assert result.theoretical.size == (3, 3)
    assert result.area_ratio[0.99] == 9 / 81


@pytest.mark.parametrize("label", [None, 1])
def test_a_region_counts_by_its_mean(unet, images, label):
    mask = torch.zeros(16, 24, dtype=torch.bool)
    mask[2:7, 3:9] = True
    boxed = effective_receptive_field(unet, images, targets=ClassIn(label, (2, 3, 7, 9)))
    masked = effective_receptive_field(unet, images, targets=ClassIn(label, mask.numpy()))
    assert np.array_equal(boxed.scores, masked.scores)
    covers = unet(images).argmax(1)[:, mask]
    chosen = [int(row.bincount(minlength=4).argmax()) if label is None else label for row in covers]
    classes = iter(chosen)
    expected = gradients(unet, images, lambda logits: logits[next(classes)][mask].mean())
    close(torch.from_numpy(boxed.scores * boxed.peak), expected, FLOAT64)
    assert boxed.about["labels"] == chosen
    assert boxed.position == (4, 5)
    assert boxed.rows()[0]["layer"].endswith("at region (2, 3, 7, 9)")
    assert masked.rows()[0]["layer"].endswith("at region of 30 pixels")


@pytest.mark.parametrize(
    "target", [ClassAt(2, 5, 7), ClassAt(None, 5, 7), ClassIn(3, (0, 0, 4, 24)), ClassIn(None, (4, 4, 16, 9))]
)
def test_the_map_of_a_place_is_that_of_its_logit(unet, images, target):
    found = class_activation(unet, images, targets=target, batch_size=2, classes=NAMES)
    where = target.where((16, 24))
    for image, result, chosen, sure in zip(images, found.maps, found.targets, found.probability, strict=True):
        maps = unet.encoder(image[None])
        deepest = maps[-1].detach().requires_grad_()
        logits = unet.segmentation_head(unet.decoder([*maps[:-1], deepest]))[0]
        label = int(logits[:, where].argmax(0).bincount(minlength=4).argmax()) if target.label is None else target.label
        (gradient,) = torch.autograd.grad(logits[label][where].mean(), deepest)
        expected = (gradient.mean((2, 3), keepdim=True) * deepest).sum(1)[0].relu().detach()
        close(torch.from_numpy(result), (expected / expected.max().clamp(min=1e-30)).float(), FLOAT32)
        assert chosen == label
        assert sure == pytest.approx(logits.softmax(0)[label][where].mean().item(), rel=FLOAT32)
    assert found.labels == tuple(NAMES[k] for k in found.targets)
    assert np.array_equal(found.where, where.numpy())
    assert found.about["of"] == target.place((16, 24))
    assert "where" not in found.to_dict()
    assert found.plot().axes


def test_maps_of_logits_of_another_size_are_resized():
    class Coarse(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 4, 4)

        def forward(self, x):
            return {"logits": self.conv(x)}

    model, image = Coarse().double(), torch.randn(1, 3, 16, 16, dtype=torch.float64)
    result = effective_receptive_field(model, image, targets=ClassAt(1, 5, 6))
    leaf = image.clone().requires_grad_()
    logits = F.interpolate(model(leaf)["logits"], (16, 16), mode="bilinear")
    (gradient,) = torch.autograd.grad(logits[0, 1, 5, 6], leaf)
    close(torch.from_numpy(result.scores * result.peak), gradient[0].clamp(min=0).sum(0), FLOAT64)


def test_torchvisions_segmentation_models_are_asked_as_they_are():
    model = shaken(torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None))
    images = torch.randn(1, 3, 64, 96)
    field = effective_receptive_field(model, images, targets=ClassAt())
    assert field.scores.shape == (64, 96)
    assert class_activation(model, images, targets=ClassAt(y=10, x=20)).maps.shape[0] == 1


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (ClassAt(0, 16, 3), ValueError, r"the pixel \(16, 3\) \(row, column\) lies outside the image, which is 16x24"),
        (ClassAt(4), ValueError, "must be .*from 0 to 3; got 4"),
        (ClassIn(0, (0, 0, 17, 4)), ValueError, r"region \(0, 0, 17, 4\) .* does not lie in the image, which is 16x24"),
        (
            ClassIn(0, torch.ones(3, 3, dtype=torch.bool)),
            ValueError,
            r"region is \(3, 3\), and the images are \(16, 24\)",
        ),
    ],
)
def test_a_place_that_does_not_fit_is_refused(unet, images, target, error, message):
    for analysis in (effective_receptive_field, class_activation):
        with pytest.raises(error, match=message):
            analysis(unet, images, targets=target)


def test_places_are_for_segmentation_models_alone(unet, images):
    classifier = timm.create_model("test_resnet", num_classes=4)
    for analysis in (effective_receptive_field, class_activation):
        with pytest.raises(ValueError, match=r"ClassAt needs a segmentation model, .* ResNet returns"):
            analysis(classifier, images.float(), targets=ClassAt())
    with pytest.raises(ValueError, match="leave out layer and position"):
        effective_receptive_field(unet, images, layer="encoder", targets=ClassAt())
    with pytest.raises(TypeError, match="targets must be a ClassAt, ClassIn, DetectionScore or KeypointPeak; got 3"):
        effective_receptive_field(unet, images, targets=3)
    with pytest.raises(ValueError, match="classes has 2 names, but the model returns 4"):
        effective_receptive_field(unet, images, targets=ClassAt(), classes=("a", "b"))


@pytest.mark.parametrize(("analysis", "options"), [(translation_stability, {"shifts": (4,)}), (interactions, {})])
def test_an_analysis_of_classifiers_says_what_segmentation_models_have_instead(unet, images, analysis, options):
    with pytest.raises(ValueError, match=r"UNet is a segmentation model: .* \(ClassAt, ClassIn\)"):
        analysis(unet, images, **options)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ClassAt(-1), ValueError, "label must be at least 0; got -1"),
        (lambda: ClassAt(0, 1.5), TypeError, "y must be an integer"),
        (lambda: ClassIn(0, (3, 0, 3, 4)), ValueError, "must have top < bottom and left < right"),
        (lambda: ClassIn(0, torch.zeros(4, 4, dtype=torch.bool)), ValueError, "region has no pixel"),
        (lambda: ClassIn(0, torch.zeros(4, 4)), ValueError, "region must be a mask, bool"),
        (lambda: ClassIn(0, 3), TypeError, "region must be"),
    ],
)
def test_wrong_places_are_refused_at_once(make, error, message):
    with pytest.raises(error, match=message):
        make()
