"""Every shipped recipe for segmentation: its options, its numbers in the docs, its model, and two training steps.

``-m slow`` builds all of them, and trains all of them at full width with small images and few blocks.
"""

from __future__ import annotations

import copy
import gc
import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from data import made_segmentation
from tolerances import FLOAT32, close
from train.recipe_pages import (
    RESIZED,
    check_network,
    check_options,
    check_row,
    check_two_steps,
    docs_rows,
    first_lines,
    on_meta,
    pretrained_file,
    shapes,
    shipped,
    shortened,
    with_few_blocks,
)
from widefield import dense, tasks
from widefield.models.comparison_segmentation import CITED_SEGMENTERS, CLASSES
from widefield.train import Recipe, build_model, load_recipe, shipped_recipes
from widefield.train.learner import _checkpoint_blocks
from widefield.train.optimization import create_optimizer

SETS = {"ade20k": "ADE20K", "cityscapes": "Cityscapes"}
"""The published data sets: name in recipes -> name in the comparison."""
HEADS = {"upernet": "UPerNet", "deeplabv3plus": "DeepLabV3Plus", "semantic_fpn": "SemanticFPN"}
SOME = (
    "deeplabv3plus_mobilenetv2_lk9_cityscapes",
    "semantic_fpn_moganet_tiny_ade20k",
    "upernet_convnext_tiny_ade20k",
    "upernet_van_b0_ade20k",
)
"""Recipes that the default tests build."""


NAMES = [name for name in shipped_recipes() if shipped(name).data.name in SETS]


def as_documented(recipe: Recipe) -> dict[str, str]:
    """Return the cells that the docs must have for a recipe."""
    crop = recipe.data.args["size"]
    sides = "x".join(map(str, crop)) if isinstance(crop, list) else f"{crop}"
    besides = [f"{sides} pixels"] if sides != "512" else []
    views = recipe.task.args
    besides += [f"windows of {views['window']} every {views['stride']}"] if views.get("test") == "slide" else []
    besides += ["aligned corners"] if views.get("head_args", {}).get("align_corners") else []
    for key in ("kernel_sizes", "focal_windows", "output_stride"):
        if key in recipe.model.args:
            besides.append(f"{key} {json.dumps(recipe.model.args[key])}")
    besides += decay(recipe)
    besides += [f"clip {recipe.clip_grad:g}"] if recipe.clip_grad else []
    warmup = recipe.schedule.warmup_steps
    return {
        "backbone": f"`{recipe.model.name}`",
        "steps": f"{recipe.max_steps} ({warmup})" if warmup else f"{recipe.max_steps}",
        "batch": f"{recipe.optimizer.lr_base_size}",
        "lr": f"{recipe.optimizer.lr:g}",
        "weight decay": f"{recipe.optimizer.weight_decay:g}",
        "drop path": f"{recipe.model.args.get('drop_path_rate', 0):g}",
        "besides": ", ".join(besides),
    }


def decay(recipe: Recipe) -> list[str]:
    """Return how the docs describe the decay of rates towards the stem."""
    spec = recipe.optimizer.layer_decay
    if spec is None:
        return []
    unit = {"stage_wise": "a stage", "layer_wise": "a layer", "block_wise": "a block"}[spec.rule]
    return [f"rates x{spec.rate:g} {unit} ({spec.num_layers} layers)"]


class Labeled:
    """The part of a data set that a task reads."""

    def __init__(self, recipe: Recipe) -> None:
        self.classes = tuple(map(str, range(CLASSES[SETS[recipe.data.name]])))


def test_docs_have_a_row_for_every_recipe() -> None:
    assert len(NAMES) > 60
    assert sorted(docs_rows("segmentation_recipes.md")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_docs_agree_with_the_recipe(name: str) -> None:
    row = check_row("segmentation_recipes.md", name, as_documented(shipped(name)))
    one, several = row["mIoU, %"].split(" / ")
    for value in (one, several):
        assert re.fullmatch(r"\d\d\.\d\d?|-", value)
        assert value == "-" or f"{value} %" in first_lines(name)
    assert row["published in"]


@pytest.mark.parametrize("name", NAMES)
def test_recipe_reaches_the_batch_that_it_was_made_for(name: str) -> None:
    recipe = shipped(name)
    assert recipe.name == name
    stated = recipe.optimizer.lr_base_size
    assert stated is not None
    processes, rest = divmod(stated, recipe.batch_size * recipe.accumulate)
    assert rest == 0
    assert f"accelerate launch --num_processes {processes} -m widefield train {name}" in first_lines(name)
    assert recipe.sync_batchnorm


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_known_where_it_goes(name: str, tmp_path: Path) -> None:
    check_options(name, Labeled, tmp_path)


@pytest.mark.parametrize("name", [name for name in NAMES if str(shipped(name).model.pretrained).startswith("runs/")])
def test_weights_of_runs_come_from_a_recipe_of_the_same_network(name: str) -> None:
    recipe = shipped(name)
    source = str(recipe.model.pretrained).removeprefix("runs/")
    if recipe.model.name == "mobilenetv2_lk":  # its training on ImageNet is not published
        assert source not in shipped_recipes()
        return
    check_network(recipe, load_recipe(source), RESIZED)


def check_model(name: str) -> None:
    """Check that a recipe's model is the one of the comparison, and that its optimizer finds what it names."""
    recipe = shipped(name)
    model = on_meta(recipe, Labeled)
    head, classes = HEADS[recipe.task.args["model"]], CLASSES[SETS[recipe.data.name]]
    assert isinstance(model, getattr(dense, head))
    assert model.num_classes == classes
    args = {key: value for key, value in recipe.model.args.items() if key != "drop_path_rate"}
    with torch.device("meta"):
        compared = getattr(dense, head)(recipe.model.name, classes, **args, **recipe.task.args.get("head_args", {}))
    assert shapes(model) == shapes(compared)
    cited = {(row.method, SETS[recipe.data.name], row.name) for row in CITED_SEGMENTERS}
    assert (head, SETS[recipe.data.name], recipe.model.name) in cited or "b4" in name
    create_optimizer(model, recipe.optimizer, recipe.optimizer.lr)


@pytest.mark.parametrize("name", SOME)
def test_the_model_is_the_published_one(name: str) -> None:
    check_model(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in SOME])
def test_the_model_of_every_recipe_is_the_published_one(name: str) -> None:
    check_model(name)


def check_start(recipe: Recipe) -> None:
    """Check that the model starts from every convolution of its file of weights."""
    weights = load_file(str(recipe.model.pretrained))
    task = tasks.create(recipe.task.name, Labeled(recipe), **recipe.task.args)
    model: Any = build_model(recipe, task)
    drawn = [tensor for tensor in weights.values() if tensor.ndim == 4 and tensor.std() > 0]
    found: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for parameter in model.backbone.parameters():
        found.setdefault(tuple(parameter.shape), []).append(parameter.detach())
    known = [tensor for tensor in drawn if tuple(tensor.shape) in found]
    grown = any(key in recipe.model.args for key in ("focal_windows", "global_filters"))
    assert known
    assert len(known) >= 0.9 * len(drawn) or grown  # some networks have a convolution in their head
    for tensor in known:
        assert any(torch.equal(tensor, other) for other in found[tuple(tensor.shape)]), tensor.shape


def two_steps(recipe: Recipe, folder: Path) -> Path:
    """Train two steps of a recipe on generated data from drawn weights, check the results, and return the run."""
    crop = [64, 96] if isinstance(recipe.data.args["size"], list) else 64
    views = {"window": 64, "stride": 43} if recipe.task.args.get("test") == "slide" else {}
    write = {"ade20k": made_segmentation.write_ade20k, "cityscapes": made_segmentation.write_cityscapes}
    write[recipe.data.name](folder / "data", {"train": 4, "val": 2})
    made = shortened(
        recipe,
        folder,
        model=replace(recipe.model, pretrained=str(pretrained_file(recipe, folder))),
        data=replace(
            recipe.data, args={**recipe.data.args, "root": str(folder / "data"), "size": crop, "scale": [128, 64]}
        ),
        task=replace(recipe.task, args={**recipe.task.args, **views}),
        schedule=replace(recipe.schedule, warmup_steps=recipe.schedule.warmup_steps and 1),
        max_steps=2,
        evaluate_every=2,
    )
    check_start(made)
    result = check_two_steps(made)
    assert 0 <= result.metrics["miou"] <= 1
    return result.folder


def test_two_steps_of_the_smallest(tmp_path: Path) -> None:
    two_steps(shipped("semantic_fpn_van_b0_ade20k"), tmp_path)


@pytest.mark.parametrize("name", ["semantic_fpn_van_b0_ade20k", "upernet_convnext_tiny_ade20k"])
def test_activations_can_be_recomputed(name: str) -> None:
    """With a network that timm wraps to give its maps (VAN), and with one that it takes apart (ConvNeXt)."""
    recipe = shipped(name)
    small = {"depths": [1, 1, 1, 1], ("widths" if "van" in name else "dims"): [8, 16, 24, 32]}
    fresh = replace(recipe, model=replace(recipe.model, args=small, pretrained=False))
    torch.manual_seed(0)
    task = tasks.create(recipe.task.name, Labeled(recipe), **recipe.task.args)
    plain: Any = build_model(fresh, task)
    again = copy.deepcopy(plain)
    _checkpoint_blocks(again)
    images = torch.randn(2, 3, 64, 64)
    gradients, calls = [], []
    for model in (plain, again):
        torch.manual_seed(1)  # of the dropout
        count: list[int] = []
        for module in model.backbone.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda *_, count=count: count.append(1))
        model.decode_head(model.maps(images)).square().sum().backward()
        gradients.append([p.grad for p in model.backbone.parameters()])
        calls.append(len(count))
    assert calls[1] > calls[0]
    for one, other in zip(*gradients, strict=True):
        close(one, other, FLOAT32)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_steps_of_every_recipe(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:  # delete it at once: a run writes up to two gigabytes
        two_steps(with_few_blocks(shipped(name)), Path(folder))
    gc.collect()  # loops of references would keep the model until the next one is large
