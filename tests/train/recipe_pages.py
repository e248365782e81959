"""What the tests of all pages of recipes share: a recipe by name, its row in the docs, its first lines, its model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from widefield import tasks
from widefield.train import Recipe, build_model, load_recipe
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
