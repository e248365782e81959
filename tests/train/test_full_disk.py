"""A disk that fills up: a one-line error, the last good checkpoint, and a run that resumes later."""

from __future__ import annotations

import errno
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from train.helpers import log, same_weights
from widefield.cli import main
from widefield.train import Recipe, RunResult, save_recipe
from widefield.train.run import Run as Training

Run = Callable[..., RunResult]


@contextmanager
def files_no_longer_than(size: int) -> Iterator[None]:
    """Make the system refuse longer files with EFBIG, as a full disk does with ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def refused(*args: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def refused_by_safetensors(*args: Any, **options: Any) -> None:
    """Raise what safetensors 0.8 does: not an OSError."""
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


WRITES = {
    "weights": ("safetensors.torch.serialize_file", refused_by_safetensors),
    "state": ("widefield.train.state_file.save_file", refused_by_safetensors),
    "meta": ("widefield.train.checkpoint._json", refused),
    "flush": ("os.fsync", refused),
    "log": ("widefield.train.logs.json.dumps", refused),
    "events": ("tensorboard.summary.writer.record_writer.RecordWriter.write", refused),
    "metrics": ("widefield.train.checkpoint.record", refused),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_disk_that_fills_up_names_the_last_good_checkpoint(
    run: Run, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    whole = run(name="whole")
    plain = Training._step
    with monkeypatch.context() as patch:

        def step(self: Training, group: Any) -> None:
            plain(self, group)
            if self.step == 8:  # in the second epoch of two
                patch.setattr(*WRITES[write])

        patch.setattr(Training, "_step", step)
        with pytest.raises(OSError, match="No space left on device") as caught:
            run()
    kept = re.escape(f"{recipe.folder / 'checkpoints'}/step-000000")
    found = re.search(rf"The last good checkpoint is {kept}(\d\d): make room, then continue with", str(caught.value))
    assert found, caught.value
    assert int(found[1]) == (12 if write == "metrics" else 6) or write == "events"  # a thread writes the events
    assert caught.value.errno == errno.ENOSPC
    assert "\n" not in str(caught.value)
    assert not list((recipe.folder / "checkpoints").glob(".*"))
    rest = run(resume=recipe.folder)
    assert same_weights(rest.model, whole.model)
    assert log(rest.folder) == log(whole.folder)


def test_the_command_prints_one_line(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_recipe(recipe, tmp_path / "recipe.yaml")
    plain = Training._step

    def step(self: Training, group: Any) -> None:
        plain(self, group)
        if self.step == 8:
            resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    monkeypatch.setattr(Training, "_step", step)
    with files_no_longer_than(resource.getrlimit(resource.RLIMIT_FSIZE)[0]):
        assert main(["train", str(tmp_path / "recipe.yaml")]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == (
        f"widefield train: the run in {recipe.folder} stopped: File too large. The last good checkpoint is "
        f"{recipe.folder}/checkpoints/step-00000006: make room, then continue with widefield train --resume "
        f"{recipe.folder}."
    )


def test_before_the_first_checkpoint_there_is_none_to_name(run: Run, recipe: Recipe) -> None:
    with files_no_longer_than(12_000), pytest.raises(OSError, match="There is no checkpoint yet: make room"):
        run(trackers=[])
    assert not (recipe.folder / "config.yaml").exists()


def test_this_is_how_safetensors_says_it(tmp_path: Path) -> None:
    with files_no_longer_than(1000), pytest.raises(SafetensorError, match=rf"\(os error {errno.EFBIG}\)"):
        save_file({"a": torch.zeros(10_000)}, tmp_path / "a.safetensors")
