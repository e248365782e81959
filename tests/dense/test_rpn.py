"""The region proposal network: losses and proposals against plain loops, gradients, limits."""

import math

import pytest
import torch

import tolerances
from dense import naive_boxes
from widefield.dense.anchors import Anchors
from widefield.dense.boxes import Assigner, BoxCoder, Sampler
from widefield.dense.detector import Targets
from widefield.dense.rpn import ProposalLimits, RPNHead

ANCHORS = Anchors((4, 8), (4.0,), (0.5, 2.0))
OBJECTS = torch.tensor([[2.0, 3.0, 19.0, 11.0], [10.0, 10.0, 38.0, 24.0], [30.0, 1.0, 34.0, 7.0]])
EVERYTHING = Sampler(100_000)


def head(**options):
    torch.manual_seed(0)
    built = RPNHead(6, **{"anchors": ANCHORS, "sampler": EVERYTHING, **options})
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return built.double()


def levels(count=2, size=(28, 42)):
    generator = torch.Generator().manual_seed(1)
    shapes = [(count, 6, -(-size[0] // s), -(-size[1] // s)) for s in ANCHORS.strides]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def target(rows, size, crowd=()):
    boxes = torch.cat((OBJECTS[rows], torch.tensor(crowd).reshape(-1, 4))).double()
    is_crowd = torch.arange(len(boxes)) >= len(rows)
    return Targets(boxes, torch.zeros(len(boxes), dtype=torch.long), crowd=is_crowd, size=size)


def anchors_of(x, level, stride):
    """Yield (anchor, channel, row, column) in the published order."""
    for row in range(x.shape[2]):
        for column in range(x.shape[3]):
            for channel, ratio in enumerate(ANCHORS.ratios):
                w, h = stride * 4 / ratio**0.5 / 2, stride * 4 * ratio**0.5 / 2
                y, z = row * stride, column * stride
                yield (z - w, y - h, z + w, y + h), channel, row, column


def looped(outputs, targets, *, border=None, beta=None, crowd_part=None):
    """Return both losses by level, computed anchor by anchor."""
    classes, boxes, count = [0.0, 0.0], [0.0, 0.0], 0
    for image, entry in enumerate(targets):
        usable, places = [], []
        for level, x in enumerate(outputs.objectness):
            stride = ANCHORS.strides[level]
            for anchor, *place in anchors_of(x, level, stride):
                height, width = entry.size
                padded = (math.ceil(height / 32) * 32, math.ceil(width / 32) * 32)
                if place[1] * stride >= padded[0] or place[2] * stride >= padded[1]:
                    continue
                leaves = max(-anchor[0], -anchor[1], anchor[2] - width + 1e-12, anchor[3] - height + 1e-12)
                if border is None or leaves <= border:
                    usable.append(anchor)
                    places.append((level, *place))
        rows = entry.boxes[~entry.crowd].tolist()
        rule = {"positive": 0.7, "negative": 0.3, "minimum": 0.3, "low_quality": True, "crowd_part": crowd_part}
        assigned, _ = naive_boxes.assign(usable, rows, entry.boxes[entry.crowd].tolist(), **rule)
        count += max(1, sum(a >= 0 for a in assigned)) + max(1, sum(a == -1 for a in assigned))
        for anchor, (level, channel, row, column), own in zip(usable, places, assigned, strict=True):
            if own == -2:
                continue
            logit = outputs.objectness[level][image, channel, row, column].item()
            classes[level] += math.log1p(math.exp(-logit if own >= 0 else logit))
            if own >= 0:
                deltas = outputs.deltas[level][image, 4 * channel : 4 * channel + 4, row, column].tolist()
                box, w, h = rows[own], anchor[2] - anchor[0], anchor[3] - anchor[1]
                goal = (
                    (box[0] + box[2] - anchor[0] - anchor[2]) / 2 / w,
                    (box[1] + box[3] - anchor[1] - anchor[3]) / 2 / h,
                    math.log((box[2] - box[0]) / w),
                    math.log((box[3] - box[1]) / h),
                )
                for d, g in zip(deltas, goal, strict=True):
                    gap = abs(d - g)
                    boxes[level] += gap if beta is None else gap**2 / 2 / beta if gap < beta else gap - beta / 2
    eps = torch.finfo(torch.float32).eps
    return {name: torch.tensor(v, dtype=torch.float64) / (count + eps) for name, v in
            (("loss_rpn_cls", classes), ("loss_rpn_bbox", boxes))}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "crowd"),
    [({}, []), ({"allowed_border": 0.0}, []), ({"smooth_l1_beta": 1 / 9}, []),
     ({"assigner": Assigner(crowd=0.5)}, [[20.0, 8.0, 40.0, 28.0]]), ({}, [[20.0, 8.0, 40.0, 28.0]])],
)  # fmt: skip
def test_losses_are_those_of_a_loop(options, crowd):
    built = head(**options)
    outputs = built(levels(size=(28, 70)))
    targets = [target([0, 1, 2], (28, 42), crowd), target([], (20, 40))]  # the first 64 columns of pixels count
    found = built.losses_by_level(outputs, targets)
    rule = {"border": options.get("allowed_border"), "beta": options.get("smooth_l1_beta")}
    crowd_part = built.assigner.crowd
    expected = looped(outputs, targets, **rule, crowd_part=crowd_part)
    for name, values in expected.items():
        tolerances.close(found[name], values, tolerances.FLOAT64)
    assert expected["loss_rpn_bbox"].sum() > 0
    total = built.losses(outputs, targets)
    assert {name: value.item() for name, value in total.items()} == {k: v.sum().item() for k, v in found.items()}


@pytest.mark.parametrize("rows", [[0, 1], []], ids=["objects", "none"])
@pytest.mark.parametrize("border", [None, 0.0], ids=["all", "inside"])
def test_every_parameter_gets_a_gradient(rows, border):
    built = head(allowed_border=border)
    for size in ((28, 42), (6, 6)):  # no anchor lies within the second
        built.zero_grad()
        losses = built.losses(built(levels(1)), [target(rows, size)])
        sum(losses.values()).backward()
        for parameter in built.parameters():
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()


def test_samples_come_from_the_generator():
    built = head(sampler=Sampler(16))
    outputs, targets = built(levels(1)), [target([0, 1], (28, 42))]
    torch.manual_seed(5)
    one, other = built.losses(outputs, targets), built.losses(outputs, targets)
    torch.manual_seed(5)
    again = built.losses(outputs, targets)
    assert one["loss_rpn_cls"] == again["loss_rpn_cls"] != other["loss_rpn_cls"]


@pytest.mark.parametrize("training", [True, False])
def test_proposals_are_those_of_a_loop(training):
    limits = {"for_training": ProposalLimits(40, 30, 0.6), "for_testing": ProposalLimits(25, 12, 0.5, min_side=3.0)}
    built = head(**limits)
    rule = limits["for_training" if training else "for_testing"]
    outputs, sizes = built(levels()), [(28, 42), (21, 30)]
    found = built.proposals(outputs, sizes, training=training)
    for image, (height, width) in enumerate(sizes):
        kept = []
        for level, stride in enumerate(ANCHORS.strides):
            x = outputs.objectness[level]
            rows = []
            for anchor, channel, row, column in anchors_of(x, level, stride):
                deltas = outputs.deltas[level][image, 4 * channel : 4 * channel + 4, row, column]
                box = BoxCoder().decode(torch.tensor(anchor, dtype=torch.float64), deltas).tolist()
                rows.append((x[image, channel, row, column].item(), box))
            rows = sorted(rows, key=lambda entry: -entry[0])[: rule.before_nms]
            rows = [(score, (max(0, min(b[0], width)), max(0, min(b[1], height)), max(0, min(b[2], width)),
                             max(0, min(b[3], height)))) for score, b in rows]  # fmt: skip
            rows = [(s, b) for s, b in rows if min(b[2] - b[0], b[3] - b[1]) > rule.min_side]
            scores, boxes = [s for s, _ in rows], [b for _, b in rows]
            kept += [rows[place] for place in naive_boxes.nms(boxes, scores, [0] * len(rows), rule.nms_threshold)]
        kept = sorted(kept, key=lambda entry: -entry[0])[: rule.max_per_image]
        tolerances.close(
            found[image].boxes, torch.tensor([b for _, b in kept], dtype=torch.float64), tolerances.FLOAT64
        )
        scores = torch.tensor([s for s, _ in kept], dtype=torch.float64).sigmoid()
        tolerances.close(found[image].scores, scores, tolerances.FLOAT64)
        assert not found[image].boxes.requires_grad


def test_saturated_scores_keep_their_order():
    """In float32, the sigmoids of large logits are all 1, but their order still chooses the proposals."""
    built = RPNHead(6, anchors=ANCHORS, for_testing=ProposalLimits(5, 5, 1.0))
    outputs = built([x.float() for x in levels(1)])
    logits = [x * 0 + 30 + torch.arange(x.numel()).reshape(x.shape) / 10 for x in outputs.objectness]
    best = built.proposals(outputs._replace(objectness=logits), [(28, 42)], training=False)[0]
    boxes, order, _ = built.candidates(outputs._replace(objectness=logits), 5)
    assert best.scores.tolist() == [1.0] * 5
    assert torch.equal(best.boxes[0], boxes[0, order[0].argmax()].clamp(torch.zeros(4), torch.tensor([42, 28] * 2)))


def test_half_precision_is_widened():
    built = RPNHead(6, anchors=ANCHORS)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = built([x.float() for x in levels(1)])
        assert outputs.deltas[0].dtype == torch.bfloat16
        entry = target([0], (28, 42))
        losses = built.losses(outputs, [entry._replace(boxes=entry.boxes.float())])
        found = built.proposals(outputs, [(28, 42)], training=True)[0]
    assert {value.dtype for value in (*losses.values(), *found)} == {torch.float32}


def test_names_and_start_are_the_published_ones():
    torch.manual_seed(0)
    built = RPNHead(64)
    shapes = {name: tuple(value.shape) for name, value in built.state_dict().items()}
    assert shapes == {
        "rpn_conv.weight": (64, 64, 3, 3),
        "rpn_conv.bias": (64,),
        "rpn_cls.weight": (3, 64, 1, 1),
        "rpn_cls.bias": (3,),
        "rpn_reg.weight": (12, 64, 1, 1),
        "rpn_reg.bias": (12,),
    }
    assert built.rpn_conv.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert built.rpn_cls.bias.abs().max() == 0


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="allowed_border must be from 0"):
        RPNHead(6, allowed_border=-1)
    with pytest.raises(ValueError, match="nms_threshold must be from 0"):
        ProposalLimits(nms_threshold=1.5)
    built = head()
    outputs, few = built(levels(1)), built(levels(1)[:1])
    with pytest.raises(ValueError, match=r"size of each target must be set"):
        built.losses(outputs, [target([0], None)])
    with pytest.raises(ValueError, match="2 levels"):
        built.proposals(few, [(28, 42)], training=False)
