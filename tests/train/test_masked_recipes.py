"""Every shipped recipe for masked pre-training and what follows it: options, numbers in the docs, rates, two steps.

``-m slow`` builds all of them, and trains all of them at full width with small images and few blocks.
"""

from __future__ import annotations

import gc
import math
import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch

from train import made_data
from train.recipe_pages import (
    MASKED,
    check_batch,
    check_network,
    check_options,
    check_row,
    check_two_steps,
    docs_rows,
    first_lines,
    groups_of,
    shipped,
    shortened,
    with_few_blocks,
)
from widefield import masking
from widefield.loading import load_trained
from widefield.train import Recipe, shipped_recipes

PAGE = "masked_recipes.md"
NAMES = [name for name in shipped_recipes() if name.startswith(MASKED)]
PRETRAINING = [name for name in NAMES if shipped(name).task.name == "masked_image"]
FINETUNING = [name for name in NAMES if name not in PRETRAINING]
SOME = ("a2mim_resnet50_in1k", "fcmae_convnextv2_atto_in1k", "spark_resnet50_ft_in1k", "spark_resnet50_linear_in1k")
"""Recipes that the default tests build."""


class ImageNet:
    """The part of a data set that a task reads."""

    classes = tuple(map(str, range(1000)))

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe


def millions(parameters: int) -> str:
    return f"{parameters / 1e6:.2f}"


def as_documented(recipe: Recipe) -> dict[str, str]:
    """Return the cells that the docs must have for a recipe."""
    spec, schedule = recipe.optimizer, recipe.schedule
    epochs = str(recipe.epochs)
    end = spec.weight_decay_end
    shared = {
        "network": f"`{recipe.model.name}`",
        "epochs": f"{epochs} ({schedule.warmup_epochs})" if schedule.warmup_epochs else epochs,
        "batch": f"{spec.lr_base_size}",
        "lr": f"{spec.lr:g}",
        "weight decay": f"{spec.weight_decay:g}" + (f" to {end:g}" if end else ""),
        "drop path": f"{recipe.model.args.get('drop_path_rate', 0):g}",
    }
    special = {"lamb": ["LAMB"], "momentum": ["SGD"], "adamw": []}[spec.name]
    side = recipe.data.args["size"]
    special += [f"{side} pixels"] if side != 224 else []
    return shared | (pretraining if recipe.task.name == "masked_image" else finetuning)(recipe, special)


def pretraining(recipe: Recipe, special: list[str]) -> dict[str, str]:
    options = recipe.task.args
    if options["method"] == "a2mim":
        spectrum = options.get("frequency", {}).get("weight", masking.METHODS["a2mim"].frequency.weight)
        special.append(f"spectrum {spectrum:g}")
    special += [f"{options['ratio']:.0%} masked"] if "ratio" in options else []
    special += ["token added"] if options.get("token") == "add" else []
    special += [recipe.conversion.kind] if recipe.conversion else []
    smallest, largest = recipe.data.args["scale"]
    return {"crops": f"{smallest:g} to {largest:g}", "besides": ", ".join(special)}


def finetuning(recipe: Recipe, special: list[str]) -> dict[str, str]:
    options, mixing = recipe.data.args, recipe.task.args
    policy = options.get("auto_augment") or "0"
    drawn = [options.get("re_prob", 0), *(mixing.get(key, 0) for key in ("mixup", "cutmix", "label_smoothing"))]
    found = re.fullmatch(r"rand-m(\d+)-mstd0.5-inc1", policy)
    augmentation = " / ".join([found[1] if found else policy, *(f"{float(value):g}" for value in drawn)])
    special += ["binary"] if mixing.get("loss") == "binary" else []
    special += [f"EMA {recipe.ema.decay:g}"] if recipe.ema else []
    special += [f"{recipe.repeats} repeats"] if recipe.repeats > 1 else []
    special += [f"{recipe.freeze} frozen"] if recipe.freeze else []
    decay = recipe.optimizer.layer_decay
    if decay is not None:
        unit = {"single": "a block", "layer_wise": "a group", "grouped": "a group"}[decay.rule]
        special.append(f"rates x{decay.rate:g} {unit}")
    plain = augmentation == "0 / 0 / 0 / 0 / 0"
    return {"augmentation": "crop, flip" if plain else augmentation, "besides": ", ".join(special)}


def test_docs_have_a_row_for_every_recipe() -> None:
    assert len(NAMES) > 55
    assert sorted(docs_rows(PAGE)) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_docs_agree_with_the_recipe(name: str) -> None:
    row = check_row(PAGE, name, as_documented(shipped(name)))
    assert row["published in"]
    if name in FINETUNING:
        stated = re.search(r"Result: (\d\d\.\d) % top-1", first_lines(name))
        assert row["top-1, %"] == (stated[1] if stated else "-")


@pytest.mark.parametrize("name", NAMES)
def test_recipe_reaches_the_batch_that_it_was_made_for(name: str) -> None:
    check_batch(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_known_where_it_goes(name: str, tmp_path: Path) -> None:
    task, options = check_options(name, ImageNet, tmp_path), shipped(name).data.args
    assert options["root"] == "data/imagenet"
    if name in PRETRAINING:
        task.method.mask.count(*task.method.mask.grid(options["size"], options["size"]))


@pytest.mark.parametrize("name", FINETUNING)
def test_fine_tuning_starts_from_pretraining_of_the_same_network(name: str) -> None:
    recipe = shipped(name)
    before = shipped(str(recipe.model.pretrained).removeprefix("runs/"))
    assert before.name in PRETRAINING
    assert before.name.partition("_")[0] == name.partition("_")[0]
    check_network(recipe, before, {"drop_path_rate", "head_init_scale"})


@pytest.mark.parametrize(
    ("start", "then"),
    [("spark_morf_convnext_tiny", "morf_convnext_tiny"), ("spark_gmconv_resnet50", "gmconv_resnet50")],
)
def test_converted_networks_are_those_of_the_recipes_that_fine_tune_them(start: str, then: str) -> None:
    before, after = shipped(f"{start}_in1k"), shipped(f"{then}_in1k")
    assert f"widefield train {then}_in1k --model.pretrained runs/{start}_in1k" in first_lines(before.name)
    assert before.conversion == after.conversion
    assert before.model.name == after.model.name


def single(name: str, depths: list[int]) -> tuple[int, int]:
    """ConvNeXt V2's code, get_num_layer_for_convnext_single, on timm's names: layer, and layers below the head."""
    words = name.split(".")
    if words[0] == "stem":
        return 1, sum(depths) + 1
    if words[0] != "stages":
        return sum(depths) + 1, sum(depths) + 1
    block = int(words[3]) if words[2] == "blocks" else 0
    return sum(depths[: int(words[1])]) + block + 1, sum(depths) + 1


def group(name: str, depths: list[int]) -> tuple[int, int]:
    """ConvNeXt V2's code, get_num_layer_for_convnext."""
    words = name.split(".")
    if words[0] == "stem":
        return 0, 13
    if words[0] != "stages":
        return 13, 13
    block = int(words[3]) if words[2] == "blocks" else 0
    return (1, 2, 3 + block // 3, 12)[int(words[1])], 13


def resnet(name: str, depths: list[int]) -> tuple[int, int]:
    """SparK's code, resnets_get_layer_id_and_scale_exp."""
    second, third = {6: (2, 3), 23: (2, 3), 36: (4, 4)}[depths[2]]
    middle = math.ceil(depths[1] / second)
    top = 2 + middle + math.ceil(depths[2] / third)
    words = name.split(".")
    if words[0] == "fc":
        return top + 1, top + 1
    if not words[0].startswith("layer"):
        return 0, top + 1
    block = int(words[1])
    return (1, 2 + block // second, 2 + middle + block // third, top)[int(words[0][5:]) - 1], top + 1


LAYERS: dict[str, tuple[Callable[[str, list[int]], tuple[int, int]], list[int]]] = {
    "fcmae_convnextv2_nano_ft_in1k": (single, [2, 2, 8, 2]),
    "fcmae_convnextv2_base_ft_in1k": (group, [3, 3, 27, 3]),
    "spark_resnet50_ft_in1k": (resnet, [3, 4, 6, 3]),
    "spark_resnet200_ft_in1k": (resnet, [3, 24, 36, 3]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_rates_by_layer_are_the_published_ones(name: str) -> None:
    layer, depths = LAYERS[name]
    recipe = shipped(name)
    decay = recipe.optimizer.layer_decay
    assert decay is not None
    _, groups = groups_of(recipe, ImageNet)
    for key, found in groups.items():
        number, last = layer(key, depths)
        assert found["lr_scale"] == pytest.approx(decay.rate ** (last - number), rel=1e-12), key
        free = key.endswith(("bias", "norm.weight", "bn1.weight", "bn2.weight", "bn3.weight", "gamma", "grn.weight"))
        free |= bool(re.search(r"(downsample|stem)\.[01]\.weight$", key)) and not found["weight_decay"]  # norms
        assert found["weight_decay"] == (0 if free else recipe.optimizer.weight_decay), key


@pytest.mark.parametrize(
    ("name", "token", "rate"),
    [
        ("spark_resnet50_in1k", "decoder.mask_tokens.3", 1.0),
        ("simmim_resnet50_in1k", "token.mask_token", 1.0),
        ("a2mim_resnet50_in1k", "token.mask_token", 0.1),
    ],
)
def test_tokens_have_their_own_rate_and_no_decay(name: str, token: str, rate: float) -> None:
    model, groups = groups_of(shipped(name), ImageNet)
    assert groups[token]["weight_decay"] == 0
    assert groups[token].get("lr_scale", 1.0) == rate
    weights = {key for key, p in model.named_parameters() if p.ndim > 1 and ".mask_" not in key}
    assert {key for key, found in groups.items() if found["weight_decay"] and ".mask_" not in key} == weights


def test_the_probe_trains_the_classifier_only() -> None:
    _, groups = groups_of(shipped("spark_resnet50_linear_in1k"), ImageNet)
    assert set(groups) == {"fc.weight", "fc.bias"}


def check_parameters(name: str) -> None:
    """Check the number of parameters in the docs, and that the optimizer finds what the recipe names."""
    model, _ = groups_of(shipped(name), ImageNet)
    whole = sum(p.numel() for p in model.parameters())
    if name in FINETUNING:
        assert docs_rows(PAGE)[name]["parameters, M"] == millions(whole)
        return
    assert isinstance(model, masking.MaskedAutoencoder)
    encoder = sum(p.numel() for p in model.encoder.parameters())
    assert docs_rows(PAGE)[name]["encoder + decoder, M"] == f"{millions(encoder)} + {millions(whole - encoder)}"


@pytest.mark.parametrize("name", SOME)
def test_parameters(name: str) -> None:
    check_parameters(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in SOME])
def test_parameters_of_every_recipe(name: str) -> None:
    check_parameters(name)


def two_steps(recipe: Recipe, folder: Path, pretrained: Path | None = None) -> Path:
    """Train two steps of a recipe on generated images in ImageNet's layout, check the results, and return the run."""
    root = folder / "imagenet"
    if not root.exists():
        made_data.imagenet(root, train=8, val=4)
    if pretrained is not None:
        recipe = replace(recipe, model=replace(recipe.model, pretrained=str(pretrained)))
    schedule = recipe.schedule
    made = shortened(
        recipe,
        folder,
        data=replace(recipe.data, args={**recipe.data.args, "root": str(root), "size": 96}),
        schedule=replace(schedule, warmup_epochs=min(schedule.warmup_epochs, 1)),
        epochs=1,
        batch_size=4,
    )
    result = check_two_steps(made)
    measured = "knn_top1" if recipe.task.name == "masked_image" else "top1"
    assert 0 <= result.metrics[measured] <= 1
    assert (f"ema_{measured}" in result.metrics) == (recipe.ema is not None)
    return result.folder


def test_two_steps_of_pretraining_and_of_what_follows(tmp_path: Path) -> None:
    small = {"dims": [8, 8, 12, 16]}
    run = two_steps(with_few_blocks(shipped("fcmae_convnextv2_atto_in1k"), **small), tmp_path)
    two_steps(with_few_blocks(shipped("fcmae_convnextv2_atto_ft_in1k"), **small), tmp_path, run)
    probe = shipped("spark_resnet50_linear_in1k")
    probe = replace(probe, model=replace(probe.model, name="convnextv2_atto"))
    probed = two_steps(with_few_blocks(probe, **small), tmp_path, run)
    # The probe's encoder is that of the pre-training, whose module has other names for the same order of parameters.
    start, end = load_trained(run).encoder.body, load_trained(probed)
    kept = [p for name, p in end.named_parameters() if not name.startswith("head")]
    assert len(kept) > 20
    assert all(torch.equal(one, other) for one, other in zip(start.parameters(), kept, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_steps_of_every_recipe(name: str) -> None:
    recipe = with_few_blocks(shipped(name))
    with tempfile.TemporaryDirectory() as folder:  # delete it at once: runs are large
        encoder = None
        if name in FINETUNING:
            free = {"drop_path_rate", "head_init_scale"}
            args = {key: value for key, value in recipe.model.args.items() if key not in free}
            encoder = Path(folder) / "encoder.pth"
            torch.save(timm.create_model(recipe.model.name, num_classes=0, **args).state_dict(), encoder)
        two_steps(recipe, Path(folder), encoder)
    gc.collect()  # loops of references would keep the model until the next one is large
