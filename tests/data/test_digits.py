import copy
import pickle

import numpy as np
import pytest
import torch

from widefield.data import Digits


def labels(data):
    return np.array([sample["label"] for sample in data])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 32])
def test_a_sample_has_the_promised_form(channels, size):
    data = Digits("val", size=size, channels=channels)
    sample = data[0]
    assert sample["image"].shape == (channels, size, size)
    assert sample["image"].dtype == torch.float32
    assert type(sample["label"]) is int
    assert len(data.mean) == len(data.std) == channels
    assert data.image_size == size
    assert data.classes == tuple("0123456789")
    assert torch.equal(sample["image"][0], sample["image"][-1])


def test_mean_and_std_are_those_of_the_train_pixels():
    images = torch.stack([sample["image"] for sample in Digits("train", size=8)])
    assert images.mean().abs() < 0.002
    assert (images.std() - 1).abs() < 0.002


def test_the_split_is_stratified_fixed_and_disjoint():
    train, val = Digits("train", size=8), Digits("val", size=8, seed=5)
    assert (len(train), len(val)) == (1442, 355)
    share = np.bincount(labels(val)) / np.bincount(np.concatenate([labels(train), labels(val)]))
    assert ((share > 0.19) & (share <= 0.2)).all()
    pixels = [{sample["image"].numpy().tobytes() for sample in data} for data in (train, val)]
    assert pixels[0].isdisjoint(pixels[1])
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(val, Digits("val", size=8), strict=True))


def test_augmentation_is_a_function_of_seed_epoch_and_index():
    data, again = (Digits("train", augment=True, seed=3) for _ in range(2))
    plain, first = Digits("train")[7]["image"], data[7]["image"]
    assert not torch.equal(first, plain)
    assert (first - plain).abs().mean() < 1
    assert torch.equal([again[i] for i in (9, 8, 7)][-1]["image"], first)
    data.set_epoch(1)
    assert not torch.equal(data[7]["image"], first)
    data.set_epoch(0)
    assert torch.equal(data[7]["image"], first)
    assert not torch.equal(Digits("train", augment=True, seed=4)[7]["image"], first)


def test_val_is_never_augmented():
    assert torch.equal(Digits("val", augment=True)[0]["image"], Digits("val")[0]["image"])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda data: pickle.loads(pickle.dumps(data))])
def test_copies_have_their_own_epoch_and_share_it_with_workers(copied):
    data = Digits("train", augment=True)
    twin = copied(data)
    first = data[0]["image"]
    twin.set_epoch(2)
    assert torch.equal(data[0]["image"], first)
    assert not torch.equal(twin[0]["image"], first)
    assert twin._epoch.is_shared()


def test_indices_behave_as_in_a_sequence():
    data = Digits("val", size=8)
    assert torch.equal(data[-1]["image"], data[len(data) - 1]["image"])
    with pytest.raises(IndexError):
        data[len(data)]


def test_writing_into_a_sample_leaves_the_set_alone():
    data = Digits("val", size=8, channels=1)
    before = data[0]["image"].clone()
    data[0]["image"].zero_()
    assert torch.equal(data[0]["image"], before)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"channels": 2}, ValueError, "channels must be 1 or 3; got 2"),
        ({"size": 1.5}, TypeError, "size must be an integer"),
        ({"seed": -1}, ValueError, "seed must be from 0"),
    ],
)
def test_bad_options_are_refused(options, error, text):
    with pytest.raises(error, match=text):
        Digits("train", **options)


def test_bad_epochs_are_refused():
    with pytest.raises(ValueError, match="epoch must be at least 0; got -1"):
        Digits("train").set_epoch(-1)
