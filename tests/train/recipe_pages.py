"""What the tests of all pages of recipes share: a recipe by name, its row in the docs, its model, two steps."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from train.helpers import QUIET, log
from widefield import data, tasks
from widefield.train import Recipe, RunResult, build_model, load_recipe, train
from widefield.train.optimization import create_optimizer, freeze
from widefield.train.recipe_io import SHIPPED

DOCS = Path(__file__).parents[2] / "docs"
MASKED = ("fcmae_", "spark_", "simmim_", "a2mim_")
"""How the names of recipes for masked pre-training begin, and of what follows it."""


@functools.cache
def shipped(name: str) -> Recipe:
    return load_recipe(name)


@functools.cache
def docs_rows(page: str) -> Mapping[str, dict[str, str]]:
    """Return recipe -> its row in the tables of a page, by the tables' headings."""
    rows: dict[str, dict[str, str]] = {}
    heading = None
    for line in (DOCS / page).read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if cells and cells[0] == "recipe":
            heading = cells
        elif not cells:
            heading = None
        elif heading and not set(line) <= set("|-"):
            name = cells[0].strip("`")
            assert name not in rows
            rows[name] = dict(zip(heading, cells, strict=True))
    return rows


def first_lines(name: str) -> str:
    """Return the comment at the top of a recipe as one line."""
    lines = (SHIPPED / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return " ".join(line.removeprefix("#").strip() for line in lines[: lines.index(f"name: {name}")])


Described = Callable[[Recipe], Any]
"""Recipe -> the part of its data set that its task reads."""


def on_meta(recipe: Recipe, described: Described) -> Any:
    """Return the recipe's model with fresh weights on the meta device."""
    fresh = replace(recipe, model=replace(recipe.model, pretrained=False))
    with torch.device("meta"):
        return build_model(fresh, tasks.create(recipe.task.name, described(recipe), **recipe.task.args))


def groups_of(recipe: Recipe, described: Described) -> tuple[nn.Module, dict[str, dict[str, Any]]]:
    """Return the recipe's model on the meta device, and the optimizer's group of each parameter that learns."""
    model = on_meta(recipe, described)
    if recipe.freeze is not None:
        freeze(model, recipe.freeze)
    optimizer = create_optimizer(model, recipe.optimizer, recipe.optimizer.lr)
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    groups = {name: found[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    assert len(groups) == len(found)
    return model, groups


def check_batch(name: str) -> None:
    """Check that a recipe reaches, on the eight GPUs of its command, the batch that its learning rate is meant for."""
    recipe = shipped(name)
    assert recipe.name == name
    assert recipe.optimizer.lr_base_size == 8 * recipe.batch_size * recipe.accumulate
    assert f"accelerate launch --num_processes 8 -m widefield train {name}" in first_lines(name)


def check_row(page: str, name: str, expected: Mapping[str, str]) -> Mapping[str, str]:
    """Check that the row of a recipe in the docs has these cells, and return it."""
    row = docs_rows(page)[name]
    assert {key: row[key] for key in expected} == expected
    return row


def check_options(name: str, described: Described, folder: Path) -> Any:
    """Check that data set, task and timm know the options of a recipe, and return the task.

    Args:
        name: of the recipe.
        described: see `Described`.
        folder: an empty one: missing data are the only error.
    """
    recipe = shipped(name)
    for split in ("train", "val"):
        with pytest.raises(FileNotFoundError):
            data.create(recipe.data.name, split, **{**recipe.data.args, "root": str(folder / "nowhere")})
    assert timm.is_model(recipe.model.name)
    return tasks.create(recipe.task.name, described(recipe), **recipe.task.args)


RESIZED = {"drop_path_rate", "layer_scale_init", "ls_init_value", "focal_windows", "global_filters"}
"""Arguments in which a network may differ from the one that its weights were trained with."""


def check_network(recipe: Recipe, before: Recipe, free: set[str]) -> None:
    """Check that a recipe has the network of the recipe that its weights come from, but for some arguments."""
    assert before.model.name == recipe.model.name
    theirs, ours = ({k: v for k, v in each.model.args.items() if k not in free} for each in (before, recipe))
    assert theirs == ours


def shapes(model: nn.Module) -> list[torch.Size]:
    """Return the shapes of a model's parameters in a fixed order."""
    return sorted(parameter.shape for parameter in model.parameters())


def pretrained_file(recipe: Recipe, folder: Path) -> Path:
    """Write drawn weights of the recipe's network as it was trained on ImageNet, with its own classifier.

    Biases are drawn too: fresh ones are zero, so padded pixels stay zero, and every LayerNorm there multiplies the
    gradient by 1 / sqrt(eps). In FocalNet-S that overflows. Trained biases are not zero.
    """
    resized = {"drop_path_rate", "focal_windows", "global_filters", "output_stride"}
    args = {key: value for key, value in recipe.model.args.items() if key not in resized}
    network = timm.create_model(recipe.model.name, num_classes=7, pretrained=False, **args)
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            if key.endswith("bias"):
                nn.init.normal_(parameter, std=0.02)
    path = folder / "weights.safetensors"
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, path)
    return path


def with_few_blocks(recipe: Recipe, **args: Any) -> Recipe:
    """Return a recipe with one block in each stage, at full width, and further arguments of the network.

    That bounds memory to that of 120 million weights. FocalNet and MobileNetV2 have at most 90 million, and no argument
    for it.
    """
    if not recipe.model.name.startswith(("focalnet", "mobilenetv2")):
        args = {"layers" if recipe.model.name.startswith("resnet") else "depths": [1, 1, 1, 1], **args}
    return replace(recipe, model=replace(recipe.model, args={**recipe.model.args, **args}))


def shortened(recipe: Recipe, folder: Path, **changes: Any) -> Recipe:
    """Return a recipe that trains on the CPU for moments, into a folder, with further fields changed."""
    quick: dict[str, Any] = {"batch_size": 2, "accumulate": 1, "workers": 0, "log_every": 1, "trackers": []}
    return replace(recipe, output=str(folder / "runs"), mixed_precision="no", **{**quick, **changes})


def check_two_steps(recipe: Recipe) -> RunResult:
    """Train a recipe, check that it took two steps with finite losses, and return the run."""
    result = train(recipe, console=QUIET)
    assert result.steps == 2
    losses = [entry["loss"] for entry in log(result.folder) if entry["kind"] == "step"]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    return result
