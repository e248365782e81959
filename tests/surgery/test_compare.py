"""Differences between outputs, tensor by tensor, and the labels that give accuracies."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tolerances import FLOAT64
from widefield.surgery.compare import Reference, Tally, compare, difference
from widefield.surgery.inputs import batches


def tallied(*calls, **options):
    tally = Tally()
    for call in calls:
        tally.add(*call, **options)
    return tally.difference()


SCALES = st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(0, 1)), min_size=1, max_size=4)


@given(scales=SCALES, split=st.integers(1, 4))
def test_each_output_is_measured_against_its_own_size(scales, split):
    before = [scale * torch.randn(5, 3, dtype=torch.double) for scale, _ in scales]
    after = [b + share * scale * torch.randn_like(b) for b, (scale, share) in zip(before, scales, strict=True)]
    change = tallied(
        *(([b[part] for b in before], [a[part] for a in after]) for part in (slice(split), slice(split, 5)))
    )
    gaps = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(after, before, strict=True)]
    norms = [((a - b).norm() / b.norm()).item() for a, b in zip(after, before, strict=True)]
    assert change.relative == pytest.approx(max(gaps), rel=FLOAT64)
    assert change.relative == pytest.approx(difference(before, after).relative, rel=FLOAT64)
    assert change.rms == pytest.approx(max(norms), rel=FLOAT64)
    worst = gaps.index(max(gaps))
    assert change.scale == before[worst].abs().max()
    assert change.images == 5


def test_a_wrong_score_does_not_hide_next_to_large_boxes():
    boxes = 1e4 * torch.ones(2, 4)
    change = tallied(((boxes, torch.ones(2)), (boxes, torch.zeros(2))))
    assert (change.max_abs, change.scale, change.relative, change.rms) == (1, 1, 1, 1)


@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([0, 1, -1]), torch.tensor([[0], [1], [-1]]), torch.tensor([0, 1, -1], dtype=torch.int8),
        [0, 1, -1], np.array([0, 1, -1], dtype=np.int16), (0, 1, -1), list(torch.tensor([0, 1, -1])),
    ],
    ids=repr,
)  # fmt: skip
def test_labels_may_be_any_whole_numbers(labels):
    first, second = torch.eye(3)[[0, 0, 2]], torch.eye(3)[[0, 1, 2]]
    change = tallied((first, second, labels))
    assert (change.accuracy_before, change.accuracy_after) == (0.5, 1.0)
    model = nn.Flatten()
    images = first.reshape(3, 3, 1, 1)
    for batch in ((images, labels), {"image": images, "label": labels}):
        assert compare(model, model, [batch]).accuracy_before == 0.5


@pytest.mark.parametrize("labels", [None, ["cat", "dog", "cow"], torch.rand(3), [{"boxes": 1}] * 3, torch.ones(3, 2)])
def test_what_is_no_class_of_each_image_is_left_alone(labels):
    assert tallied((torch.eye(3), torch.eye(3), labels)).accuracy_before is None


@pytest.mark.parametrize("labels", [torch.tensor([0]), [0, 1], np.arange(4)])
def test_labels_must_be_as_many_as_images(labels):
    with pytest.raises(ValueError, match=f"{len(labels)} labels for 3 images"):
        tallied((torch.eye(3), torch.eye(3), labels))


class Total(nn.Module):
    """Returns one number for all images."""

    def forward(self, x):
        return x.sum()


def test_images_are_counted_whatever_the_outputs_are():
    model = Total()
    loader = [torch.ones(3, 1, 2, 2), torch.ones(2, 1, 2, 2)]
    assert compare(model, model, loader).images == 5
    assert tallied((torch.tensor(2.0), torch.tensor(3.0))).images == 1
    assert tallied(((torch.tensor(2.0), torch.ones(4, 2)),) * 2).images == 4
    rows = torch.eye(6)  # two rows per image are not classes
    change = tallied((rows, rows, torch.arange(3)), images=3)
    assert (change.images, change.agreement, change.accuracy_before) == (3, None, None)


def test_there_must_be_something_to_compare():
    none = {"boxes": torch.empty(0, 4), "scores": torch.empty(0)}
    with pytest.raises(ValueError, match="nothing to compare: the outputs hold no numbers"):
        difference(none, none)
    with pytest.raises(ValueError, match="nothing to compare"):
        tallied((none, none), images=2)
    with pytest.raises(ValueError, match="nothing to compare"):
        compare(nn.Flatten(), nn.Flatten(), torch.empty(0, 1, 2, 2))
    some = {"boxes": torch.ones(1, 4), "scores": torch.ones(1)}
    assert tallied((none, none), (some, some), images=2).images == 4  # one image without detections is allowed
    assert tallied((torch.zeros(2), torch.ones(2))).rms == math.inf


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_second_output_that_is_not_finite_is_infinitely_far(wrong):
    before = torch.randn(2, 3, 4, 5)
    after = before.clone()
    after[1, 2, 0, 3] = wrong
    change = tallied((before, after))
    assert (change.max_abs, change.rms) == (math.inf, math.inf)
    assert not change.within(1e6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int32])
def test_maps_of_any_type_and_layout_are_measured_in_float64(dtype):
    before, after = (10 * torch.randn(3, 4, 5, 6) for _ in range(2))
    before, after = before.to(dtype, memory_format=torch.channels_last), after.to(dtype)
    change = tallied((before, after))
    gap = after.double() - before.double()
    assert change.max_abs == gap.abs().max()
    assert change.scale == before.double().abs().max()
    assert change.rms == pytest.approx((gap.norm() / before.double().norm()).item(), rel=FLOAT64)


class Counted(nn.Module):
    """Doubles images, and counts how often it is called."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return 2 * x.flatten(1)


class Other:
    """A loader of two batches, which are others in every pass."""

    def __iter__(self):
        return iter([torch.randn(2, 1, 2, 2), torch.randn(3, 1, 2, 2)])


def test_a_reference_computes_each_batch_once():
    first, loader = Counted(), [torch.randn(2, 1, 2, 2), torch.randn(3, 1, 2, 2)]
    reference = Reference(first, loader)
    for scale in (1.0, 1.5, 3.0):
        second = nn.Sequential(nn.Flatten(), nn.Linear(4, 4, bias=False))
        nn.init.eye_(second[1].weight).data.mul_(scale)
        assert reference.compare(second) == compare(Counted(), second, loader)
    assert first.calls == 2


@pytest.mark.parametrize(("loader", "room"), [(Other(), 2**20), ([torch.ones(1, 1, 2, 2)] * 2, 0)])
def test_a_reference_computes_anew_what_it_does_not_hold(loader, room):
    first, second = Counted(), Counted()
    reference = Reference(first, loader, room=room)
    for calls in (2, 4):
        assert reference.compare(second).max_abs == 0
        assert first.calls == calls


def test_a_reference_holds_what_fits():
    first, loader = Counted(), [torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)]
    reference = Reference(first, loader, room=40)  # 16 bytes of images and 16 of outputs in each batch
    for calls in (2, 3):
        assert reference.compare(Counted()).max_abs == 0
        assert first.calls == calls


@pytest.mark.parametrize("loader", [None, 3])
def test_what_is_no_loader_is_told_what_one_is(loader):
    with pytest.raises(TypeError, match=r"loader must give batches of normalized images .* got (None|3) of type"):
        next(batches(loader, nn.Flatten()))


def test_a_tensor_and_a_loader_give_the_same_difference():
    first, second = nn.Linear(6, 4), nn.Linear(6, 4)
    first, second = nn.Sequential(nn.Flatten(), first), nn.Sequential(nn.Flatten(), second)
    x = torch.randn(5, 1, 2, 3)
    alone = compare(first, second, x)
    split = compare(first, second, [x[:2], (x[2:], None)])
    assert (alone.images, split.images) == (5, 5)
    assert alone.agreement == split.agreement
    assert alone.accuracy_before is None
    assert split.rms == pytest.approx(alone.rms)
    assert split.relative == pytest.approx(alone.relative)
    labels = first(x).argmax(1)
    labeled = compare(first, second, [(x, labels)])
    assert (labeled.accuracy_before, labeled.accuracy_after) == (1.0, alone.agreement)
    assert str(labeled).startswith("outputs on 5 images change by ")
    assert "\n" not in str(labeled)  # other texts hold it
    assert f"accuracy 100.00% -> {alone.agreement:.2%}" in labeled._repr_html_().replace("&gt;", ">")
