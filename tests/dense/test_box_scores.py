"""Scores of given boxes: those that the detector gives when it finds boxes, with gradients to the maps only."""

import pytest
import torch

from dense.networks import Maps
from tolerances import FLOAT64, close
from widefield import dense

SIZE = (96, 128)


def built(kind, **options):
    torch.manual_seed(0)
    narrow = {"neck_channels": 64, "num_convs": 1} if kind in ("RetinaNet", "FCOS") else {"neck_channels": 16}
    options = {"norm": "group", **options} if kind == "RetinaNet" else options
    model = getattr(dense, kind)(Maps(), 3, **narrow, **options)
    for name, parameter in model.named_parameters():
        if name.endswith(("fc_cls.weight", "cls.weight")):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("kind", ["FasterRCNN", "MaskRCNN", "CascadeRCNN"])
def test_a_second_stage_scores_boxes_as_it_scores_proposals(kind, images):
    model = built(kind, test_proposals=20)
    if kind == "CascadeRCNN":  # so that no stage moves the boxes of the one before
        for head in model.roi_head.bbox_head:
            torch.nn.init.zeros_(head.fc_reg.weight)
    with torch.no_grad():
        maps = model.maps(images)
        proposals = model.rpn_head.proposals(model.rpn_head(maps), [SIZE, SIZE], training=False)
        boxes = [entry.boxes for entry in proposals]
        best = torch.stack([one.scores[0] for one in model.detect(maps, [SIZE, SIZE])])
    scores = model.box_scores(maps, boxes)
    found = torch.stack([part.max() for part in scores.probabilities.split([len(own) for own in boxes])])
    close(found, best, FLOAT64)
    assert scores.logits.shape == scores.probabilities.shape == (sum(map(len, boxes)), 3)


def test_retinanet_scores_a_box_by_its_best_anchor(images):
    model = built("RetinaNet")
    maps = model.maps(images)
    logits = model.bbox_head(maps).logits
    anchors = model.bbox_head.anchors
    places = [(0, 4, 7, 2), (1, 3, 2, 8), (2, 1, 1, 0)]  # level, row, column, anchor of the cell
    boxes, expected = [], []
    for level, row, column, kind in places:
        stride = anchors.strides[level]
        shift = torch.tensor([column, row, column, row]) * stride
        boxes.append(torch.tensor(anchors.shapes(level)[kind], dtype=torch.float64) + shift)
        expected.append(logits[level][0].unflatten(0, (anchors.per_cell, 3))[kind, :, row, column])
    scores = model.box_scores(maps, [torch.stack(boxes), torch.zeros(0, 4, dtype=torch.float64)])
    close(scores.logits, torch.stack(expected), FLOAT64)
    close(scores.probabilities, torch.stack(expected).sigmoid(), FLOAT64)


@pytest.mark.parametrize("kind", ["FasterRCNN", "CascadeRCNN", "RetinaNet", "FCOS"])
def test_gradients_flow_to_the_image_and_not_to_the_boxes(kind, images):
    model = built(kind)
    leaf = images.clone().requires_grad_()
    boxes = torch.tensor([[10.0, 12, 60, 70]], dtype=torch.float64).requires_grad_()
    logits = model.box_scores(model.maps(leaf), [boxes, boxes]).logits
    image, box = torch.autograd.grad(logits[0].sum(), [leaf, boxes], allow_unused=True)
    assert image[0].any()
    assert not image[1].any()
    assert box is None or not box.any()
