"""Every shipped recipe for classification: its options, its numbers in the docs and its first lines, and two steps.

``-m slow`` runs all of them at full width, with small images.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
from safetensors.torch import save_file

from train import made_data
from train.helpers import QUIET, log
from train.recipe_pages import MASKED, docs_rows, first_lines, shipped
from widefield import data, tasks
from widefield.loading import load_trained
from widefield.tasks import Classification
from widefield.train import Recipe, build_model, shipped_recipes, train
from widefield.train.networks import TORCHVISION

NOT_PUBLISHED = {"demo_digits", "demo_photo_crops", "demo_scales", "demo_scenes", "digits_morf"}
PROCESSES = (1, 8)
"""The numbers of processes that recipes are written for: one GPU, or a machine with eight."""


PUBLISHED = [
    name
    for name in shipped_recipes()
    if name not in NOT_PUBLISHED and not name.startswith(MASKED) and shipped(name).task.name == "classification"
]


def as_documented(recipe: Recipe) -> dict[str, str]:
    """Return the cells that the docs must have for a recipe."""
    options, mixing = recipe.data.args, recipe.task.args
    policy = re.fullmatch(r"rand-m(\d+)-mstd0.5-inc1", options.get("auto_augment") or "rand-m0-mstd0.5-inc1")
    assert policy is not None
    drawn = [policy[1], options.get("re_prob", 0), *(mixing.get(k, 0) for k in ("mixup", "cutmix", "label_smoothing"))]
    augmentation = " / ".join(f"{float(value):g}" for value in drawn)
    besides = [recipe.conversion.kind] if recipe.conversion else []
    side = options.get("size", 32 if recipe.data.name.startswith("cifar") else 224)
    besides += [f"{side} pixels"] if side != 224 else []
    for key in ("kernel_sizes", "attention", "stages"):
        if key in recipe.model.args:
            value = recipe.model.args[key]
            besides.append(f"{key} {value if isinstance(value, str) else json.dumps(value)}")
    besides += ["EMA"] if recipe.ema else []
    besides += [f"clip {recipe.clip_grad:g}"] if recipe.clip_grad else []
    decay = recipe.optimizer.args.get("layer_decay")
    besides += [f"rates x{decay:g} a block"] if decay else []
    besides += [f"{recipe.sparsity.sparsity:.0%} zero"] if recipe.sparsity else []
    warmup = recipe.schedule.warmup_epochs
    epochs = recipe.epochs + recipe.schedule.args.get("cooldown_epochs", 0)
    return {
        "model": f"`{recipe.model.name}`",
        "epochs": f"{epochs} ({warmup})" if warmup else f"{epochs}",
        "batch": f"{recipe.optimizer.lr_base_size}",
        "lr": f"{recipe.optimizer.lr:g}",
        "weight decay": f"{recipe.optimizer.weight_decay:g}",
        "drop path": f"{recipe.model.args.get('drop_path_rate', 0):g}",
        "augmentation": "crop, flip" if augmentation == "0 / 0 / 0 / 0 / 0" else augmentation,
        "besides": ", ".join(besides),
    }


def test_docs_have_a_row_for_every_recipe() -> None:
    assert len(PUBLISHED) > 50
    assert sorted(docs_rows("recipes.md")) == sorted(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_docs_agree_with_the_recipe(name: str) -> None:
    row = docs_rows("recipes.md")[name]
    assert {key: row[key] for key in as_documented(shipped(name))} == as_documented(shipped(name))
    top1 = row["top-1, %"]
    assert re.fullmatch(r"\d\d\.\d\d?", top1)
    assert f"{top1} %" in first_lines(name)
    assert row["published in"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_reaches_the_batch_that_it_was_made_for(name: str) -> None:
    recipe = shipped(name)
    assert recipe.name == name
    stated = recipe.optimizer.lr_base_size
    assert stated is not None
    assert recipe.optimizer.lr_at(stated) == recipe.optimizer.lr
    processes, rest = divmod(stated, recipe.batch_size * recipe.accumulate)
    assert rest == 0
    assert processes in PROCESSES
    command = f"widefield train {name}"
    assert command in first_lines(name)
    assert (f"accelerate launch --num_processes {processes} -m {command}" in first_lines(name)) == (processes > 1)


def test_the_two_statements_of_morf_are_one() -> None:
    """MoRF's text has 0.001 for a batch of 1024, its table 5 has 4e-3 for 4096."""
    recipes = [shipped(name) for name in PUBLISHED if name.startswith("morf") and "384" not in name]
    assert len(recipes) == 16
    for recipe in recipes:
        assert recipe.optimizer.lr_at(1024) == pytest.approx(1e-3)
        assert recipe.optimizer.lr_at(4096) == pytest.approx(4e-3)


class Three:
    """The part of a data set that a task reads."""

    classes = ("a", "b", "c")


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_option_is_known_where_it_goes(name: str, tmp_path: Path) -> None:
    recipe = shipped(name)
    for split in ("train", "val"):  # the missing data are the only error
        with pytest.raises(FileNotFoundError):
            data.create(recipe.data.name, split, **{**recipe.data.args, "root": str(tmp_path / "nowhere")})
    assert recipe.data.args["root"] == f"data/{recipe.data.name if recipe.data.name != 'folder' else 'imagenet'}"
    tasks.create(recipe.task.name, Three(), **recipe.task.args)
    assert timm.is_model(recipe.model.name) or recipe.model.name.startswith(TORCHVISION)
    assert set(recipe.optimizer.args) <= set(inspect.signature(timm.optim.create_optimizer_v2).parameters)
    assert set(recipe.schedule.args) <= set(inspect.signature(timm.scheduler.create_scheduler_v2).parameters)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if shipped(name).model.pretrained])
def test_fine_tuning_starts_from_what_fits(name: str) -> None:
    recipe = shipped(name)
    source = str(recipe.model.pretrained)
    if source.startswith("weights/"):
        assert "in22k" in name
        return
    before = shipped(source.removeprefix("runs/"))
    assert before.model.name == recipe.model.name

    def shape(args: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in args.items() if key != "drop_path_rate"}

    assert shape(before.model.args) == shape(recipe.model.args)
    assert before.data.args["root"] == recipe.data.args["root"]


def two_steps(recipe: Recipe, root: Path, runs: Path, **changes: Any) -> Path:
    """Train two steps of a recipe on generated data, check the results, and return the run's folder."""
    schedule = recipe.schedule
    made = replace(
        recipe,
        output=str(runs),
        data=replace(recipe.data, args={**recipe.data.args, "root": str(root)}),
        # Exactly one epoch.
        schedule=replace(
            schedule,
            warmup_epochs=min(schedule.warmup_epochs, 1),
            args={key: value for key, value in schedule.args.items() if key != "cooldown_epochs"},
        ),
        epochs=1,
        accumulate=1,
        workers=0,
        log_every=1,
        trackers=[],
        **changes,
    )
    result = train(made, console=QUIET)
    assert result.steps == 2
    losses = [entry["loss"] for entry in log(result.folder) if entry["kind"] == "step"]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    assert 0 <= result.metrics["top1"] <= 1
    assert ("ema_top1" in result.metrics) == (recipe.ema is not None)
    return result.folder


def smaller(recipe: Recipe, **args: Any) -> Recipe:
    return replace(recipe, model=replace(recipe.model, args={**recipe.model.args, **args}))


def with_side(recipe: Recipe, side: int) -> Recipe:
    return replace(recipe, data=replace(recipe.data, args={**recipe.data.args, "size": side}))


def test_two_steps_on_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = made_data.cifar(tmp_path, "cifar10", monkeypatch)
    two_steps(shipped("gmconv_resnet20_cifar10"), root, tmp_path / "runs", batch_size=5)


def test_two_steps_on_imagenet_and_two_from_there_at_another_size(tmp_path: Path) -> None:
    root = made_data.imagenet(tmp_path / "imagenet", train=4, val=3)
    small = {"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32]}
    first = smaller(with_side(shipped("morf_convnext_base_in1k"), 32), **small)
    run = two_steps(first, root, tmp_path / "runs", batch_size=2)
    then = smaller(with_side(shipped("morf_convnext_base_384_in1k"), 64), **small)
    assert then.model.pretrained == "runs/morf_convnext_base_in1k"
    then = replace(then, model=replace(then.model, pretrained=str(run)))
    two_steps(then, root, tmp_path / "runs", batch_size=2)


def test_two_sparse_steps(tmp_path: Path) -> None:
    root = made_data.imagenet(tmp_path / "imagenet", train=4, val=3)
    recipe = smaller(with_side(shipped("slak_tiny_in1k"), 32), depths=[1, 1, 1, 1], widths=[8, 8, 12, 16])
    run = two_steps(recipe, root, tmp_path / "runs", batch_size=2)
    weights = [p for p in load_trained(run, "last").parameters() if p.ndim >= 2]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    assert zeros == pytest.approx(0.4, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_two_steps_of_every_recipe(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = shipped(name)
    # Delete it at once: a network of 200 million weights writes gigabytes, including its averages.
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if recipe.data.name.startswith("cifar"):
            root = made_data.cifar(place, recipe.data.name, monkeypatch)
            batch = {"cifar10": 5, "cifar100": 50}[recipe.data.name]
        else:
            # A block that is dropped for every image of the first batch gives SNIP no gradient.
            batch = 8 if recipe.sparsity else 2
            root = made_data.imagenet(place / "imagenet", train=2 * batch, val=3)
            recipe = with_side(recipe, 64)
        if recipe.model.pretrained:
            # ImageNet-22K weights have other classes, ImageNet-1k weights the same ones.
            fresh = replace(recipe, model=replace(recipe.model, pretrained=False))
            model = build_model(fresh, Classification(5 if "in22k" in name else len(made_data.WNIDS)))
            save_file({key: value.contiguous() for key, value in model.state_dict().items()}, place / "w.safetensors")
            del model
            recipe = replace(recipe, model=replace(recipe.model, pretrained=str(place / "w.safetensors")))
        two_steps(recipe, root, place / "runs", batch_size=batch)
