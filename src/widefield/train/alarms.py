"""Diagnose a run beyond its metrics: collapsed routers of mixtures, and the reach of masks, which may stand still."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn

from widefield.analysis.masks import masks
from widefield.analysis.routing import Routing, collapse, mixtures, recording
from widefield.nn import DynamicGMConv2d, GMConv2d
from widefield.train.optimization import Schedule

_SAMPLED = 50
"""Steps at which the learning rate is looked at."""
_WANTED = 10.0
"""Taps that a sigma should be able to move."""


def watch_routers(model: nn.Module, evaluate: Callable[[], dict[str, float]]) -> tuple[dict[str, float], list[str]]:
    """Evaluate a model and report how it routed the images, as ``widefield.analysis.routing_statistics`` does.

    It costs a copy of the routing weights, and nothing for a model without mixtures. All processes must call it.

    Args:
        model: the model whose mixtures are recorded.
        evaluate: runs the model and returns metrics.

    Returns:
        The metrics, with ``router_entropy`` (mean over the mixtures; 1 is even use of the experts, 0 one expert for
        all), ``router_dead`` (dead experts of all mixtures) and ``router_constant`` (mixtures whose router gives all
        images the same weights); and a sentence for each mixture with dead experts or a constant router.
    """
    if not mixtures(model):
        return evaluate(), []
    with recording(model) as recorded:
        metrics = evaluate()
    blocks = _joined(gather_object([recorded()]))
    if not blocks:  # the model has mixtures and does not call them
        return metrics, []
    numbers = {
        "router_entropy": float(np.mean([block.entropy() for block in blocks])),
        "router_dead": float(sum(len(block.dead()) for block in blocks)),
        "router_constant": float(sum(not block.depends_on_input for block in blocks)),
    }
    return {**metrics, **numbers}, collapse(blocks)


def sigmas(model: nn.Module) -> dict[str, float]:
    """Return sigma of every GMConv layer by the layer's name, in taps; empty for a model without masks.

    For a dynamic layer it is the geometric mean of the two sigmas without any excitation by the image.
    """
    if not any(isinstance(module, (GMConv2d, DynamicGMConv2d)) for module in model.modules()):
        return {}
    return {layer.name: float(np.sqrt(np.prod(layer.sigma))) for layer in masks(model).layers}


def still_sigmas(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Schedule | None, steps: int) -> str:
    """Return a remark if the optimizer cannot move the sigmas of masks by a tap in the whole run; else "".

    Adam and its kin move a parameter by at most about the learning rate at a step, whatever the gradient is.

    Args:
        model: with or without static GMConv layers.
        optimizer: of its parameters; one without ``betas`` has steps in proportion to the gradient: no remark.
        schedule: of the learning rate, which is left at its start; None: constant.
        steps: of the run.
    """
    layers = [module for module in model.modules() if isinstance(module, GMConv2d) and module.sigma.requires_grad]
    owned = {id(layer.sigma) for layer in layers}
    groups = [group for group in optimizer.param_groups if owned & {id(one) for one in group["params"]}]
    if not groups or "betas" not in groups[0]:
        return ""
    rates = []
    for step in np.linspace(0, max(steps - 1, 0), _SAMPLED).astype(int):
        if schedule is not None:
            schedule.step_update(int(step))
        rates.append(min(group["lr"] for group in groups))
    if schedule is not None:
        schedule.step_update(0)
    reach = steps * float(np.mean(rates))
    if reach >= 1:
        return ""
    scale = max(group.get("lr_scale", 1.0) for group in groups) * _WANTED / max(reach, 1e-6)
    return (
        f"sigma of the masks can move by about {reach:.1g} taps in this run, since Adam moves a parameter by at most "
        f"about its learning rate at a step. Give sigmas their own: --optimizer.groups \"[{{where: '*sigma*', "
        f'lr_scale: {float(f"{scale:.1g}"):g}, weight_decay: 0}}]"'
    )


def brief(warnings: Sequence[str]) -> str:
    """Return the first three sentences in one line, and the number of others."""
    rest = len(warnings) - 3
    return "; ".join(warnings[:3]) + (f"; and {rest} more like this" if rest > 0 else "")


def _joined(parts: list[list[Routing]]) -> list[Routing]:
    """Join the records of all processes by mixture."""
    found: dict[str, list[Routing]] = {}
    for block in (block for part in parts for block in part):
        found.setdefault(block.name, []).append(block)
    return [replace(same[0], weights=np.concatenate([b.weights for b in same])) for same in found.values()]
