"""Boxes are compared, coded, assigned, sampled and suppressed as slow loops over plain numbers do it."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings
from torchvision.ops import batched_nms, box_iou, generalized_box_iou

import tolerances
from dense import naive_boxes
from dense.box_checks import tensor
from widefield.dense import boxes
from widefield.dense.boxes import BACKGROUND, IGNORED, Assigner, Assignment, BoxCoder, Sampler

FEW = settings(max_examples=60, deadline=None)

corner = st.integers(-2, 12)
side = st.integers(0, 6)
box = st.builds(lambda x, y, w, h: (x, y, x + w, y + h), corner, corner, side, side)
"""Boxes of whole pixels: equal overlaps, touching edges, and no area are common."""


def some(most, least=0):
    return st.lists(box, min_size=least, max_size=most)


# Overlaps


@FEW
@given(some(6), some(6), st.sampled_from(boxes.OVERLAPS))
def test_overlaps_of_pairs(a, b, mode):
    found = boxes.pairwise_iou(tensor(a), tensor(b), mode)
    expected = torch.tensor([[naive_boxes.overlap(x, y, mode) for y in b] for x in a], dtype=torch.float64)
    tolerances.close(found, expected.reshape(len(a), len(b)), tolerances.FLOAT64)
    assert bool((boxes.paired_iou(tensor(a), tensor(a), "iou") <= 1).all())


def test_overlaps_agree_with_torchvision():
    torch.manual_seed(0)
    a, b = (boxes.clip(torch.rand(50, 2).repeat(1, 2) + torch.tensor([0, 0, 0.1, 0.5]), (2, 2)) for _ in range(2))
    tolerances.close(boxes.pairwise_iou(a, b), box_iou(a, b), tolerances.FLOAT32)
    tolerances.close(boxes.pairwise_iou(a, b, "giou"), generalized_box_iou(a, b), tolerances.FLOAT32)


def test_an_unknown_overlap_is_refused():
    with pytest.raises(ValueError, match=r"mode.*'iou'"):
        boxes.pairwise_iou(tensor([]), tensor([]), "iuo")


def test_half_precision_is_computed_in_float32():
    a = torch.tensor([[0.0, 0.0, 1000.0, 1000.0]], dtype=torch.bfloat16)  # areas exceed float16
    assert boxes.pairwise_iou(a, a).dtype == torch.float32
    assert Assigner()(a, a.double()).objects.tolist() == [0]
    assert BoxCoder().decode(a, torch.zeros(1, 4, dtype=torch.float16)).tolist() == a.tolist()


# Coding


@FEW
@given(some(5, 1), some(5, 1))
def test_decoding_inverts_encoding(references, objects):
    count = min(len(references), len(objects))
    grown = torch.tensor([0, 0, 1, 1])  # every side is at least 1
    a, b = tensor(references[:count]) + grown, tensor(objects[:count]) + grown
    for stds in ((1, 1, 1, 1), (0.1, 0.1, 0.2, 0.2)):
        coder = BoxCoder(stds)
        tolerances.close(coder.decode(a, coder.encode(a, b)), b, tolerances.FLOAT64)


def test_sides_are_bounded_on_both_sides():
    reference = tensor([[0, 0, 10, 10]])
    sides = [
        (found[:, 2:] - found[:, :2]).tolist()
        for found in (BoxCoder().decode(reference, tensor([[0, 0, d, -d]])) for d in (5.0, 90.0))
    ]
    assert sides[0] == sides[1]
    assert sides[0][0] == pytest.approx([625, 0.16])


def test_boxes_per_class_are_decoded_by_broadcasting():
    references, deltas = tensor([[0, 0, 10, 10], [5, 5, 6, 9]]), torch.randn(2, 3, 4, dtype=torch.float64)
    together = BoxCoder().decode(references[:, None], deltas, (8, 9))
    for label in range(3):
        assert torch.equal(together[:, label], BoxCoder().decode(references, deltas[:, label], (8, 9)))


def test_no_boxes_are_coded():
    assert BoxCoder().encode(tensor([]), tensor([])).shape == (0, 4)
    assert BoxCoder().decode(tensor([]), tensor([]), (4, 4)).shape == (0, 4)


@pytest.mark.parametrize("stds", [(1, 1, 1), (1, 1, 0, 1), (1, 1, 1, float("nan"))])
def test_wrong_stds_are_refused(stds):
    with pytest.raises(ValueError, match="stds"):
        BoxCoder(stds)


# Assignment


@FEW
@given(
    some(12),
    some(5),
    some(2),
    st.sampled_from([(0.7, 0.3, 0.3), (0.5, 0.5, 0.5), (0.5, 0.4, 0.0), (0.6, 0.6, 0.1)]),
    st.booleans(),
    st.sampled_from([None, 0.5, 0.99]),
)
@example([(0, 0, 2, 2)], [], [(0, 0, 4, 4)], (0.7, 0.3, 0.3), True, 0.5)
@example([(0, 0, 2, 2), (1, 1, 2, 2)], [(0, 0, 2, 2)], [(0, 0, 4, 4)], (0.5, 0.4, 0.0), True, 0.5)
@example([(0, 0, 1, 2), (0, 0, 2, 5)], [(0, 0, 2, 2)], [], (0.5, 0.5, 0.5), False, None)  # IoU 1/2 and 2/5
@example([(3, 3, 3, 3)] * 2, [(0, 0, 1, 1), (3, 3, 3, 3)], [], (0.5, 0.4, 0.0), True, None)
def test_assignment(candidates, objects, crowd, limits, low_quality, crowd_part):
    positive, negative, minimum = limits
    rule = {"positive": positive, "negative": negative, "minimum": minimum, "low_quality": low_quality}
    found = Assigner(**rule, crowd=crowd_part)(tensor(candidates), tensor(objects), tensor(crowd))
    index, overlaps = naive_boxes.assign(candidates, objects, crowd, **rule, crowd_part=crowd_part)
    assert found.objects.tolist() == index
    tolerances.close(found.overlaps, torch.tensor(overlaps, dtype=torch.float64), tolerances.FLOAT64)


@pytest.mark.parametrize("minimum", [0.0, 0.3])
def test_assignment_of_many_boxes_equals_that_of_the_whole_table(minimum):
    """So many boxes are computed in parts; the best boxes of an object lie in several of them."""
    torch.manual_seed(0)
    corners = torch.randint(0, 300, (9000, 2))
    candidates = torch.cat((corners, corners + torch.randint(0, 20, (9000, 2))), 1).double()
    objects = torch.cat((candidates[::300], candidates[:5] + 0.5, tensor([[900, 900, 920, 920]])))
    candidates = torch.cat((candidates, candidates))
    crowd = tensor([[0, 0, 90, 90]])
    found = Assigner(minimum=minimum, crowd=0.5)(candidates, objects, crowd)
    table = boxes.pairwise_iou(candidates, objects)
    table[boxes.pairwise_iou(candidates, crowd, "iof")[:, 0] > 0.5] = -1
    best, expected = table.max(1)
    expected[best < 0.7] = IGNORED
    expected[(best < 0.3) & (best >= 0)] = BACKGROUND
    for place, largest in enumerate(table.amax(0)):
        if largest >= minimum:
            expected[table[:, place] == largest] = place
    assert torch.equal(found.objects, expected)
    assert torch.equal(found.overlaps, best)
    assert len(found.objects[found.objects >= 0]) > 50


def test_objects_can_be_put_before_the_boxes():
    found = Assignment(torch.tensor([1, BACKGROUND]), torch.tensor([0.6, 0.2])).with_objects(3)
    assert found.objects.tolist() == [0, 1, 2, 1, BACKGROUND]
    assert found.overlaps.tolist() == pytest.approx([1, 1, 1, 0.6, 0.2])


@pytest.mark.parametrize("given_", [{"positive": 1.5}, {"negative": 0.8}, {"crowd": -1}])
def test_wrong_thresholds_are_refused(given_):
    with pytest.raises(ValueError, match=next(iter(given_))):
        Assigner(**given_)


# Sampling


def _assignment(positive, background, ignored):
    """Return an assignment with so many boxes of each kind, mixed."""
    index = torch.tensor([0] * positive + [BACKGROUND] * background + [IGNORED] * ignored)
    return Assignment(index[torch.randperm(len(index))], torch.zeros(len(index)))


@FEW
@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 5), st.integers(1, 40), st.sampled_from([0.0, 0.25, 0.5]))
def test_samples_have_the_right_kinds_and_numbers(positive, background, ignored, num, fraction):
    given_ = _assignment(positive, background, ignored)
    sample = Sampler(num, fraction)(given_)
    assert len(sample.positive) == min(positive, int(num * fraction))
    assert len(sample.negative) == min(background, num - len(sample.positive))
    assert bool((given_.objects[sample.positive] >= 0).all())
    assert bool((given_.objects[sample.negative] == BACKGROUND).all())
    for part in sample:
        assert torch.equal(part, part.unique())  # rising, without repetition


def test_samples_follow_the_generator_and_large_ones_draw_nothing():
    given_ = _assignment(50, 500, 3)
    torch.manual_seed(3)
    first = Sampler(64, 0.25)(given_)
    second = Sampler(64, 0.25)(given_)
    torch.manual_seed(3)
    assert all(map(torch.equal, first, Sampler(64, 0.25)(given_)))
    assert not torch.equal(first.negative, second.negative)
    before = torch.get_rng_state()
    everything = Sampler(100000)(given_)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(everything.positive) + len(everything.negative) == 550


def test_every_box_is_sampled_equally_often():
    given_ = Assignment(torch.full((20,), BACKGROUND), torch.zeros(20))
    torch.manual_seed(0)
    counts = torch.zeros(20)
    for _ in range(2000):
        counts[Sampler(5)(given_).negative] += 1
    assert bool(((counts - 500).abs() < 5 * (2000 * 0.25 * 0.75) ** 0.5).all())  # five standard deviations


# NMS


@FEW
@given(some(12), st.data())
def test_suppression_by_label(candidates, data):
    count = len(candidates)
    values = data.draw(st.lists(st.integers(0, 4), min_size=count, max_size=count))  # equal scores are common
    labels = data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    threshold = data.draw(st.sampled_from([0.31, 0.5, 0.71]))
    scores = torch.tensor(values, dtype=torch.float64) / 4
    found = boxes.nms_by_label(tensor(candidates), scores, torch.tensor(labels, dtype=torch.long), threshold)
    assert found.tolist() == naive_boxes.nms(candidates, values, labels, threshold)


def test_suppression_of_many_boxes_equals_torchvisions():
    torch.manual_seed(0)
    corners = torch.rand(2500, 2, dtype=torch.float64) * 200
    candidates = torch.cat((corners, corners + 5 + torch.rand(2500, 2, dtype=torch.float64) * 60), 1)
    scores, labels = torch.rand(2500, dtype=torch.float64), torch.randint(0, 7, (2500,))
    for count in (900, 2500):  # one pass over all labels, and one per label
        given_ = candidates[:count], scores[:count], labels[:count]
        assert torch.equal(boxes.nms_by_label(*given_, 0.5), batched_nms(*given_, 0.5))


def test_far_labels_and_negative_coordinates_do_not_interfere():
    """In float32, moving boxes apart by label would round their coordinates to 1/8 pixel here."""
    pair = [[-300.0, 0.0, -299.0, 1.0], [-300.0, 0.0, -299.0, 1.02], [1300.0, 0.0, 1301.0, 1.0]]
    found = boxes.nms_by_label(torch.tensor(pair), torch.tensor([0.9, 0.8, 0.7]), torch.tensor([1202] * 3), 0.985)
    assert found.tolist() == [0, 1, 2]
    left = torch.tensor([[-300.0, -101.0, -200.0, -1.0], [-199.0, 0.0, -99.0, 100.0]])  # moved by 101, they coincide
    assert len(boxes.nms_by_label(left, torch.tensor([0.9, 0.8]), torch.tensor([1, 0]), 0.1)) == 2


def test_detections_of_one_box_or_a_box_per_class():
    torch.manual_seed(0)
    shared, scores = tensor([[0, 0, 10, 10], [1, 1, 11, 11], [30, 30, 40, 40]]), torch.rand(3, 4, dtype=torch.float64)
    limits = {"score_threshold": 0.2, "nms_threshold": 0.5, "max_per_image": 6}
    kept = boxes.nms_per_class(shared, scores, **limits)
    other = boxes.nms_per_class(shared[:, None].expand(3, 4, 4), scores, **limits)
    assert all(map(torch.equal, kept, other))
    rows = kept.places // 4
    assert torch.equal(kept.places % 4, kept.labels)
    assert torch.equal(scores[rows, kept.labels], kept.scores)
    assert torch.equal(shared[rows], kept.boxes)
    assert kept.scores.tolist() == sorted(kept.scores.tolist(), reverse=True)


def test_scores_must_exceed_the_threshold():
    kept = boxes.nms_per_class(tensor([[0, 0, 9, 9]]), torch.tensor([[0.5, 0.75]]), score_threshold=0.5)
    assert kept.labels.tolist() == [1]


def test_no_detections():
    for count, threshold in ((0, 0.05), (3, 1.0)):
        kept = boxes.nms_per_class(torch.rand(count, 4), torch.rand(count, 5), score_threshold=threshold)
        assert [len(part) for part in kept] == [0] * 4
        assert kept.boxes.shape == (0, 4)


@settings(deadline=None, max_examples=80)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 5)),
    st.sampled_from([0.0, 0.05, 0.5, 0.73, 1.0]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.integers(1, 30),
    st.integers(0, 999),
)
def test_the_best_of_a_level_are_above_the_threshold_and_few(sides, threshold, dtype, count, seed):
    """Scores are in steps, so that many are equal, and some equal the threshold."""
    per_cell, classes, height, width = sides
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randint(-9, 9, (per_cell * classes, height, width), generator=g) / 2).to(dtype)
    found = boxes.best_of_level(logits, classes, threshold, count)
    listed = []
    for row in range(height):
        for column in range(width):
            for box in range(per_cell):
                for label in range(classes):
                    logit = logits[box * classes + label, row, column]
                    score = (logit if dtype == torch.float64 else logit.float()).sigmoid().item()
                    if score > threshold:
                        listed.append((score, label, (row * width + column) * per_cell + box))
    listed = sorted(listed, key=lambda one: -one[0])[:count]
    assert list(zip(*(part.tolist() for part in found), strict=True)) == listed
