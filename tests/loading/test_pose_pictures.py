"""The images that analyses of a pose run get: its own crops with labels, and other images in the form of its crops."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms.functional import center_crop

from data.made_poses import write_keypoints
from train.helpers import QUIET
from widefield import cli
from widefield.data import Pictures
from widefield.loading import Subject, load
from widefield.train import DataSpec, ModelSpec, Recipe, TaskSpec, train

NETWORK = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run whose validation crops are of a detector's boxes."""
    root = tmp_path_factory.mktemp("coco")
    write_keypoints(root, np.random.default_rng(0))
    torch.manual_seed(0)
    recipe = Recipe(
        name="detected",
        model=ModelSpec("convnext_atto", NETWORK),
        data=DataSpec("coco_keypoints", {"root": str(root), "crop_size": [64, 48], "boxes": "boxes.json"}),
        task=TaskSpec("pose", {"channels": [8, 8, 8]}),
        output=str(root / "runs"),
        max_steps=1,
        batch_size=2,
        workers=0,
    )
    return train(recipe, console=QUIET).folder


@pytest.fixture(scope="module")
def subject(folder: Path) -> Subject:
    return load(str(folder))


def test_analyses_see_labeled_people_where_the_run_has_boxes_of_a_detector(subject: Subject) -> None:
    assert not any(sample["keypoints"].any() for sample in subject.own_data())  # the evaluation keeps the boxes
    labeled = [*subject.object_view(4).samples, *subject.pictures(count=4)]
    assert len(labeled) == 8
    assert all((sample["keypoints"][:, 2] > 0).any() for sample in labeled)
    assert all(sample["image"].shape == (3, 64, 48) for sample in labeled)


@pytest.mark.parametrize(("size", "crop"), [(None, (64, 48)), (96, (128, 96))])
def test_other_images_have_the_form_of_the_crops_and_no_distortion(
    subject: Subject, size: int | None, crop: tuple[int, int]
) -> None:
    found = subject.pictures("photographs", count=2, size=size)
    square = Pictures("photographs", count=2, size=crop[0], mean=subject.mean, std=subject.std)
    assert torch.equal(found.tensor(), center_crop(square.tensor(), list(crop)))
    assert found.about["size"] == list(crop)
    assert len(subject.pictures("photographs", count=2, size=size)) == 2


def test_the_field_on_images_of_a_folder_has_the_form_of_the_crops(
    folder: Path, subject: Subject, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = Path(subject.recipe.data.args["root"]) / "val2017" if subject.recipe else tmp_path
    assert cli.main(["erf", str(folder), "--images", str(images), "--count", "2", "--out", str(tmp_path)]) == 0
    assert "2 of 4 images" in capsys.readouterr().out
    found = json.loads((tmp_path / "erf.json").read_text())["results"]["detected"]
    assert np.array(found["scores"]).shape == (64, 48)
