"""Callbacks see a run's steps and evaluations, and can end it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from train.helpers import QUIET, log
from widefield.runs import read_run
from widefield.train import Callback, Recipe, RunResult, train


class Notes(Callback):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.notes: list[tuple[Any, ...]] = []

    def on_train_begin(self, model: nn.Module, step: int) -> None:
        self.notes.append(("begin", step))

    def on_step_end(self, model: nn.Module, step: int) -> None:
        assert model.training
        self.notes.append(("step", step))

    def on_evaluate(self, model: nn.Module, step: int, metrics: Mapping[str, float]) -> None:
        self.notes.append(("evaluate", step, dict(metrics)))

    def on_train_end(self, result: RunResult) -> None:
        self.notes.append(("end", result.steps, result.metrics))


class GivesUp(Callback):
    """Raises after the first evaluation, as a tuner does with a hopeless trial."""

    def on_evaluate(self, model: nn.Module, step: int, metrics: Mapping[str, float]) -> None:
        raise LookupError("pruned")


def test_they_see_every_step_and_evaluation(recipe: Recipe) -> None:
    notes = Notes()
    result = train(recipe, console=QUIET, callbacks=[Callback(), notes])
    kinds = [note[0] for note in notes.notes]
    assert kinds == ["begin", *["step"] * 6, "evaluate", *["step"] * 6, "evaluate", "end"]
    assert [note[1] for note in notes.notes if note[0] == "step"] == list(range(1, 13))
    logged = [entry for entry in log(result.folder) if entry["kind"] == "epoch"]
    for note, entry in zip((n for n in notes.notes if n[0] == "evaluate"), logged, strict=True):
        assert note[1] == entry["step"]
        assert note[2] == {name: entry[name] for name in note[2]}
    assert notes.notes[-1] == ("end", 12, result.metrics)


def test_an_error_leaves_a_run_that_goes_on(recipe: Recipe) -> None:
    whole = train(replace(recipe, name="whole"), console=QUIET)
    with pytest.raises(LookupError, match="pruned"):
        train(recipe, console=QUIET, callbacks=[GivesUp()])
    assert read_run(recipe.folder).done == 1
    notes = Notes()
    train(recipe, resume=recipe.folder, console=QUIET, callbacks=[notes])
    assert notes.notes[0] == ("begin", 6)
    assert log(recipe.folder) == log(whole.folder)


def test_other_objects_are_refused_before_anything_is_built(recipe: Recipe) -> None:
    with pytest.raises(TypeError, match=r"callbacks must be objects of widefield.train.Callback; got <function"):
        train(recipe, console=QUIET, callbacks=[lambda: None])  # type: ignore[list-item]
    assert not recipe.folder.exists()
