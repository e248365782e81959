"""Two processes with half the batch each give the results of one process with the whole batch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tolerances import NETWORK, close
from train.helpers import log, same_weights
from widefield.loading import load_trained
from widefield.train import (
    CheckpointSpec,
    DataSpec,
    EmaSpec,
    ModelSpec,
    OptimizerSpec,
    Recipe,
    RunResult,
    TaskSpec,
    save_recipe,
)


def launch(recipe: Recipe, path: Path, processes: int, *more: str) -> None:
    """Run ``widefield train`` in several processes on the CPU, like ``accelerate launch``."""
    save_recipe(recipe, path)
    words = ["torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0", "--rdzv-backend=c10d"]
    words += ["--rdzv-endpoint=localhost:0", "-m", "widefield", "train", str(path), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run([sys.executable, "-m", *words], env=environment, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def plain(recipe: Recipe) -> Recipe:
    """Return a recipe without random numbers in a process and without batch norm."""
    return replace(recipe, model=ModelSpec("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}))


def same_log(ours: Path, theirs: Path) -> None:
    mine, others = log(ours), log(theirs)
    assert [entry["kind"] for entry in mine] == [entry["kind"] for entry in others]
    for entry, other in zip(mine, others, strict=True):
        assert entry.keys() == other.keys()
        for name, value in entry.items():
            assert other[name] == (
                value if isinstance(value, (str, type(None))) else pytest.approx(value, rel=1e-4, abs=1e-6)
            ), name


@pytest.mark.parametrize("fsdp", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_are_one_with_the_same_whole_batch(
    run: Callable[..., RunResult], plain: Recipe, tmp_path: Path, fsdp: bool
) -> None:
    one = run(name="one", model=plain.model, batch_size=16, accumulate=2, clip_grad=1.0)
    two = replace(plain, name="two", batch_size=8, accumulate=2, clip_grad=1.0, fsdp=fsdp)
    launch(two, tmp_path / "two.yaml", 2)
    same_log(one.folder, two.folder)
    weights = load_trained(two.folder, "last").state_dict()
    for name, expected in load_trained(one.folder, "last").state_dict().items():
        close(weights[name], expected, NETWORK)


@pytest.mark.slow
def test_a_sharded_run_resumes(plain: Recipe, tmp_path: Path) -> None:
    whole = replace(plain, name="whole", batch_size=8, fsdp=True, checkpoint=CheckpointSpec(keep=9, every=4))
    launch(whole, tmp_path / "whole.yaml", 2)
    part = replace(whole, name="part")
    shutil.copytree(whole.folder, part.folder)
    for step in (6, 8, 10, 12):
        shutil.rmtree(part.folder / "checkpoints" / f"step-{step:08d}", ignore_errors=True)
    launch(part, tmp_path / "part.yaml", 2, "--resume", str(part.folder))
    same_log(part.folder, whole.folder)
    assert same_weights(load_trained(part.folder, "last"), load_trained(whole.folder, "last"))


@pytest.mark.slow
def test_a_process_without_an_image_to_evaluate_waits_for_nobody(recipe: Recipe, tmp_path: Path) -> None:
    """Batch norms have buffers, which torch's wrapper would broadcast in the forward pass of the other processes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 1)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    (tmp_path / "val" / "dog" / "0.png").write_bytes(b"broken")
    args = {"root": str(tmp_path), "size": 32, "corrupt": "skip", "max_corrupt": 1.0}
    lame = replace(
        recipe, model=ModelSpec("test_resnet"), data=DataSpec("folder", args), batch_size=4, ema=EmaSpec(0.5)
    )
    launch(lame, tmp_path / "lame.yaml", 2)
    epochs = [entry for entry in log(lame.folder) if entry["kind"] == "epoch"]
    assert [entry["epoch"] for entry in epochs] == [0, 1]
    assert all(entry["top1"] in (0, 1) for entry in epochs)


@pytest.mark.slow
def test_a_segmenter_with_synchronized_norms_and_its_counts_are_those_of_one_process(tmp_path: Path) -> None:
    """The heads have batch norms. Pixels are counted exactly, whichever process counts them."""
    one = Recipe(
        name="one",
        model=ModelSpec("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8], "ls_init_value": None}),
        data=DataSpec("scenes", {"size": 64, "count": 24}),
        task=TaskSpec("segmentation", {"head_args": {"channels": 8, "auxiliary_channels": 8, "dropout": 0.0}}),
        output=str(tmp_path / "runs"),
        optimizer=OptimizerSpec("sgd", lr=0.005),
        max_steps=8,
        evaluate_every=4,
        batch_size=8,
        workers=0,
        log_every=1,
        sync_batchnorm=True,
        trackers=[],
    )
    launch(one, tmp_path / "one.yaml", 1)
    two = replace(one, name="two", batch_size=4)
    launch(two, tmp_path / "two.yaml", 2)
    same_log(one.folder, two.folder)
    weights = load_trained(two.folder, "last").state_dict()
    for name, expected in load_trained(one.folder, "last").state_dict().items():
        close(weights[name], expected, NETWORK)
