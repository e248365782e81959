"""Every shipped recipe for detection on COCO: its options, its numbers in the docs, its model, rates, and two steps.

``-m slow`` builds all of them, and trains all of them at full width with small images and few blocks.
"""

from __future__ import annotations

import gc
import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from data import made_objects
from train.recipe_pages import (
    RESIZED,
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
from widefield.models.comparison_detection import CITED_DETECTORS, CLASSES, METHODS
from widefield.train import Recipe, build_model, load_recipe, shipped_recipes
from widefield.train.optimization import create_schedule

SOME = ("fcos_resnet50_1x_coco", "mask_rcnn_convnext_tiny_3x_coco", "retinanet_moganet_xtiny_1x_coco")
"""Recipes that the default tests build."""
STEPS = 7330
"""Steps of an epoch of COCO with 16 images, as published: 117,266 images with objects in training."""


NAMES = [name for name in shipped_recipes() if shipped(name).data.name == "coco"]


def as_documented(recipe: Recipe) -> dict[str, str]:
    """Return the cells that the docs must have for a recipe."""
    spec, first = recipe.optimizer, recipe.schedule.args["decay_milestones"]
    decay, options = spec.layer_decay, recipe.data.args
    unit = {"stage_wise": "a stage", "layer_wise": "a layer", "pair_wise": "a pair", "block_wise": "a block"}
    besides = ["several sizes"] if options.get("pipeline") == "multi_scale_crop" else []
    besides += [f"sides of {', '.join(map(str, options['short_sides']))}"] if "short_sides" in options else []
    besides += [f"rates x{decay.rate:g} {unit[decay.rule]} ({decay.num_layers} layers)"] if decay else []
    besides += ["EMA"] if recipe.ema else []
    besides += [f"clip {recipe.clip_grad:g}"] if recipe.clip_grad else []
    return {
        "backbone": f"`{recipe.model.name}`",
        "epochs": f"{recipe.epochs} ({', '.join(map(str, first))})",
        "batch": f"{spec.lr_base_size}",
        "lr": f"{spec.lr:g}",
        "weight decay": f"{spec.weight_decay:g}",
        "drop path": f"{recipe.model.args.get('drop_path_rate', 0):g}",
        "besides": ", ".join(besides),
    }


class Objects:
    """The part of a data set that a task reads."""

    object_classes = classes = tuple(map(str, range(CLASSES)))

    def __init__(self, recipe: Recipe) -> None:
        """All recipes have the classes of COCO."""


def test_docs_have_a_row_for_every_recipe() -> None:
    assert len(NAMES) > 90
    assert sorted(docs_rows("detection_recipes.md")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_docs_agree_with_the_recipe(name: str) -> None:
    row = check_row("detection_recipes.md", name, as_documented(shipped(name)))
    for value in row["AP, %"].split(" / "):
        assert re.fullmatch(r"\d\d\.\d|-", value)
        assert value == "-" or f"{value} %" in first_lines(name)
    assert row["published in"]


@pytest.mark.parametrize("name", NAMES)
def test_recipe_reaches_the_batch_that_it_was_made_for(name: str) -> None:
    check_batch(name)
    recipe = shipped(name)
    four = recipe.task.args.get("head_args", {}).get("box_head") == "4conv1fc"
    assert recipe.sync_batchnorm >= four  # the batch norms of these heads are synchronized


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_known_where_it_goes(name: str, tmp_path: Path) -> None:
    task = check_options(name, Objects, tmp_path)
    assert task.masks == shipped(name).data.args.get("masks", False) == ("mask" in name)


@pytest.mark.parametrize("name", [name for name in NAMES if str(shipped(name).model.pretrained).startswith("runs/")])
def test_weights_of_runs_come_from_a_recipe_of_the_same_network(name: str) -> None:
    recipe = shipped(name)
    source = str(recipe.model.pretrained).removeprefix("runs/")
    if re.search("dcn|_l[123]_", name):  # made by the command in the comment
        assert source not in shipped_recipes()
        assert source in first_lines(name) or "more_conversions" in first_lines(name)
        return
    before = load_recipe(source)
    assert before.conversion == recipe.conversion
    check_network(recipe, before, RESIZED | {"zero_init_last"})


@pytest.mark.parametrize("name", NAMES)
def test_rates_fall_where_the_published_ones_do(name: str) -> None:
    """After warm-ups of 500 or 1000 steps, at two thirds and more of the epochs of COCO."""
    recipe = shipped(name)
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), recipe.optimizer.lr)
    schedule, steps = create_schedule(optimizer, recipe.schedule, recipe.epochs or 0, STEPS)
    assert schedule is not None

    def rate(step: int) -> float:
        schedule.step_update(step)
        return float(optimizer.param_groups[0]["lr"]) / recipe.optimizer.lr

    first, second = {12: (8, 11), 24: (16, 22), 36: (27, 33)}[recipe.epochs or 0]
    if "focalnet" in name and recipe.epochs == 12:
        first = 9
    assert steps == STEPS * (recipe.epochs or 0)
    constant = name.startswith("fcos")
    warmup = 1000 if re.match("cascade_mask_rcnn_moganet_(small|base|large)_3x", name) else 500
    expected = {0: 1 / 3 if constant else 0.001, warmup // 2: 1 / 3 if constant else 0.5005, warmup: 1.0}
    expected |= {first * STEPS - 1: 1.0, first * STEPS: 0.1, second * STEPS - 1: 0.1, second * STEPS: 0.01}
    assert {step: rate(step) for step in expected} == pytest.approx(expected, rel=1e-9)


DROPS = {
    "convnext": {"tiny": 0.4, "small": 0.6, "base": 0.7, "large": 0.7, "xlarge": 0.8},
    "hornet": {"tiny": 0.4, "small": 0.6, "base": 0.7, "large": 0.7},
    "unireplknet": {"t": 0.3, "s": 0.5, "b": 0.6, "l": 0.7, "xl": 0.7},
    "moganet": {"xtiny": 0.05, "tiny": 0.1, "small": 0.1, "base": 0.2, "large": 0.3},
}
"""Family -> size -> the published drop path rate."""


@pytest.mark.parametrize("name", [name for name in NAMES if shipped(name).model.name.split("_")[0] in DROPS])
def test_drop_path_rates_are_the_published_ones(name: str) -> None:
    family, size, *_ = shipped(name).model.name.split("_")
    wide = name == "mask_rcnn_moganet_base_3x_coco"
    assert shipped(name).model.args["drop_path_rate"] == (0.3 if wide else DROPS[family][size])


def test_drop_path_reaches_the_last_block() -> None:
    model = on_meta(shipped("mask_rcnn_convnext_tiny_3x_coco"), Objects)
    rates = [module.drop_prob for module in model.modules() if type(module).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.4)
    assert min(rates) == pytest.approx(0.4 / 17)  # the first of 18 blocks has none


def official(name: str) -> str:
    """Return the name that ConvNeXt's and HorNet's code gives a parameter."""
    name = re.sub(r"^backbone\.body\.(model\.)?", "backbone.", name)
    name = re.sub(r"^backbone\.stem_(\d)", r"backbone.downsample_layers.0.\1", name)
    name = re.sub(r"^backbone\.stages_(\d)\.downsample", r"backbone.downsample_layers.\1", name)
    return re.sub(r"^backbone\.stages_(\d)\.blocks", r"backbone.stages.\1", name)


def convnext_layer(name: str, last: int) -> int:
    """ConvNeXt's mmcv_custom, get_num_layer_layer_wise."""
    words = official(name).split(".")
    if words[1] == "downsample_layers":
        return (0, 2, 3, last)[int(words[2])]
    return (1, 2, 3 + int(words[3]) // 3, last)[int(words[2])] if words[1] == "stages" else last + 1


def hornet_layer(name: str, last: int) -> int:
    """HorNet's mmcv_custom, get_num_layer_layer_wise."""
    words = official(name).split(".")
    if words[1] == "downsample_layers":
        return (0, 2, 3, 12)[int(words[2])]
    return (1, 2, min(3 + int(words[3]) // 2, 11), 12)[int(words[2])] if words[1] == "stages" else last + 1


def moganet_layer(name: str, last: int) -> int:
    """MogaNet's mmcv_custom, get_num_layer_layer_wise, which counts stages from 1."""
    words = name.removeprefix("backbone.body.model.").split(".")
    if words[0].startswith("patch_embed"):
        return (0, 3, 4, last)[int(words[0][-1]) - 1]
    if words[0].startswith("blocks"):
        return (2, 3, min(3 + int(words[1]) // 2, 11), last)[int(words[0][-1]) - 1]
    return last + 1


@pytest.mark.parametrize(
    ("name", "layer", "rate", "last"),
    [
        ("mask_rcnn_convnext_tiny_3x_coco", convnext_layer, 0.95, 6),
        ("cascade_mask_rcnn_convnext_base_3x_coco", convnext_layer, 0.8, 12),
        ("cascade_mask_rcnn_hornet_base_gf_3x_coco", hornet_layer, 0.8, 12),
        ("cascade_mask_rcnn_moganet_base_3x_coco", moganet_layer, 0.8, 12),
        ("cascade_mask_rcnn_unireplknet_t_3x_coco", convnext_layer, 0.8, 12),
    ],
)
def test_rates_by_layer_are_the_published_ones(
    name: str, layer: Callable[[str, int], int], rate: float, last: int
) -> None:
    recipe = shipped(name)
    model, groups = groups_of(recipe, Objects)
    parameters = dict(model.named_parameters())
    for key, group in groups.items():
        scale = rate ** (last + 1 - layer(key, last))
        assert group["lr"] == pytest.approx(recipe.optimizer.lr * scale, rel=1e-9), key
        decays = parameters[key].squeeze().ndim > 1 and not key.endswith(".bias")
        if "unireplknet" not in name and "hornet" not in name:  # they do not squeeze
            assert group["weight_decay"] == (0.05 if decays else 0), key
    assert {round(group["lr"] / recipe.optimizer.lr, 6) for group in groups.values()} >= {1.0}


def test_internimage_decays_by_block() -> None:
    """The rate of the heads is 39 layers above that of the stem (InternImage's mmcv_custom, get_num_layer_for_swin)."""
    model, groups = groups_of(shipped("cascade_mask_rcnn_internimage_xl_in22k_3x_coco"), Objects)
    inner = "backbone.body.model."
    rates = {name.removeprefix(inner): group["lr"] / 2e-4 for name, group in groups.items()}
    stem = next(rate for name, rate in rates.items() if name.startswith("patch_embed"))
    assert stem == pytest.approx(0.9**40)
    assert rates["levels.0.blocks.0.mlp.fc1.weight"] == pytest.approx(0.9**39)
    assert rates["levels.3.blocks.4.mlp.fc1.weight"] == pytest.approx(0.9)
    assert rates["neck.lateral_convs.0.conv.weight"] == 1
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(387.4e6, rel=1e-3)


NORMS = (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)


@pytest.mark.parametrize("name", ["fcos_replknet_31b_2x_coco", "cascade_mask_rcnn_replknet_xl_3x_coco"])
def test_replknet_decays_everything_but_norms(name: str) -> None:
    model, groups = groups_of(shipped(name), Objects)
    norms = {f"{key}.{part}" for key, m in model.named_modules() if isinstance(m, NORMS) for part in ("weight", "bias")}
    assert norms & set(groups)
    assert {key for key, group in groups.items() if not group["weight_decay"]} == norms


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mask_rcnn_focalnet_tiny_lrf_1x_coco", ("norm",)),
        ("mask_rcnn_van_b2_3x_coco", ("norm",)),
        ("mask_rcnn_moganet_tiny_3x_coco", ("norm", "scale")),
        ("retinanet_moganet_xtiny_1x_coco", ("norm", "scale")),
    ],
)
def test_names_decide_what_is_decayed_as_in_swins_settings(name: str, words: tuple[str, ...]) -> None:
    """OpenMMLab's custom_keys: a parameter whose name contains the word."""
    _, groups = groups_of(shipped(name), Objects)
    free = {key for key, group in groups.items() if not group["weight_decay"]}
    assert free == {key for key in groups if any(word in key for word in words)}
    assert any(key.endswith(".bias") for key in set(groups) - free)


def test_cocos_two_boxes_without_height_do_not_stop_recipes() -> None:
    for name in NAMES:
        assert shipped(name).data.args["repair"] is True


def test_resnets_train_as_in_mmdetection() -> None:
    recipe = shipped("faster_rcnn_resnet50_1x_coco")
    model, groups = groups_of(recipe, Objects)
    assert {group["weight_decay"] for group in groups.values()} == {1e-4}
    assert {group["lr"] for group in groups.values()} == {0.02}
    assert {group["momentum"] for group in groups.values()} == {0.9}
    assert not any(group["nesterov"] for group in groups.values())
    fixed = {key for key, _ in model.named_parameters()} - set(groups)
    assert {key.split(".")[2] for key in fixed} == {"conv1", "bn1", "layer1"}
    assert not any(m.training for key, m in model.train().named_modules() if isinstance(m, nn.BatchNorm2d))


def test_biases_of_fcos_have_twice_the_rate_and_no_decay() -> None:
    model, groups = groups_of(shipped("fcos_resnet50_1x_coco"), Objects)
    convolutions = {f"{key}.bias" for key, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    for key, group in groups.items():
        twice = key in convolutions
        assert (group["lr"], group["weight_decay"]) == pytest.approx((0.02, 0) if twice else (0.01, 1e-4)), key
    norms = {key for key, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert not any(key.rpartition(".")[0] in norms for key in groups)
    assert shipped("fcos_resnet50_1x_coco").clip_grad == 35


def test_table_v_of_gmconv_converts_stage_by_stage() -> None:
    for name, stages in (("gmconv_l1_", 1), ("gmconv_l2_", 2), ("gmconv_l3_", 3), ("gmconv_", 4), ("", 0)):
        model = on_meta(shipped(f"cascade_rcnn_{name}resnet50_1x_coco"), Objects)
        masked = [key for key, m in model.named_modules() if type(m).__name__ in ("GMConv2d", "DynamicGMConv2d")]
        assert {key.split(".")[2] for key in masked} == set(
            ["conv1", "layer1", "layer2", "layer3", "layer4"][: stages + 1 if stages else 0]
        )
        dynamic = [key for key, m in model.named_modules() if type(m).__name__ == "DynamicGMConv2d"]
        assert dynamic == (["backbone.body.conv1"] if stages else [])


def test_gmconv_and_deformable_convolutions_share_a_backbone() -> None:
    model = on_meta(shipped("faster_rcnn_gmconv_dcn_resnet50_1x_coco"), Objects)
    converted = [(key, type(m).__name__) for key, m in model.named_modules() if type(m) is not nn.Conv2d]
    kinds = {(key.split(".")[2], kind) for key, kind in converted if kind.endswith("Conv2d") and "backbone" in key}
    assert kinds == {
        ("conv1", "DynamicGMConv2d"), ("layer1", "GMConv2d"),
        *((layer, kind) for layer in ("layer2", "layer3", "layer4") for kind in ("DeformConv2d", "DepthwiseConv2d")),
    }  # fmt: skip


def check_model(name: str) -> None:
    """Check that a recipe's model is the one of the comparison, and that its optimizer finds what it names."""
    recipe = shipped(name)
    model, _ = groups_of(recipe, Objects)
    assert isinstance(model, getattr(dense, tasks.detection.MODELS[recipe.task.args["model"]]))
    assert model.num_classes == CLASSES
    if recipe.conversion is not None:
        return
    network = recipe.model.name.partition(".")[0]
    found = [row for row in CITED_DETECTORS if row.name == network and METHODS[row.method].kind == type(model).__name__]
    expected = []
    for row in found:
        method = METHODS[row.method]
        with torch.device("meta"):
            expected.append(shapes(getattr(dense, method.kind)(row.name, CLASSES, **method.args, **row.args)))
    assert shapes(model) in expected


@pytest.mark.parametrize("name", SOME)
def test_the_model_is_the_published_one(name: str) -> None:
    check_model(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in SOME])
def test_the_model_of_every_recipe_is_the_published_one(name: str) -> None:
    check_model(name)


def check_start(recipe: Recipe) -> None:
    """Check that the model starts from the convolutions of its file of weights, unless they are converted."""
    weights = load_file(str(recipe.model.pretrained))
    task = tasks.create(recipe.task.name, Objects(recipe), **recipe.task.args)
    model: Any = build_model(recipe, task)
    found: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for parameter in model.backbone.parameters():
        found.setdefault(tuple(parameter.shape), []).append(parameter.detach())
    drawn = [tensor for tensor in weights.values() if tensor.ndim == 4 and tensor.std() > 0]
    equal = [any(torch.equal(tensor, other) for other in found.get(tuple(tensor.shape), [])) for tensor in drawn]
    changed = recipe.conversion is not None or {"focal_windows", "global_filters"} & set(recipe.model.args)
    assert sum(equal) >= (0.4 if changed else 0.9) * len(drawn)  # some networks have a convolution in their head


def two_steps(recipe: Recipe, folder: Path) -> Path:
    """Train two steps of a recipe on generated data from drawn weights, check the results, and return the run."""
    made_objects.write_coco(folder / "data")
    options = {"root": str(folder / "data"), "scale": [96, 64]}
    if "short_sides" in recipe.data.args or recipe.data.args.get("pipeline") == "multi_scale_crop":
        options["short_sides"] = [48, 64]
    heads = dict(recipe.task.args.get("head_args", {}))
    if "rcnn" in recipe.task.args["model"]:
        heads |= {"train_proposals": 32, "test_proposals": 16, "rois_per_image": 16}
    made = shortened(
        recipe,
        folder,
        model=replace(recipe.model, pretrained=str(pretrained_file(recipe, folder))),
        data=replace(recipe.data, args={**recipe.data.args, **options}),
        task=replace(recipe.task, args={**recipe.task.args, "head_args": heads}),
        schedule=replace(recipe.schedule, warmup_steps=1),
        epochs=None,
        max_steps=2,
    )
    check_start(made)
    result = check_two_steps(made)
    assert 0 <= result.metrics["box_ap"] <= 1
    assert ("mask_ap" in result.metrics) == ("mask" in recipe.name)
    return result.folder


def test_two_steps_of_the_smallest(tmp_path: Path) -> None:
    recipe = shipped("mask_rcnn_moganet_xtiny_1x_coco")
    two_steps(replace(with_few_blocks(recipe), optimizer=replace(recipe.optimizer, lr_base_size=None)), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_steps_of_every_recipe(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:  # delete it at once: a run writes up to two gigabytes
        two_steps(with_few_blocks(shipped(name)), Path(folder))
    gc.collect()  # loops of references would keep the model until the next one is large
