"""The recipe that trains a small pose model on `scenes`: what it builds, and a few of its steps."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from train.helpers import QUIET, log
from widefield.dense import HeatmapPose
from widefield.train import load_recipe, train


def test_the_recipe_trains_its_model(tmp_path: Path) -> None:
    recipe = load_recipe("demo_scenes_pose")
    shortened = replace(
        recipe,
        output=str(tmp_path),
        data=replace(recipe.data, args={**recipe.data.args, "count": 3}),
        schedule=replace(recipe.schedule, warmup_steps=2),
        max_steps=4,
        evaluate_every=4,
        batch_size=4,
        log_every=1,
        trackers=[],
    )
    result = train(shortened, console=QUIET)
    model = result.model
    assert isinstance(model, HeatmapPose)
    assert model.num_keypoints == 5
    assert model.stride == 2
    assert sum(isinstance(layer, nn.ConvTranspose2d) for layer in model.head.modules()) == 3
    losses = [entry["loss"] for entry in log(result.folder) if entry["kind"] == "step"]
    assert all(map(math.isfinite, losses))
    assert 0 <= result.metrics["oks_ap"] <= 1


@pytest.mark.slow
def test_a_quarter_of_the_recipe_finds_key_points(tmp_path: Path) -> None:
    recipe = load_recipe("demo_scenes_pose")
    shortened = replace(recipe, output=str(tmp_path), max_steps=1200, evaluate_every=1200, trackers=[])
    metrics = train(shortened, console=QUIET).metrics
    # 32 % was measured with these steps, 59.7 % with all 5,000, and less than 0.1 % after 30.
    assert metrics["oks_ap"] > 0.2
