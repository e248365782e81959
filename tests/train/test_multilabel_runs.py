"""Runs of multi-label classification: exact resume, what they show, and the shipped recipe."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import made_objects
from train.helpers import QUIET, log, same_weights
from widefield.train import DataSpec, DistillationSpec, RunResult, TaskSpec, load_recipe, train

Run = Callable[..., RunResult]

SCENES: dict[str, Any] = {
    "data": DataSpec("scene_labels", {"count": 48, "size": 32}),
    "batch_size": 8,
}


@pytest.mark.parametrize("loss", ["binary", "asymmetric"])
def test_a_run_stopped_in_mid_epoch_equals_an_uninterrupted_one(run: Run, stop_at: Any, loss: str) -> None:
    options = {"loss": loss, **({"positive_weights": "balanced"} if loss == "binary" else {})}
    task = TaskSpec("multilabel", options)
    whole = run(name="whole", task=task, **SCENES)
    assert {"loss", "map", "cf1", "of1"} < set(whole.metrics)
    assert whole.best is not None
    stop_at(4)
    part = run(task=task, **SCENES)
    assert part.interrupted
    rest = run(resume=part.folder, task=task, workers=1, **SCENES)
    assert log(rest.folder) == log(whole.folder)
    assert same_weights(rest.model, whole.model)


def test_it_refuses_what_it_has_not(run: Run) -> None:
    teacher = run(name="teacher", task=TaskSpec("multilabel"), epochs=1, **SCENES).folder
    for changes, text in (
        ({"class_sampling": 0.5}, "class_sampling needs the label of each image, and SceneLabels has no `labels`"),
        ({"distillation": DistillationSpec(str(teacher))}, "distillation is for classification"),
        ({"data": DataSpec("scales", {"count": 16})}, "the task multilabel needs images with any number of classes"),
    ):
        with pytest.raises(ValueError, match=text):
            run(task=TaskSpec("multilabel"), **{**SCENES, **changes})


def test_the_shipped_recipe_trains(tmp_path: Path) -> None:
    recipe = load_recipe("demo_scene_labels")
    shortened = replace(
        recipe,
        output=str(tmp_path),
        data=replace(recipe.data, args={**recipe.data.args, "count": 12}),
        epochs=2,
        batch_size=4,
        log_every=1,
        trackers=[],
    )
    result = train(shortened, console=QUIET)
    losses = [entry["loss"] for entry in log(result.folder) if entry["kind"] == "step"]
    assert len(losses) == 6
    assert all(map(math.isfinite, losses))
    assert 0 <= result.metrics["map"] <= 1


def test_the_recipe_for_coco_fits_its_data_and_trains(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split, first in (("train", 1), ("val", 1001)):
        content = made_objects.coco_content(rng, first=first)
        (tmp_path / f"{split}2017").mkdir()
        (tmp_path / "annotations").mkdir(exist_ok=True)
        for image in content["images"]:
            made_objects.write_image(
                tmp_path / f"{split}2017" / image["file_name"], image["height"], image["width"], rng
            )
        (tmp_path / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    recipe = load_recipe("multilabel_resnet101_coco")
    assert recipe.optimizer.lr_base_size == recipe.batch_size
    small = replace(
        recipe,
        output=str(tmp_path / "runs"),
        model=replace(recipe.model, name="test_resnet", pretrained=False),
        data=replace(recipe.data, args={**recipe.data.args, "root": str(tmp_path), "size": 32}),
        schedule=replace(recipe.schedule, warmup_epochs=0),
        epochs=1,
        batch_size=2,
        workers=0,
        mixed_precision="no",
        trackers=[],
    )
    assert math.isfinite(train(small, console=QUIET).metrics["loss"])
