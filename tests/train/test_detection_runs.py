"""Runs of detectors: what they measure and log, exact resume, and two processes."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tolerances import NETWORK, close
from train.helpers import QUIET, log, same_weights
from train.test_processes import launch, same_log
from widefield.dense import FasterRCNN
from widefield.loading import load_trained
from widefield.tasks import Detection
from widefield.train import DataSpec, EmaSpec, ModelSpec, OptimizerSpec, Recipe, TaskSpec, train

BOXES: dict[str, Any] = {
    "neck_channels": 16, "box_channels": 16, "rois_per_image": 16, "anchor_scales": [2.0], "train_proposals": 50,
    "test_proposals": 50,
}  # fmt: skip
HEADS: dict[str, dict[str, Any]] = {
    "faster_rcnn": BOXES,
    "mask_rcnn": BOXES,
    "cascade_rcnn": {**BOXES, "masks": True},
    "retinanet": {"neck_channels": 16, "num_convs": 1},
    "fcos": {"neck_channels": 64, "num_convs": 1, "start_level": 0, "ranges": [16, 32, 64]},
}
LOSSES = {
    "faster_rcnn": {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox"},
    "fcos": {"loss_cls", "loss_bbox", "loss_centerness"},
}


def recipe(detector: str, output: Path, **changes: Any) -> Recipe:
    """Return a recipe of six steps on 24 scenes, with everything that has a state."""
    return replace(
        Recipe(
            name=detector,
            model=ModelSpec("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8], "drop_path_rate": 0.1}),
            data=DataSpec("scenes", {"size": 64, "count": 24}),
            task=TaskSpec("detection", {"model": detector, "head_args": HEADS[detector]}),
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
    losses = Detection.losses

    def arrange(n: int) -> None:
        calls = iter(range(1, 1000))

        def counted(*args: Any) -> Mapping[str, Any]:
            if next(calls) == n:
                signal.raise_signal(signal.SIGINT)
            return losses(*args)

        monkeypatch.setattr(Detection, "losses", counted)

    return arrange


@pytest.mark.parametrize(
    "model", ["faster_rcnn", *(pytest.param(x, marks=pytest.mark.slow) for x in HEADS if x != "faster_rcnn")]
)
def test_it_trains_and_resumes_exactly(model: str, tmp_path: Path, stop_at: Callable[[int], None]) -> None:
    """Samplers draw random numbers: a resumed run draws the same ones."""
    whole = train(recipe(model, tmp_path / "whole"), console=QUIET)
    kinds = ("box", "mask") if model in ("mask_rcnn", "cascade_rcnn") else ("box",)
    names = {f"{kind}_ap{end}" for kind in kinds for end in ("", "50", "75", "_small", "_medium", "_large")}
    assert set(whole.metrics) == {*names, *(f"ema_{name}" for name in names), "train_loss"}
    steps = [entry for entry in log(whole.folder) if entry["kind"] == "step"]
    parts = [{name: value for name, value in entry.items() if "loss_" in name} for entry in steps]
    assert set(parts[0]) == LOSSES.get(model, set(parts[0]))
    for entry, part in zip(steps, parts, strict=True):
        assert sum(part.values()) == pytest.approx(entry["loss"], rel=1e-5)
    stop_at(4)
    part_run = train(recipe(model, tmp_path / "part"), console=QUIET)
    assert (part_run.steps, part_run.interrupted) == (4, signal.SIGINT)
    rest = train(recipe(model, tmp_path / "part", workers=1), resume=part_run.folder, console=QUIET)
    assert log(rest.folder) == log(whole.folder)
    assert same_weights(rest.model, whole.model)
    trained = load_trained(rest.folder, "last")
    assert trained.num_classes == 8
    assert isinstance(trained, FasterRCNN) == (model in ("faster_rcnn", "mask_rcnn"))


@pytest.mark.parametrize("model", ["fcos", pytest.param("mask_rcnn", marks=pytest.mark.slow)])
def test_mixed_precision_layer_decay_and_accumulation(model: str, tmp_path: Path) -> None:
    options = recipe(model, tmp_path).optimizer
    result = train(
        recipe(
            model, tmp_path, mixed_precision="bf16", accumulate=2, batch_size=2, channels_last=True,
            optimizer=replace(options, args={"layer_decay": 0.8}), max_steps=2, evaluate_every=2,
        ),
        console=QUIET,
    )  # fmt: skip
    assert math.isfinite(result.metrics["train_loss"])
    assert all(torch.isfinite(parameter).all() for parameter in result.model.parameters())


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    """FCOS draws no random numbers, and its losses are divided by means over processes, as published."""
    plain: dict[str, Any] = {
        "model": ModelSpec("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}),
        "optimizer": OptimizerSpec("sgd", lr=0.005),
        "data": DataSpec("scenes", {"size": 64, "count": 25}),  # of the val scenes, one process has 13
    }
    one = train(recipe("fcos", tmp_path / "one", **plain, batch_size=8), console=QUIET)
    two = recipe("fcos", tmp_path / "two", **plain, batch_size=4)
    launch(two, tmp_path / "two.yaml", 2)
    same_log(two.folder, one.folder)
    weights = load_trained(two.folder, "last").state_dict()
    for name, expected in load_trained(one.folder, "last").state_dict().items():
        close(weights[name], expected, NETWORK)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["faster_rcnn", "cascade_rcnn"])
def test_two_processes_train_with_samplers(model: str, tmp_path: Path) -> None:
    """Every parameter gets a gradient in each process, and all processes end with the same metrics."""
    two = recipe(model, tmp_path, batch_size=2, max_steps=4, evaluate_every=2)
    launch(two, tmp_path / "two.yaml", 2)
    entries = [entry for entry in log(two.folder) if entry["kind"] == "step"]
    assert len(entries) == 4
    assert all(math.isfinite(entry["loss"]) for entry in entries)
