"""The recipe that trains a small segmentation model on `scenes`: what it builds, and that its runs are exact."""

import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tolerances import NETWORK, close
from train.helpers import QUIET, log, same_weights
from train.test_processes import launch
from widefield import dense
from widefield.data import create
from widefield.loading import load_trained
from widefield.train import CheckpointSpec, Recipe, load_recipe, save_recipe, train


def shortened(output: Path, **changes) -> Recipe:
    """Return the recipe with twelve steps on 40 small scenes."""
    recipe = load_recipe("demo_scenes")
    return replace(
        recipe,
        output=str(output),
        data=replace(recipe.data, args={"size": 32, "count": 40}),
        schedule=replace(recipe.schedule, warmup_steps=2),
        **{"max_steps": 12, "evaluate_every": 6, "log_every": 1, "trackers": [], **changes},
    )


def test_the_recipe_trains_an_upernet_and_measures_it_by_object_size(tmp_path):
    result = train(shortened(tmp_path), console=QUIET)
    assert isinstance(result.model, dense.UPerNet)
    assert result.steps == 12
    metrics = {"miou", "macc", "aacc", "loss", "miou_small", "miou_medium", "miou_large", "train_loss"}
    assert set(result.metrics) == metrics
    losses = [entry["loss"] for entry in log(result.folder) if entry["kind"] == "step"]
    assert all(map(math.isfinite, losses))
    assert min(losses[-4:]) < losses[0]


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_bit(tmp_path):
    checkpoint = CheckpointSpec(keep=2, every=3)
    whole = train(shortened(tmp_path / "whole", checkpoint=checkpoint), console=QUIET)
    part = shortened(tmp_path / "part", checkpoint=checkpoint)
    save_recipe(part, tmp_path / "part.yaml")
    process = subprocess.Popen([sys.executable, "-m", "widefield", "train", str(tmp_path / "part.yaml")])
    deadline = time.monotonic() + 200
    while not any(part.folder.glob("checkpoints/step-*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    rest = train(part, resume=part.folder, console=QUIET)
    assert log(rest.folder) == log(whole.folder)
    assert same_weights(rest.model, whole.model)


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    one = train(shortened(tmp_path / "one", batch_size=8), console=QUIET)
    two = shortened(tmp_path / "two", batch_size=4, sync_batchnorm=True)
    launch(two, tmp_path / "two.yaml", 2)
    for mine, theirs in zip(log(two.folder), log(one.folder), strict=True):
        for name, value in theirs.items():
            assert mine[name] == (
                value if isinstance(value, (str, type(None))) else pytest.approx(value, rel=2e-3, abs=1e-4)
            ), name
    # Not the weights: biases in front of batch norms have no gradient, and AdamW turns its rounding errors into steps.
    image = create("scenes", "val", size=32)[0]["image"][None]
    with torch.no_grad():
        close(load_trained(two.folder, "last")(image), one.model(image), NETWORK)
