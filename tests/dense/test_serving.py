"""Detectors with outputs of fixed shapes find what the detectors find."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import nms

from dense.detectors import DETECTORS, fcos, noise, retinanet, trained
from dense.networks import cascade_mask_rcnn, cascade_rcnn, faster_rcnn, mask_rcnn
from tolerances import FLOAT32, FLOAT64
from widefield import dense
from widefield.dense.serving import nms_mask
from widefield.surgery.compare import difference

torch.manual_seed(0)


@pytest.fixture(scope="module", params=DETECTORS, ids=lambda build: build.__name__)
def model(request):
    torch.manual_seed(0)
    return trained(request.param())


@torch.no_grad()
@pytest.mark.parametrize("shape", [(2, 3, 64, 96), (1, 3, 75, 33)])
def test_the_detections_are_those_of_the_model(model, shape):
    images = noise(*shape)
    found = model(images)
    assert min(len(one.scores) for one in found) > 2
    for where in ("inside", "outside") if not model.has_masks else ("inside",):
        graph = dense.ServedDetector(model, where)
        apart = difference(found, graph.detections(graph(images)), model)
        assert apart.agreement == 1.0
        assert apart.relative < FLOAT32


@torch.no_grad()
@pytest.mark.parametrize("build", [cascade_mask_rcnn, fcos, retinanet])
def test_in_float64_they_are_the_same_numbers(build):
    torch.manual_seed(0)
    model, images = trained(build().double()), noise(2, 3, 64, 64).double()
    graph = dense.ServedDetector(model)
    apart = difference(model(images), graph.detections(graph(images)), model)
    assert apart.agreement == 1.0
    assert apart.relative < FLOAT64


@torch.no_grad()
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_scores_of_fcos_may_be_below_the_threshold_and_are_compared(where):
    torch.manual_seed(0)
    model, images = trained(fcos()), noise(1, 3, 64, 96)
    model.bbox_head.conv_centerness.bias.fill_(-4.0)
    found, graph = model(images), dense.ServedDetector(model, where)
    assert found[0].scores.max() < model.score_threshold  # of classes, before the product
    apart = difference(found, graph.detections(graph(images)), model)
    assert (apart.agreement, apart.detections) == (1.0, 2 * len(found[0].scores))
    half = dense.Detections(*(part[: len(part) // 2] for part in found[0][:3]))
    assert difference(found, [half], model).agreement < 0.7


@torch.no_grad()
def test_images_below_the_largest_stride_are_padded(model):
    images = noise(2, 3, 17, 40)
    found, graph = model(images), dense.ServedDetector(model)
    assert sum(len(one.scores) for one in found) > 2
    assert difference(found, graph.detections(graph(images)), model).agreement == 1.0


@torch.no_grad()
def test_shapes_do_not_depend_on_the_images_and_the_rest_is_zero():
    model = trained(mask_rcnn(max_per_image=40))
    outputs = dense.ServedDetector(model)(noise(2, 3, 64, 64))
    shapes = {name: tuple(x.shape) for name, x in outputs.items()}
    size = {"boxes": (2, 40, 4), "scores": (2, 40), "labels": (2, 40), "count": (2,), "masks": (2, 40, 28, 28)}
    assert shapes == size
    model.score_threshold = outputs["scores"][0, 5].item()  # five exceed it
    few = dense.ServedDetector(model)(noise(2, 3, 64, 64))
    assert {name: tuple(x.shape) for name, x in few.items()} == size
    assert few["count"][0] == 5
    assert not few["scores"][0, 5:].any()
    assert not few["boxes"][0, 5:].any()
    model.score_threshold = 1.0
    assert dense.ServedDetector(model)(noise(2, 3, 64, 64))["count"].tolist() == [0, 0]


@torch.no_grad()
@pytest.mark.parametrize(
    ("build", "boxes", "scores"),
    [
        (faster_rcnn, (1, 1000, 3, 4), (1, 1000, 3)),
        (cascade_rcnn, (1, 1000, 4), (1, 1000, 3)),
        (fcos, (1, 5000, 4), (1, 5000, 3)),
    ],
)
def test_candidates_are_what_the_caller_suppresses(build, boxes, scores):
    outputs = dense.ServedDetector(trained(build()), "outside")(noise(1, 3, 64, 64))
    assert {name: tuple(x.shape) for name, x in outputs.items()} == {"boxes": boxes, "scores": scores}


def test_masks_need_the_final_boxes():
    with pytest.raises(ValueError, match="computed for the boxes that are left"):
        dense.ServedDetector(mask_rcnn(), "outside")
    with pytest.raises(ValueError, match="nms"):
        dense.ServedDetector(faster_rcnn(), "both")


def test_the_score_threshold_can_be_read_and_set():
    for build in DETECTORS:
        model = build(score_threshold=0.25)
        assert model.score_threshold == 0.25
        model.score_threshold = 0.5
        assert model.rules.score_threshold == 0.5
        with pytest.raises(ValueError, match="score_threshold"):
            model.score_threshold = 1.5
        with pytest.raises(TypeError, match="DetectionRules; got dict"):
            model.rules = {"score_threshold": 0.5}


@settings(max_examples=25)
@given(seed=st.integers(0, 1000), rows=st.integers(0, 12), classes=st.integers(1, 3))
def test_masks_of_suppression_are_those_of_torchvision_class_by_class(seed, rows, classes):
    g = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, 6, (2, rows, 2), generator=g).float()
    boxes = torch.cat((corner, corner + torch.randint(1, 6, (2, rows, 2), generator=g)), 2)
    scores = torch.randperm(2 * classes * rows, generator=g).float().view(2, classes, rows) / 50
    kept = nms_mask(boxes, scores, 0.5, 0.1)
    for image in range(2):
        for label in range(classes):
            able = (scores[image, label] > 0.1).nonzero()[:, 0]
            best = able[nms(boxes[image, able], scores[image, label, able], 0.5)]
            assert kept[image, label].nonzero()[:, 0].tolist() == sorted(best.tolist())


def test_parts_of_a_served_detector_are_those_of_the_model():
    model = faster_rcnn()
    graph = dense.ServedDetector(model)
    assert list(graph.state_dict()) == list(model.state_dict())
    assert graph.rpn_head is model.rpn_head
