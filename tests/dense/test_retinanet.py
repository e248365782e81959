"""RetinaNet: what anchors learn, losses against plain loops, detections, gradients, and the detector on backbones."""

import math

import pytest
import torch

import tolerances
from dense import naive_boxes
from dense.networks import Maps
from widefield import dense
from widefield.dense.anchors import Anchors
from widefield.dense.boxes import Assigner

STRIDES = (8, 16)
ANCHORS = Anchors.octaves(STRIDES, base=2, per_octave=2, ratios=(0.5, 2))
CLASSES = 3


def head(**options):
    torch.manual_seed(0)
    built = dense.RetinaHead(8, CLASSES, **{"channels": 8, "num_convs": 1, "anchors": ANCHORS, **options})
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return built.double()


def levels(size=(40, 50), count=2):
    generator = torch.Generator().manual_seed(1)
    shapes = [(count, 8, -(-size[0] // s), -(-size[1] // s)) for s in STRIDES]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def targets():
    """Return one image with objects and a crowd region, and one without."""
    boxes = torch.tensor([[2.0, 3.0, 29.0, 21.0], [20.0, 10.0, 48.0, 34.0], [30.0, 1.0, 33.0, 5.0], [0, 20, 50, 40]])
    crowd = torch.tensor([False, False, False, True])
    return [
        dense.Targets(boxes.double(), torch.tensor([2, 0, 1, 0]), crowd=crowd, size=(40, 50)),
        dense.Targets(torch.zeros(0, 4).double(), torch.zeros(0).long(), crowd=torch.zeros(0).bool(), size=(40, 50)),
    ]


def rows_of(outputs, image):
    """Yield (level, logits, deltas) of each anchor: row, column, anchor of the position."""
    for level, (logits, deltas) in enumerate(zip(*outputs, strict=True)):
        for y in range(logits.shape[2]):
            for x in range(logits.shape[3]):
                for a in range(ANCHORS.per_cell):
                    own = logits[image, a * CLASSES : (a + 1) * CLASSES, y, x]
                    yield level, own.tolist(), deltas[image, 4 * a : 4 * a + 4, y, x]


@pytest.mark.parametrize("crowd", [None, 0.5])
@pytest.mark.parametrize("beta", [None, 0.11])
def test_losses_are_those_of_a_loop(crowd, beta):
    assigner = Assigner(positive=0.5, negative=0.4, minimum=0.0, crowd=crowd)
    built = head(assigner=assigner, smooth_l1_beta=beta)
    outputs = built(levels())
    anchors = torch.cat(ANCHORS.grid(outputs.logits))
    classes, boxes, count = [0.0, 0.0], [0.0, 0.0], 0
    for image, entry in enumerate(targets()):
        objects = entry.boxes[~entry.crowd].tolist()
        assigned, _ = naive_boxes.assign(
            anchors.tolist(), objects, entry.boxes[entry.crowd].tolist(), positive=0.5, negative=0.4, minimum=0.0,
            low_quality=True, crowd_part=crowd,
        )  # fmt: skip
        count += max(1, sum(own >= 0 for own in assigned))
        for own, anchor, (level, logits, deltas) in zip(assigned, anchors, rows_of(outputs, image), strict=True):
            if own == -2:
                continue
            for k, logit in enumerate(logits):
                there = own >= 0 and entry.labels[own] == k
                p = 1 / (1 + math.exp(-logit if there else logit))
                classes[level] += (0.25 if there else 0.75) * (1 - p) ** 2 * -math.log(p)
            if own >= 0:
                goal = built.coder.encode(anchor, entry.boxes[own])
                for gap in (deltas - goal).abs().tolist():
                    boxes[level] += gap if beta is None else gap**2 / 2 / beta if gap < beta else gap - beta / 2
    found = built.losses_by_level(outputs, targets())
    total = count + torch.finfo(torch.float32).eps
    tolerances.close(found["loss_cls"], torch.tensor(classes, dtype=torch.float64) / total, tolerances.FLOAT64)
    tolerances.close(found["loss_bbox"], torch.tensor(boxes, dtype=torch.float64) / total, tolerances.FLOAT64)
    assert count > 3
    sums = built.losses(outputs, targets())
    assert {name: value.item() for name, value in sums.items()} == {k: v.sum().item() for k, v in found.items()}


def test_an_object_without_overlaps_gets_its_best_anchors():
    built = head()
    small = dense.Targets(torch.tensor([[30.0, 1.0, 33.0, 5.0]]).double(), torch.tensor([1]), size=(40, 50))
    found = built.targets(built(levels()).logits, small)
    assert 1 <= len(found.positive) < 10
    assert set(found.labels[found.positive].tolist()) == {1}


def test_detections_are_those_of_a_loop():
    built = head()
    outputs = built(levels())
    size, rules = (33, 47), {"score_threshold": 0.6, "nms_threshold": 0.4, "max_per_image": 9, "candidates": 30}
    anchors = torch.cat(ANCHORS.grid(outputs.logits))
    for image, found in enumerate(built.detections(outputs, [size] * 2, dense.DetectionRules(**rules))):
        by_level = [[], []]
        for anchor, (level, logits, deltas) in zip(anchors, rows_of(outputs, image), strict=True):
            x1, y1, x2, y2 = built.coder.decode(anchor, deltas).tolist()
            box = (max(0, min(x1, 47)), max(0, min(y1, 33)), max(0, min(x2, 47)), max(0, min(y2, 33)))
            for k, logit in enumerate(logits):
                score = 1 / (1 + math.exp(-logit))
                if score > 0.6:
                    by_level[level].append((score, k, box))
        rows = [row for part in by_level for row in sorted(part, key=lambda row: -row[0])[:30]]
        rows = [row for row in rows if row[2][0] < row[2][2] and row[2][1] < row[2][3]]
        scores, labels, boxes = ([row[place] for row in rows] for place in range(3))
        kept = naive_boxes.nms(boxes, scores, labels, 0.4)[:9]
        assert len(kept) == 9
        tolerances.close(found.boxes, torch.tensor([boxes[i] for i in kept], dtype=torch.float64), tolerances.FLOAT64)
        tolerances.close(found.scores, torch.tensor([scores[i] for i in kept], dtype=torch.float64), tolerances.FLOAT64)
        assert found.labels.tolist() == [labels[i] for i in kept]


# The detector

IMAGES = torch.randn(2, 3, 70, 90, generator=torch.Generator().manual_seed(0))
OBJECTS = [
    dense.Targets(torch.tensor([[4.0, 5.0, 60.0, 66.0], [8.0, 9.0, 30.0, 33.0]]), torch.tensor([4, 0])),
    dense.Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)),
]


def retinanet(backbone="test_convnext", **options):
    return dense.RetinaNet(backbone, 5, **{"neck_channels": 32, "num_convs": 1, **options})


@pytest.mark.parametrize("backbone", ["test_convnext", "test_resnet", Maps()], ids=["convnext", "resnet", "module"])
@pytest.mark.parametrize("objects", [OBJECTS, OBJECTS[1:] * 2], ids=["objects", "none"])
def test_training_gives_every_parameter_a_gradient(backbone, objects):
    model = retinanet(backbone).train()
    losses = model(IMAGES, objects)
    assert list(losses) == ["loss_cls", "loss_bbox"]
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_names_and_start_are_the_published_ones():
    model = retinanet()
    some = {
        "neck.lateral_convs.2.conv.bias",
        "neck.fpn_convs.4.conv.weight",
        "bbox_head.cls_convs.0.conv.bias",
        "bbox_head.reg_convs.0.conv.weight",
        "bbox_head.retina_cls.weight",
        "bbox_head.retina_reg.bias",
    }
    assert some <= set(model.state_dict())
    assert "neck.lateral_convs.3.conv.bias" not in model.state_dict()
    assert model.bbox_head.retina_cls.bias.sigmoid().mean().item() == pytest.approx(0.01)
    assert not model.neck.relu_before_extra
    assert "bbox_head.cls_convs.0.gn.weight" in retinanet(norm="group").state_dict()


def test_a_fresh_model_finds_nothing_and_thresholds_hold():
    model = retinanet().eval()
    with torch.no_grad():
        assert [len(found.boxes) for found in model(IMAGES)] == [0, 0]
        model = retinanet(score_threshold=0.0, max_per_image=7).eval()
        found = model(IMAGES, sizes=[(70, 90), (50, 60)], out_sizes=[(140, 180), (50, 60)])
    for entry, (height, width) in zip(found, [(140, 180), (50, 60)], strict=True):
        assert len(entry.boxes) == 7
        assert (entry.scores.diff() <= 0).all()
        assert entry.boxes[:, 2].max() <= width
        assert entry.boxes[:, 3].max() <= height


def test_half_precision_is_widened():
    model = retinanet().train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(IMAGES, OBJECTS)
        found = model.eval()(IMAGES)
    assert {value.dtype for value in losses.values()} == {torch.float32}
    assert found[0].boxes.dtype == torch.float32


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="score_threshold must be from 0"):
        retinanet(score_threshold=2)
    with pytest.raises(TypeError, match="has an argument 'score_treshold'"):
        retinanet(score_treshold=0.1)
    built = head()
    outputs = built(levels()[:1])
    with pytest.raises(ValueError, match="2 levels"):
        built.losses(outputs, targets())
