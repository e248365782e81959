"""Every shipped recipe for poses on COCO: its options, its numbers in the docs, its model, rates, and two steps.

``-m slow`` builds all of them, and trains all of them at full width with small crops and few blocks.
"""

from __future__ import annotations

import gc
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from data.made_poses import write_keypoints
from train.recipe_pages import (
    check_batch,
    check_network,
    check_options,
    check_row,
    check_two_steps,
    docs_rows,
    first_lines,
    groups_of,
    on_meta,
    pretrained_file,
    shapes,
    shipped,
    shortened,
    with_few_blocks,
)
from widefield import dense, tasks
from widefield.data import Skeleton
from widefield.models.comparison_pose import CITED_POSES, KEYPOINTS
from widefield.train import Recipe, load_recipe, shipped_recipes
from widefield.train.optimization import create_schedule

SOME = ("pose_moganet_xtiny_256x192_coco", "pose_convnext_tiny_384x288_coco", "pose_gmconv_resnet50_256x192_coco")
"""Recipes that the default tests build."""
STEPS = 292
"""Steps of an epoch of COCO with 512 crops: 149,813 people with key points in training."""
NAMES = [name for name in shipped_recipes() if name.startswith("pose_")]


def as_documented(recipe: Recipe) -> dict[str, str]:
    """Return the cells that the docs must have for a recipe."""
    spec, options = recipe.optimizer, recipe.task.args
    other = ["DARK"] if options.get("kind") == "unbiased" else []
    other += ["synchronized norms"] if recipe.sync_batchnorm else []
    return {
        "backbone": f"`{recipe.model.name}`",
        "crop": "x".join(map(str, recipe.data.args["crop_size"])),
        "optimizer": {"adam": "Adam", "adamw": "AdamW"}[spec.name],
        "lr": f"{spec.lr:g}",
        "batch": f"{spec.lr_base_size}",
        "weight decay": f"{spec.weight_decay:g}",
        "drop path": f"{recipe.model.args.get('drop_path_rate', 0):g}",
        "sigma": f"{options.get('sigma', 2):g}",
        "other": ", ".join(other),
    }


class People:
    """The part of a data set that a task reads."""

    classes = ("person",)
    skeleton = Skeleton.load("coco")

    def __init__(self, recipe: Recipe) -> None:
        self.crop_size = tuple(recipe.data.args["crop_size"])


def test_docs_have_a_row_for_every_recipe() -> None:
    assert len(NAMES) == 44
    assert sorted(docs_rows("pose_recipes.md")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_docs_agree_with_the_recipe(name: str) -> None:
    row = check_row("pose_recipes.md", name, as_documented(shipped(name)))
    stated = re.search(r"Result: (\d\d\.\d) % AP", first_lines(name))
    assert row["AP, %"] == (stated[1] if stated else "-")
    assert bool(stated) == (row["published in"] != "-")


def test_results_are_those_of_the_comparison() -> None:
    cited = {(row.name, row.size): [] for row in CITED_POSES}
    for row in CITED_POSES:
        cited[row.name, row.size].append((row.source, row.ap))
    for name, row in docs_rows("pose_recipes.md").items():
        recipe = shipped(name)
        if row["AP, %"] != "-" and "dark" not in name:
            network = recipe.model.name.partition(".")[0]
            assert (row["published in"], row["AP, %"]) in cited[network, tuple(recipe.data.args["crop_size"])], name


@pytest.mark.parametrize("name", NAMES)
def test_recipe_reaches_the_batch_that_it_was_made_for(name: str) -> None:
    check_batch(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_known_where_it_goes(name: str, tmp_path: Path) -> None:
    task = check_options(name, People, tmp_path)
    assert isinstance(task, tasks.PoseEstimation)
    assert "x".join(map(str, task.rules.crop_size)) in name


@pytest.mark.parametrize("name", [name for name in NAMES if str(shipped(name).model.pretrained).startswith("runs/")])
def test_weights_of_runs_come_from_a_recipe_of_the_same_network(name: str) -> None:
    recipe = shipped(name)
    before = load_recipe(str(recipe.model.pretrained).removeprefix("runs/"))
    assert before.conversion == recipe.conversion
    check_network(recipe, before, {"drop_path_rate", "layer_scale_init", "ls_init_value", "zero_init_last"})


@pytest.mark.parametrize("name", SOME)
def test_rates_fall_where_the_published_ones_do(name: str) -> None:
    recipe = shipped(name)
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), recipe.optimizer.lr)
    schedule, steps = create_schedule(optimizer, recipe.schedule, recipe.epochs or 0, STEPS)
    assert schedule is not None

    def rate(step: int) -> float:
        schedule.step_update(step)
        return float(optimizer.param_groups[0]["lr"]) / recipe.optimizer.lr

    assert steps == STEPS * 210
    expected = {0: 0.001, 250: 0.5005, 500: 1.0, 170 * STEPS - 1: 1.0, 170 * STEPS: 0.1, 200 * STEPS - 1: 0.1,
                200 * STEPS: 0.01, steps - 1: 0.01}  # fmt: skip
    assert {step: rate(step) for step in expected} == pytest.approx(expected, rel=1e-9)


def test_one_bad_entry_of_the_annotations_stops_no_recipe() -> None:
    assert all(shipped(name).data.args["repair"] is True for name in NAMES)


def test_all_recipes_have_the_same_schedule() -> None:
    assert {repr(shipped(name).schedule) for name in NAMES} == {repr(shipped(SOME[0]).schedule)}
    assert {shipped(name).epochs for name in NAMES} == {210}


DROPS = {
    "moganet_xtiny": (0.1, 0.1), "moganet_tiny": (0.15, 0.15), "moganet_small": (0.2, 0.2), "moganet_base": (0.3, 0.4),
    "convnext_tiny": (0.4, 0.4), "convnext_small": (0.6, 0.6), "convnext_base": (0.6, 0.7),
}  # fmt: skip
"""Network -> the published drop path rates for small and large crops."""


def test_drop_path_rates_are_the_published_ones() -> None:
    for network, rates in DROPS.items():
        for size, rate in zip(("256x192", "384x288"), rates, strict=True):
            assert shipped(f"pose_{network}_{size}_coco").model.args["drop_path_rate"] == rate


def test_adam_decays_nothing_and_adamw_all_but_norms() -> None:
    """OpenMMLab's custom_keys: a parameter whose name contains the word."""
    _, groups = groups_of(shipped("pose_moganet_xtiny_256x192_coco"), People)
    assert {(group["lr"], group["weight_decay"]) for group in groups.values()} == {(1e-3, 0)}
    _, groups = groups_of(shipped("pose_convnext_tiny_384x288_coco"), People)
    free = {key for key, group in groups.items() if not group["weight_decay"]}
    assert free == {key for key in groups if "norm" in key}
    assert {group["weight_decay"] for key, group in groups.items() if key not in free} == {0.01}
    assert "head.deconv_layers.1.bias" not in free


@pytest.mark.parametrize("size", ["256x192", "384x288"])
def test_gmconv_masks_the_stem_dynamically(size: str) -> None:
    kinds = {type(m).__name__ for m in on_meta(shipped(f"pose_gmconv_resnet50_{size}_coco"), People).modules()}
    assert {"GMConv2d", "DynamicGMConv2d"} <= kinds


def check_model(name: str) -> None:
    """Check that a recipe's model is the one of the comparison, and that its optimizer finds what it names."""
    recipe = shipped(name)
    model, _ = groups_of(recipe, People)
    assert isinstance(model, dense.HeatmapPose)
    assert model.num_keypoints == KEYPOINTS
    if recipe.conversion is not None:
        return
    network = recipe.model.name.partition(".")[0]
    row = next(row for row in CITED_POSES if row.name == network)
    with torch.device("meta"):
        expected = dense.HeatmapPose(network, KEYPOINTS, **row.args)
    assert shapes(model) == shapes(expected)


@pytest.mark.parametrize("name", SOME)
def test_the_model_is_that_of_the_comparison(name: str) -> None:
    check_model(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in SOME])
def test_the_model_of_every_recipe_is_that_of_the_comparison(name: str) -> None:
    check_model(name)


def two_steps(recipe: Recipe, folder: Path) -> None:
    """Train two steps of a recipe on generated people from drawn weights, and check the results."""
    write_keypoints(folder / "data", np.random.default_rng(0))
    made = shortened(
        recipe,
        folder,
        model=replace(recipe.model, pretrained=str(pretrained_file(recipe, folder))),
        data=replace(
            recipe.data,
            args={**recipe.data.args, "root": str(folder / "data"), "boxes": "boxes.json", "crop_size": [64, 64]},
        ),
        schedule=replace(recipe.schedule, warmup_steps=1),
        epochs=None,
        max_steps=2,
    )
    result = check_two_steps(made)
    assert 0 <= result.metrics["oks_ap"] <= 1


def test_two_steps_of_the_smallest(tmp_path: Path) -> None:
    two_steps(with_few_blocks(shipped("pose_moganet_xtiny_256x192_coco")), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_steps_of_every_recipe(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:  # delete it at once: runs are large
        two_steps(with_few_blocks(shipped(name)), Path(folder))
    gc.collect()  # loops of references would keep the model until the next one is large
