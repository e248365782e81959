"""Sparse training in the engine: masks hold in steps, the average, checkpoints and resumed runs."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_resume import BUSY
from torch import nn

from train.helpers import log, same_weights
from widefield.train import ConversionSpec, ModelSpec, Recipe, RunResult, SparsitySpec
from widefield.train.recipe import CONVERSIONS

Run = Callable[..., RunResult]
SPARSE = SparsitySpec(sparsity=0.6, interval=2, init="erk", where="stages.*")


def zeros(state: dict[str, torch.Tensor]) -> float:
    masked = [v for k, v in state.items() if k.startswith("stages") and k.endswith("weight") and v.ndim > 1]
    return sum(int((v == 0).sum()) for v in masked) / sum(v.numel() for v in masked)


@pytest.mark.parametrize("growth", ["random", "gradient"])
def test_the_share_of_zeros_holds_in_the_model_the_average_and_the_checkpoints(run: Run, growth: str) -> None:
    result = run(sparsity=replace(SPARSE, growth=growth), **BUSY)
    last = max((result.folder / "checkpoints").glob("*/model.safetensors"))
    for state in (result.model.state_dict(), load_file(last)):
        assert zeros(state) == pytest.approx(0.6, abs=0.02)


@pytest.mark.parametrize("stop", [3, 6, 9])
def test_a_resumed_sparse_run_is_the_uninterrupted_one(run: Run, recipe: Recipe, stop_at: Any, stop: int) -> None:
    whole = run(name="whole", sparsity=SPARSE, **BUSY)
    stop_at(stop)
    part = run(sparsity=SPARSE, **BUSY)
    assert part.interrupted == signal.SIGINT
    rest = run(resume=part.folder, sparsity=SPARSE, **BUSY)
    assert same_weights(whole.model, rest.model)
    assert log(whole.folder) == log(rest.folder)


def test_every_kind_of_conversion_trains(run: Run) -> None:
    given: dict[str, dict[str, Any]] = {
        "gmconv": {},
        "large_kernel": {"kernel_sizes": [9, 9, 7, 7], "small": 3},
        "fast_depthwise": {},
        "inception_split": {},
        "deformable": {},
        "morf": {},
        "token_mixer": {"mixer": "lka"},
        "elastic": {"kernel_sizes": [3, 9]},
        "resize": {"kernel_size": 5},
    }
    assert set(given) == set(CONVERSIONS)
    for kind, arguments in given.items():
        result = run(name=kind, epochs=1, conversion=ConversionSpec(kind, args=arguments))
        assert result.steps == 6
        assert not any(type(m) is nn.Conv2d and m.kernel_size == (7, 7) for m in result.model.modules())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sparsity": 1.5}, "sparsity.sparsity must be from 0"),
        ({"sparsity": 1}, "sparsity.sparsity must be below 1: at 1 no weight is left"),
        ({"growth": "gradients"}, "got 'gradients'. Did you mean 'gradient'?"),
        ({"init": "snap"}, "got 'snap'. Did you mean 'snip'?"),
    ],
)
def test_a_sparsity_that_cannot_be_is_refused_by_name(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SparsitySpec(**given)


def test_snip_starts_from_the_first_batch(run: Run) -> None:
    """Layer scales of 1e-6, as ConvNeXt starts with, hide the blocks' gradients from SNIP."""
    model = ModelSpec("test_resnet", {"drop_rate": 0.1})
    result = run(model=model, epochs=1, sparsity=SparsitySpec(0.5, where="layer*"))
    masked = [v for k, v in result.model.state_dict().items() if k.startswith("layer") and v.ndim == 4]
    share = sum(int((v == 0).sum()) for v in masked) / sum(v.numel() for v in masked)
    assert share == pytest.approx(0.5, abs=1e-3)
