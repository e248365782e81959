"""A run that is killed at any time loses at most the steps since its last checkpoint."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from test_resume import BUSY

from train.helpers import log, same_weights
from widefield.loading import load_trained
from widefield.train import CheckpointSpec, Recipe, RunResult, load_recipe, save_recipe
from widefield.train.checkpoint import checkpoints

EVERY = 2


def launch(recipe: Recipe, path: Path, *more: str) -> subprocess.Popen[bytes]:
    save_recipe(recipe, path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "widefield", "train", str(path), *more]
    with path.with_suffix(".log").open("w") as output:
        return subprocess.Popen(words, env=environment, stdout=output, stderr=output)


def steps(folder: Path) -> int:
    """Return the step of the newest checkpoint, or 0. Read all checkpoints to check that they are complete."""
    for found in checkpoints(folder / "checkpoints"):
        found.state()
        load_trained(folder, "last")
    return max((found.step for found in checkpoints(folder / "checkpoints")), default=0)


def logged(folder: Path) -> int:
    """Return the steps in the log; its last line may be incomplete."""
    last = 0
    for line in (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else ():
        try:
            last = max(last, json.loads(line)["step"])
        except json.JSONDecodeError:
            break
    return last


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_and_resumed_it_is_the_run_that_was_not(
    run: Callable[..., RunResult], recipe: Recipe, tmp_path: Path, kills: int
) -> None:
    chance = random.Random(kills)
    busy = replace(recipe, epochs=4 * kills, checkpoint=CheckpointSpec(keep=2, every=EVERY), **BUSY)
    whole = run(name="whole", epochs=busy.epochs, checkpoint=busy.checkpoint, **BUSY)
    folder, behind = busy.folder, 0
    for kill in range(kills):
        process = launch(busy, tmp_path / "r.yaml", *(["--resume", str(folder)] if behind else []))
        goal = logged(folder) + chance.randint(1, 12)
        deadline = time.monotonic() + 120
        while process.poll() is None and logged(folder) < goal and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.2)  # in a step, in an evaluation, while writing a checkpoint
        assert process.poll() is None, (tmp_path / "r.log").read_text()
        process.send_signal(signal.SIGKILL)
        process.wait()
        reached = steps(folder)
        assert reached >= behind
        assert reached >= logged(folder) - EVERY
        behind = reached
        if not behind:  # nothing to resume, and a new start needs an empty folder
            assert logged(folder) < EVERY + 1
            folder.rename(folder.with_name(f"dead-{kill}"))
    rest = run(resume=folder, **{**BUSY, "epochs": busy.epochs, "checkpoint": busy.checkpoint})
    assert log(rest.folder) == log(whole.folder)
    assert same_weights(rest.model, whole.model)
    assert load_recipe(folder) == busy
