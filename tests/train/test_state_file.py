"""The state of a run is restored bit by bit, without pickle."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from widefield.train.randomness import random_state, restore_random_state
from widefield.train.state_file import load_state, save_state

PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
KEYS = st.text() | st.integers()
NESTED = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(KEYS, inner),
    max_leaves=20,
)


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


@given(NESTED)
def test_plain_values_come_back(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    folder = tmp_path_factory.mktemp("state")
    save_state(folder, value)
    assert same(load_state(folder), value)


def test_tensors_come_back_each_its_own(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    state = {
        "views": [base, base[1:3, ::2], base.t(), base[0]],
        0: {"step": torch.tensor(3.0), "flags": torch.tensor([True, False]), "none": torch.zeros(0, 3)},
        "kinds": tuple(torch.ones(2).to(kind) for kind in (torch.bfloat16, torch.float64, torch.int64, torch.uint8)),
    }
    save_state(tmp_path, state)
    assert same(load_state(tmp_path), state)
    assert {path.name for path in tmp_path.iterdir()} == {"state.safetensors", "state.json"}


def test_an_optimizer_and_the_generators_go_on_as_they_were(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    save_state(tmp_path, {"optimizer": optimizer.state_dict(), "random": [random_state()]})
    expected = torch.rand(3), np.random.rand(3)
    state = load_state(tmp_path)
    again = torch.optim.AdamW(layer.parameters())
    again.load_state_dict(state["optimizer"])
    assert same(again.state_dict(), optimizer.state_dict())
    restore_random_state(state["random"][0])
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])


def test_what_it_cannot_hold_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"state\.a\.1 is a set, which a checkpoint cannot hold"):
        save_state(tmp_path, {"a": [1, {2}]})
