"""Detections of two models compared as sets, and the box AP that reports show."""

import contextlib
import io
import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tolerances import FLOAT32, FLOAT64
from widefield._coco.precision import AveragePrecision
from widefield.surgery.compare import NothingToCompareError, Tally, compare, difference
from widefield.surgery.detections import sensitive
from widefield.surgery.inputs import batches


class Named(NamedTuple):
    boxes: torch.Tensor
    scores: torch.Tensor
    labels: torch.Tensor
    masks: torch.Tensor | None = None


def made(count, seed=0, spread=60.0, least=0.1):
    """Return detections that overlap little, best first."""
    g = torch.Generator().manual_seed(seed)
    corner = torch.arange(count)[:, None] * torch.tensor([spread, 0.0]) + torch.rand(count, 2, generator=g)
    boxes = torch.cat((corner, corner + 10 + 30 * torch.rand(count, 2, generator=g)), 1)
    scores = (least + (0.95 - least) * torch.rand(count, generator=g)).sort(descending=True).values
    return Named(boxes, scores, torch.randint(3, (count,), generator=g))


def shuffled(found, seed=1):
    order = torch.randperm(len(found.scores), generator=torch.Generator().manual_seed(seed))
    return Named(*(None if part is None else part[order] for part in found))


def without(found, index):
    keep = torch.arange(len(found.scores)) != index
    return Named(*(None if part is None else part[keep] for part in found))


def changed(found, index, **values):
    parts = found._replace(**{name: getattr(found, name).clone() for name in values})
    for name, value in values.items():
        getattr(parts, name)[index] = value
    return parts


@given(count=st.integers(1, 12), seed=st.integers(0, 50))
def test_the_order_of_detections_and_the_type_of_their_container_do_not_matter(count, seed):
    found = made(count, seed)
    other = {name: part for name, part in shuffled(found)._asdict().items() if part is not None}
    apart = difference([found], [other])
    assert (apart.agreement, apart.max_abs, apart.rms, apart.detections) == (1.0, 0.0, 0.0, 2 * count)
    assert apart.within(0.0)


def test_scores_and_boxes_of_partners_are_measured_against_their_own_size():
    found = made(5)
    score = changed(found, 0, scores=found.scores[0] - 0.01)
    apart = difference([found], [score])
    assert apart.max_abs == pytest.approx(0.01, rel=FLOAT32)
    assert apart.scale == pytest.approx(found.scores.max().item(), rel=FLOAT32)
    box = changed(found, 2, boxes=found.boxes[2] + torch.tensor([0.5, 0, 0.5, 0]))
    apart = difference([found], [box])
    assert (apart.max_abs, apart.scale) == pytest.approx((0.5, found.boxes.max().item()), rel=1e-4)
    assert apart.agreement == 1.0
    assert not apart.within(1e-4)


def test_masks_of_partners_are_compared():
    found = made(3)._replace(masks=torch.rand(3, 4, 4))
    other = shuffled(changed(found, 1, masks=found.masks[1] * 0))
    apart = difference([found], [other])
    assert apart.max_abs == pytest.approx(found.masks[1].max().item(), rel=FLOAT32)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda f: without(f, 1),
        lambda f: changed(f, 1, labels=f.labels[1] + 1),
        lambda f: changed(f, 1, scores=f.scores[1] - 0.06),
        lambda f: changed(f, 1, boxes=f.boxes[1] + torch.tensor([0.0, 0, 6, 6]), scores=f.scores[1] - 0.01),
    ],
)
def test_a_detection_without_a_partner_lowers_the_agreement_and_counts_with_its_score(wrong):
    found = made(6)
    other = wrong(found)
    apart = difference([found], [other])
    twins = 1 if len(other.scores) < 6 else 2
    assert apart.agreement == pytest.approx(10 / (10 + twins))
    lost = [found.scores[1], *([other.scores[1]] if twins == 2 else [])]
    expected = math.sqrt(sum(float(s) ** 2 for s in lost) / float(found.scores.double().square().sum()))
    assert apart.rms == pytest.approx(expected, rel=FLOAT32)
    assert apart.relative < FLOAT32  # those with partners did not move
    assert not apart.within(1e-4)


class Scripted(nn.Module):
    """A detector with a threshold that returns given detections above it."""

    def __init__(self, found, threshold=0.5):
        super().__init__()
        self.found, self.score_threshold = found, threshold

    def forward(self, images):
        return [
            Named(*(None if p is None else p[one.scores > self.score_threshold] for p in one)) for one in self.found
        ]


def test_a_detection_at_the_score_threshold_may_be_missing():
    found = made(4, least=0.6)
    edge = Named(
        torch.cat((found.boxes, torch.tensor([[500.0, 0, 520, 20]]))),
        torch.cat((found.scores, torch.tensor([0.500001]))),
        torch.cat((found.labels, torch.tensor([0]))),
    )
    images = torch.zeros(1, 3, 4, 4)
    apart = compare(Scripted([edge]), Scripted([changed(edge, 4, scores=0.499999)]), images)
    assert (apart.agreement, apart.rms) == (1.0, 0.0)
    apart = compare(Scripted([changed(edge, 4, scores=0.6)]), Scripted([changed(edge, 4, scores=0.499999)]), images)
    assert apart.agreement == pytest.approx(8 / 9)


def test_overlapping_boxes_of_equal_score_may_replace_each_other_if_others_do_not_move():
    found = made(40)
    step = torch.tensor([0.0, 0, 6, 6])
    rivals = found
    for index in range(6):
        rivals = changed(rivals, index, boxes=found.boxes[index] + step, scores=found.scores[index] * 0.99999)
    apart = difference([found], [rivals])
    assert (apart.agreement, apart.tied) == (pytest.approx(34 / 40), 12)
    assert apart.within(1e-4)
    assert not difference([found], [found._replace(boxes=found.boxes + step)]).within(1e-4)
    far = changed(rivals, slice(0, 6), boxes=found.boxes[:6] + 5000)
    assert not difference([found], [far]).within(1e-4)


def test_full_lists_may_end_differently():
    found = made(8)
    last = changed(found, 7, boxes=torch.tensor([900.0, 0, 950, 50]), scores=found.scores[7] * 1.0001)
    assert difference([found], [last]).agreement == 1.0
    middle = changed(found, 3, boxes=torch.tensor([900.0, 0, 950, 50]), scores=found.scores[3] * 1.0001)
    assert difference([found], [middle]).agreement == pytest.approx(14 / 16)
    flat = found._replace(scores=torch.full((8,), 0.3))
    moved = flat._replace(boxes=flat.boxes + 1000)
    assert not difference([flat], [moved]).within(1.0)  # every detection is at the end of its list


def test_detections_are_not_compared_with_other_outputs_or_with_none():
    found, none = made(2), made(0)
    with pytest.raises(ValueError, match="returns detections, and the second \\(2, 3\\)"):
        difference([found], torch.zeros(2, 3))
    with pytest.raises(NothingToCompareError, match="without detections"):
        difference([none], [none])
    assert difference([none, found], [none, found]).images == 2
    with pytest.raises(ValueError, match="not finite"):
        difference([changed(found, 0, scores=torch.nan)], [found])
    assert difference([found], [changed(found, 0, scores=torch.nan)]).agreement < 1


def test_a_detector_that_finds_nothing_shows_its_best_boxes_while_it_is_verified():
    model, images = Scripted([made(3)], threshold=0.99), torch.zeros(1, 3, 4, 4)
    with sensitive(model, images):
        assert len(model(images)[0].scores) == 3
    assert model.score_threshold == 0.99
    model.score_threshold = 0.0
    with sensitive(model, images):
        assert model.score_threshold == 0.0


def test_loaders_give_targets_of_each_image_for_the_box_ap():
    found = made(4)
    model, perfect = Scripted([found, found], 0.0), {"boxes": found.boxes, "labels": found.labels}
    images = torch.zeros(2, 3, 8, 8)
    named = {
        "image": images,
        "boxes": [found.boxes] * 2,
        "labels": [found.labels] * 2,
        "crowd": [torch.zeros(4) > 0] * 2,
    }
    worse = Scripted([without(found, 0), found], 0.0)
    for batch in ((images, [perfect, perfect]), named):
        apart = compare(model, worse, [batch])
        assert apart.score == "box AP"
        assert apart.scores[0] == pytest.approx(1.0, rel=FLOAT64)
        assert apart.scores[1] < 1
        assert "box AP 100.00% -> " in apart.summary()
        assert "of 15 detections found by both" in apart.summary()
    with pytest.raises(ValueError, match="targets for each image; got 1 for 2"):
        compare(model, worse, [(images, [perfect])])


def test_images_of_several_sizes_come_as_lists_with_their_targets():
    images = [torch.zeros(3, 8, 8), torch.zeros(3, 4, 6)]
    boxes = [torch.zeros(1, 4), torch.zeros(0, 4)]
    labels = [torch.tensor([1]), torch.tensor([], dtype=torch.long)]
    pairs = [{"boxes": box, "labels": label} for box, label in zip(boxes, labels, strict=True)]
    for batch in ((images, pairs), {"image": images, "boxes": boxes, "labels": labels}):
        found = list(batches([batch], nn.Identity()))
        assert [tuple(x.shape) for x, _ in found] == [(1, 3, 8, 8), (1, 3, 4, 6)]
        assert [target[0]["labels"].tolist() for _, target in found] == [[1], []]


def test_boxes_without_area_have_partners():
    found = made(3)
    flat = changed(found, 1, boxes=torch.tensor([5.0, 5, 5, 9]))
    assert difference([flat], [flat]).agreement == 1.0
    assert difference([flat], [changed(flat, 1, boxes=torch.tensor([5.0, 6, 5, 9]))]).agreement == pytest.approx(4 / 6)


@pytest.mark.parametrize("seed", range(6))
def test_box_ap_is_that_of_pycocotools(seed):
    coco, evaluation = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    g = torch.Generator().manual_seed(seed)
    ours, images, objects, detections = AveragePrecision(), [], [], []
    for index in range(1, 6):
        count, found = (int(torch.randint(0, most, (1,), generator=g)) for most in (9, 140))
        corner = torch.randint(0, 60, (count, 2), generator=g)
        boxes = torch.cat((corner, corner + torch.randint(5, 40, (count, 2), generator=g)), 1).double()
        labels, crowd = torch.randint(0, 4, (count,), generator=g), torch.rand(count, generator=g) < 0.2
        pick = torch.randint(0, max(count, 1), (found if count else 0,), generator=g)
        theirs = boxes[pick] + torch.randint(-6, 7, (len(pick), 4), generator=g) * 0.5  # many equal overlaps
        theirs[:, 2:] = torch.maximum(theirs[:, 2:], theirs[:, :2] + 1)
        guess = torch.where(torch.rand(len(pick), generator=g) < 0.8, labels[pick], 3)
        scores = torch.randperm(1000, generator=g)[: len(pick)].double() / 1000
        ours.add(theirs, scores, guess, boxes, labels, crowd)
        images.append({"id": index, "height": 100, "width": 100})
        for box, label, flag in zip(boxes.tolist(), labels.tolist(), crowd.tolist(), strict=True):
            w, h = box[2] - box[0], box[3] - box[1]
            entry = {"id": len(objects) + 1, "image_id": index, "category_id": label, "bbox": [*box[:2], w, h]}
            objects.append({**entry, "area": w * h, "iscrowd": int(flag)})
        for box, label, score in zip(theirs.tolist(), guess.tolist(), scores.tolist(), strict=True):
            size = [box[2] - box[0], box[3] - box[1]]
            detections.append({"image_id": index, "category_id": label, "bbox": [*box[:2], *size], "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        reference = coco.COCO()
        categories = [{"id": label} for label in range(4)]
        reference.dataset = {"info": {}, "images": images, "annotations": objects, "categories": categories}
        reference.createIndex()
        found = evaluation.COCOeval(reference, reference.loadRes(detections), "bbox")
        found.evaluate()
        found.accumulate()
        found.summarize()
    assert ours.value() == pytest.approx(found.stats[0], rel=FLOAT64)


def test_box_ap_without_objects_is_unknown():
    nothing = AveragePrecision()
    nothing.add(made(2).boxes, made(2).scores, made(2).labels, torch.zeros(0, 4), torch.zeros(0), torch.zeros(0) > 0)
    assert nothing.value() is None
    tally = Tally()
    tally.add([made(2)], [made(2)], [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0)}])
    assert tally.difference().scores is None
