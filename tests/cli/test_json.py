"""``--json``: one document, with full numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from documents import document
from widefield import cli
from widefield.cli._tables import Printer, plain

SMALL = ["--size", "64", "--count", "2", "--out", "out"]

CHEAP = {
    "recipes van*": ["recipes"],
    "models resnet18": ["models"],
    "models --compare imagenet van_b0": ["rows", "note"],
    "models --compare segmentation morf_convnext_tiny": ["rows", "note"],
    "plan test_resnet --to morf --options kernel_sizes=[3,5]": ["model", "replaced", "steps"],
    "plan test_convnext --masked": ["model", "method", "size", "masked_patches", "patches", "plan"],
    "runs runs": ["runs"],
    "runs --compare first second": ["runs"],
    "erf test_resnet": ["environment", "results", "files"],
    "cam test_resnet": ["environment", "results", "files"],
    "blocks test_resnet": ["environment", "results", "files"],
    "stability test_resnet --shifts 1 2": ["environment", "results", "files"],
    "interactions test_resnet --grid 8 --pairs 1 --contexts 2": ["environment", "results", "files"],
    "masks test_resnet --convert": ["environment", "results", "files"],
    "routing mixture": ["environment", "results", "files"],
    "kernels test_resnet --limit 3 --cost": ["environment", "results", "files", "costs", "costs_file"],
    "predict test_resnet cat.png": [
        "environment",
        "model",
        "weights",
        "about",
        "classes",
        "palette",
        "images",
        "unreadable",
        "files",
    ],
    "train digits_morf --print-config": ["recipe"],
    "train digits_morf --dry-run": ["dry_run"],
    "eval tenclass --data digits --class-map sorted --workers 0": ["environment", "results"],
    "bench model test_resnet --size 32 --batch-size 2 --repeats 1": ["environment", "facts", "summary", "tables"],
}
"""Command -> entries of its document after command and version, in order."""
ANALYSES = ("erf", "cam", "blocks", "stability", "interactions", "masks", "routing", "kernels")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working directory, with two runs and an image."""
    monkeypatch.chdir(tmp_path)
    for name, accuracy in (("first", 1 / 3), ("second", float("nan"))):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(f"base: digits_morf\nname: {name}\nepochs: 2\n")
        entry = {"kind": "epoch", "step": 9, "epoch": 0, "seconds": 3.0, "top1": accuracy}
        (folder / "metrics.jsonl").write_text(json.dumps(entry).replace("NaN", "null") + "\n")
    Image.new("RGB", (70, 70)).save(tmp_path / "cat.png")
    return tmp_path


MODELS = {
    "tenclass": "test_resnet{num_classes: 10}",
    "mixture": "morf_convnext_tiny{depths: [1, 1, 1, 1], dims: [8, 8, 8, 8]}",
}


def words_of(command: str) -> list[str]:
    words = [MODELS.get(word, word) for word in command.split()]
    return [*words, *(SMALL if words[0] in ANALYSES else [])]


@pytest.mark.parametrize("command", CHEAP)
def test_stdout_is_one_document(command: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main([*words_of(command), "--json"])
    out, error = capsys.readouterr()
    assert status == 0, error
    assert list(document(out)) == ["command", "version", *CHEAP[command]]
    assert "┃" not in error


def test_every_command_takes_json(capsys: pytest.CaptureFixture[str]) -> None:
    for name in cli.COMMANDS:
        words = [name] if name not in cli.SEVERAL else [name, "model"]
        with pytest.raises(SystemExit):
            cli.main([*words, "--help"])
        assert "--json" in capsys.readouterr().out, name


def test_numbers_are_not_rounded_and_undefined_ones_are_null(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["runs", "--sort", "name", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["runs"]
    assert (first["best"], second["best"]) == (1 / 3, None)
    assert first["recipe"]["optimizer.lr"] > 0


def test_the_document_of_an_analysis_is_its_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*words_of("erf test_resnet"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["results"] == json.loads((here / "out" / "erf.json").read_text())["results"]
    assert all(Path(file).is_file() for file in found["files"])


def test_errors_leave_stdout_empty(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["runs", "nowhere", "--json"]) == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert "there is no folder 'nowhere'" in error


def test_one_process_of_several_prints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert cli.main(["recipes", "van_b0*", "--json"]) == 0
        assert capsys.readouterr().out.count("\n") == lines


class _Pair(NamedTuple):
    size: tuple[int, int]
    file: Path


def test_plain_values() -> None:
    found = plain({
        "tensor": torch.tensor([[1.5, math.inf]]), "array": np.float32(0.25), "record": _Pair((2, 3), Path("a/b")),
        1: {True, }, "long": 2**60, "none": None,
    })  # fmt: skip
    assert found == {
        "tensor": [[1.5, None]], "array": 0.25, "record": {"size": [2, 3], "file": str(Path("a/b"))},
        "1": [True], "long": 2**60, "none": None,
    }  # fmt: skip
    with pytest.raises(TypeError, match="a document is made of"):
        plain(object())


def test_a_failing_command_prints_no_document(capsys: pytest.CaptureFixture[str]) -> None:
    printer = Printer(as_json=True, head={})

    def half() -> None:
        with printer.printing():
            printer.add(half=1)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        half()
    assert capsys.readouterr().out == ""
