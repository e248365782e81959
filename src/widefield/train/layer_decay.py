"""Scale learning rates by the depth of the layer, as the published recipes for dense prediction do.

A layer with number i of L gets the rate times rate^(L + 1 - i). The rules number layers as ConvNeXt's and InternImage's
segmentation and detection code does, from which OpenMMLab's optimizer constructors come, or as the fine-tuning code of
ConvNeXt V2 and of SparK does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from widefield.surgery import Anatomy, anatomy
from widefield.surgery.anatomy import is_inside
from widefield.train.recipe import LayerDecaySpec

_FOUR_STAGES = ("layer_wise", "pair_wise", "stage_wise")


class _Place(NamedTuple):
    """Where a parameter is in the backbone: the stem, or a stage and perhaps a block of it."""

    stage: int | None
    """From 0; None for the stem."""
    block: int | None = None
    """From 0; None for layers around the blocks."""
    leads: bool = False
    """Whether it is a downsampling layer. Inside a stage's module, that of InternImage comes after the blocks."""
    inside: bool = True
    """Whether the stage's own module holds it."""


def layer_groups(model: nn.Module, spec: LayerDecaySpec, weight_decay: float) -> list[dict[str, Any]]:
    """Return the groups of a model's trainable parameters, for an optimizer.

    Each has ``lr_scale`` and ``weight_decay``, which is 0 for vectors and biases.

    Raises:
        ValueError: the backbone's stages or blocks are unknown, or there are too many for ``spec.num_layers``.
    """
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    numbers, last = layer_numbers(model, spec)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.endswith(".bias")
            group = groups.setdefault(
                (numbers[name], decays),
                {
                    "params": [],
                    "lr_scale": spec.rate ** (last - numbers[name]),
                    "weight_decay": weight_decay if decays else 0.0,
                },
            )
            group["params"].append(parameter)
    return list(groups.values())


def layer_numbers(model: nn.Module, spec: LayerDecaySpec) -> tuple[dict[str, int], int]:
    """Return the layer's number of each parameter, and the largest number: that of necks, heads and per-stage norms.

    The stem is 0. The rules number the rest:

    - ``layer_wise``: stage 0 is 1, stage 1 is 2, block b of stage 2 is 3 + b // 3, stage 3 is L. Downsampling layers
      count as the first block of the stage that they lead to.
    - ``pair_wise``, HorNet's: as ``layer_wise``, but block b of stage 2 is 3 + b // 2, and at most L - 1.
    - ``stage_wise``: stage s is s + 1; all downsampling layers are 0.
    - ``block_wise``: block b of stage s is 1 + b + the number of blocks before the stage. Layers after the blocks of a
      stage count as the next block; those of the last stage as its first.
    - ``single``, ConvNeXt V2's: a layer for each block. All other layers of a stage count as its first block, and so
      does the stem as that of stage 0, with number 1.
    - ``grouped``, SparK's: ``group_sizes[s]`` blocks of stage s are one layer. All other layers of a stage are in its
      first one. With [3, 3, 3, 3] it is ConvNeXt V2's "group", and ``layer_wise``.

    Raises ValueError as :func:`layer_groups` does.
    """
    parts = anatomy(model)
    names = [name for name, _ in model.named_parameters()]
    places = {name: place for name in names if (place := _place(model, parts, name)) is not None}
    stages = sorted({place.stage for place in places.values() if place.stage is not None})
    ranks = {stage: rank for rank, stage in enumerate(stages)}
    blocks = [{p.block for p in places.values() if p.stage == stage and p.block is not None} for stage in stages]
    depths = [len(found) for found in blocks]
    four = spec.rule in _FOUR_STAGES
    if not depths or not all(depths) or (four and len(depths) != 4):
        count = "four " if four else ""
        raise ValueError(
            f"optimizer.layer_decay: {spec.rule} needs a backbone of {count}stages with numbered blocks; those of "
            f"{type(model).__name__} have {depths or 'unknown'} blocks. "
            f"optimizer.args.layer_decay: {spec.rate} decays by timm's own numbers."
        )
    sizes = spec.group_sizes or [1] * len(depths)
    if len(sizes) != len(depths):
        raise ValueError(
            f"optimizer.layer_decay.group_sizes must have a number for each of the {len(depths)} stages, which have "
            f"{depths} blocks; got {sizes}."
        )
    last = (spec.num_layers or (12 if four else sum(_groups(depths, sizes)))) + 1
    ranked = {name: p if p.stage is None else p._replace(stage=ranks[p.stage]) for name, p in places.items()}
    numbers = {name: _number(ranked.get(name), spec.rule, depths, last, sizes) for name in names}
    least = max(_number(place, spec.rule, depths, 1, sizes) for place in ranked.values())  # the last stage always fits
    if least >= last:
        raise ValueError(
            f"optimizer.layer_decay.num_layers: {last - 1} is too small for stages of {depths} blocks. Set at least "
            f"{least}."
        )
    return numbers, last


def _groups(depths: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """Return the number of groups of each stage's blocks."""
    return [-(-depth // size) for depth, size in zip(depths, sizes, strict=True)]


def _number(place: _Place | None, rule: str, depths: list[int], last: int, sizes: Sequence[int]) -> int:
    if place is None:
        return last
    if place.stage is None:
        return int(rule == "single")
    stage, block = place.stage, place.block
    if rule == "stage_wise":
        return 0 if place.leads else stage + 1
    if rule == "layer_wise":
        return last - 1 if stage == 3 else stage + 1 + (block or 0) // 3 * (stage == 2)
    if rule == "pair_wise":
        return last - 1 if stage == 3 else min(stage + 1 + (block or 0) // 2 * (stage == 2), max(last - 2, 3))
    if rule in ("single", "grouped"):
        return 1 + sum(_groups(depths, sizes)[:stage]) + (block or 0) // sizes[stage]
    if block is not None or not place.inside:
        return 1 + sum(depths[:stage]) + (block or 0)
    return 1 + sum(depths[: min(stage + 1, len(depths) - 1)])


def _next_to(end: str, stage: int, name: str) -> _Place | None:
    """Return the place of a parameter in a stage whose blocks and downsampling layer are siblings of its last norm."""
    if is_inside(name, end):
        return None  # like the norms that segmenters add after each stage
    prefix = f"{parent}." if (parent := end.rpartition(".")[0]) else ""
    path = name.removeprefix(prefix).split(".")  # such as block2.0.attn.proj_1.weight or patch_embed2.proj.weight
    if path[0].startswith("block") and path[1].isdecimal():
        return _Place(stage, int(path[1]))
    return _Place(stage, leads=True, inside=False) if stage else _Place(None)


def _place(model: nn.Module, parts: Anatomy, name: str) -> _Place | None:
    """Return where a parameter is; None outside of the backbone and in a norm after a stage."""
    stage = parts.stage_of(name)
    if stage is None:
        return None if not parts.in_backbone(name) else _Place(None)
    root = parts.root_of(name)
    if root:  # the stem, or a list of the stem and all downsampling layers, one for each stage
        index = next(iter(name.removeprefix(f"{root}.").split(".")))
        listed = len(list(model.get_submodule(root).children())) == len(parts.stages) and index.isdecimal()
        return _Place(int(index), leads=True, inside=False) if listed and int(index) else _Place(None)
    holder = parts.stages[stage].name
    if parts.ends_in_norm(stage):
        return _next_to(holder, stage, name)
    if not is_inside(name, holder):  # between two stages, or before the first one
        return _Place(stage, leads=True, inside=False) if stage else _Place(None)
    path = name.removeprefix(f"{holder}.").split(".")  # such as blocks.3.mlp.fc1.weight or 3.conv1.weight
    if path[0].startswith("downsample"):
        return _Place(stage, leads=True)
    numbered = path[1:] if path[0].startswith(("block", "layer")) else path
    return _Place(stage, int(numbered[0]) if numbered[0].isdecimal() else None)
