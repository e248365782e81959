"""Train batches of samples of one group, such as wide or tall images: every sample once, exact resume, processes."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from train.helpers import log, same_weights
from widefield.data import SETS, Scales
from widefield.tasks import Classification
from widefield.train import Recipe, RunResult
from widefield.train.loaders import EpochSampler, batches, train_loader

Run = Callable[..., RunResult]


class Grouped(Scales):
    """Images of which each third is of another group."""

    def batch_groups(self) -> NDArray[np.int64]:
        return np.arange(len(self)) % 3 // 2


def order(sampler: EpochSampler, epoch: int = 0, start: int = 0) -> list[int]:
    sampler.set_epoch(epoch)
    sampler.start = start
    return list(sampler)


@given(
    groups=st.lists(st.integers(0, 3), min_size=1, max_size=80),
    together=st.integers(1, 9),
    epoch=st.integers(0, 3),
    start=st.integers(0, 100),
)
def test_every_sample_comes_once_and_only_the_last_ones_are_mixed(
    groups: list[int], together: int, epoch: int, start: int
) -> None:
    column = np.array(groups)
    sampler = EpochSampler(len(groups), 5, 1, column, together)
    found = order(sampler, epoch)
    assert sorted(found) == list(range(len(groups)))
    whole = sum(np.bincount(column) // together)
    blocks = column[found[: whole * together]].reshape(whole, together)
    assert (blocks == blocks[:, :1]).all()
    # In each group the order is that of the shuffle, and so is that of the blocks.
    plain = order(EpochSampler(len(groups), 5), epoch)
    for group in set(groups):
        assert [i for i in found if groups[i] == group] == [i for i in plain if groups[i] == group]
    ends = [plain.index(block[-1]) for block in np.array(found[: whole * together]).reshape(whole, together)]
    assert ends == sorted(ends)
    start = min(start, len(groups))
    assert order(sampler, epoch, start) == found[start:]


def test_one_group_is_the_usual_order() -> None:
    assert order(EpochSampler(50, 1, 1, np.zeros(50, np.int64), 8), 3) == order(EpochSampler(50, 1), 3)


def test_visits_of_an_image_are_of_its_group() -> None:
    groups = np.arange(60) % 2
    found = order(EpochSampler(60, 1, 3, groups, 6), 1)
    assert len(found) == 60
    assert sorted(np.unique(np.array(found) // 60)) == [0, 1, 2]
    blocks = (groups[np.array(found) % 60])[:54].reshape(9, 6)
    assert (blocks == blocks[:, :1]).all()


def test_a_step_of_several_processes_is_of_one_group() -> None:
    dataset = Grouped("train", count=96, size=32)
    collate = Classification(8).collate
    one = [batch["index"] for batch in batches(train_loader(dataset, collate, 12, 0, seed=0))]
    two = [batch["index"] for batch in batches(train_loader(dataset, collate, 6, 0, seed=0, processes=2))]
    assert [index.tolist() for index in one] == [
        [*first.tolist(), *second.tolist()] for first, second in zip(two[::2], two[1::2], strict=True)
    ]
    # As accelerate deals batches out to processes.
    sampler = train_loader(dataset, collate, 6, 0, seed=0, processes=2).batch_sampler
    shares = [list(BatchSamplerShard(sampler, num_processes=2, process_index=i)) for i in range(2)]
    assert [index.tolist() for index in one] == [[*mine, *theirs] for mine, theirs in zip(*shares, strict=True)]
    kinds = [set((dataset.batch_groups()[index]).tolist()) for index in one]
    assert kinds.count({0}) == 5
    assert kinds.count({1}) == 2
    plain = train_loader(Scales("train", count=96, size=32), collate, 12, 0, seed=0)
    assert plain.sampler.groups is None


@pytest.fixture
def grouped(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setitem(SETS, "grouped", Grouped)
    return {"data": replace(recipe.data, name="grouped")}


@pytest.mark.parametrize("stop", [4, 9])
def test_a_resumed_run_equals_an_uninterrupted_one(
    run: Run, grouped: dict[str, Any], monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    whole = run(name="whole", **grouped)
    loss, calls = Classification.loss, 0

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == stop:
            signal.raise_signal(signal.SIGINT)
        return loss(*args)

    monkeypatch.setattr(Classification, "loss", counted)
    part = run(**grouped)
    assert part.steps == stop
    rest = run(resume=part.folder, **grouped)
    assert log(rest.folder) == log(whole.folder)
    assert same_weights(rest.model, whole.model)
