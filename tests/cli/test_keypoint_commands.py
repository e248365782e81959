"""The commands on single key points of a pose run: erf, cam, keypoint-erf and export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from documents import document
from train.helpers import QUIET
from widefield import cli, deploy
from widefield.loading import load
from widefield.train import DataSpec, ModelSpec, Recipe, TaskSpec, train

NETWORK = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}
NAMES = ("center", "top", "right", "bottom", "left")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a short run of a small pose model on crops of scenes that are higher than wide."""
    torch.manual_seed(0)
    recipe = Recipe(
        name="poses",
        model=ModelSpec("convnext_atto", NETWORK),
        data=DataSpec("scene_poses", {"size": 64, "count": 4, "crop_size": [96, 64]}),
        task=TaskSpec("pose", {"channels": [8, 8, 8]}),
        output=str(tmp_path_factory.mktemp("runs")),
        max_steps=30,
        batch_size=4,
        workers=0,
    )
    return train(recipe, console=QUIET).folder


def result(folder: Path, *words: str) -> dict[str, Any]:
    """Return what a command of an analysis writes for the run."""
    assert cli.main([*words, "--out", str(folder)]) == 0
    found: dict[str, Any] = json.loads((folder / f"{words[0]}.json").read_text())["results"]["poses"]
    return found


def test_the_field_of_one_key_point(trained: Path, tmp_path: Path) -> None:
    found = result(tmp_path, "erf", str(trained), "--keypoint", "top")
    assert found["of"] == "top at its peak"
    assert found["about"]["images"] == 1
    assert np.array(found["scores"]).shape == (96, 64)
    best = result(tmp_path, "erf", str(trained), "--keypoint")
    assert best["of"].removesuffix(" at its peak") in NAMES
    larger = result(tmp_path, "erf", str(trained), "--keypoint", "1", "--size", "128")
    assert larger["of"] == "top at its peak"
    assert np.array(larger["scores"]).shape == (192, 128)
    assert np.array(result(tmp_path, "erf", str(trained))["scores"]).shape == (96, 64)  # of the backbone


def test_the_activation_of_a_key_point(trained: Path, tmp_path: Path) -> None:
    found = result(tmp_path, "cam", str(trained), "--keypoint", "top", "--count", "3")
    assert np.array(found["points"]).shape == (3, 2)
    assert found["labels"] == ["top"] * 3
    same = result(tmp_path, "cam", str(trained), "--class", "top", "--count", "3")
    assert same["maps"] == found["maps"]


def test_fields_of_key_points_by_size(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--count", "8", "--sizes", "14", "--people", "2", "--keypoint", "top", "4"]
    found = result(tmp_path, "keypoint-erf", str(trained), *words, "--json")
    assert found["names"] == list(NAMES)
    assert {group["keypoint"] for group in found["groups"]} == {1, 4}
    assert (tmp_path / "keypoint-erf.html").is_file()
    out, error = capsys.readouterr()
    assert "8 images of scene_poses" in error
    assert list(document(out)["results"].values()) == [found]


@pytest.mark.slow
def test_a_run_becomes_a_file_with_key_points(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", str(trained), "--count", "8", "--out", str(tmp_path)]) == 0
    told = json.loads((tmp_path / "poses.onnx.json").read_text())
    assert told["classes"] == list(NAMES)
    assert told["input"]["size"] == [96, 64]
    assert told["input"]["dynamic"] == ["batch"]
    assert told["pose"]["decoding"] == "inside"
    assert all(check["keypoints"] for check in told["checks"])
    assert told["checks"][-1]["pck_before"] == told["checks"][-1]["pck_after"]
    assert "key points within a pixel" in capsys.readouterr().out
    file, model = deploy.load(tmp_path / "poses.onnx"), load(str(trained)).model
    images = torch.randn(3, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected: Any = model.decode(model(images), (96, 64))  # type: ignore[operator]
    found: Any = file(images)
    assert (found.points - expected.points).norm(dim=2).median() < 0.01


@pytest.mark.slow
def test_photographs_verify_a_file_of_the_run_s_crops(trained: Path, tmp_path: Path) -> None:
    words = ["--images", "photographs", "--count", "4", "--out", str(tmp_path)]
    assert cli.main(["export", str(trained), *words]) == 0
    told = json.loads((tmp_path / "poses.onnx.json").read_text())
    assert told["input"]["size"] == [96, 64]
    assert all(check["keypoints"] for check in told["checks"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["erf", "RUN", "--keypoint", "elbow"], "'elbow'. Its key points are center, top, right, bottom, left."),
        (["cam", "RUN", "--keypoint", "rihgt"], "Did you mean 'right'? Its key points are center, top"),
        (["keypoint-erf", "RUN", "--keypoint", "elbow"], "'elbow'. Its key points are center, top"),
        (["erf", "RUN", "--keypoint", "9"], "keypoint must be from 0 to 4; got 9"),
        (["erf", "RUN", "--keypoint", "top", "--count", "2"], "give one image"),
        (["cam", "RUN", "--keypoint", "top", "--class", "left"], "leave out --class"),
        (["erf", "test_resnet", "--size", "64", "--keypoint", "0"], "needs a pose model"),
        (["keypoint-erf", "test_resnet"], "keypoint-erf needs a pose model, and test_resnet is a model for class"),
        (["object-erf", "RUN"], "object-erf needs a detector of widefield.dense, and poses is a model for pose. Give"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert cli.main([str(trained) if word == "RUN" else word for word in words]) == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_analyses_of_classes_name_the_pose_model(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["interactions", str(trained), "--count", "1"]) == 1
    assert "is a pose model" in capsys.readouterr().err
