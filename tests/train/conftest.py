"""Small runs: seconds on one core."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from train.helpers import QUIET
from widefield.tasks import Classification, MultiLabelClassification
from widefield.train import DataSpec, ModelSpec, OptimizerSpec, Recipe, RunResult, train


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Return a recipe of two epochs of six steps."""
    return Recipe(
        name="run",
        model=ModelSpec("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "drop_rate": 0.1}),
        data=DataSpec("scales", {"count": 96, "size": 32}),
        output=str(tmp_path / "runs"),
        optimizer=OptimizerSpec(lr=2e-3),
        epochs=2,
        batch_size=16,
        workers=0,
        log_every=1,
    )


@pytest.fixture
def run(recipe: Recipe) -> Callable[..., RunResult]:
    """Train the recipe with some keys replaced, without output."""

    def start(resume: Path | None = None, **changes: Any) -> RunResult:
        return train(replace(recipe, **changes), resume=resume, console=QUIET)

    return start


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, signal.Signals], None]:
    """Send a real signal to this process in the n-th training step from now on."""
    losses = {kind: kind.loss for kind in (Classification, MultiLabelClassification)}

    def arrange(n: int, number: signal.Signals = signal.SIGINT) -> None:
        calls = 0

        def counted(task: Any, *args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == n:
                signal.raise_signal(number)
            return losses[type(task)](task, *args)

        for kind in losses:
            monkeypatch.setattr(kind, "loss", counted)

    return arrange
