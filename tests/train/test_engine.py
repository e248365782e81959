from __future__ import annotations

import io
import json
import math
import multiprocessing
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch.utils.data import DataLoader, Dataset

from train.helpers import QUIET, log
from widefield import data, tasks
from widefield.loading import load_trained
from widefield.nn import MoRFConv2d
from widefield.tasks import Classification
from widefield.train import (
    CheckpointSpec,
    ConversionSpec,
    DataSpec,
    EmaSpec,
    ModelSpec,
    OptimizerSpec,
    Recipe,
    RunResult,
    ScheduleSpec,
    TaskSpec,
    build_model,
    evaluate,
    load_recipe,
    save_recipe,
    train,
)
from widefield.train.loaders import EpochSampler, shut_down, val_loader

Run = Callable[..., RunResult]


def test_training_learns_the_digits(run: Run) -> None:
    model = ModelSpec("convnext_atto", {"patch_size": 2, "depths": [1, 1, 1, 1], "dims": [8, 16, 16, 16]})
    args = {**model.args, "ls_init_value": None}
    result = run(
        data=DataSpec("digits"), model=replace(model, args=args), batch_size=32, optimizer=OptimizerSpec(lr=5e-3)
    )
    losses = [entry["loss"] for entry in log(result.folder) if entry["kind"] == "step"]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert result.metrics["top1"] > 0.7
    assert result.best["top1"] >= result.metrics["top1"]


def test_a_run_leaves_its_record(run: Run, recipe: Recipe) -> None:
    result = run(log_every=4)
    assert result.folder == recipe.folder
    assert (result.epochs, result.steps, result.interrupted) == (2, 12, None)
    assert load_recipe(result.folder) == replace(recipe, log_every=4)
    entries = log(result.folder)
    assert [(entry["kind"], entry["step"], entry["epoch"]) for entry in entries] == [
        ("step", 4, 0),
        ("epoch", 6, 0),
        ("step", 8, 1),
        ("step", 12, 1),
        ("epoch", 12, 1),
    ]
    for entry in entries:
        names = {"loss", "lr"} if entry["kind"] == "step" else {"lr", "train_loss", "loss", "top1", "top5"}
        assert names == set(entry) - {"kind", "step", "epoch"}
    assert {name: entries[-1][name] for name in result.metrics} == result.metrics
    assert [path.name for path in sorted((result.folder / "checkpoints").iterdir())] == [
        "step-00000006",
        "step-00000012",
    ]
    meta = json.loads((result.folder / "checkpoints" / "step-00000012" / "meta.json").read_text())
    assert meta["metrics"] == result.metrics
    assert (meta["step"], meta["epoch"], meta["position"], meta["model"]) == (12, 1, 6, "convnext_atto")
    assert {"widefield", "torch", "timm", "accelerate", "python"} == set(meta["versions"])
    assert len(meta["recipe"]) == 16
    assert list((result.folder / "tensorboard").glob("events.*"))
    assert not result.model.training


def test_metrics_are_those_of_the_returned_and_of_the_loaded_model(run: Run, recipe: Recipe) -> None:
    result = run(ema=EmaSpec(0.5))
    val = data.create("scales", "val", **recipe.data.args)
    batches = DataLoader(val, 32, collate_fn=data.collate)
    task = tasks.create("classification", val)
    for model in (result.model, load_trained(result.folder, "last")):
        measured = evaluate(model, batches, task)
        assert {f"ema_{name}": pytest.approx(value) for name, value in measured.items()} == {
            name: value for name, value in result.metrics.items() if name.startswith("ema_")
        }
        assert not model.training
    assert set(result.metrics) == {"train_loss", *(p + m for p in ("", "ema_") for m in ("loss", "top1", "top5"))}


def test_the_best_epoch_is_found(run: Run) -> None:
    result = run(epochs=4, checkpoint=CheckpointSpec(keep=1))
    epochs = [entry for entry in log(result.folder) if entry["kind"] == "epoch"]
    best = max(epochs, key=lambda entry: entry["top1"])
    assert result.best["top1"] == best["top1"]
    kept = {int(path.name[-8:]) for path in (result.folder / "checkpoints").iterdir()}
    assert kept == {best["step"], 24}
    assert load_trained(result.folder) is not None


def test_every_part_at_once(run: Run) -> None:
    """Conversion, balance, clipping, mixing, EMA, bf16, channels last and workers in one run."""
    result = run(
        conversion=ConversionSpec("morf", "stages.*.conv_dw", {"kernel_sizes": [3, 5, 7], "routing": "hard"}),
        balance=0.01,
        clip_grad=1.0,
        task=TaskSpec(args={"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}),
        ema=EmaSpec(0.9, warmup=True),
        mixed_precision="bf16",
        channels_last=True,
        workers=1,
        schedule=ScheduleSpec("cosine", warmup_epochs=1, min_lr=1e-6),
        optimizer=OptimizerSpec("sgd", lr=0.1, lr_base_size=160, args={"momentum": 0.9}),
    )
    assert any(isinstance(module, MoRFConv2d) for module in result.model.modules())
    steps = [entry for entry in log(result.folder) if entry["kind"] == "step"]
    rates = [entry["lr"] for entry in steps]
    assert rates[:6] == pytest.approx([0.01 * k / 6 for k in range(6)])
    assert rates[6] == pytest.approx(0.005, rel=0.2)  # the cosine continues under the warm-up
    assert rates[6:] == sorted(rates[6:], reverse=True)
    assert all(math.isfinite(entry["loss"]) for entry in steps)


def test_ema_is_an_average(run: Run) -> None:
    plain = run(name="plain", epochs=1)
    slow = run(name="slow", epochs=1, ema=EmaSpec(1.0))
    fast = run(name="fast", epochs=1, ema=EmaSpec(0.0))
    assert {"ema_loss": fast.metrics["ema_loss"], "loss": slow.metrics["loss"]} == {
        "ema_loss": plain.metrics["loss"],
        "loss": plain.metrics["loss"],
    }
    assert slow.metrics["ema_loss"] != plain.metrics["loss"]
    assert (slow.folder / "checkpoints" / "step-00000006" / "ema.safetensors").is_file()


def test_a_second_run_may_ask_for_another_precision(run: Run) -> None:
    run(name="a", epochs=1, mixed_precision="bf16")
    result = run(name="b", epochs=1)
    assert result.model(torch.zeros(1, 3, 32, 32)).dtype == torch.float32


# Errors


def test_an_existing_run_is_refused(run: Run, recipe: Recipe) -> None:
    run(epochs=1)
    before = log(recipe.folder)
    with pytest.raises(FileExistsError, match=rf"--resume {recipe.folder}, or choose another --name"):
        run(epochs=1)
    assert log(recipe.folder) == before


@pytest.mark.parametrize("name", ["notes.txt", "config.yaml"])
def test_a_folder_with_anything_in_it_is_refused(run: Run, recipe: Recipe, name: str) -> None:
    """A new run has no checkpoint either."""
    recipe.folder.mkdir(parents=True)
    (recipe.folder / name).touch()
    with pytest.raises(FileExistsError, match="no checkpoint: delete it, or choose another --name"):
        run()


def test_an_unwritable_folder_is_found_before_anything_is_built(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file.txt").touch()

    def build(*args: Any, **kwargs: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("widefield.data.create_both", build)
    with pytest.raises(OSError, match=r"file.txt/sub/run cannot be written: .*Choose another with --output"):
        run(output=str(tmp_path / "file.txt" / "sub"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": ModelSpec("convnext_ato")}, ValueError, "timm knows no model 'convnext_ato'. Did you mean 'convn"),
        ({"model": ModelSpec("convnext_atto", {"num_classes": 3})}, ValueError, "num_classes is decided by the task"),
        (
            {"model": ModelSpec("convnext_atto.d2_in1k", {"depth": [1]})},
            TypeError,
            "model.args.depth: convnext_atto.d2_in1k has no such argument. Did you mean 'depths'? It takes those of C",
        ),
        ({"model": ModelSpec("resnet18", {"zzzzz": 1})}, TypeError, "argument. It takes those of ResNet."),
        (
            {"model": ModelSpec("convnext_atto", {"act_layer": "foo"})},
            ValueError,
            "timm cannot build 'convnext_atto' with model.args {'act_layer': 'foo'}: KeyError: 'foo'.",
        ),
        ({"conversion": ConversionSpec("morf", args={"kernel_size": 3})}, TypeError, "Did you mean 'kernel_sizes'"),
        ({"conversion": ConversionSpec("morf", "nowhere")}, ValueError, "matches no convolution"),
        ({"data": DataSpec("digts")}, ValueError, "digits"),
        ({"data": DataSpec("scales", {"cuont": 3})}, TypeError, "count"),
        ({"task": TaskSpec(args={"mixpu": 3})}, TypeError, "mixup"),
        ({"optimizer": OptimizerSpec("adamww")}, ValueError, "adamww"),
        ({"batch_size": 97}, ValueError, "96 images, fewer than one batch of 97: lower batch_size"),
        ({"balance": 0.1}, ValueError, "no hard router"),
    ],
)
def test_recipes_that_cannot_work(run: Run, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        run(**changes)
    assert message in str(caught.value)


def test_build_model_alone(recipe: Recipe) -> None:
    model = build_model(recipe, Classification(3))
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_load_trained_refuses(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no checkpoints"):
        load_trained(tmp_path)
    with pytest.raises(ValueError, match="which must be one of"):
        load_trained(tmp_path, "worst")


# Invalid and missing data


class Noise(data.LabeledImages):
    """Noise with labels; images in ``poison`` are NaN, images in ``gone`` are unreadable."""

    classes = ("a", "b", "c")
    mean = std = (1.0, 1.0, 1.0)

    def __init__(self, split: str, count: int = 24, poison: int = -1, gone: range = range(0)) -> None:
        super().__init__(split, 32, 0)
        self.count, self.poison, self.gone = count, poison, gone
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.epochs.append(epoch)

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int) -> dict[str, Any] | None:
        if index in self.gone:
            return None
        image = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(index))
        if self.split == "train" and index == self.poison:
            image.fill_(math.nan)
        return {"image": image, "label": index % 3}


class Stuck(Dataset[Any]):
    """Blocks on its only sample; ``reached`` is set when it is requested."""

    def __init__(self) -> None:
        self.reached = multiprocessing.Event()

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        self.reached.set()
        while True:
            time.sleep(60)


def image_folder(root: Path) -> Path:
    """Make two classes of four images each in both splits."""
    for split in ("train", "val"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (40, 40), (60 * i, 0, 0)).save(root / split / name / f"{i}.png")
    return root


def with_noise(monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, Noise]:
    sets = {split: Noise(split, **options) for split in ("train", "val")}
    monkeypatch.setattr("widefield.data.create_both", lambda name, **_: (sets["train"], sets["val"]))
    return sets


def test_a_loss_that_is_nan_stops_the_run(run: Run, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = with_noise(monkeypatch, count=24)

    def poisoned(epoch: int) -> None:
        sets["train"].poison = 5 if epoch == 1 else -1

    monkeypatch.setattr(sets["train"], "set_epoch", poisoned)
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step [3-6] of 9 \(learning rate 0.00"):
        run(batch_size=8, epochs=3, log_every=100)
    assert [path.name for path in (recipe.folder / "checkpoints").iterdir()] == ["step-00000003"]
    assert load_trained(recipe.folder)(torch.zeros(1, 3, 32, 32)).isfinite().all()


def test_a_run_that_fails_before_its_first_checkpoint_leaves_its_name_free(
    run: Run, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = with_noise(monkeypatch)
    whole = run(name="whole", batch_size=4)
    sets["train"].poison = 5
    with pytest.raises(FloatingPointError):
        run(batch_size=4, seed=1)
    assert load_recipe(recipe.folder / "failed.yaml") == replace(recipe, batch_size=4, seed=1)
    (recipe.folder / "notes.txt").touch()
    sets["train"].poison = -1
    assert log(run(batch_size=4).folder) == log(whole.folder)
    assert {path.name for path in recipe.folder.iterdir()} - {path.name for path in whole.folder.iterdir()} == {
        "notes.txt"
    }
    assert len(list((recipe.folder / "tensorboard").iterdir())) == 1
    (recipe.folder / "failed.yaml").touch()
    with pytest.raises(FileExistsError, match="--resume"):
        run(batch_size=4)


def test_a_disk_that_is_full_at_the_start_leaves_the_name_free(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("widefield.train.checkpoint._flush", full)
        with pytest.raises(OSError, match="No space left"):
            run()
    assert run(epochs=1).epochs == 1


def test_an_epoch_without_images_has_no_loss(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = with_noise(monkeypatch)
    sets["train"].gone = range(24)
    result = run(epochs=1)
    assert math.isnan(result.metrics["train_loss"])
    entries = [
        json.loads(line, parse_constant=pytest.fail)
        for line in (result.folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert [entry["train_loss"] for entry in entries] == [None]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("split", ["train", "val"])
def test_an_image_that_cannot_be_read_ends_the_run_in_one_sentence(
    run: Run, tmp_path: Path, split: str, workers: int
) -> None:
    broken = image_folder(tmp_path / "images") / split / "a" / "1.png"
    broken.write_bytes(b"not a png")
    spec = DataSpec("folder", {"root": str(tmp_path / "images"), "size": 32})
    before = multiprocessing.active_children()
    with pytest.raises(OSError, match=rf"^cannot read the image {broken}: [^\n]*$"):
        run(data=spec, batch_size=4, workers=workers)
    assert set(multiprocessing.active_children()) <= set(before)


SCRIPT = """
import sys
from widefield.cli import main
sys.exit(main(["train", sys.argv[1]]))
"""


def test_a_process_whose_worker_found_a_corrupt_image_ends(recipe: Recipe, tmp_path: Path) -> None:
    broken = image_folder(tmp_path / "images") / "train" / "a" / "1.png"
    broken.write_bytes(b"not a png")
    spec = DataSpec("folder", {"root": str(tmp_path / "images"), "size": 32})
    save_recipe(replace(recipe, data=spec, batch_size=4, workers=1), tmp_path / "recipe.yaml")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "recipe.yaml"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, done.stderr
    assert f"widefield train: cannot read the image {broken}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_worker_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a worker that blocks in a file system and ignores torch's queue and SIGTERM."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    before, dataset = multiprocessing.active_children(), Stuck()
    loader = val_loader(dataset, data.collate, 1, 1)
    iter(loader)
    assert dataset.reached.wait(60)
    (worker,) = set(multiprocessing.active_children()) - set(before)
    shut_down(loader)
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL


def test_batches_of_unreadable_images_are_passed_over(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = with_noise(monkeypatch, count=24, gone=range(17))
    monkeypatch.setattr(EpochSampler, "__iter__", lambda self: iter(range(self.start, self.length)))
    result = run(batch_size=8, task=TaskSpec(args={"mixup": 0.8}))
    assert [entry["step"] for entry in log(result.folder) if entry["kind"] == "step"] == [3, 6]
    assert result.steps == 6
    assert {"loss", "top1"} <= set(result.metrics)
    assert sets["train"].epochs[-1] == 1


def test_nothing_to_evaluate_is_an_error() -> None:
    task = tasks.create("classification", Noise("val"))
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(torch.nn.Linear(1, 1), [{}, {}], task)


def test_evaluate_leaves_the_modes_as_they_were() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 3), torch.nn.Dropout())
    model.train()
    model[2].eval()
    batches = DataLoader(Noise("val"), 8, collate_fn=data.collate)
    evaluate(model, batches, tasks.create("classification", Noise("val")), "cpu")
    assert [module.training for module in model] == [True, True, False]


# Progress


@pytest.mark.parametrize("terminal", [True, False])
def test_progress(recipe: Recipe, terminal: bool) -> None:
    text = io.StringIO()
    train(replace(recipe, epochs=1), console=Console(file=text, force_terminal=terminal, width=150))
    shown = text.getvalue()
    assert "epoch 1/1  train_loss" in shown
    assert "top1" in shown
    assert ("6/6" in shown) == terminal
    found = data.summarize(*data.create_both(recipe.data.name, **recipe.data.args)).splitlines()
    assert [line.partition(":")[0] for line in found] == ["train", "val"]
    assert all(line in shown for line in found)


def test_lines_come_every_half_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    from widefield.train.progress import reporter

    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    text = io.StringIO()
    with reporter(Console(file=text, width=80), 100) as report:
        for step in range(1, 101):
            now += 1
            report.step(step, "loss 1")
    assert text.getvalue().splitlines() == [f"step {step} of 100  loss 1" for step in (30, 60, 90)]


def test_quiet_is_quiet(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    train(replace(recipe, epochs=1), console=QUIET)
    assert capsys.readouterr() == ("", "")
