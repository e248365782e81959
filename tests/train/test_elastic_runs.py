"""Runs of networks that draw kernel sizes."""

from __future__ import annotations

import signal
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from train.helpers import QUIET, same_weights
from widefield.surgery import elastic_layers
from widefield.tasks import Classification
from widefield.train import ConversionSpec, Recipe, train

ELASTIC = ConversionSpec("elastic", "*.conv_dw", {"kernel_sizes": [3, 5]})


def test_a_run_draws_sizes_and_resumes_to_the_bit(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(recipe, conversion=ELASTIC)
    loss, drawn = Classification.loss, []

    def seen(task: Classification, model: Any, batch: Any) -> Tensor:
        drawn.append([layer.drawn for layer in elastic_layers(model).values()])
        if len(drawn) == 12 + 8:
            signal.raise_signal(signal.SIGINT)
        return loss(task, model, batch)

    monkeypatch.setattr(Classification, "loss", seen)
    whole = train(replace(recipe, name="whole"), console=QUIET)
    assert len({tuple(sizes) for sizes in drawn}) > 4
    assert {layer.kernel_size for layer in elastic_layers(whole.model).values()} == {7}  # evaluation has its own

    part = train(recipe, console=QUIET)
    assert (part.steps, part.interrupted) == (8, signal.SIGINT)
    resumed = train(recipe, resume=part.folder, console=QUIET)
    assert drawn[:12] == drawn[12:]
    assert same_weights(whole.model, resumed.model)
    assert resumed.metrics == whole.metrics
