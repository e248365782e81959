"""The commands on a run that was trained on a COCO folder, with a crowd and an image without objects."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from data.made_objects import CLASSES, IDS, write_coco
from train.helpers import QUIET
from widefield import cli
from widefield.loading import load
from widefield.train import DataSpec, ModelSpec, Recipe, TaskSpec, train

HEAD = {"neck_channels": 64, "num_convs": 1, "score_threshold": 0.0}
NETWORK = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coco")
    write_coco(folder)
    return folder


@pytest.fixture(scope="module")
def trained(root: Path) -> Path:
    torch.manual_seed(0)
    recipe = Recipe(
        name="coco_run",
        model=ModelSpec("convnext_atto", NETWORK),
        data=DataSpec("coco", {"root": str(root), "scale": [96, 64], "masks": False}),
        task=TaskSpec("detection", {"model": "fcos", "head_args": HEAD}),
        output=str(root / "runs"),
        max_steps=1,
        batch_size=2,
        workers=0,
    )
    return train(recipe, console=QUIET).folder


def test_the_run_is_evaluated_predicted_and_analyzed(
    trained: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", str(trained), "--data", str(root), "--workers", "0", "--page", str(tmp_path / "page.html")]
    assert cli.main([*words, "--out", str(tmp_path / "eval.json"), "--min-score", "0.001"]) == 0
    content = json.loads((tmp_path / "eval.json").read_text())["results"][0]
    assert content["data"]["name"] == "coco"
    assert content["classes"] == len(CLASSES)
    assert content["images"] == 3
    assert "nan" not in capsys.readouterr().out  # there are no large objects
    assert (tmp_path / "page.html").read_text().count("<h3>") == 2  # the image without objects is not rated
    annotations = root / "annotations/instances_val2017.json"
    words = [
        "predict",
        str(trained),
        str(root / "val2017"),
        "--coco",
        str(annotations),
        "--out",
        str(tmp_path / "seen"),
    ]
    assert cli.main(words) == 0
    entries = json.loads((tmp_path / "seen/predict_coco.json").read_text())
    assert {entry["category_id"] for entry in entries} <= set(IDS)
    known = {one["id"]: (one["width"], one["height"]) for one in json.loads(annotations.read_text())["images"]}
    assert {entry["image_id"] for entry in entries} == set(known)
    for entry in entries:
        left, top, width, height = entry["bbox"]
        assert left + width <= known[entry["image_id"]][0] + 1e-3
        assert top + height <= known[entry["image_id"]][1] + 1e-3
    assert load(str(trained)).size == 64  # the shorter side at the test scale
    words = ["object-erf", str(trained), "--sizes", "24", "--objects", "2", "--out", str(tmp_path / "fields")]
    assert cli.main(words) == 0
    found = json.loads((tmp_path / "fields/object-erf.json").read_text())["results"]["coco_run"]
    assert found["about"]["source"] == "coco"
    assert all(group["inside"] > 0 for group in found["groups"])
