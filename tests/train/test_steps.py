"""Runs whose length counts in steps: evaluations every n steps, epochs of the data that follow each other."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_killed import launch as launch_one
from test_killed import logged
from test_processes import launch, same_log
from test_resume import BUSY

from tolerances import NETWORK, close
from train.helpers import QUIET, log, same_weights
from train.patches import Patches
from widefield import data
from widefield.loading import load_trained
from widefield.runs import draw_runs, read_run
from widefield.tasks import Segmentation
from widefield.train import (
    CheckpointSpec,
    DataSpec,
    EmaSpec,
    ModelSpec,
    OptimizerSpec,
    Recipe,
    RunResult,
    ScheduleSpec,
    TaskSpec,
    train,
)
from widefield.train.loaders import EpochSampler
from widefield.train.optimization import create_schedule

Run = Callable[..., RunResult]

# An epoch of the data has six steps: rounds of four steps end within and across epochs.
STEPS: dict[str, Any] = {"epochs": None, "max_steps": 14, "evaluate_every": 4}


def test_a_run_in_steps_leaves_its_record(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    epochs: list[int] = []
    set_epoch = EpochSampler.set_epoch
    monkeypatch.setattr(EpochSampler, "set_epoch", lambda self, epoch: (epochs.append(epoch), set_epoch(self, epoch)))
    result = run(**STEPS, log_every=7)
    assert (result.epochs, result.steps, result.interrupted) == (2, 14, None)
    assert sorted(set(epochs)) == [0, 1, 2]
    entries = log(result.folder)
    assert [(entry["kind"], entry["step"], entry["epoch"]) for entry in entries] == [
        ("evaluation", 4, 0),
        ("step", 7, 1),
        ("evaluation", 8, 1),
        ("evaluation", 12, 1),
        ("step", 14, 2),
        ("evaluation", 14, 2),
    ]
    assert {name: entries[-1][name] for name in result.metrics} == result.metrics
    assert [path.name for path in sorted((result.folder / "checkpoints").iterdir())][-1] == "step-00000014"
    found = read_run(result.folder)
    assert (found.state, found.unit, found.done, found.length) == ("finished", "step", 14, 14)
    assert found.row()["trained"] == "14/14 steps"
    (axes,) = draw_runs([found]).axes
    assert list(axes.lines[0].get_xdata()) == [4, 8, 12, 14]
    assert axes.get_xlabel() == "step"


def test_evaluations_do_not_change_the_training(run: Run) -> None:
    """The same steps in two epochs, in rounds of four steps, and in one round give the same weights."""
    by_epoch = run(name="epochs", epochs=2, **BUSY)
    for every in (4, 12):
        in_steps = run(name=f"every{every}", epochs=None, max_steps=12, evaluate_every=every, **BUSY)
        assert same_weights(in_steps.model, by_epoch.model)
        assert in_steps.metrics["top1"] == by_epoch.metrics["top1"]


def test_without_a_number_it_is_evaluated_after_each_epoch_of_the_data(run: Run) -> None:
    result = run(epochs=None, max_steps=8)
    assert [entry["step"] for entry in log(result.folder) if entry["kind"] == "evaluation"] == [6, 8]


@pytest.mark.parametrize("stop", [*(pytest.param(stop, marks=pytest.mark.slow) for stop in (3, 6, 14)), 4, 9])
def test_resumed_equals_uninterrupted(run: Run, stop_at: Any, stop: int) -> None:
    """Stop within a round, at its end, at the end of an epoch within a round, and after the last step."""
    whole = run(name="whole", **STEPS, **BUSY)
    stop_at(stop)
    part = run(**STEPS, **BUSY)
    assert (part.steps, part.interrupted) == (stop, signal.SIGINT)
    if stop < 14:
        assert read_run(part.folder).done == 4 * ((stop - 1) // 4)
    rest = run(resume=part.folder, workers=1, **STEPS, **BUSY)
    assert rest.interrupted is None
    assert log(rest.folder) == log(whole.folder)
    assert same_weights(rest.model, whole.model)
    assert (rest.metrics, rest.best, rest.steps) == (whole.metrics, whole.best, whole.steps)


def test_a_finished_run_says_so(run: Run, capsys: pytest.CaptureFixture[str], recipe: Recipe) -> None:
    steps = replace(recipe, **STEPS)
    whole = train(steps, console=QUIET)
    again = train(steps, resume=whole.folder)
    assert "is finished: all 14 steps are done" in capsys.readouterr().err.replace("\n", " ")
    assert again.metrics == whole.metrics


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, 8])
def test_killed_within_a_round_and_resumed(run: Run, recipe: Recipe, tmp_path: Path, kills: int) -> None:
    length: dict[str, Any] = {
        "epochs": None, "max_steps": 40 * kills, "evaluate_every": 9, "checkpoint": CheckpointSpec(every=2),
    }  # fmt: skip
    busy = replace(recipe, **length, **BUSY)
    whole = run(name="whole", **length, **BUSY)
    for kill in range(kills):
        process = launch_one(busy, tmp_path / "r.yaml", *(["--resume", str(busy.folder)] if kill else []))
        goal, deadline = logged(busy.folder) + 13, time.monotonic() + 120
        while process.poll() is None and logged(busy.folder) < goal and time.monotonic() < deadline:
            time.sleep(0.002)
        assert process.poll() is None, (tmp_path / "r.log").read_text()
        process.send_signal(signal.SIGKILL)
        process.wait()
    rest = run(resume=busy.folder, **length, **BUSY)
    assert log(rest.folder) == log(whole.folder)
    assert same_weights(rest.model, whole.model)


# Segmentation


@pytest.fixture
def patches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Return a recipe of 14 steps; an epoch of the data has three."""
    monkeypatch.setitem(data.SETS, "patches", Patches)
    return Recipe(
        name="run",
        model=ModelSpec("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8], "patch_size": 2}),
        data=DataSpec("patches", {"count": 24}),
        task=TaskSpec("segmentation", {"head_args": {"channels": 8, "auxiliary_channels": 8}}),
        output=str(tmp_path / "runs"),
        optimizer=OptimizerSpec(lr=1e-2),
        schedule=ScheduleSpec("poly", warmup_steps=3, warmup_ratio=1e-6, args={"decay_rate": 1.0}),
        max_steps=14,
        evaluate_every=5,
        batch_size=8,
        workers=0,
        log_every=1,
        channels_last=True,
        gradient_checkpointing=True,
        ema=EmaSpec(0.5),
        trackers=[],
    )


@pytest.mark.parametrize("stop", [*(pytest.param(stop, marks=pytest.mark.slow) for stop in (2, 5)), 7])
def test_segmentation_resumes_exactly(patches: Recipe, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    whole = train(replace(patches, name="whole"), console=QUIET)
    rates = [entry["lr"] for entry in log(whole.folder) if entry["kind"] == "step"]
    assert rates == pytest.approx([mmcv_poly(t, 14, 1e-2, 1.0, 0.0, 3, 1e-6) for t in range(14)], rel=1e-12)
    assert {"miou", "ema_miou", "miou_small", "ema_miou_large", "macc", "aacc", "loss"} <= set(whole.metrics)
    assert whole.best["ema_miou"] == max(e["ema_miou"] for e in log(whole.folder) if e["kind"] == "evaluation")
    loss, calls = Segmentation.loss, iter(range(1, 100))

    def counted(*args: Any) -> torch.Tensor:
        if next(calls) == stop:
            signal.raise_signal(signal.SIGINT)
        return loss(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Segmentation, "loss", counted)
        part = train(patches, console=QUIET)
    assert (part.steps, part.interrupted) == (stop, signal.SIGINT)
    rest = train(replace(patches, workers=1), resume=part.folder, console=QUIET)
    assert log(rest.folder) == log(whole.folder)
    assert same_weights(rest.model, whole.model)
    assert same_weights(load_trained(rest.folder, "last"), whole.model)


def test_segmentation_learns(patches: Recipe) -> None:
    model = ModelSpec("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [16] * 4, "ls_init_value": None})
    task = TaskSpec("segmentation", {"head_args": {"channels": 16, "auxiliary_channels": 8}})
    longer = replace(patches, model=model, task=task, max_steps=90, evaluate_every=30, ema=None, log_every=50)
    result = train(longer, console=QUIET)
    first, _, last = (entry for entry in log(result.folder) if entry["kind"] == "evaluation")
    assert last["train_loss"] < first["train_loss"]
    assert last["miou"] > 0.45  # 0.29 if everything is ground


@pytest.mark.slow
def test_two_processes_are_one(run: Run, recipe: Recipe, tmp_path: Path) -> None:
    model = ModelSpec("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]})
    one = run(name="one", model=model, batch_size=16, **STEPS)
    two = replace(recipe, name="two", model=model, batch_size=8, **STEPS)
    launch(two, tmp_path / "two.yaml", 2)
    same_log(one.folder, two.folder)
    weights = load_trained(two.folder, "last").state_dict()
    for name, expected in load_trained(one.folder, "last").state_dict().items():
        close(weights[name], expected, NETWORK)


# Schedules


def mmcv_poly(t: int, steps: int, lr: float, power: float, least: float, warmup: int, ratio: float) -> float:
    """Return the rate of iteration t, from 0, of mmcv's PolyLrUpdaterHook with a linear warm-up, by iteration."""
    rate = (lr - least) * (1 - t / steps) ** power + least
    return rate * (1 - (1 - t / warmup) * (1 - ratio)) if t < warmup else rate


def rates(spec: ScheduleSpec, steps: int, lr: float) -> list[float]:
    optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr)
    schedule, total = create_schedule(optimizer, spec, steps, 1)
    assert total == steps
    assert schedule is not None
    found = []
    for step in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        schedule.step_update(step + 1)
    return found


@pytest.mark.parametrize(
    ("power", "steps", "lr", "least", "warmup", "ratio"),
    [
        (1.0, 160_000, 1e-4, 0.0, 1500, 1e-6),  # UPerNet with ConvNeXt
        (0.9, 80_000, 1e-2, 1e-4, 0, 1.0),  # DeepLabv3+ with MobileNetV2
        (0.9, 80_000, 2e-4, 0.0, 1500, 1e-6),  # Semantic FPN
        (1.0, 17, 1e-3, 1e-5, 5, 0.1),
    ],
)
def test_poly_by_iteration_is_mmcvs(
    power: float, steps: int, lr: float, least: float, warmup: int, ratio: float
) -> None:
    begin: dict[str, Any] = {"warmup_steps": warmup, "warmup_ratio": ratio} if warmup else {}
    spec = ScheduleSpec("poly", min_lr=least, args={"decay_rate": power}, **begin)
    expected = [mmcv_poly(t, steps, lr, power, least, warmup, ratio) for t in range(steps)]
    assert rates(spec, steps, lr) == pytest.approx(expected, rel=1e-10, abs=1e-16)


def test_poly_is_a_straight_line_by_default() -> None:
    """As in mmcv. timm's own default, power 0.1, is still at 93 % of the peak after half of the run."""
    assert rates(ScheduleSpec("poly"), 8, 1.0) == pytest.approx([1 - t / 8 for t in range(8)])


def test_the_warm_up_of_timm_rises_past_the_decay() -> None:
    """Therefore ``warmup_ratio``: timm's own warm-up ends at the peak, up to 0.9 % above mmcv's rate."""
    spec = ScheduleSpec("poly", warmup_steps=1500, warmup_lr=1e-10, args={"decay_rate": 1.0})
    gaps = [
        found / mmcv_poly(t, 160_000, 1e-4, 1.0, 0.0, 1500, 1e-6) - 1
        for t, found in enumerate(rates(spec, 160_000, 1e-4))
    ]
    assert 0.009 < max(gaps) < 0.0095
    assert max(gaps[1500:]) < 1e-12


@pytest.mark.parametrize(
    ("spec", "epochs"),
    [
        (ScheduleSpec("cosine", warmup_epochs=2, args={"cooldown_epochs": 3}), 10),
        (ScheduleSpec("step", args={"decay_epochs": 3, "decay_rate": 0.5}), 10),
        (ScheduleSpec("poly", warmup_epochs=2, args={"warmup_prefix": True, "decay_rate": 0.5}), 12),
    ],
)
def test_lengths_in_epochs_count_the_steps_of_an_epoch(spec: ScheduleSpec, epochs: int) -> None:
    from timm.scheduler import create_scheduler_v2

    ours, theirs = (torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), 0.1) for _ in range(2))
    schedule, steps = create_schedule(ours, spec, epochs, 7)
    expected, length = create_scheduler_v2(
        theirs, spec.name, epochs, warmup_epochs=spec.warmup_epochs, warmup_lr=0.0, step_on_epochs=False,
        updates_per_epoch=7, **spec.args,
    )  # fmt: skip
    assert steps == 7 * length
    assert schedule is not None
    for step in range(steps + 1):
        schedule.step_update(step)
        expected.step_update(step)
        assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]


def test_multistep_decays_at_its_milestones() -> None:
    """As PyTorch's schedule, by which published detectors were trained. timm's own decays one step before."""
    ours, theirs = (torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), 0.1) for _ in range(2))
    spec = ScheduleSpec("multistep", args={"decay_milestones": [8, 11], "decay_rate": 0.1})
    schedule, steps = create_schedule(ours, spec, 12, 7)
    expected = torch.optim.lr_scheduler.MultiStepLR(theirs, [8 * 7, 11 * 7], 0.1)
    assert schedule is not None
    assert steps == 12 * 7
    for step in range(steps):
        schedule.step_update(step)
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-12)
        theirs.step()
        expected.step()


def test_a_warm_up_in_steps_within_epochs() -> None:
    optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), 0.1)
    spec = ScheduleSpec("poly", warmup_steps=10, warmup_ratio=0.001, args={"decay_rate": 0.9})
    schedule, steps = create_schedule(optimizer, spec, 12, 7)
    assert schedule is not None
    found = []
    for step in range(steps):
        schedule.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    expected = [mmcv_poly(t, 84, 0.1, 0.9, 0.0, 10, 0.001) for t in range(84)]
    assert found == pytest.approx(expected, rel=1e-12)


def test_a_constant_warm_up_keeps_its_factor() -> None:
    """As in mmdetection's FCOS: a third of the rate for 500 steps, and the milestones where they were."""
    optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), 0.1)
    args = {"decay_milestones": [2], "decay_rate": 0.1}
    spec = ScheduleSpec("multistep", warmup_steps=4, warmup_ratio=1 / 3, warmup_shape="constant", args=args)
    schedule, steps = create_schedule(optimizer, spec, 3, 5)
    assert schedule is not None
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 3)
    found = []
    for step in range(steps):
        schedule.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    assert found == pytest.approx([0.1 / 3] * 4 + [0.1] * 6 + [0.01] * 5)


# Recipes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 3, "max_steps": 10}, r"epochs and max_steps cannot both be given; got 3 and 10"),
        ({"epochs": 3, "evaluate_every": 10}, r"evaluate_every is for runs with max_steps"),
        ({"epochs": None, "max_steps": 0}, r"max_steps must be at least 1; got 0"),
        ({"epochs": None, "max_steps": 9, "evaluate_every": 0}, r"evaluate_every must be at least 1"),
        (
            {"epochs": None, "max_steps": 9, "schedule": ScheduleSpec(warmup_epochs=1)},
            r"schedule.warmup_epochs is for runs with epochs; with max_steps set warmup_steps",
        ),
        (
            {"epochs": None, "max_steps": 9, "schedule": ScheduleSpec(warmup_steps=10)},
            r"schedule.warmup_steps must not exceed max_steps; got 10 of 9",
        ),
    ],
)
def test_lengths_that_do_not_fit(recipe: Recipe, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(recipe, **changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_epochs": 1, "warmup_steps": 5}, r"warmup_epochs and schedule.warmup_steps cannot both be given"),
        (
            {"warmup_steps": 5, "warmup_lr": 0.1, "warmup_ratio": 0.1},
            r"warmup_lr and schedule.warmup_ratio cannot both",
        ),
        ({"warmup_ratio": 0.1}, r"schedule.warmup_ratio needs a warm-up"),
        ({"warmup_steps": 5, "warmup_shape": "constant"}, r"schedule.warmup_shape: constant needs warmup_ratio"),
        ({"warmup_shape": "constat"}, r"schedule.warmup_shape must be one of.*Did you mean 'constant'"),
        (
            {"warmup_steps": 5, "warmup_ratio": 0.1, "args": {"warmup_prefix": True}},
            r"schedule.args.warmup_prefix has no effect with warmup_ratio",
        ),
    ],
)
def test_warm_ups_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScheduleSpec("poly", **options)


def test_without_any_length_a_recipe_has_100_epochs(recipe: Recipe) -> None:
    plain = Recipe("run", recipe.model, recipe.data)
    assert (plain.epochs, plain.max_steps) == (100, None)
    assert replace(plain, epochs=None, max_steps=10).epochs is None
