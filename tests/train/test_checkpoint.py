from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from widefield.train import checkpoint
from widefield.train.checkpoint import Checkpoint

HIGHER = {"headline": "top1", "higher_is_better": True}


def net(width: int = 4) -> nn.Module:
    torch.manual_seed(width)
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width, 2))


def save(folder: Path, step: int, top1: float | None = None, model: nn.Module | None = None) -> Checkpoint:
    saved = checkpoint.save(folder, model or net(), None, {"step": torch.tensor(step)}, {"step": step})
    return saved if top1 is None else checkpoint.record(saved, {"top1": top1})


def test_what_is_saved_is_what_is_read(tmp_path: Path) -> None:
    model, ema = net(), net(5)
    saved = checkpoint.save(tmp_path, model, ema, {"a": [1, (2, None)], "t": torch.ones(2)}, {"step": 3, "epoch": 1})
    (found,) = checkpoint.checkpoints(tmp_path)
    assert found == saved
    assert found.step == 3
    assert found.metrics is None
    assert found.weights.name == "ema.safetensors"
    assert {file.name for file in found.path.iterdir()} == {
        "model.safetensors",
        "ema.safetensors",
        "state.safetensors",
        "state.json",
        "meta.json",
    }
    state = found.state()
    assert state["a"] == [1, (2, None)]
    assert torch.equal(state["t"], torch.ones(2))
    other = net(4)
    nn.init.zeros_(other[0].weight)
    checkpoint.load_weights(found.path / "model.safetensors", other)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_channels_last_and_shared_weights_survive(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Linear(4, 4), nn.Linear(4, 4)).to(
            memory_format=torch.channels_last
        )
        model[2].weight = model[1].weight
        return model

    model, other = tied(), tied()
    saved = save(tmp_path, 1, model=model)
    checkpoint.load_weights(saved.weights, other)
    assert torch.equal(model[0].weight, other[0].weight)
    assert torch.equal(model[2].weight, other[2].weight)
    assert other[2].weight is other[1].weight
    assert other[0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "at",
    ["widefield.train.checkpoint.save_state", "os.fsync", "pathlib.Path.replace", "widefield.train.checkpoint._json"],
)
def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    before = save(tmp_path, 1, model=net())

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(at, fail)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 2)
    assert checkpoint.checkpoints(tmp_path) == [before]
    assert [path.name for path in tmp_path.iterdir()] == [before.path.name]
    before.state()
    checkpoint.load_weights(before.weights, net())


def test_what_a_killed_write_left_is_ignored_and_cleaned(tmp_path: Path) -> None:
    save(tmp_path, 1)
    leftover = tmp_path / ".unfinished-abc"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    assert [c.step for c in checkpoint.checkpoints(tmp_path)] == [1]
    save(tmp_path, 2)
    assert not leftover.exists()
    assert [c.step for c in checkpoint.checkpoints(tmp_path)] == [1, 2]


def test_a_failed_record_leaves_the_old_meta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = save(tmp_path, 1)

    def fail(path: Path, target: Path) -> None:
        raise OSError("power cut")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="power cut"):
        checkpoint.record(saved, {"top1": 0.5})
    assert json.loads((saved.path / "meta.json").read_text())["metrics"] is None


def test_saving_a_step_again_keeps_the_first(tmp_path: Path) -> None:
    save(tmp_path, 1, top1=0.5)
    assert save(tmp_path, 1, model=net()).metrics == {"top1": 0.5}


def test_best_and_newest_stay(tmp_path: Path) -> None:
    for step, top1 in enumerate([0.1, 0.9, 0.3, float("nan"), 0.5, 0.9], start=1):
        save(tmp_path, step, top1)
        checkpoint.prune(tmp_path, 2, **HIGHER)
    save(tmp_path, 7)  # interrupted: not evaluated, never the best
    checkpoint.prune(tmp_path, 2, **HIGHER)
    assert [c.step for c in checkpoint.checkpoints(tmp_path)] == [2, 6, 7]
    best = checkpoint.best(tmp_path, **HIGHER)
    assert best is not None
    assert best.step == 2
    lowest = checkpoint.best(tmp_path, "top1", higher_is_better=False)
    assert lowest is not None
    assert lowest.step == 2  # the earliest of equals


def test_best_of_nothing_is_none(tmp_path: Path) -> None:
    assert checkpoint.best(tmp_path / "none", **HIGHER) is None
    save(tmp_path, 1)
    assert checkpoint.best(tmp_path, **HIGHER) is None


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (net(5), r"0.weight is \[4, 3, 3, 3\] there and \[5, 3, 3, 3\] here; .*and 4 more"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), r"1.bias is \[4\] there and not in the model here"),
        (nn.Sequential(*net(), nn.Linear(2, 2)), r"4.weight is not in the checkpoint there and \[2, 2\] here"),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path: Path, model: nn.Module, message: str) -> None:
    saved = save(tmp_path, 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        checkpoint.load_weights(saved.weights, model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
