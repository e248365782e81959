"""A stopped and resumed run equals an uninterrupted one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from train.helpers import log, same_weights
from widefield.train import EmaSpec, Recipe, RunResult, TaskSpec, load_recipe, save_recipe
from widefield.train.interrupt import StopRequest
from widefield.train.loaders import EpochSampler

Run = Callable[..., RunResult]

# Everything with random numbers or state: dropout, mixing, the average, the optimizer, the schedule.
BUSY: dict[str, Any] = {
    "task": TaskSpec(args={"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}),
    "ema": EmaSpec(0.9, warmup=True),
    "clip_grad": 1.0,
}


@pytest.mark.parametrize(("stop", "steps"), [(4, 4), (6, 6), (9, 9), (12, 12)])
def test_resumed_equals_uninterrupted(run: Run, recipe: Recipe, stop_at: Any, stop: int, steps: int) -> None:
    """Stop in the middle of an epoch, at its end before the evaluation, and after the last step."""
    whole = run(name="whole", **BUSY)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    stop_at(stop)
    part = run(**BUSY)
    assert (part.steps, part.interrupted) == (steps, signal.SIGINT)
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    rest = run(resume=part.folder, **BUSY)
    assert rest.interrupted is None
    assert log(rest.folder) == log(whole.folder)
    assert same_weights(rest.model, whole.model)
    assert (rest.metrics, rest.best, rest.steps) == (whole.metrics, whole.best, whole.steps)


def test_stopped_twice_and_resumed_with_other_workers(run: Run, stop_at: Any) -> None:
    whole = run(name="whole", **BUSY)
    stop_at(2, signal.SIGTERM)
    part = run(**BUSY)
    assert part.interrupted is signal.SIGTERM
    stop_at(6)
    part = run(resume=part.folder, workers=1, log_every=3, **BUSY)
    assert part.steps == 8
    rest = run(resume=part.folder, **BUSY)
    assert same_weights(rest.model, whole.model)
    assert rest.metrics == whole.metrics


def test_resumed_at_an_epochs_end(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(name="whole", **BUSY)
    train_until = "widefield.train.run.Run._train_until"
    from widefield.train.run import Run

    original = Run._train_until

    def killed(self: Any, end: int) -> None:
        if self.rounds == 1:
            raise RuntimeError("killed")
        original(self, end)

    with monkeypatch.context() as patch:
        patch.setattr(train_until, killed)
        with pytest.raises(RuntimeError, match="killed"):
            run(**BUSY)
    rest = run(resume=whole.folder.with_name("run"), **BUSY)
    assert log(rest.folder) == log(whole.folder)
    assert same_weights(rest.model, whole.model)


def test_a_run_killed_after_its_last_checkpoint_repeats_what_was_lost(run: Run, stop_at: Any) -> None:
    whole = run(name="whole")
    stop_at(4)
    part = run()
    with (part.folder / "metrics.jsonl").open("a") as file:  # files that a kill -9 two steps later would leave
        file.write('{"kind": "step", "step": 5, "loss": 0}\n{"kind": "epoch", "step": 6, "loss": 0}\n{"kind": "st')
    (part.folder / "checkpoints" / ".unfinished-x").mkdir()
    rest = run(resume=part.folder)
    assert log(rest.folder) == log(whole.folder)
    assert not (part.folder / "checkpoints" / ".unfinished-x").exists()


def test_a_finished_run_resumes_to_its_result(run: Run) -> None:
    whole = run(**BUSY)
    before = log(whole.folder)
    again = run(resume=whole.folder, **BUSY)
    assert log(whole.folder) == before
    assert same_weights(again.model, whole.model)
    assert (again.metrics, again.best, again.epochs, again.steps) == (whole.metrics, whole.best, 2, 12)


def test_another_model_is_refused_before_anything_changes(run: Run, recipe: Recipe, stop_at: Any) -> None:
    stop_at(3)
    part = run()
    before = {path: path.read_bytes() for path in part.folder.rglob("*") if path.is_file()}
    wider = replace(recipe.model, args={**recipe.model.args, "dims": [16, 8, 16, 16]})
    with pytest.raises(
        ValueError, match=r"another model than this ConvNeXt: stem.0.weight is \[8, .*\] there and \[16"
    ):
        run(resume=part.folder, model=wider)
    after = {path: path.read_bytes() for path in part.folder.rglob("*") if path.is_file()}
    assert after == before


def test_another_recipe_is_refused(run: Run, recipe: Recipe, stop_at: Any) -> None:
    stop_at(3)
    part = run()
    with pytest.raises(ValueError, match=r"only be resumed as it was, and optimizer.lr was 0.002 and is 0.1"):
        run(resume=part.folder, optimizer=replace(recipe.optimizer, lr=0.1))
    with pytest.raises(ValueError, match=r"ema.decay was None and is 0.5"):
        run(resume=part.folder, ema=EmaSpec(0.5))


def test_nothing_to_resume(run: Run, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no checkpoint to resume from"):
        run(resume=tmp_path / "nowhere")


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from widefield.train import load_recipe, train
result = train(load_recipe(sys.argv[1]))
sys.exit(128 + result.interrupted if result.interrupted else 0)
"""


def test_sigterm_from_outside(run: Run, recipe: Recipe, tmp_path: Path, stop_at: Any) -> None:
    recipe = replace(recipe, workers=1, epochs=500)  # long enough to be interrupted
    save_recipe(recipe, tmp_path / "recipe.yaml")
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, tmp_path / "recipe.yaml"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # the same as in this process: losses are compared bit by bit
    )
    entries = recipe.folder / "metrics.jsonl"
    deadline = time.monotonic() + 60
    try:
        while time.monotonic() < deadline and not (entries.is_file() and len(entries.read_text().splitlines()) > 8):
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # like a scheduler: loader workers get it too
        _, shown = process.communicate(timeout=60)
    assert process.returncode == 143, shown
    assert f"continue with: widefield train --resume {recipe.folder}" in shown
    assert load_recipe(recipe.folder) == recipe
    stopped = [entry for entry in log(recipe.folder) if entry["kind"] == "step"]
    assert len(stopped) > 6

    # Resumed in this process for some steps, it still equals the uninterrupted run.
    stop_at(5)
    rest = run(resume=recipe.folder, epochs=500)
    stop_at(len(stopped) + 5)
    whole = run(name="whole", epochs=500)
    assert log(rest.folder) == log(whole.folder)
    assert same_weights(rest.model, whole.model)


def test_second_signal_acts_at_once(request: pytest.FixtureRequest) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.received is signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_off_the_main_thread_signals_are_left_alone() -> None:
    from concurrent.futures import ThreadPoolExecutor

    def enter() -> Any:
        with StopRequest():
            return signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(enter).result() is signal.getsignal(signal.SIGTERM)


def test_sampler_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int, start: int = 0) -> list[int]:
        sampler = EpochSampler(20, seed)
        sampler.set_epoch(epoch)
        sampler.start = start
        assert len(sampler) == 20 - start
        return list(sampler)

    np.random.seed(0)
    first = order(1, 2)
    np.random.seed(1)
    assert order(1, 2) == first
    assert sorted(first) == list(range(20))
    assert order(1, 2, start=7) == first[7:]
    assert order(1, 3) != first != order(2, 2)
