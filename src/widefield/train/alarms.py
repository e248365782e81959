"""Diagnose a run beyond its metrics: collapsed routers of mixtures, and the reach of masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from accelerate.utils import gather_object
from torch import nn

from widefield.analysis.masks import masks
from widefield.analysis.routing import Routing, collapse, mixtures, recording
from widefield.nn import DynamicGMConv2d, GMConv2d


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


def brief(warnings: Sequence[str], most: int = 3) -> str:
    """Return the first few sentences in one line, and the number of others."""
    rest = len(warnings) - most
    return "; ".join(warnings[:most]) + (f"; and {rest} more like this" if rest > 0 else "")


def _joined(parts: list[list[Routing]]) -> list[Routing]:
    """Join the records of all processes by mixture."""
    found: dict[str, list[Routing]] = {}
    for block in (block for part in parts for block in part):
        found.setdefault(block.name, []).append(block)
    return [replace(same[0], weights=np.concatenate([b.weights for b in same])) for same in found.values()]
