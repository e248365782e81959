"""A few images from any source, preprocessed for a model."""

import re

import numpy as np
import pytest
import torch
from made_objects import write_coco
from made_poses import write_keypoints
from made_segmentation import write_masks
from PIL import Image

from tolerances import FLOAT32, close
from widefield.data import Digits, Pictures


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cat/1.png", "cat/2.JPG", "dog/deep.png", "dog/notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".txt":
            path.write_text("no image")
        else:
            Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(path)
    return tmp_path


def test_photographs_are_a_function_of_seed_and_place():
    first, again, other = (Pictures(count=4, size=48, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.tensor(), again.tensor())
    assert not torch.equal(first.tensor(), other.tensor())
    assert torch.equal(Pictures(count=2, size=48, seed=3).tensor(), first.tensor()[:2])
    assert len(Pictures()) == 64
    assert first.classes == ()
    assert first.about["seed"] == 3
    assert first.name(2) == "photographs 2"
    assert len({image.sum().item() for image in first.tensor()}) == 4


def test_pixels_are_normalized_as_asked_and_come_back():
    plain = Pictures(count=3, size=32, mean=(0, 0, 0), std=(1, 1, 1)).tensor()
    assert 0 <= plain.min() < plain.max() <= 1
    pictures = Pictures(count=3, size=32)
    shown = pictures.shown(pictures.tensor())
    assert shown.shape == (3, 32, 32, 3)
    close(shown, plain.movedim(1, -1), FLOAT32)


def test_a_folder_is_searched_and_its_folders_are_classes(folder):
    pictures = Pictures(folder, size=24)
    assert len(pictures) == 3
    assert pictures.classes == ("cat", "dog")
    assert [pictures[i]["label"] for i in range(3)] == [0, 0, 1]
    assert pictures.name(2).endswith("deep.png")
    assert [len(batch["image"]) for batch in pictures.batches(2)] == [2, 1]
    assert Pictures(folder / "dog", size=24).classes == ()
    assert len(Pictures(folder, size=24, count=2)) == 2


def test_classes_are_the_folders_in_the_source_as_of_a_data_set(tmp_path):
    for place in ("cat/indoor", "cat/outdoor", "dog/indoor", ".hidden/x"):
        (tmp_path / place).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / place / "1.png")
    pictures = Pictures(tmp_path, size=8)
    assert pictures.classes == ("cat", "dog")
    assert [pictures[i]["label"] for i in range(3)] == [0, 0, 1]


def test_of_a_data_set_the_validation_part_is_taken(folder):
    digits = Digits("val", size=16)
    pictures = Pictures("digits", size=16)
    assert len(pictures) == len(digits)
    assert torch.equal(pictures[5]["image"], digits[5]["image"])
    assert pictures[5]["label"] == digits[5]["label"]
    assert pictures.classes == digits.classes
    gray = Pictures("digits", size=16, options={"channels": 1}, count=3)
    assert gray.tensor().shape == (3, 1, 16, 16)
    wide = Pictures("digits", size=16, options={"channels": 1}, count=3, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert wide.tensor().shape == (3, 3, 16, 16)
    (folder / "train").mkdir()
    (folder / "val").mkdir()
    (folder / "cat").rename(folder / "val" / "cat")
    assert Pictures(folder, size=24).classes == ("cat",)
    (folder / "val" / "cat" / "1.png").rename(folder / "val" / "1.png")
    assert Pictures(folder, size=24).classes == ()
    with pytest.raises(ValueError, match="size must be at least 1; got 0"):
        next(Pictures(count=1).batches(0))


@pytest.mark.parametrize(
    ("source", "given", "error", "message"),
    [
        ("photograph", {}, FileNotFoundError, "Did you mean 'photographs'?"),
        ("digits", {"options": {"sise": 3}}, TypeError, "no option 'sise'"),
        ("photographs", {"options": {"augment": True}}, TypeError, "options ['augment'] are for data sets"),
        ("photographs", {"count": 0}, ValueError, "count must be"),
        ("photographs", {"size": 0}, ValueError, "size must be"),
        (".", {}, FileNotFoundError, "holds no images"),
    ],
)
def test_what_cannot_be_is_refused(source, given, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=re.escape(message)):
        Pictures(source, **given)


def test_a_broken_file_is_named(folder):
    (folder / "cat" / "1.png").write_bytes(b"broken")
    with pytest.raises(OSError, match=r"cannot read the image .*1\.png"):
        Pictures(folder, size=24).tensor()


def test_images_of_a_set_for_segmentation_are_squares_with_their_masks(tmp_path):
    masks = write_masks(tmp_path, counts={"train": 1, "val": 3}, size=(40, 60))["val"]
    pictures = Pictures("masks", size=20, options={"root": tmp_path, "classes": ["sky", "sea", "ship"]})
    assert pictures.tensor().shape == (3, 3, 20, 20)
    assert pictures.classes == ()
    for sample, mask in zip(pictures, masks, strict=True):
        height, width = mask.shape
        left = round((width - height) / 2)
        assert sample["label"] == -1
        shown = sample["mask"]
        assert shown.shape == (20, 20)
        rows = torch.arange(20) * height // 20
        assert torch.equal(shown, torch.from_numpy(mask).long()[rows][:, left + rows])
    (batch,) = pictures.batches()
    assert batch["mask"].shape == (3, 20, 20)


def test_of_a_set_for_detection_the_images_are_taken(tmp_path):
    write_coco(tmp_path)
    pictures = Pictures("coco", size=20, options={"root": tmp_path, "masks": True, "scale": (60, 40)})
    assert pictures.classes == ()
    (batch,) = pictures.batches()
    assert {name: tuple(value.shape) for name, value in batch.items()} == {"image": (3, 3, 20, 20), "label": (3,)}


def test_scenes_come_in_batches_without_their_objects():
    (batch,) = Pictures("scenes", size=32, count=4, options={"count": 4}).batches()
    assert set(batch) == {"image", "mask", "label"}
    assert batch["mask"].shape == (4, 32, 32)


def test_of_a_set_for_pose_estimation_the_crops_are_taken(tmp_path):
    write_keypoints(tmp_path, np.random.default_rng(0))
    for source, options in (("coco_keypoints", {"root": tmp_path}), ("scene_poses", {"count": 1, "size": 32})):
        pictures = Pictures(source, size=20, count=3, options=options)
        assert pictures.classes == ()
        (batch,) = pictures.batches()
        assert {name: tuple(value.shape) for name, value in batch.items()} == {"image": (3, 3, 20, 20), "label": (3,)}
