"""Made data in the layouts of the published sets, through the commands train, eval and predict."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data import made_segmentation
from widefield import cli

IMAGES = {
    "ade20k": "images/validation",
    "cityscapes": "leftImg8bit/val",
    "voc": "JPEGImages",
    "coco_stuff": "images/val2017",
}
"""Data set -> folder with the images of val, and with others too in Pascal VOC's layout."""
WRITE: dict[str, Callable[..., Any]] = {name: getattr(made_segmentation, f"write_{name}") for name in IMAGES}


@pytest.mark.parametrize("name", IMAGES)
def test_train_eval_and_predict(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    WRITE[name](tmp_path / "data")
    Path("recipe.yaml").write_text(
        f"""
name: run
model: {{name: test_resnet}}
data: {{name: {name}, args: {{root: data, size: 64, scale: [96, 64]}}}}
task: {{name: segmentation, args: {{head_args: {{channels: 16}}}}}}
max_steps: 2
batch_size: 2
workers: 0
"""
    )
    assert cli.main(["train", "recipe.yaml"]) == 0
    assert cli.main(["eval", "runs/run", "--workers", "0", "--out", "eval.json"]) == 0
    metrics = json.loads(Path("eval.json").read_text())["results"][0]["metrics"]
    logged = [json.loads(line) for line in Path("runs/run/metrics.jsonl").read_text().splitlines()]
    assert metrics["miou"] == pytest.approx(next(e["miou"] for e in reversed(logged) if "miou" in e))
    assert cli.main(["predict", "runs/run", f"data/{IMAGES[name]}", "--out", "seen"]) == 0
    assert list(Path("seen/labels").rglob("*.png"))
