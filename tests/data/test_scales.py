import math

import numpy as np
import pytest
import torch

from widefield.data import Scales


@pytest.fixture(scope="module")
def train() -> Scales:
    return Scales("train", count=1600)


def same(a: dict, b: dict) -> bool:
    return a["label"] == b["label"] and all(torch.equal(a[k], b[k]) for k in ("image", "size", "mask"))


def test_a_sample_has_the_promised_form(train):
    sample = train[3]
    assert sample["image"].shape == (3, 32, 32)
    assert sample["image"].dtype == torch.float32
    assert type(sample["label"]) is int
    assert sample["size"].shape == ()
    assert sample["size"].dtype == torch.float32
    assert sample["mask"].shape == (32, 32)
    assert sample["mask"].dtype == torch.bool
    pixels = sample["image"] * 0.27 + 0.5
    assert -1e-6 <= pixels.min() < pixels.max() <= 1 + 1e-6


def test_mean_and_std_describe_the_images(train):
    images = torch.stack([sample["image"] for sample in train])
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=0.05, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3)), torch.ones(3), atol=0.2, rtol=0)


def test_a_sample_depends_on_seed_split_and_index_alone(train):
    fewer = Scales("train", count=5)
    for index in (4, 0, 3):
        assert same(fewer[index], train[index])
    assert not same(Scales("train", count=1, seed=1)[0], train[0])
    assert not same(Scales("val", count=1)[0], train[0])


def test_writing_into_a_sample_leaves_the_set_alone(train):
    sample, before = train[0], train[0]
    for name in ("image", "size", "mask"):
        sample[name].fill_(1)
    assert same(train[0], before)


def test_the_epoch_changes_nothing():
    data = Scales("train", count=2)
    before = data[1]
    data.set_epoch(7)
    assert same(data[1], before)


def test_rendering_ignores_the_number_of_threads():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = Scales("train", count=40)
        torch.set_num_threads(3)
        three = Scales("train", count=40)
    finally:
        torch.set_num_threads(threads)
    assert all(same(a, b) for a, b in zip(one, three, strict=True))


def test_the_images_are_those_of_the_first_release():
    # Pixels are computed only with correctly rounded operations, so this holds on every machine.
    images = torch.stack([s["image"] for s in Scales("train", count=16)])
    pixels = (images * 0.27 + 0.5).mul(255).round().to(torch.int64)
    weights = torch.arange(pixels.numel()).reshape(pixels.shape) % 251
    assert int((pixels * weights).sum()) == 851_084_208


def test_no_image_is_in_both_splits(train):
    def images(data):
        return {sample["image"].numpy().tobytes() for sample in data}

    val = images(Scales("val", count=400))
    assert len(val) == 400
    assert val.isdisjoint(images(train))


def test_classes_are_balanced(train):
    assert len(train.classes) == len(set(train.classes)) == 8
    counts = np.bincount([sample["label"] for sample in train], minlength=8)
    assert counts.tolist() == [200] * 8


def test_sizes_are_log_uniform_over_more_than_two_octaves(train):
    octaves = np.log2([float(sample["size"]) for sample in train])
    assert math.log2(6) <= octaves.min()
    assert octaves.max() <= math.log2(28) + 1e-6
    assert np.ptp(octaves) > 2
    expected = np.linspace(math.log2(6), math.log2(28), len(octaves))
    assert np.abs(np.sort(octaves) - expected).max() < 0.1


def test_the_mask_agrees_with_the_size_and_lies_inside(train):
    for sample in train:
        side, mask = float(sample["size"]), sample["mask"]
        assert 0.25 * side**2 < mask.sum() < 0.75 * side**2
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        for span in (rows, columns):
            extent = int(span.max() - span.min()) + 1
            assert 0.7 * side - 1.5 < extent < 1.1 * side + 1.5  # thin tips cover no pixel's center


def test_objects_are_never_cut_by_the_border():
    data = Scales("train", count=80, object_sizes=(28, 28), rotation=180)
    areas = torch.tensor([float(s["mask"].sum()) for s in data]).reshape(-1, 8)
    assert ((areas - areas.mean(0)).abs() < 0.04 * areas.mean(0)).all()


def test_the_mask_marks_the_object_in_the_image():
    for sample in Scales("train", count=40, clutter=0):
        image, mask = sample["image"], sample["mask"]
        inside, outside = image[:, mask], image[:, ~mask]
        assert ((inside.median(1).values - outside.median(1).values).abs() > 0.5).any()


def test_color_says_nothing_of_the_class(train):
    lighter = [[] for _ in train.classes]
    for sample in train:
        gap = sample["image"][:, sample["mask"]].mean() - sample["image"][:, ~sample["mask"]].mean()
        lighter[sample["label"]].append(float(gap > 0))
    assert all(0.35 < np.mean(one) < 0.65 for one in lighter)


def test_clutter_and_rotation_do_what_they_say():
    flat, busy = (Scales("train", count=1, clutter=c)[0] for c in (0, 1))
    outside = ~flat["mask"]
    assert busy["image"][:, outside].std() > 2 * flat["image"][:, outside].std()
    upright = Scales("train", count=9, rotation=0, object_sizes=(20, 20))
    square = upright.classes.index("square")
    assert upright[square]["mask"].sum() == upright[square]["mask"].any(0).sum() * upright[square]["mask"].any(1).sum()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"size": 0}, ValueError, "size must be at least 1; got 0"),
        ({"count": 0}, ValueError, "count must be at least 1; got 0"),
        ({"count": 2.5}, TypeError, "count must be an integer; got 2.5"),
        ({"seed": -1}, ValueError, "seed must be from 0"),
        ({"object_sizes": (6, 40)}, ValueError, r"at most 29 in images of 32 pixels; got \(6, 40\)"),
        ({"object_sizes": (20, 10)}, ValueError, "increasing order"),
        ({"object_sizes": (1, 10)}, ValueError, "smallest of object_sizes must be from 4"),
        ({"object_sizes": 10}, TypeError, "must be a pair"),
        ({"clutter": 3}, ValueError, "clutter must be from"),
        ({"rotation": "free"}, TypeError, "rotation must be a number; got 'free'"),
    ],
)
def test_bad_options_are_refused(options, error, text):
    with pytest.raises(error, match=text):
        Scales("train", **options)
