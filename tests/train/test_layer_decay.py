"""Learning rates by depth, against the published formulas on the published names of parameters."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from widefield import dense
from widefield.train import GroupSpec, LayerDecaySpec, OptimizerSpec
from widefield.train.layer_decay import layer_numbers
from widefield.train.optimization import create_optimizer, create_schedule
from widefield.train.recipe import ScheduleSpec

SMALL = {"channels": 8, "auxiliary_channels": 8}


def published(name: str) -> str:
    """Return the published name of a parameter of our segmenter on timm's ConvNeXt, or one with official names."""
    name = re.sub(r"^backbone\.body\.(model\.)?", "backbone.", name)
    name = re.sub(r"^backbone\.stem_(\d)", r"backbone.downsample_layers.0.\1", name)
    name = re.sub(r"^backbone\.stages_(\d)\.downsample", r"backbone.downsample_layers.\1", name)
    return re.sub(r"^backbone\.stages_(\d)\.blocks", r"backbone.stages.\1", name)


def layer_wise(name: str, num_layers: int) -> int:
    """ConvNeXt's detection and segmentation code, get_num_layer_layer_wise."""
    words = name.split(".")
    if words[1] == "downsample_layers":
        return (0, 2, 3, num_layers)[int(words[2])]
    if words[1] == "stages":
        return (1, 2, 3 + int(words[3]) // 3, num_layers)[int(words[2])]
    return num_layers + 1


def pair_wise(name: str, num_layers: int) -> int:
    """HorNet's code, get_num_layer_layer_wise, which is for twelve layers."""
    words = name.split(".")
    if words[1] == "downsample_layers":
        return (0, 2, 3, 12)[int(words[2])]
    if words[1] == "stages":
        return (1, 2, min(3 + int(words[3]) // 2, 11), 12)[int(words[2])]
    return num_layers + 1


def stage_wise(name: str, num_layers: int) -> int:
    """ConvNeXt's segmentation code, get_num_layer_stage_wise, whose argument is num_layers + 2."""
    words = name.split(".")
    if words[1] == "downsample_layers":
        return 0
    return int(words[2]) + 1 if words[1] == "stages" else num_layers + 2 - 1


def block_wise(name: str, num_layers: int, depths: tuple[int, ...] = (4, 4, 18, 4)) -> int:
    """InternImage's code, which began as that of Swin."""
    words = name.split(".")
    if words[1] == "patch_embed":
        return 0
    if words[1] != "levels":
        return num_layers + 1
    stage = int(words[2])
    if words[3] == "blocks":
        return int(words[4]) + 1 + sum(depths[:stage])
    return 1 + sum(depths[: min(stage + 1, 3)])


@pytest.mark.parametrize(
    ("network", "rule", "number", "num_layers"),
    [
        ("convnext_tiny", "layer_wise", layer_wise, 6),
        ("convnext_tiny", "stage_wise", stage_wise, 6),
        ("convnext_base", "layer_wise", layer_wise, 12),
        ("convnext_base", "stage_wise", stage_wise, 12),
        ("unireplknet_t", "layer_wise", layer_wise, 12),
        ("hornet_tiny_7x7", "stage_wise", stage_wise, 6),
        ("hornet_tiny_7x7", "pair_wise", pair_wise, 12),
        ("convnext_base", "pair_wise", pair_wise, 12),
        ("internimage_t", "block_wise", block_wise, 30),
    ],
)
def test_numbers_and_scales_are_the_published_ones(
    network: str, rule: str, number: Callable[[str, int], int], num_layers: int
) -> None:
    with torch.device("meta"):
        model = dense.UPerNet(network, 5, **SMALL)
    rate = 0.9
    spec = OptimizerSpec(lr=1e-4, weight_decay=0.05, layer_decay=LayerDecaySpec(rate, rule, num_layers))
    optimizer = create_optimizer(model, spec, 1e-4)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(groups) == len(learning)
    for name, parameter in learning.items():
        scale = rate ** (num_layers + 2 - number(published(name), num_layers) - 1)
        group = groups[id(parameter)]
        assert group["lr"] == pytest.approx(1e-4 * scale, rel=1e-12, abs=0), name
        decays = parameter.ndim > 1 and not name.endswith("bias")
        assert group["weight_decay"] == (0.05 if decays else 0.0), name
    assert any(name.startswith("backbone.norm") for name in learning) == (network != "internimage_t")


def test_stage_wise_of_convnext_tiny_in_figures() -> None:
    """With six layers the heads have rate^0, stage 3 rate^3 and the stem rate^7."""
    with torch.device("meta"):
        model = dense.UPerNet("convnext_tiny", 5, **SMALL)
    numbers, last = layer_numbers(model, LayerDecaySpec(0.9, "stage_wise", 6))
    powers = {name: last - number for name, number in numbers.items()}
    assert powers["decode_head.conv_seg.weight"] == powers["backbone.norm3.weight"] == 0
    assert powers["backbone.body.stages_3.blocks.0.gamma"] == 3
    assert powers["backbone.body.stem_0.weight"] == powers["backbone.body.stages_3.downsample.1.weight"] == 7


def small(network: str = "convnext_atto", **args: object) -> nn.Module:
    args = {"depths": (1, 1, 2, 1), "dims": (8, 8, 8, 8), **args} if network == "convnext_atto" else args
    return dense.UPerNet(network, 3, **SMALL, **args)


def test_frozen_parameters_are_left_out_and_groups_multiply() -> None:
    model = small()
    model.get_parameter("backbone.body.stem_0.weight").requires_grad_(False)
    spec = OptimizerSpec(
        layer_decay=LayerDecaySpec(0.5, "stage_wise", 4), groups=[GroupSpec("*.stages_3.*.gamma", lr_scale=10)]
    )
    optimizer = create_optimizer(model, spec, 1.0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert id(model.get_parameter("backbone.body.stem_0.weight")) not in rates
    assert rates[id(model.get_parameter("backbone.body.stages_3.blocks.0.gamma"))] == 0.5 * 10
    assert rates[id(model.get_parameter("backbone.body.stages_3.blocks.0.mlp.fc1.weight"))] == 0.5
    schedule, _ = create_schedule(optimizer, ScheduleSpec("poly", args={"decay_rate": 1.0}), 10, 1)
    assert schedule is not None
    schedule.step_update(5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rates[id(optimizer.param_groups[0]["params"][0])] / 2)


@pytest.mark.parametrize("network", ["van_b0", "moganet_xtiny"])
def test_norms_after_the_blocks_count_as_those_of_the_head(network: str) -> None:
    """VAN and MogaNet have blocks, downsampling layer and a last norm next to each other."""
    with torch.device("meta"):
        model = dense.SemanticFPN(network, 5, channels=8, neck_channels=8, depths=(1, 2, 4, 1))
    inner = "backbone.body.model."
    ends = {name for name, _ in model.named_parameters() if re.match(rf"{re.escape(inner)}norm\d", name)}
    assert len(ends) == 8

    def by_layer(name: str, rule: str) -> int:
        head, _, rest = name.removeprefix(inner).partition(".")
        if not name.startswith(inner) or head.startswith("norm"):
            return 13
        stage, leads = int(head[-1]) - 1, not head.startswith("block")
        if leads and (stage == 0 or rule == "stage_wise"):
            return 0
        if rule == "stage_wise":
            return stage + 1
        block = 0 if leads else int(rest.split(".")[0])
        return (1, 2, 3 + block // 3, 12)[stage] if rule == "layer_wise" else 1 + (0, 1, 3, 7)[stage] + block

    for rule in ("layer_wise", "stage_wise", "block_wise"):
        numbers, _ = layer_numbers(model, LayerDecaySpec(0.9, rule, 12))
        assert numbers == {name: by_layer(name, rule) for name in numbers}


def test_a_backbone_alone_has_numbers_too() -> None:
    import timm

    model = timm.create_model("convnext_atto", num_classes=3, depths=(1, 1, 4, 1), dims=(8, 8, 8, 8))
    numbers, last = layer_numbers(model, LayerDecaySpec(0.7, "layer_wise", 6))
    assert (numbers["stem.0.weight"], numbers["stages.2.blocks.3.gamma"], numbers["head.fc.weight"]) == (0, 4, last)


@pytest.mark.parametrize(
    ("network", "spec", "message"),
    [
        (
            "mobilenetv2_050",
            LayerDecaySpec(0.9),
            r"layer_wise needs a backbone of four stages with numbered blocks; those of UPerNet",
        ),
        (
            "convnext_tiny",
            LayerDecaySpec(0.9, "grouped", group_sizes=[3, 3]),
            r"group_sizes must have a number for each of the 4 stages, which have \[3, 3, 9, 3\] blocks; got \[3, 3\]",
        ),
        (
            "convnext_tiny",
            LayerDecaySpec(0.9, "stage_wise", 3),
            r"num_layers: 3 is too small for stages of \[3, 3, 9, 3\]",
        ),
        ("replknet_31b", LayerDecaySpec(0.9, "layer_wise", 12), r"\[4, 4, 36, 4\] blocks. Set at least 14\.$"),
        ("convnext_base", LayerDecaySpec(0.9, "layer_wise", 6), r"blocks. Set at least 11\.$"),
    ],
)
def test_refused_models(network: str, spec: LayerDecaySpec, message: str) -> None:
    with torch.device("meta"):
        model = dense.UPerNet(network, 5, **SMALL)
    with pytest.raises(ValueError, match=message):
        create_optimizer(model, OptimizerSpec(layer_decay=spec), 1e-4)


def test_refused_options() -> None:
    with pytest.raises(ValueError, match=r"rule must be one of 'layer_wise', .* Did you mean 'stage_wise'"):
        LayerDecaySpec(0.9, "stagewise")
    with pytest.raises(ValueError, match=r"layer_decay.rate must be above 0"):
        LayerDecaySpec(0.0)
    with pytest.raises(ValueError, match=r"group_sizes and rule: grouped belong together; got group_sizes None and"):
        LayerDecaySpec(0.9, "grouped")
    with pytest.raises(ValueError, match=r"got group_sizes \[3\] and rule 'single'"):
        LayerDecaySpec(0.9, "single", group_sizes=[3])
    with pytest.raises(ValueError, match=r"every entry of optimizer.layer_decay.group_sizes must be .*0"):
        LayerDecaySpec(0.9, "grouped", group_sizes=[3, 0])
    with pytest.raises(ValueError, match=r"which is timm's, cannot both be given"):
        OptimizerSpec(layer_decay=LayerDecaySpec(0.9), args={"layer_decay": 0.9})
