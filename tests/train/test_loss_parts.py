"""A task whose loss has several parts: each is logged next to their sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from torch import Tensor, nn

from train.helpers import log, same_weights
from widefield import tasks
from widefield.tasks import Batch, Classification
from widefield.train import ConversionSpec, RunResult, TaskSpec

HARD = ConversionSpec("morf", "*.conv_dw", {"kernel_sizes": [3, 7], "routing": "hard"})


class InParts(Classification):
    """The usual loss as a quarter and three quarters of it."""

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        loss = self.loss(model, batch)
        return {"loss_low": loss / 4, "loss_high": 3 * loss / 4}


@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "batch_size": 4}, {"balance": 0.5, "conversion": HARD}])
def test_parts_are_logged_and_their_sum_trains(
    run: Callable[..., RunResult], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setitem(tasks.TASKS, "in_parts", InParts)
    one = run(name="one", log_every=1, **options)
    two = run(name="two", log_every=1, task=TaskSpec("in_parts"), **options)
    assert same_weights(one.model, two.model)
    whole = [entry for entry in log(one.folder) if entry["kind"] == "step"]
    parted = [entry for entry in log(two.folder) if entry["kind"] == "step"]
    assert not any("loss_low" in entry for entry in whole)
    for entry, other in zip(parted, whole, strict=True):
        assert entry["loss"] == other["loss"]
        assert entry["loss_high"] == pytest.approx(3 * entry["loss_low"])
        if "balance" not in options:
            assert entry["loss_low"] + entry["loss_high"] == pytest.approx(entry["loss"])
        else:
            assert entry["loss_low"] + entry["loss_high"] < entry["loss"]
