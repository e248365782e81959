"""The mean of the weights of runs, and of a run's checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import widefield
from train.helpers import QUIET
from widefield import cli
from widefield.loading import load, save
from widefield.runs import average
from widefield.train import CheckpointSpec, DataSpec, ModelSpec, Recipe, train


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Return a recipe whose run of three epochs keeps all checkpoints, trained."""
    recipe = Recipe(
        name="start", model=ModelSpec("test_resnet"), data=DataSpec("scales", {"count": 48, "size": 32}),
        output=str(tmp_path_factory.mktemp("runs")), epochs=3, batch_size=16, workers=0, trackers=[],
        checkpoint=CheckpointSpec(keep=3),
    )  # fmt: skip
    train(recipe, console=QUIET)
    return recipe


@pytest.fixture(scope="module")
def soup(start: Recipe) -> list[Path]:
    """Return two runs from the same weights."""
    model = replace(start.model, pretrained=str(start.folder))
    return [
        train(replace(start, name=f"part-{seed}", model=model, seed=seed, epochs=1), console=QUIET).folder
        for seed in (1, 2)
    ]


def test_the_last_checkpoints_of_a_run(start: Recipe) -> None:
    subject = average([start.folder], last=2)
    files = sorted(start.folder.glob("checkpoints/step-*/model.safetensors"))
    assert len(files) == 3
    parts = [load_file(file) for file in files[1:]]
    for name, value in subject.model.state_dict().items():
        if value.is_floating_point():
            expected = ((parts[0][name].double() + parts[1][name].double()) / 2).float()
            assert torch.equal(value, expected), name
        else:
            assert torch.equal(value, parts[0][name]), name
    assert not subject.model.training


def test_runs_from_one_start_and_the_file(soup: list[Path], tmp_path: Path) -> None:
    subject = average(soup)
    states = [load(str(run)).model.state_dict() for run in soup]
    weight = subject.model.state_dict()["stem.0.weight"] if "stem.0.weight" in states[0] else None
    for name, value in subject.model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (states[0][name] + states[1][name]) / 2)
    assert weight is None or weight.shape == states[0]["stem.0.weight"].shape
    again = widefield.load(save(subject, tmp_path / "mean.safetensors"))
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(again(x), subject.model(x))
    card = save(subject, tmp_path / "folder") / "README.md"
    assert "top1" not in card.read_text()  # that of a part is not that of the mean


def test_batch_norms_may_measure_anew(soup: list[Path]) -> None:
    images = torch.rand(32, 3, 32, 32)
    plain, measured = average(soup), average(soup, batches=images.split(8))
    norm = next(m for m in measured.model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    seen: list[torch.Tensor] = []
    norm.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    measured.model(images)
    torch.testing.assert_close(norm.running_mean, seen[0].mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    other = next(m for m in plain.model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert not torch.allclose(norm.running_mean, other.running_mean)
    assert not measured.model.training


def test_what_has_no_mean(start: Recipe, soup: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs at least two sources"):
        average([start.folder])
    with pytest.raises(ValueError, match="checkpoints of one run; got 2 sources"):
        average(soup, last=2)
    with pytest.raises(FileNotFoundError, match="holds 3 checkpoints, not 4"):
        average([start.folder], last=4)
    with pytest.raises(ValueError, match="are different networks: they differ in"):
        average([soup[0], "test_convnext"])


def test_the_command(start: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "mean.safetensors"
    assert cli.main(["average", str(start.folder), "--last", "3", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"wrote {out}" in printed
    assert "statistics of batch norms were averaged" in printed
    assert cli.main(["eval", str(out), "--data", "scales", "--workers", "0"]) == 0
