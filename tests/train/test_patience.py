"""Runs that end because they no longer get better."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from typing import Any

import pytest

from train.helpers import log, same_weights
from widefield.runs import read_run
from widefield.train import OptimizerSpec, Recipe, RunResult
from widefield.train.patience import Patience

Run = Callable[..., RunResult]

# A model that does not learn: no evaluation is better than the first.
STILL: dict[str, Any] = {"epochs": 6, "patience": 2, "optimizer": OptimizerSpec("sgd", lr=0.0, weight_decay=0.0)}


@pytest.mark.parametrize(
    ("higher", "headlines", "over"),
    [
        (True, [0.1, 0.2, 0.2, 0.1], True),
        (True, [0.1, 0.2, 0.1, 0.3], False),
        (False, [0.3, 0.2, 0.2, 0.4], True),
        (False, [0.3, 0.2, 0.4, 0.1], False),
        (True, [math.nan, 0.1, 0.2, math.nan], False),
        (True, [0.1, math.nan, math.nan], True),
        (True, [math.nan, math.nan], True),
    ],
)
def test_counts_evaluations_since_the_best(higher: bool, headlines: list[float], over: bool) -> None:
    patience = Patience(2, higher_is_better=higher)
    endless = Patience(None, higher_is_better=higher)
    for headline in headlines:
        assert not patience.is_over
        patience.see(headline)
        endless.see(headline)
    assert patience.is_over is over
    assert not endless.is_over


def test_a_run_ends_early_and_stays_finished(run: Run) -> None:
    result = run(**STILL)
    assert (result.epochs, result.steps, result.interrupted) == (3, 18, None)
    assert read_run(result.folder).state == "finished"
    before = log(result.folder)
    again = run(resume=result.folder, **STILL)
    assert (again.epochs, log(again.folder)) == (3, before)


def test_an_interrupted_run_ends_where_it_would_have(run: Run, stop_at: Any) -> None:
    whole = run(name="whole", **STILL)
    stop_at(14)
    part = run(**STILL)
    assert (part.steps, part.interrupted) == (14, signal.SIGINT)
    rest = run(resume=part.folder, **STILL)
    assert log(rest.folder) == log(whole.folder)
    assert same_weights(rest.model, whole.model)


def test_more_patience_continues_a_run(run: Run) -> None:
    short = run(**STILL)
    result = run(resume=short.folder, **{**STILL, "patience": 4})
    assert (result.epochs, result.interrupted) == (5, None)


def test_patience_is_a_number_of_evaluations(recipe: Recipe) -> None:
    with pytest.raises(ValueError, match="patience must be at least 1; got 0"):
        Recipe(**{**vars(recipe), "patience": 0})
