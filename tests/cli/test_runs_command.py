"""``widefield runs``."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from PIL import Image

from widefield import cli
from widefield.train import DataSpec, ModelSpec, OptimizerSpec, Recipe, save_recipe


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return three runs: two finished, one interrupted."""
    monkeypatch.chdir(tmp_path)
    for name, lr, accuracies in (("first", 0.1, [0.5, 0.6]), ("second", 0.2, [0.7, 0.65]), ("third", 0.2, [0.4])):
        model, data = ModelSpec("resnet18"), DataSpec("scales")
        plan = Recipe(name=name, model=model, data=data, optimizer=OptimizerSpec(lr=lr), epochs=2)
        plan.folder.mkdir(parents=True)
        save_recipe(plan, plan.folder / "config.yaml")
        entries = [
            {"kind": "epoch", "step": 9 * i + 9, "epoch": i, "seconds": 30.0, "train_loss": 1.25, "top1": value}
            for i, value in enumerate(accuracies)
        ]
        (plan.folder / "metrics.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
        for file in plan.folder.iterdir():
            os.utime(file, (time.time() - 7200,) * 2)
    return tmp_path


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]


def test_all_runs_are_listed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["runs", "--sort", "name"]) == 0
    text = capsys.readouterr().out
    found = [row[:-1] for row in rows(text)]  # everything except the date
    start = ["resnet18", "scales"]
    assert found == [
        ["first", *start, "finished", "2/2 epochs", "top1", "60.00%", "60.00%", "1.25", "1m00s"],
        ["second", *start, "finished", "2/2 epochs", "top1", "70.00%", "65.00%", "1.25", "1m00s"],
        ["third", *start, "interrupted", "1/2 epochs", "top1", "40.00%", "40.00%", "1.25", "30s"],
    ]
    assert "third: it has no checkpoint to resume from" in text


def test_runs_are_sorted_and_chosen(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["runs", "runs", "--sort", "best", "--where", "optimizer.lr=0.2", "state=*"]) == 0
    assert [row[0] for row in rows(capsys.readouterr().out)] == ["second", "third"]
    assert cli.main(["runs", "--where", "state=failed"]) == 0
    assert capsys.readouterr().out == "no runs in runs that meet state=failed.\n"


def test_runs_are_compared(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["first", "third"], ["runs/first", "runs/third"]):
        assert cli.main(["runs", "--compare", *words, "--metric", "top1"]) == 0
        assert rows(capsys.readouterr().out) == [
            ["optimizer.lr", "0.1", "0.2"],
            ["state", "finished", "interrupted"],
            ["trained", "2/2 epochs", "1/2 epochs"],
            ["time", "1m00s", "30s"],
            ["last top1", "60.00%", "40.00%"],
            ["best top1", "60.00%", "40.00%"],
        ]


def test_runs_can_be_compared_where_there_is_no_folder_of_them(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "empty").mkdir()
    monkeypatch.chdir(here / "empty")
    assert cli.main(["runs", "--compare", "../runs/first", "../runs/second"]) == 0
    assert rows(capsys.readouterr().out)[0] == ["optimizer.lr", "0.1", "0.2"]


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_curves_are_drawn(suffix: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = here / "figures" / f"curves.{suffix}"
    assert cli.main(["runs", "--plot", str(file), "--metric", "top1", "train_loss"]) == 0
    assert f"wrote {file}" in capsys.readouterr().out
    content = file.read_bytes()
    assert content.startswith({"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix])
    if suffix == "png":
        with Image.open(file) as picture:
            assert picture.height > picture.width  # two panels in one column
    if suffix == "svg":
        assert all(word in content for word in (b"first", b"second", b"third", b"top1 (%)", b"train_loss"))


def test_runs_are_written_as_json(here: Path) -> None:
    assert cli.main(["runs", "--sort", "name", "--out", "deep/runs.json"]) == 0
    found = json.loads((here / "deep" / "runs.json").read_text())
    assert [entry["name"] for entry in found] == ["first", "second", "third"]
    assert found[1]["recipe"]["optimizer.lr"] == 0.2
    assert [entry["top1"] for entry in found[1]["log"]] == [0.7, 0.65]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "there is no folder 'nowhere' to look for runs in"),
        (
            ["--compare", "first", "secnd"],
            "no run 'secnd' among 3, nor in a folder of that name. Did you mean 'second'",
        ),
        (["--compare", "first"], "give two runs or more"),
        (["--sort", "top5"], "no run has the metric 'top5'"),
        (["--where", "optimzer.lr=1"], "no run has the key 'optimzer.lr'. Did you mean 'optimizer.lr'?"),
        (["--plot", "curves.gif"], "the suffix of --plot must be one of"),
        (["--plot", "curves.png", "--metric", "top5"], "no run has the metric 'top5' to draw"),
    ],
)
def test_what_the_user_can_mend_is_one_line(
    words: list[str], message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["runs", *words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("widefield runs: ")
    assert message in error
    assert not (here / "curves.png").exists()
