"""Runs of pose models: what they measure, exact resume, the record of their data, and two processes."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tolerances import NETWORK, close
from train.helpers import QUIET, log, same_weights
from train.test_processes import launch, same_log
from widefield import tasks
from widefield.data import Skeleton
from widefield.dense import HeatmapPose
from widefield.loading import load_trained
from widefield.tasks import PoseEstimation
from widefield.train import DataSpec, EmaSpec, ModelSpec, OptimizerSpec, Recipe, TaskSpec, run_data, train

METRICS = {"oks_ap", "oks_ap50", "oks_ap75", "oks_ap_medium", "oks_ap_large", "oks_ar", "pck", "pck20", "auc", "epe"}


def recipe(output: Path, **changes: Any) -> Recipe:
    """Return a recipe of six steps on the objects of four scenes, with everything that has a state."""
    return replace(
        Recipe(
            name="pose",
            model=ModelSpec("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8], "drop_path_rate": 0.1}),
            data=DataSpec("scene_poses", {"size": 64, "crop_size": [32, 32], "count": 4}),
            task=TaskSpec("pose", {"channels": [8, 8], "sigma": 1.0, "flip_test": False}),
            output=str(output),
            optimizer=OptimizerSpec(lr=1e-3),
            ema=EmaSpec(0.5),
            clip_grad=10.0,
            max_steps=6,
            evaluate_every=3,
            batch_size=4,
            workers=0,
            log_every=1,
            trackers=[],
        ),
        **changes,
    )


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Send a signal to this process in the n-th training step."""
    loss = PoseEstimation.loss

    def arrange(n: int) -> None:
        calls = iter(range(1, 1000))

        def counted(*args: Any) -> torch.Tensor:
            if next(calls) == n:
                signal.raise_signal(signal.SIGINT)
            return loss(*args)

        monkeypatch.setattr(PoseEstimation, "loss", counted)

    return arrange


def test_it_trains_and_resumes_exactly(tmp_path: Path, stop_at: Callable[[int], None]) -> None:
    whole = train(recipe(tmp_path / "whole"), console=QUIET)
    assert set(whole.metrics) == {*METRICS, *(f"ema_{name}" for name in METRICS), "train_loss"}
    assert whole.metrics["epe"] > 0
    stop_at(4)
    part = train(recipe(tmp_path / "part"), console=QUIET)
    assert (part.steps, part.interrupted) == (4, signal.SIGINT)
    rest = train(recipe(tmp_path / "part", workers=1), resume=part.folder, console=QUIET)
    assert log(rest.folder) == log(whole.folder)
    assert same_weights(rest.model, whole.model)
    trained = load_trained(rest.folder, "last")
    assert isinstance(trained, HeatmapPose)
    assert trained.num_keypoints == 5


def test_the_record_of_a_run_makes_its_task_again(tmp_path: Path) -> None:
    data = DataSpec("scene_poses", {"size": 64, "crop_size": [32, 64], "count": 2, "udp": True, "padding": 1.5})
    options = {"channels": [8], "kind": "udp", "sigma": 1.0, "blur": 5}
    run = train(
        recipe(tmp_path, data=data, task=TaskSpec("pose", options), max_steps=1, evaluate_every=1), console=QUIET
    )
    record = run_data.read(run.folder)
    assert record.skeleton == Skeleton.load("scenes")
    assert (record.crop_size, record.udp, record.padding) == ((32, 64), True, 1.5)
    task = tasks.create("pose", record, **options)
    assert isinstance(task, PoseEstimation)
    assert (task.rules.crop_size, task.rules.padding, task.rules.aligned) == ((32, 64), 1.5, True)
    assert task.classes == record.classes
    task.check(run.model, (3, 32, 64))
    older = json.loads((run.folder / "data.json").read_text())
    for name in ("skeleton", "udp", "padding"):
        del older[name]
    (run.folder / "data.json").write_text(json.dumps(older))
    assert run_data.read(run.folder).skeleton is None


def test_mixed_precision_layer_decay_and_accumulation(tmp_path: Path) -> None:
    changed = recipe(
        tmp_path, mixed_precision="bf16", accumulate=2, batch_size=2, channels_last=True,
        optimizer=OptimizerSpec(lr=1e-3, args={"layer_decay": 0.8}), max_steps=2, evaluate_every=2,
    )  # fmt: skip
    result = train(changed, console=QUIET)
    assert math.isfinite(result.metrics["train_loss"])
    assert all(torch.isfinite(parameter).all() for parameter in result.model.parameters())


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    """The deconvolutions have batch norms, which are synchronized. The poses of an image are in both processes."""
    plain: dict[str, Any] = {
        "model": ModelSpec("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}),
        "optimizer": OptimizerSpec("sgd", lr=0.005),
        "sync_batchnorm": True,
    }
    one = recipe(tmp_path / "one", **plain, batch_size=8)
    launch(one, tmp_path / "one.yaml", 1)
    two = recipe(tmp_path / "two", **plain, batch_size=4)
    launch(two, tmp_path / "two.yaml", 2)
    same_log(two.folder, one.folder)
    weights = load_trained(two.folder, "last").state_dict()
    for name, expected in load_trained(one.folder, "last").state_dict().items():
        close(weights[name], expected, NETWORK)
