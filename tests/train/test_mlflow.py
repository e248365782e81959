"""Logging to MLflow, whose package is replaced by one that writes down its calls."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from train.helpers import QUIET, log
from widefield.train import Callback, Recipe, train


class Server(ModuleType):
    """What accelerate's tracker calls of MLflow, with runs in memory."""

    utils = SimpleNamespace(validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100))

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.__spec__ = ModuleSpec("mlflow", None)
        self.runs: dict[str, dict[str, Any]] = {}
        self.current = ""

    def search_experiments(self, filter_string: str) -> list[Any]:
        return [SimpleNamespace(experiment_id="1")]

    def start_run(self, run_id: str | None = None, run_name: str | None = None, **_: Any) -> Any:
        self.current = run_id or f"id-{len(self.runs)}"
        self.runs.setdefault(self.current, {"name": run_name, "params": {}, "metrics": []})
        return SimpleNamespace(info=SimpleNamespace(run_id=self.current))

    def log_params(self, values: dict[str, Any]) -> None:
        before = self.runs[self.current]["params"]
        for name, value in values.items():  # MLflow's own rule
            assert before.setdefault(name, str(value)) == str(value), f"Changing param values is not allowed: {name}"

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.runs[self.current]["metrics"].append((step, metrics))

    def end_run(self) -> None:
        self.current = ""


class Stops(Callback):
    """Ends the run at its first evaluation."""

    def on_evaluate(self, *_: Any) -> None:
        raise LookupError


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    made = Server()
    monkeypatch.setitem(sys.modules, "mlflow", made)
    return made


def test_a_resumed_run_stays_one_run(recipe: Recipe, server: Server) -> None:
    tracked = replace(recipe, trackers=["mlflow"])
    with pytest.raises(LookupError):
        train(tracked, console=QUIET, callbacks=[Stops()])
    assert server.current == ""
    train(replace(tracked, log_every=2), resume=recipe.folder, console=QUIET)
    (run,) = server.runs.values()
    assert run["name"] == "run"
    assert (run["params"]["optimizer.lr"], run["params"]["model.name"]) == ("0.002", "convnext_atto")
    losses = [(step, numbers["step/loss"]) for step, numbers in run["metrics"] if "step/loss" in numbers]
    assert losses == [(entry["step"], entry["loss"]) for entry in log(recipe.folder) if entry["kind"] == "step"]
    assert [numbers["epoch/top1"] for _, numbers in run["metrics"] if "epoch/top1" in numbers] == [
        entry["top1"] for entry in log(recipe.folder) if entry["kind"] == "epoch"
    ]


def test_another_run_in_a_folder_that_gave_up_is_another(recipe: Recipe, server: Server) -> None:
    class Fails(Callback):
        def on_train_begin(self, *_: Any) -> None:
            raise LookupError

    tracked = replace(recipe, trackers=["mlflow"], epochs=1)
    with pytest.raises(LookupError):
        train(tracked, console=QUIET, callbacks=[Fails()])
    train(tracked, console=QUIET)
    assert len(server.runs) == 2
