"""Runs on shards at a URL equal runs on the same files of this machine, stopped in the middle of an epoch or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml

from data.http_server import serving
from data.made_sets import pictures, webdataset, write_folder, write_tar
from train.helpers import log, same_weights
from widefield import cli
from widefield.train import DataSpec, RunResult

Run = Callable[..., RunResult]

AUGMENTED = {"size": 32, "auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.5}
BRACES = {"train": "train/a-{0..1}.tar", "val": "val/a-{0..1}.tar"}


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "sets"
    for split, count in (("train", 16), ("val", 2)):
        found = pictures(count, seed=count)
        write_folder(root / "files", split, found)
        members = webdataset(found)
        write_tar(root / "tars" / split / "a-0.tar", members[:40])
        write_tar(root / "tars" / split / "a-1.tar", members[40:] or members[:2])
    return root


@pytest.fixture
def memory(made: Path) -> Iterator[str]:
    files = fsspec.filesystem("memory")
    files.put(str(made), "/sets", recursive=True)
    yield "memory://sets"
    files.rm("/sets", recursive=True)


@pytest.mark.parametrize("name", ["shards", "folder"])
def test_a_run_stopped_in_mid_epoch_equals_one_on_local_files(
    run: Run, made: Path, memory: str, stop_at: Any, name: str
) -> None:
    """Whole on this machine; the parts in memory, and by two workers through the local file system of fsspec."""
    part_of = "tars" if name == "shards" else "files"

    def spec(base: str) -> DataSpec:
        return DataSpec(name, {"root": f"{base}/{part_of}", **AUGMENTED})

    same = {"batch_size": 8, "ema": None}
    whole = run(name="whole", data=spec(str(made)), **same)
    assert whole.steps == 12
    stop_at(2)
    part = run(data=spec(memory), **same)
    assert part.interrupted
    stop_at(7)
    part = run(resume=part.folder, data=spec(f"file://{made}"), workers=2, **same)
    assert part.steps == 9
    rest = run(resume=part.folder, data=spec(memory), **same)
    assert log(rest.folder) == log(whole.folder)
    assert same_weights(rest.model, whole.model)


def test_the_command_trains_and_evaluates_on_shards_at_a_url(
    made: Path, memory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("words.txt").write_text("cat\ndog\neel\n")
    with serving(made) as server:
        data = {"root": f"{server.url}/tars", "size": 32, "class_map": "words.txt", **BRACES}
        recipe = {
            "name": "remote",
            "model": {"name": "convnext_atto", "args": {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}},
            "data": {"name": "shards", "args": data},
            "output": "runs",
            "optimizer": {"lr": 0.001},
            "epochs": 1,
            "batch_size": 16,
            "workers": 0,
        }
        Path("remote.yaml").write_text(yaml.safe_dump(recipe))
        assert cli.main(["train", "remote.yaml"]) == 0
        assert f"train: 48 images in {server.url}/tars, 3 classes" in capsys.readouterr().err
        assert cli.main(["eval", "runs/remote"]) == 0
        assert server.url in capsys.readouterr().out
        assert cli.main(["train", "--resume", "runs/remote", "--data.args.storage.key", "geheim"]) == 1
        assert "storage must not hold 'key'" in capsys.readouterr().err
    assert cli.main(["eval", "runs/remote", "--data", f"{memory}/files"]) == 0
    assert f"{memory}/files" in capsys.readouterr().out
    assert "geheim" not in "".join(path.read_text() for path in Path("runs").rglob("*.yaml"))
