"""A run with mixtures reports its routing, and warns about collapsed routers."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from torch import nn

from train.helpers import log, same_weights
from widefield.nn import GMConv2d, MoRFConv2d
from widefield.train import (
    ConversionSpec,
    EmaSpec,
    GroupSpec,
    OptimizerSpec,
    Recipe,
    RunResult,
    ScheduleSpec,
    alarms,
    train,
)
from widefield.train.optimization import create_schedule
from widefield.train.run import Run as Training

Run = Callable[..., RunResult]
ROUTERS = {"router_entropy", "router_dead", "router_constant"}


def mixtures(**options: Any) -> dict[str, Any]:
    return {"conversion": ConversionSpec("morf", "stages.*.conv_dw", {"kernel_sizes": [5, 7], **options})}


def test_dead_experts_and_constant_routers_raise_the_alarm(recipe: Recipe) -> None:
    """With top-1 routing and no balance loss, a converted mixture keeps using the expert with the old kernel."""
    screen = io.StringIO()
    collapsed = dataclasses.replace(recipe, **mixtures(routing="hard", top_k=1), epochs=1)
    result = train(collapsed, console=Console(file=screen, width=80))
    epoch, *warnings = (entry for entry in log(result.folder) if entry["kind"] != "step")
    assert (epoch["router_entropy"], epoch["router_dead"], epoch["router_constant"]) == (0, 4, 4)
    assert {name: result.metrics[name] for name in ROUTERS} == {name: epoch[name] for name in ROUTERS}
    assert [warning["text"] for warning in warnings] == [
        f"stages.{i} hardly uses 5x5 and gives all images the same weights" for i in range(4)
    ]
    assert {(w["kind"], w["step"], w["epoch"]) for w in warnings} == {("warning", 6, 0)}
    assert "warning: stages.0 hardly uses 5x5" in screen.getvalue()
    assert screen.getvalue().endswith("; and 1 more like this\n")


def test_routers_at_work_raise_none(run: Run) -> None:
    result = run(**mixtures(routing="soft", init="random"), ema=EmaSpec(0.5), epochs=1)
    assert set(result.metrics) > ROUTERS
    assert not any(name.startswith("ema_router") for name in result.metrics)
    assert result.metrics["router_entropy"] > 0.9
    assert (result.metrics["router_dead"], result.metrics["router_constant"]) == (0, 0)
    assert {entry["kind"] for entry in log(result.folder)} == {"step", "epoch"}
    assert not any(module._forward_hooks for module in result.model.modules())


def test_a_resumed_run_warns_as_one_that_was_not(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    options = mixtures(routing="hard", top_k=1)
    whole = run(name="whole", **options)
    original = Training._train_until

    def killed(self: Any, end: int) -> None:
        if self.step:
            raise RuntimeError("killed")
        original(self, end)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_train_until", killed)
        with pytest.raises(RuntimeError, match="killed"):
            run(**options)
    rest = run(resume=whole.folder.with_name("run"), **options)
    assert log(rest.folder) == log(whole.folder)
    assert [entry["epoch"] for entry in log(rest.folder) if entry["kind"] == "warning"] == [0] * 4 + [1] * 4
    assert same_weights(rest.model, whole.model)
    assert rest.metrics == whole.metrics


def test_models_without_mixtures_are_only_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alarms, "recording", None)
    assert alarms.watch_routers(nn.Conv2d(3, 3, 3), lambda: {"top1": 0.5}) == ({"top1": 0.5}, [])


def test_what_several_processes_saw_is_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert is alive if any process's images use it."""
    layer = MoRFConv2d(3, 3, (3, 5), routing="hard", top_k=1).eval()
    with torch.no_grad():
        layer.router.gate.weight.zero_()
    seen: list[Any] = []

    def other(part: list[Any]) -> list[Any]:
        mine, twin = part[0][0], part[0][0].weights[:, ::-1]
        seen.append(mine)
        return [[mine], [dataclasses.replace(mine, weights=twin)], []]

    def evaluate() -> dict[str, float]:
        layer(torch.randn(4, 3, 8, 8))
        return {"top1": 1.0}

    alone, warnings = alarms.watch_routers(layer, evaluate)
    assert (alone["router_entropy"], alone["router_dead"], alone["router_constant"], len(warnings)) == (0, 1, 1, 1)
    monkeypatch.setattr(alarms, "gather_object", other)
    both, warnings = alarms.watch_routers(layer, evaluate)
    assert both == {"top1": 1.0, "router_entropy": 1.0, "router_dead": 0.0, "router_constant": 0.0}
    assert warnings == []
    assert seen[0].weights.shape == (4, 2)


def test_sigma_of_every_mask_is_logged_after_each_epoch(run: Callable[..., RunResult]) -> None:
    result = run(conversion=ConversionSpec("gmconv"))
    entries = [entry for entry in log(result.folder) if entry["kind"] == "sigma"]
    assert [entry["epoch"] for entry in entries] == [0, 1]
    layers = {n: m for n, m in result.model.named_modules() if isinstance(m, GMConv2d)}
    assert layers
    assert set(layers) <= set(entries[0])
    for name, layer in layers.items():
        assert entries[1][name] == pytest.approx(layer.sigma.item())
    assert entries[0] != entries[1]


def test_a_run_says_that_its_sigmas_cannot_move(recipe: Recipe) -> None:
    masked = dataclasses.replace(recipe, conversion=ConversionSpec("gmconv", args={"stem": "static"}))

    def said(**changes: Any) -> str:
        screen = io.StringIO()
        plan = dataclasses.replace(masked, name=f"masked-{len(changes)}", epochs=1, **changes)
        train(plan, console=Console(file=screen, width=400))
        return screen.getvalue()

    steps, rate = 6, recipe.optimizer.lr
    found = said()
    assert "sigma of the masks can move by about" in found
    groups = yaml.safe_load(found.partition('--optimizer.groups "')[2].partition('"')[0])
    reach = steps * rate * groups[0]["lr_scale"]
    assert 2 <= reach <= 100  # about ten taps, whatever the schedule
    own = dataclasses.replace(recipe.optimizer, groups=[GroupSpec(**group) for group in groups])
    assert "sigma of the masks" not in said(optimizer=own)
    assert "sigma of the masks" not in said(optimizer=OptimizerSpec("sgd", lr=rate), max_steps=None)


def test_looking_for_still_sigmas_leaves_the_schedule_at_its_start() -> None:
    layer = GMConv2d(2, 2, 7)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    schedule, steps = create_schedule(optimizer, ScheduleSpec("cosine", warmup_steps=10, warmup_lr=1e-5), 100, 1)
    before = optimizer.param_groups[0]["lr"]
    assert "about 0.05 taps" in alarms.still_sigmas(layer, optimizer, schedule, steps)
    assert optimizer.param_groups[0]["lr"] == before
    layer.sigma.requires_grad_(False)
    assert alarms.still_sigmas(layer, optimizer, schedule, steps) == ""
