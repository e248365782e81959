"""The search for a learning rate and for a batch size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from train.helpers import QUIET, log
from widefield import cli
from widefield.train import (
    GroupSpec,
    LearningRates,
    OptimizerSpec,
    Recipe,
    find_batch_size,
    find_learning_rate,
    save_recipe,
    train,
)
from widefield.train.learner import Learner
from widefield.train.search import sizes_that_fit


def test_rates_grow_by_a_factor_and_the_first_loss_is_the_runs(recipe: Recipe) -> None:
    found = find_learning_rate(recipe, lowest=1e-4, highest=1e-2, steps=9)
    assert not recipe.folder.exists()
    assert found.rates == pytest.approx([1e-4 * 100 ** (k / 8) for k in range(9)])
    first, *_ = log(train(recipe, console=QUIET).folder)
    assert found.losses[0] == pytest.approx(first["loss"], rel=1e-6)
    assert find_learning_rate(recipe, lowest=1e-4, highest=1e-2, steps=9) == found


def test_groups_keep_their_ratio(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[list[float]] = []
    step = Learner.step

    def noted(self: Learner, *args: object, **options: object) -> object:
        rates.append([group["lr"] for group in self.optimizer.param_groups])
        return step(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Learner, "step", noted)
    optimizer = OptimizerSpec(lr=3e-3, groups=[GroupSpec("head", lr_scale=0.1)])
    find_learning_rate(replace(recipe, optimizer=optimizer), lowest=1e-4, highest=1e-2, steps=3)
    ratios = {round(max(row) / min(row), 6) for row in rates}
    assert ratios == {10.0}
    assert [max(row) for row in rates] == pytest.approx([1e-4, 1e-3, 1e-2])


def test_it_ends_where_the_loss_blows_up(recipe: Recipe) -> None:
    found = find_learning_rate(recipe, lowest=1e-3, highest=1e6, steps=40)
    assert len(found.rates) < 40
    assert all(math.isfinite(loss) for loss in found.losses)
    assert max(found.losses) <= 4 * min(found.losses)


def curve(losses: Callable[[float], float]) -> LearningRates:
    """Return the losses at 41 rates from 1e-4 to 1."""
    rates = tuple(10 ** (-4 + k / 10) for k in range(41))
    return LearningRates(rates, tuple(map(losses, rates)))


def test_suggestions_of_known_curves() -> None:
    # A fall around 1e-3, as steep as a logistic curve is at its middle, then a rise from 0.1 on.
    found = curve(lambda rate: 2 - 1 / (1 + 1e-3 / rate) + max(0.0, math.log10(rate / 0.1)))
    assert found.steepest == pytest.approx(1e-3)
    assert found.largest == pytest.approx(0.01)
    assert "Try optimizer.lr between 0.001 and 0.01" in found.summary()
    assert len(found.draw().axes[0].lines) == 3
    rising = curve(lambda rate: 1 + rate)
    assert (rising.steepest, rising.largest) == (None, None)
    assert "the loss never falls" in str(rising)


def test_sizes_double_until_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("widefield.train.search.clear_device_cache", lambda **_: None)  # collects garbage: slow here
    tried: list[int] = []

    def attempt(size: int) -> None:
        tried.append(size)
        if size > 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    assert list(sizes_that_fit(attempt, 512)) == [1, 2, 4, 8, 16]
    assert tried == [1, 2, 4, 8, 16, 32]
    assert list(sizes_that_fit(lambda size: None, 5)) == [1, 2, 4]


def test_other_errors_pass() -> None:
    def attempt(size: int) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(sizes_that_fit(attempt, 4))


def test_what_cannot_be_searched_is_refused(recipe: Recipe) -> None:
    with pytest.raises(ValueError, match=r"lowest must be above 0 and below highest; got 0.1 and 0.1"):
        find_learning_rate(recipe, lowest=0.1, highest=0.1)
    if not torch.accelerator.is_available():
        with pytest.raises(ValueError, match="can be searched on a GPU only"):
            find_batch_size(recipe)


def test_the_command_prints_rates_and_makes_no_run(recipe: Recipe, capsys: pytest.CaptureFixture) -> None:
    file = recipe.folder.parent.parent / "recipe.yaml"
    save_recipe(recipe, file)
    assert cli.main(["train", str(file), "--find-lr"]) == 0
    assert "the loss falls fastest at" in capsys.readouterr().out
    assert not recipe.folder.exists()
    assert cli.main(["train", str(file), "--find-lr", "--resume", "x"]) == 1
    assert "--find-lr is for new runs" in capsys.readouterr().err
