"""FCOS: what points learn, losses against plain loops, detections, gradients, and the detector on backbones."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dense import detectors
from dense.networks import Maps
from tolerances import FLOAT64, close
from widefield import dense
from widefield.dense.fcos import centerness_of

STRIDES, RANGES = (4, 8, 16), (16, 40)


def head(classes=3, **options):
    torch.manual_seed(0)
    built = dense.FCOSHead(8, classes, **{"channels": 8, "num_convs": 1, "norm": None, "strides": STRIDES,
                                          "ranges": RANGES, **options})  # fmt: skip
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return built.double()


def levels(size=(40, 56), count=2, strides=STRIDES):
    generator = torch.Generator().manual_seed(1)
    shapes = [(count, 8, -(-size[0] // s), -(-size[1] // s)) for s in strides]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def learned(boxes, labels, maps, *, radius=None, offset=0.5, classes=3):
    """Return (label, distances) of each point, by a loop over points and objects."""
    found = []
    bounds = (-1, *RANGES, math.inf)
    for level, x in enumerate(maps):
        stride = STRIDES[level]
        for row in range(x.shape[-2]):
            for column in range(x.shape[-1]):
                px, py = (column + offset) * stride, (row + offset) * stride
                best = (math.inf, classes, None)
                for box, label in zip(boxes, labels, strict=True):
                    sides = (px - box[0], py - box[1], box[2] - px, box[3] - py)
                    near = radius is None or (
                        abs(px - (box[0] + box[2]) / 2) < radius * stride
                        and abs(py - (box[1] + box[3]) / 2) < radius * stride
                    )
                    if min(sides) > 0 and near and bounds[level] <= max(sides) <= bounds[level + 1]:
                        best = min(best, ((box[2] - box[0]) * (box[3] - box[1]), label, sides), key=lambda x: x[0])
                found.append(best[1:])
    return found


corner = st.integers(0, 40)
box = st.tuples(corner, corner, st.integers(1, 50), st.integers(1, 50)).map(
    lambda b: (float(b[0]), float(b[1]), float(b[0] + b[2]), float(b[1] + b[3]) + 0.25)
)


@settings(max_examples=25, deadline=None)
@given(st.lists(box, max_size=5), st.sampled_from([None, 1.5, 0.5]), st.sampled_from([0.5, 0.0]))
def test_points_learn_the_smallest_object_in_their_range(boxes, radius, offset):
    labels = [index % 3 for index in range(len(boxes))]
    maps = levels((40, 56), 1)
    built = head(center_radius=radius, point_offset=offset)
    found = built.targets(maps, torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4), torch.tensor(labels).long())
    expected = learned(boxes, labels, maps, radius=radius, offset=offset)
    assert found.labels.tolist() == [label for label, _ in expected]
    for row, (_, sides) in zip(found.distances.tolist(), expected, strict=True):
        assert sides is None or row == list(sides)


def test_both_ends_of_a_range_belong_to_it():
    maps = levels((64, 64), 1)
    square = torch.tensor([[0.0, 0.0, 32.0, 32.0]], dtype=torch.float64)  # (16, 16) is no point; (18, 18) has 18
    found = head().targets(maps, square, torch.tensor([1]))
    finest = found.labels[: 16 * 16].reshape(16, 16)
    assert (finest != 3).sum() == 0  # the farthest side is 18 or more
    exact = torch.tensor([[2.0, 2.0, 34.0, 34.0]], dtype=torch.float64)  # the point (18, 18) has 16 on each side
    found = head().targets(maps, exact, torch.tensor([1])).labels
    assert found[: 16 * 16].reshape(16, 16)[4, 4] == 1
    assert (found[: 16 * 16] != 3).sum() == 1
    below = head().targets(maps, exact + torch.tensor([0, 0, 0.5, 0.5]).double(), torch.tensor([1])).labels
    assert (below[: 16 * 16] != 3).sum() == 0


def test_centerness():
    found = centerness_of(torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 4.0, 8.0]], dtype=torch.float64))
    close(found, torch.tensor([1.0, math.sqrt(1 / 4 * 2 / 8)], dtype=torch.float64), FLOAT64)


@pytest.mark.parametrize("options", [{}, {"distances": "relu", "box_loss": "giou", "center_radius": 1.5},
                                     {"centerness_on": "boxes", "conv_bias": True, "norm": "batch"}])  # fmt: skip
def test_losses_are_those_of_a_loop(options):
    built = head(**options).train()
    maps = levels()
    boxes = [[(3.0, 4.0, 30.0, 33.0), (5.0, 6.0, 20.0, 15.0)], [(10.0, 2.0, 50.0, 38.0)]]
    labels = [[2, 0], [1]]
    targets = [dense.Targets(torch.tensor(b).double(), torch.tensor(k)) for b, k in zip(boxes, labels, strict=True)]
    outputs = built(maps)
    found = built.losses(outputs, targets)
    classes = box_loss = centerness = count = weight = 0.0
    steps = [step for x, step in zip(maps, STRIDES, strict=True) for _ in range(x[0, 0].numel())]
    for image in range(2):
        rows = [torch.cat([x[image].flatten(1) for x in part], 1).T for part in outputs]
        expected = learned(boxes[image], labels[image], maps, radius=options.get("center_radius"))
        for logits, distances, logit, (label, sides), step in zip(*rows, expected, steps, strict=True):
            for k, value in enumerate(logits.sigmoid()):
                there = k == label
                p = value if there else 1 - value
                classes += (0.25 if there else 0.75) * (1 - p) ** 2 * -p.log()
            if sides is None:
                continue
            left, t, r, b = sides
            wanted = math.sqrt(min(left, r) / max(left, r) * min(t, b) / max(t, b))
            count, weight = count + 1, weight + wanted
            p = logit[0].sigmoid()
            centerness -= wanted * p.log() + (1 - wanted) * (1 - p).log()
            scale = step if options.get("distances") == "relu" else 1
            own, theirs = ([*distances * scale], [*map(torch.tensor, sides)])
            inter = (torch.minimum(own[0], theirs[0]) + torch.minimum(own[2], theirs[2])) * (
                torch.minimum(own[1], theirs[1]) + torch.minimum(own[3], theirs[3])
            )
            union = (own[0] + own[2]) * (own[1] + own[3]) + (left + r) * (t + b) - inter
            if options.get("box_loss") == "giou":
                hull = (torch.maximum(own[0], theirs[0]) + torch.maximum(own[2], theirs[2])) * (
                    torch.maximum(own[1], theirs[1]) + torch.maximum(own[3], theirs[3])
                )
                box_loss += wanted * (1 - inter / union + (hull - union) / hull)
            else:
                box_loss -= wanted * (inter / union).clamp(min=1e-6).log()
    assert count > 5
    for name, value in (("loss_cls", classes / count), ("loss_bbox", box_loss / weight),
                        ("loss_centerness", centerness / count)):  # fmt: skip
        close(found[name], torch.as_tensor(value).double(), 1e-6)  # denominators have 1.2e-7 added


def test_crowd_regions_are_background():
    built, maps = head().train(), levels(count=1)
    boxes, labels = torch.tensor([[3.0, 4.0, 30.0, 33.0], [5.0, 6.0, 50.0, 39.0]]).double(), torch.tensor([2, 1])
    alone = built.losses(built(maps), [dense.Targets(boxes[:1], labels[:1])])
    crowded = built.losses(built(maps), [dense.Targets(boxes, labels, crowd=torch.tensor([False, True]))])
    assert all(torch.equal(alone[name], crowded[name]) for name in alone)


def test_scores_are_compared_before_the_centerness_and_boxes_are_clipped():
    built = head(classes=2).eval()
    outputs = built(levels(count=1))
    size = (37, 51)
    (found,) = built.detections(outputs, [size], dense.DetectionRules(0.6, 1.0, 10_000))
    expected = []
    for level, (logits, distances, centerness) in enumerate(zip(*outputs, strict=True)):
        for row in range(logits.shape[2]):
            for column in range(logits.shape[3]):
                x, y = (column + 0.5) * STRIDES[level], (row + 0.5) * STRIDES[level]
                left, t, r, b = distances[0, :, row, column].tolist()
                box = (max(x - left, 0), max(y - t, 0), min(x + r, size[1]), min(y + b, size[0]))
                for k in range(2):
                    score = logits[0, k, row, column].sigmoid().item()
                    if score > 0.6 and box[2] > box[0] and box[3] > box[1]:
                        expected.append((score * centerness[0, 0, row, column].sigmoid().item(), k, box))
    expected.sort(key=lambda entry: -entry[0])
    assert len(found.scores) == len(expected) > 20
    assert found.scores.min() < 0.6
    close(found.scores, torch.tensor([entry[0] for entry in expected], dtype=torch.float64), FLOAT64)
    assert found.labels.tolist() == [entry[1] for entry in expected]
    close(found.boxes, torch.tensor([entry[2] for entry in expected], dtype=torch.float64), FLOAT64)
    (few,) = built.detections(outputs, [(40, 56)], dense.DetectionRules(0.6, 1.0, candidates=3))
    assert len(few.scores) == 9


# The detector

IMAGES = torch.randn(2, 3, 70, 90, generator=torch.Generator().manual_seed(0))
OBJECTS = [
    dense.Targets(torch.tensor([[4.0, 5.0, 60.0, 66.0], [8.0, 9.0, 30.0, 33.0]]), torch.tensor([4, 0])),
    dense.Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)),
]


def fcos(backbone="test_convnext", **options):
    return dense.FCOS(backbone, 5, **{"neck_channels": 64, "num_convs": 1, **options})


@pytest.mark.parametrize("backbone", ["test_convnext", "test_resnet", Maps()], ids=["convnext", "resnet", "module"])
@pytest.mark.parametrize("objects", [OBJECTS, OBJECTS[1:] * 2], ids=["objects", "none"])
def test_training_gives_every_parameter_a_gradient(backbone, objects):
    model = fcos(backbone).train()
    losses = model(IMAGES, objects)
    assert list(losses) == ["loss_cls", "loss_bbox", "loss_centerness"]
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_names_are_the_published_ones():
    keys = {key for key in fcos().state_dict() if not key.startswith("backbone.")}
    some = {
        "neck.lateral_convs.2.conv.bias",
        "neck.fpn_convs.4.conv.weight",
        "bbox_head.cls_convs.0.conv.weight",
        "bbox_head.reg_convs.0.gn.bias",
        "bbox_head.conv_centerness.weight",
        "bbox_head.scales.4.scale",
    }
    assert some <= keys
    assert "bbox_head.cls_convs.0.conv.bias" not in keys
    assert "bbox_head.cls_convs.0.conv.bias" in fcos(conv_bias=True).state_dict()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("build", detectors.ONE_STAGE)
def test_group_norm_of_one_value_is_its_bias(build, training):
    norm = {"norm": "group"} if build is detectors.retinanet else {}
    model = build(neck_channels=32, norm_eval=True, **norm).train(training)
    image = torch.randn(1, 3, 32, 32)  # the coarsest map has one pixel
    if training:
        losses = model(image, [dense.Targets(torch.tensor([[2.0, 3, 20, 30]]), torch.tensor([1]))])
        sum(losses.values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    else:
        assert torch.isfinite(model(image)[0].scores).all()
    layer = dense.ConvModule(3, 32, 3, padding=1, norm="group").double()
    close(layer.gn(torch.randn(1, 32, 1, 1).double()), layer.gn.bias[None, :, None, None], FLOAT64)
    x = torch.randn(2, 32, 4, 5).double()
    assert torch.equal(layer.gn(x), torch.nn.functional.group_norm(x, 32, layer.gn.weight, layer.gn.bias))


@pytest.mark.parametrize("build", detectors.ONE_STAGE)
def test_three_maps_are_refused(build):
    with pytest.raises(ValueError, match=r"needs four maps .* got 3 with strides \(8, 16, 32\)"):
        build(out_indices=(2, 3, 4))


def test_targets_do_not_depend_on_the_blocks_of_points(monkeypatch):
    g = torch.Generator().manual_seed(0)
    corner = 60 * torch.rand(40, 2, generator=g)
    boxes, labels = torch.cat((corner, corner + 1 + 90 * torch.rand(40, 2, generator=g)), 1), torch.arange(40) % 3
    built, maps = dense.FCOSHead(64, 3), [torch.zeros(1, 1, 160 // s, 160 // s) for s in (8, 16, 32, 64, 128)]
    whole = built.targets(maps, boxes, labels)
    assert (whole.labels < 3).sum() > 20
    monkeypatch.setattr("widefield.dense.fcos._BLOCK", 280)  # a row of points
    blocks = built.targets(maps, boxes, labels)
    assert torch.equal(blocks.labels, whole.labels)
    assert torch.equal(blocks.distances, whole.distances)


def test_evaluation_gives_detections():
    model = fcos(score_threshold=0.0, max_per_image=7).eval()
    with torch.no_grad():
        found = model(IMAGES, sizes=[(70, 90), (50, 60)], out_sizes=[(140, 180), (50, 60)])
    for entry, (height, width) in zip(found, [(140, 180), (50, 60)], strict=True):
        assert len(entry.boxes) == 7
        assert (entry.scores.diff() <= 0).all()
        assert entry.boxes[:, 2].max() <= width
        assert entry.boxes[:, 3].max() <= height
    assert model(torch.zeros(1, 3, 33, 65))[0].boxes.shape[1] == 4


def test_half_precision_is_widened_where_it_matters():
    model = fcos().train()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model.bbox_head(model.maps(IMAGES))
        assert all(x.dtype == torch.float32 for x in outputs.distances)
        losses = model(IMAGES, OBJECTS)
        found = model.eval()(IMAGES)
    assert {value.dtype for value in losses.values()} == {torch.float32}
    assert found[0].boxes.dtype == torch.float32


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"ranges must be 4 rising numbers.*got \(64, 32\)"):
        dense.FCOSHead(8, 3, ranges=(64, 32))
    with pytest.raises(ValueError, match="centerness_on must be one of 'classification', 'boxes'; got 'reg'"):
        fcos(centerness_on="reg")
    with pytest.raises(ValueError, match="built for 5 levels; got 1"):
        dense.FCOSHead(8, 3)([torch.zeros(1, 8, 4, 4)])
    with pytest.raises(TypeError, match=r"has an argument 'score_treshold'"):
        fcos(score_treshold=0.1)


@settings(deadline=None, max_examples=60)
@given(box, st.sampled_from([0.0, 0.5]))
def test_the_point_of_a_box_is_one_that_learns_it(given_box, offset):
    """Where the middle of a box is a point inside of it, in the range of its level."""
    built, maps = head(point_offset=offset), levels((96, 96), 1)
    ((level, row, column),) = built.places(torch.tensor([given_box], dtype=torch.float64)).tolist()
    x, y = (column + offset) * STRIDES[level], (row + offset) * STRIDES[level]
    sides = (x - given_box[0], y - given_box[1], given_box[2] - x, given_box[3] - y)
    if min(sides) <= 0 or max(sides) < (-1, *RANGES)[level]:
        return  # too small to hold a point, or just between two levels
    learned_by = built.targets(maps, torch.tensor([given_box], dtype=torch.float64), torch.tensor([1])).labels
    before = sum(one.shape[2] * one.shape[3] for one in maps[:level])
    assert learned_by[before + row * maps[level].shape[3] + column] == 1


def test_scores_of_boxes_are_the_logits_at_their_points():
    torch.manual_seed(0)
    model = dense.FCOS(Maps(), 3, neck_channels=64, num_convs=1).double().eval()
    maps = model.maps(torch.randn(2, 3, 96, 128, dtype=torch.float64).requires_grad_())
    boxes = [torch.tensor([[8.0, 8, 40, 24], [0, 0, 128, 96]]), torch.zeros(0, 4), torch.tensor([[100.0, 60, 128, 96]])]
    found = model.box_scores(maps, [boxes[0].double(), boxes[2].double()])
    logits = model.bbox_head(maps).logits
    close(found.logits[0], logits[0][0, :, 2, 3], FLOAT64)
    close(found.logits[1], logits[1][0, :, 3, 4], FLOAT64)  # the farthest side is at 72 pixels, above 64
    close(found.logits[2], logits[0][1, :, 9, 14], FLOAT64)
    close(found.probabilities, found.logits.sigmoid(), FLOAT64)
    assert found.logits.requires_grad
    assert model.box_scores(maps, [boxes[1], boxes[1]]).logits.shape == (0, 3)
