"""What a detector says about one box: its effective receptive field, and its class activation."""

import json

import numpy as np
import pytest
import torch
from headed import UNet, shaken

from tolerances import FLOAT64, close
from widefield import dense
from widefield.analysis import DetectionScore, class_activation, effective_receptive_field

NAMES = ("cat", "dog", "owl")
BOX = (6.0, 9.0, 41.0, 52.0)


@pytest.fixture(scope="module")
def fcos():
    torch.manual_seed(0)
    model = dense.FCOS("test_resnet", 3, neck_channels=64, num_convs=1, conv_bias=True, center_radius=1.5)
    for module in model.bbox_head.modules():  # spread scores, so that some pass the threshold and none are equal
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.normal_(module.weight, std=0.2)
    return shaken(model).double().eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def gradient(model, image, box, label):
    """Return the positive gradient of a logit, summed over channels."""
    leaf = image[None].clone().requires_grad_()
    scores = model.box_scores(model.maps(leaf), [torch.tensor([box], dtype=leaf.dtype)])
    return torch.autograd.grad(scores.logits[0, label], leaf)[0].clamp(min=0)[0].sum(0)


def test_the_field_of_a_box_is_the_gradient_of_its_logit(fcos, images):
    result = effective_receptive_field(fcos, images, targets=DetectionScore(1, box=BOX), classes=NAMES, batch_size=1)
    expected = torch.stack([gradient(fcos, image, BOX, 1) for image in images]).mean(0)
    close(torch.from_numpy(result.scores * result.peak), expected, FLOAT64)
    assert result.box == BOX
    assert result.position == (30, 23)
    assert result.rows()[0]["layer"] == "dog at box (6, 9, 41, 52)"
    assert result.theoretical.size is None
    assert "box has a field for each" in result.theoretical.reason


@pytest.mark.parametrize(("label", "index"), [(None, 0), (None, 3), (2, 0), (2, 1)])
def test_detections_are_asked_about_by_rank(fcos, images, label, index):
    with torch.no_grad():
        found = fcos(images[:1])[0]
    places = [k for k in range(len(found.labels)) if label is None or found.labels[k] == label]
    place = places[index]
    result = effective_receptive_field(fcos, images[:1], targets=DetectionScore(label, index), classes=NAMES)
    box, own = found.boxes[place].tolist(), int(found.labels[place])
    close(torch.from_numpy(result.scores * result.peak), gradient(fcos, images[0], box, own), FLOAT64)
    np.testing.assert_allclose(result.box, box)
    assert NAMES[own] in result.of
    assert f"detection {index}" in result.of


def test_without_a_class_the_largest_logit_of_a_box_counts(fcos, images):
    with torch.no_grad():
        logits = fcos.box_scores(fcos.maps(images[:1]), [torch.tensor([BOX], dtype=torch.float64)]).logits
    result = effective_receptive_field(fcos, images[:1], targets=DetectionScore(box=BOX))
    assert result.about["labels"] == [int(logits.argmax())]


def test_the_activation_of_a_detection_is_of_its_box(fcos, images, tmp_path):
    found = class_activation(fcos, images, targets=DetectionScore(index=1), classes=NAMES)
    with torch.no_grad():
        detected = fcos(images)
    np.testing.assert_allclose(found.boxes, torch.stack([one.boxes[1] for one in detected]).numpy())
    assert found.targets.tolist() == [int(one.labels[1]) for one in detected]
    assert (found.probability > 0).all()
    assert found.where is None
    assert not np.array_equal(found.maps[0], class_activation(fcos, images, targets=DetectionScore()).maps[0])
    found.save(tmp_path / "cam.png")
    content = json.loads(found.save(tmp_path / "cam.json").read_text())
    assert np.array(content["results"]["FCOS"]["boxes"]).shape == (2, 4)


def test_the_activation_of_a_box_is_the_map_times_its_gradient(fcos, images):
    layer = next(name for name, _ in fcos.named_modules() if name.endswith("layer3"))
    found = class_activation(fcos, images, targets=DetectionScore(1, box=BOX), layer=layer)
    kept = []
    handle = fcos.get_submodule(layer).register_forward_hook(lambda module, args, output: kept.append(output))
    logits = fcos.box_scores(fcos.maps(images.clone()), [torch.tensor([BOX], dtype=torch.float64)] * 2).logits
    handle.remove()
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), kept[0])
    expected = (gradient * kept[0]).sum(1).relu().detach()
    expected = expected / expected.amax((1, 2), keepdim=True)
    np.testing.assert_allclose(found.maps, expected.numpy(), rtol=1e-4, atol=1e-6)


def test_image_without_such_a_detection_has_an_empty_map(fcos, images):
    with torch.no_grad():
        counts = torch.stack([one.labels.bincount(minlength=3) for one in fcos(images)])
    label = int((counts[0] - counts[1]).abs().argmax())
    few, many = sorted((0, 1), key=lambda k: int(counts[k, label]))
    assert counts[few, label] < counts[many, label]
    found = class_activation(fcos, images, targets=DetectionScore(label, index=int(counts[few, label])))
    assert found.targets[few] == -1
    assert np.isnan(found.boxes[few]).all()
    assert not found.maps[few].any()
    assert found.targets[many] == label
    assert found.maps[many].any()
    found.plot()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (DetectionScore(index=10_000), "FCOS has no detection 10000 in this image"),
        (DetectionScore(2, index=500), "has no detection 500 of class 2"),
        (DetectionScore(7), "label must be a class from 0 to 2; got 7"),
        (DetectionScore(7, box=BOX), "label must be a class from 0 to 2; got 7"),
        (DetectionScore(box=(0, 0, 97, 64)), "leaves the image of 64x96"),
    ],
)
def test_what_is_not_there_is_said(fcos, images, target, message):
    with pytest.raises(ValueError, match=message):
        effective_receptive_field(fcos, images[:1], targets=target)


def test_fields_of_detections_of_several_images_are_not_averaged(fcos, images):
    with pytest.raises(ValueError, match="give one image, or a box; object_receptive_fields centers"):
        effective_receptive_field(fcos, images, targets=DetectionScore())
    with pytest.raises(ValueError, match="give one image, or a box"):
        effective_receptive_field(fcos, images, targets=DetectionScore(), batch_size=1)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"box": (1, 2, 3)}, TypeError, "box must be"),
        ({"box": (4, 2, 3, 8)}, ValueError, "left < right"),
        ({"box": (0, 0, 3, 3), "index": 1}, ValueError, "leave out one of them"),
        ({"index": -1}, ValueError, "index"),
        ({"label": 1.5}, TypeError, "label"),
    ],
)
def test_targets_are_checked(given, error, message):
    with pytest.raises(error, match=message):
        DetectionScore(**given)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match=r"DetectionScore needs a detector of widefield\.dense.*got UNet"):
        effective_receptive_field(UNet(), torch.zeros(1, 3, 32, 32), targets=DetectionScore())
    with pytest.raises(ValueError, match=r"DetectionScore needs a detector of widefield\.dense.*got UNet"):
        class_activation(UNet(), torch.zeros(1, 3, 32, 32), targets=DetectionScore())


def test_the_class_activation_of_a_detector_sums_the_scores_of_a_class(fcos, images):
    """Without a DetectionScore, as for torchvision's detectors."""
    found = class_activation(fcos, images, targets=1)
    with torch.no_grad():
        best = [one.scores[one.labels == 1].max() for one in fcos(images)]
    np.testing.assert_allclose(found.probability, torch.stack(best).numpy(), rtol=1e-6)
