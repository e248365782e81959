"""A weight decay that changes over the run: SparK's formula, groups of their own, exact resume."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from train.helpers import log, same_weights
from widefield.tasks import Classification
from widefield.train import GroupSpec, OptimizerSpec, RunResult, ScheduleSpec
from widefield.train.optimization import WeightDecayCosine, create_optimizer, create_schedule

Run = Callable[..., RunResult]


@pytest.mark.parametrize("kind", ["cosine", "none"])
@pytest.mark.parametrize(("start", "end"), [(0.04, 0.2), (0.3, 0.0)])
def test_it_follows_the_published_cosine(kind: str, start: float, end: float) -> None:
    """SparK's lr_wd_annealing, written out."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    spec = OptimizerSpec(
        weight_decay=start, weight_decay_end=end, groups=[GroupSpec("2.weight", lr_scale=0.1, weight_decay=2 * start)]
    )
    optimizer = create_optimizer(model, spec, 1e-3)
    inner, steps = create_schedule(optimizer, ScheduleSpec(kind), 5, 4)
    schedule = WeightDecayCosine(inner, optimizer, spec, steps)
    decays: dict[str, float] = {}
    for step in range(steps):
        schedule.step_update(step)
        names = {id(p): name for name, p in model.named_parameters()}
        decays = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        expected = end + (start - end) * (0.5 + 0.5 * math.cos(math.pi * step / (steps - 1)))
        assert decays["0.weight"] == pytest.approx(expected, rel=1e-12, abs=1e-15)
        assert decays["2.weight"] == pytest.approx(2 * expected, rel=1e-12, abs=1e-15)
        assert {decays[name] for name in ("0.bias", "1.weight", "1.bias", "2.bias")} == {0.0}
    assert decays["0.weight"] == pytest.approx(end, abs=1e-15)


def test_a_run_changes_its_decay_and_resumes_exactly(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: dict[str, Any] = {"optimizer": OptimizerSpec(lr=2e-3, weight_decay=0.1, weight_decay_end=5.0)}
    constant = run(name="constant", optimizer=OptimizerSpec(lr=2e-3, weight_decay=0.1))
    whole = run(name="whole", **keys)
    norms = [sum(p.detach().norm().item() for p in each.model.parameters() if p.ndim > 1) for each in (whole, constant)]
    assert norms[0] < norms[1]
    loss, calls = Classification.loss, iter(range(1, 100))

    def interrupted(*args: Any) -> torch.Tensor:
        if next(calls) == 8:
            signal.raise_signal(signal.SIGINT)
        return loss(*args)

    monkeypatch.setattr(Classification, "loss", interrupted)
    part = run(**keys)
    assert part.steps == 8
    rest = run(resume=part.folder, **keys)
    assert log(rest.folder) == log(whole.folder)
    assert same_weights(rest.model, whole.model)


def test_there_must_be_a_decay_to_start_from() -> None:
    with pytest.raises(ValueError, match=r"weight_decay_end needs a weight_decay above 0 to start from"):
        OptimizerSpec(weight_decay=0.0, weight_decay_end=0.2)
    with pytest.raises(ValueError, match=r"optimizer\.weight_decay_end must be"):
        OptimizerSpec(weight_decay_end=-0.2)
