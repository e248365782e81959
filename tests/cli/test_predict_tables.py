"""``widefield predict``: standard input, tables and lines of JSON, exit codes."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from widefield.cli import main

MODEL = "test_resnet{num_classes: 3}"


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with three images, one of them in a folder, and a broken one; it is the current one."""
    monkeypatch.chdir(tmp_path)
    folder = Path("photos")
    (folder / "more").mkdir(parents=True)
    for name in ("a.png", "b.png", "more/c.png"):
        Image.effect_noise((40, 30), 60).convert("RGB").save(folder / name)
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    return folder


def given(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_lines_of_json_on_standard_output_are_all_that_is_there(photos: Path, capsys: Any) -> None:
    assert main(["predict", MODEL, str(photos), "--jsonl", "-", "--top", "1", "--batch-size", "2"]) == 3
    out, err = capsys.readouterr()
    entries = [json.loads(line) for line in out.splitlines()]
    assert [entry["path"] for entry in entries] == [f"photos/{name}" for name in
        ("a.png", "b.png", "broken.png", "more/c.png")]  # fmt: skip
    assert "damaged" in entries[2]["error"] or "truncated" in entries[2]["error"]
    assert all(len(entry["classes"]) == 1 for entry in entries if "classes" in entry)
    assert "1 of 4 images could not be read:" in err
    assert not Path("predictions").exists()


def test_tables_next_to_a_folder(photos: Path, capsys: Any) -> None:
    words = ["--csv", "tables/seen.csv", "--jsonl", "tables/seen.jsonl", "--out", "seen", "--workers", "1"]
    assert main(["predict", MODEL, "photos/[ab].png", *words]) == 0
    with Path("tables/seen.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"], row["rank"]) for row in rows] == [(n, r) for n in ("a.png", "b.png") for r in "123"]
    assert sum(float(row["probability"]) for row in rows[:3]) == pytest.approx(1, abs=1e-4)
    assert len(Path("tables/seen.jsonl").read_text().splitlines()) == 2
    assert sorted(path.name for path in Path("seen/overlays").iterdir()) == ["a.png", "b.png"]
    assert "tables/seen.csv" in capsys.readouterr().out
    assert main(["predict", MODEL, "photos/a.png", "--no-pictures", "--out", "bare"]) == 0
    assert sorted(path.name for path in Path("bare").iterdir()) == ["predict.html", "predict.json", "predict.png"]


@pytest.mark.parametrize("separator", ["\n", "\0"])
def test_paths_come_from_standard_input(
    separator: str, photos: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given(monkeypatch, separator.join(["photos/b.png", "photos/more", ""]).encode())
    assert main(["predict", MODEL, "-", "--csv", "-", "--top", "1"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split(",")[1] for line in out[1:]] == ["photos/b.png", "photos/more/c.png"]


def test_an_image_comes_from_standard_input(photos: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, (photos / "a.png").read_bytes())
    assert main(["predict", MODEL, "-", "photos/a.png", "--jsonl", "-", "--seed", "1"]) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first["name"] == "stdin.png"
    assert first["classes"] == second["classes"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "standard input is empty"),
        (b"\xff\xfe\x80\x81", "neither an image that can be read nor paths"),
        (b"nowhere.png\n", "there is no file or folder 'nowhere.png'"),
    ],
)
def test_other_input_is_an_error(
    content: bytes, message: str, photos: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given(monkeypatch, content)
    assert main(["predict", MODEL, "-"]) == 1
    assert message in capsys.readouterr().err


def test_nothing_readable_is_an_error(photos: Path, capsys: Any) -> None:
    assert main(["predict", MODEL, "photos/broken.png", "--csv", "-"]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("image,path,error\n,photos/broken.png,")
    assert "1 of 1 image could not be read" in err


def test_one_standard_output(photos: Path, capsys: Any) -> None:
    assert main(["predict", MODEL, "photos", "--csv", "-", "--jsonl", "-"]) == 1
    assert "cannot both be standard output" in capsys.readouterr().err
