"""Crops of photographs: the class is the photograph."""

import pytest
import torch
from finding import places

from widefield import data
from widefield.data import PhotoCrops

TWO = ["china", "flower"]


def crops(split, **options):
    return PhotoCrops(split, **{"photographs": TWO, "count": 24, "size": 24, **options})


def columns_of(split, label):
    """Return the first columns of color crops in their photograph."""
    found = crops(split, color=True, hflip=0)
    (photograph,) = data.photographs([TWO[label]])
    pixels = [(255 * (found[k]["image"] * 0.25 + 0.5)).round().to(torch.uint8) for k in range(label, 24, 2)]
    return [places(photograph.pixels, crop)[0][1] for crop in pixels]


@pytest.mark.parametrize("label", [0, 1])
def test_no_pixel_is_in_both_splits(label):
    for left in columns_of("train", label):
        assert not {left * 6 // 640, (left + 23) * 6 // 640} & {1, 4}
    for left in columns_of("val", label):
        assert {left * 6 // 640, (left + 23) * 6 // 640} <= {1, 4}
    assert len(set(columns_of("train", label))) > 6


def test_train_crops_change_with_the_epoch_and_val_crops_never():
    train, val = crops("train"), crops("val")
    before = train[3]["image"], val[3]["image"]
    assert torch.equal(before[0], crops("train")[3]["image"])
    for each in (train, val):
        each.set_epoch(1)
    assert not torch.equal(train[3]["image"], before[0])
    assert torch.equal(val[3]["image"], before[1])
    assert not torch.equal(crops("val", seed=1)[3]["image"], before[1])


def test_mean_and_contrast_give_nothing_away():
    for sample in map(crops("train").__getitem__, range(24)):
        image = sample["image"]
        assert image.shape == (3, 24, 24)
        assert torch.equal(image[0], image[2])
        assert abs(image.mean()) < 1e-4
        assert image[0].std() == pytest.approx(1, abs=1e-3)
    colored = crops("train", color=True)[1]["image"]
    assert not torch.equal(colored[0], colored[2])


def test_classes_are_balanced_and_flat_places_rare():
    train = crops("train", count=60)
    assert [train[k]["label"] for k in range(4)] == [0, 1, 0, 1]
    assert train.classes == tuple(TWO)
    plain = crops("train", color=True, count=60)
    contrasts = [float((plain[k]["image"] * 0.25).mean(0).std()) for k in range(60)]
    assert sum(contrast < 10 / 255 for contrast in contrasts) <= 3


def test_sizes_of_crops_span_the_range_and_are_told():
    train = crops("train", crop_sizes=(20, 80), size=32, count=60)
    sides = torch.stack([train[k]["side"] for k in range(60)])
    assert sides.min() < 25 < 65 < sides.max() <= 80
    assert train[0]["image"].shape == (3, 32, 32)


def test_all_twelve_are_cut_from_memory():
    pytest.importorskip("skimage", reason="needs the extra [photographs]")
    train, val = data.create_both("photo_crops", size=32)
    assert (len(train), len(val), len(train.classes)) == (6_000, 1_200, 12)
    assert train.found() == "train: 6,000 images, 12 classes"
    assert [train[k]["label"] for k in range(12)] == list(range(12))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"crop_sizes": (10, 200)}, ValueError, "at most 106"),
        ({"crop_sizes": (60, 20)}, ValueError, "increasing"),
        ({"crop_sizes": 32}, TypeError, "a pair"),
        ({"size": 128}, ValueError, "at most 106"),
        ({"photographs": ["china", "china"]}, ValueError, "twice"),
        ({"hflip": 2}, ValueError, "hflip"),
    ],
)
def test_wrong_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        crops("train", **options)
