"""A fit that is killed in any phase goes on to what it would have been."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fitting.planted import continued, recipe_of
from widefield.fitting import FitResult, FitSpec
from widefield.fitting.progress import read_log
from widefield.train import CheckpointSpec
from widefield.train.checkpoint import checkpoints

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fitting.planted", "widefield.fitting"])


def killed(folder: Path, when: Callable[[], bool]) -> None:
    """Continue a fit in another process, and kill it as soon as ``when`` holds."""
    process = CONTEXT.Process(target=continued, args=(folder,))
    process.start()
    deadline = time.monotonic() + 300
    while process.is_alive() and not when() and time.monotonic() < deadline:
        time.sleep(0.002)
    assert process.is_alive(), f"the fit ended before it could be killed: {read_log(folder)}"
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()


def saved(folder: Path) -> bool:
    return bool(checkpoints(folder / "checkpoints"))


def moments(folder: Path) -> list[Callable[[], bool]]:
    """Return the moments at which a fit is killed, in their order."""
    return [
        lambda: (folder / "probe/config.yaml").is_file(),  # before its first checkpoint
        lambda: saved(folder / "probe"),
        lambda: "probe" in read_log(folder) and (folder / "readings.json").is_file(),
        lambda: "read" in read_log(folder),
        lambda: saved(folder / "plain"),
        lambda: saved(folder / "unchanged"),
        lambda: "compare" in read_log(folder),
    ]


def made(folder: Path) -> Path:
    """Return the folder of a fit that has not begun."""
    recipe = recipe_of(folder, (1, 2), checkpoint=CheckpointSpec(keep=1, every=10))
    spec = FitSpec(recipe, budget="macs", limit=0.9, probe=0.5, onnx=False, out=folder)
    folder.mkdir()
    spec.save()
    return folder


@pytest.mark.slow
def test_a_fit_that_is_killed_in_every_phase_is_the_fit_that_was_not(tmp_path: Path) -> None:
    results = []
    for name in ("whole", "killed"):
        folder = made(tmp_path / name)
        for when in moments(folder) if name == "killed" else ():
            killed(folder, when)
        process = CONTEXT.Process(target=continued, args=(folder,))
        process.start()
        process.join()
        assert process.exitcode == 0
        results.append(FitResult.load(folder))
    whole, other = results
    assert other.readings == whole.readings
    assert other.choice == whole.choice
    assert other.verdict.difference == whole.verdict.difference
    assert other.verdict.plain.metrics == whole.verdict.plain.metrics
    files = [json.loads((tmp_path / name / "verdict.json").read_text())["ratings"] for name in ("whole", "killed")]
    assert files[0] == files[1]
