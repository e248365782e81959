"""Scenes as crops of their objects with key points."""

import pickle

import pytest
import torch

from tolerances import FLOAT32, close
from widefield import data
from widefield.data import ScenePoses, Scenes, collate, crops


@pytest.fixture(scope="module")
def val():
    return ScenePoses("val", size=64, count=6)


def both(split="train", **options):
    return ScenePoses(split, size=64, count=5, **options)


def test_each_object_has_a_sample_with_its_key_points(val):
    scenes = Scenes("val", size=64, count=6)
    samples = list(val)
    place = 0
    for file, scene in enumerate(scenes):
        for number in range(len(scene["labels"])):
            sample = samples[place]
            place += 1
            assert sample["image"].shape == (3, 64, 64)
            assert int(sample["image_id"]) == file
            assert sample["size"].tolist() == [64, 64]
            assert torch.equal(sample["box"], scene["boxes"][number])
            assert int(sample["label"]) == int(scene["labels"][number])
            assert float(sample["area"]) == float(scene["area"][number])
            assert float(sample["box_score"]) == 1
            points = scene["keypoints"][number]
            seen = points[:, 2] > 0
            assert torch.equal(sample["truth"][:, 2], points[:, 2])
            assert torch.equal(sample["truth"][seen, :2], points[seen, :2] - 0.5)  # pixel indices
            back = crops.apply_matrix(sample["keypoints"][seen, :2].double(), crops.inverse(sample["affine"]))
            close(back.float(), sample["truth"][seen, :2], FLOAT32 * 10)
            assert not sample["keypoints"][~seen, :2].any()
    assert place == len(val)


def test_a_crop_shows_the_pixels_of_its_scene(val):
    sample = val[3]
    scene = Scenes("val", size=64, count=6)[int(sample["image_id"])]["image"]
    mean, std = torch.tensor(val.mean)[:, None, None], torch.tensor(val.std)[:, None, None]
    expected = crops.warp((scene * std + mean) * 255, sample["affine"][None], (64, 64))[0]
    close((sample["image"] * std + mean) * 255, expected, 0.51 / 255)  # crops of bytes are rounded


def test_every_person_is_in_one_sample_of_its_file(val):
    samples = list(val)
    counts = {}
    for sample in samples:
        file = int(sample["image_id"])
        assert bool(len(sample["people"])) == (file not in counts)
        counts.setdefault(file, sample)
    for file, first in counts.items():
        own = [sample["truth"] for sample in samples if int(sample["image_id"]) == file]
        assert torch.equal(first["people"], torch.stack(own))
        assert len(first["people_boxes"]) == len(first["people_area"]) == len(first["people_labels"]) == len(own)
        assert not first["people_crowd"].any()


def test_samples_are_functions_of_seed_epoch_and_index():
    train, other = both(), both()
    first = train[3]
    assert "people" not in first
    other[0]
    assert torch.equal(other[3]["image"], first["image"])
    copied = pickle.loads(pickle.dumps(train))
    assert torch.equal(copied[3]["affine"], first["affine"])
    train.set_epoch(1)
    assert not torch.equal(train[3]["affine"], first["affine"])
    assert not torch.equal(both(seed=1)[3]["image"], first["image"])
    assert torch.equal(both(augment=False)[3]["image"], both("train", augment=False)[3]["image"])


@pytest.mark.parametrize("udp", [False, True])
@pytest.mark.parametrize("hflip", [0, 1])
def test_key_points_follow_the_pixels(hflip, udp):
    """In flipped crops left and right change places, in the truth they do not."""
    train = both(hflip=hflip, udp=udp, crop_size=(40, 30), rotate_factor=40)
    mean, std = torch.tensor(train.mean)[:, None, None], torch.tensor(train.std)[:, None, None]
    for index in range(8):
        sample = train[index]
        order = list(train.skeleton.swapped) if hflip else list(range(5))
        truth = sample["truth"][order]
        seen = truth[:, 2] > 0
        assert torch.equal(sample["keypoints"][:, 2], truth[:, 2])
        close(sample["keypoints"][seen, :2], crops.apply_matrix(truth[seen, :2], sample["affine"]), FLOAT32)
        assert bool(torch.linalg.det(sample["affine"][:, :2]) < 0) == bool(hflip)
        pixels = train.pixels(int(sample["image_id"]))
        shown = (crops.warp(pixels, sample["affine"][None], (40, 30))[0] / 255 - mean) / std
        close(sample["image"], shown, FLOAT32)


def test_train_batches_stack():
    train = both()
    batch = collate([train[0], train[1]])
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "image": (2, 3, 64, 64),
        "keypoints": (2, 5, 3),
        "affine": (2, 2, 3),
        "label": (2,),
        "box": (2, 4),
        "box_score": (2,),
        "area": (2,),
        "truth": (2, 5, 3),
        "image_id": (2,),
        "size": (2, 2),
    }


def test_recipes_create_the_set_by_name():
    train, val = data.create_both("scene_poses", size=64, count=2, crop_size=(48, 32), hflip=0, rotation=0)
    assert train.image_shape == val.image_shape == (3, 48, 32)
    assert train.scenes.rotation == 0
    assert train.classes == Scenes.object_classes
    assert train.fingerprint() == data.create("scene_poses", "train", size=64, count=2).fingerprint()
    assert val.name(0) == "0"
    text = f"val: {len(val)} objects in 2 images, 5 key points, 8 classes"
    assert val.found() == text
    with pytest.raises(TypeError, match=r"has no option 'rotate_factors'.*Did you mean 'rotate_factor'"):
        data.create("scene_poses", "train", rotate_factors=3)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"crop_size": 1}, ValueError, "crop_size must be at least 2; got 1"),
        ({"padding": 0}, ValueError, "padding must be above 0; got 0"),
        ({"udp": "yes"}, TypeError, "udp must be True or False; got 'yes'"),
        ({"augment": 1}, TypeError, "augment must be True or False; got 1"),
        ({"scale_factor": (1.5, 0.5)}, ValueError, r"scale_factor must be a range .*got \(1.5, 0.5\)"),
        ({"shift_prob": 2}, ValueError, "shift_prob must be from 0.0 to 1; got 2"),
        ({"rotate_factor": -1}, ValueError, "rotate_factor must be from 0.0 to 180; got -1"),
        ({"min_upper_keypoints": 0}, ValueError, "min_upper_keypoints must be at least 1; got 0"),
        ({"size": 16}, ValueError, "size must be at least 32; got 16"),
        ({"turn": 3}, TypeError, "has no argument 'turn'"),
    ],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_wrong_options_are_refused_by_name(split, options, error, text):
    with pytest.raises(error, match=text):
        ScenePoses(split, **options)
