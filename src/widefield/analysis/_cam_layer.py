"""Find the default layer of Grad-CAM."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from widefield.analysis._maps import as_map, inner_map, map_hint
from widefield.analysis._model import last_maps, visited, watched
from widefield.analysis._scores import class_scores
from widefield.surgery.anatomy import anatomy

_PASSING = ("identity", "drop", "pool", "permute")


def target_layer(model: nn.Module, images: Tensor) -> str:
    """Return the name of the layer that Grad-CAM uses by default: the last map that affects the class's score.

    In a ViT that reads its class token, the other tokens of the last block have no gradient; the norm before its
    attention is the last place where they do. Among layers that return a map and have a gradient, the last one is
    chosen that is a block (a module with children), a norm, or outside of any block. Layers inside attention, and
    layers that only pass a map on, such as dropout or pooling, are skipped; if nothing else is left, the last layer of
    any kind is chosen. In a model with necks and heads, only the backbone is searched
    (:func:`widefield.surgery.anatomy.anatomy`).

    Args:
        model: as in :func:`class_activation`; left unchanged.
        images: (N, C, H, W), on the model's device; one is enough.

    Raises:
        ValueError: outputs of another form, or no layer returns a map with a gradient.
    """
    known = dict(model.named_modules())
    candidates = {name: known[name] for name in dict.fromkeys(reversed(last_maps(model, images))) if name}
    with visited(model):
        heard = _heard(model, candidates, images) or _heard(model, candidates, images, _started(model))
    if not heard and anatomy(model).backbone:  # a detector that detects nothing has no gradient
        heard = list(candidates)
    if not heard:
        raise ValueError(
            f"{type(model).__name__} has no layer that returns a map of {tuple(images.shape[2:])} pixels and affects "
            "its scores: pass layer."
        )
    return next((name for name in heard if _presentable(name, known, candidates)), heard[0])


def _heard(
    model: nn.Module, layers: Mapping[str, nn.Module], images: Tensor, weights: Mapping[str, Tensor] | None = None
) -> list[str]:
    """Return the names of the layers whose maps have a gradient, at some position, from the largest score."""
    outputs: dict[str, Tensor] = {}
    size, hint = images.shape[2:], map_hint(model)

    def see(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found = inner_map(output, size, **hint)
        if found is not None:
            outputs[name] = found[0]

    with torch.inference_mode(False), torch.enable_grad(), watched(layers, see):
        scores = class_scores(model, images.clone().detach().requires_grad_(), weights)
        best = scores.values.gather(1, scores.predicted.clamp(min=0)[:, None]).sum()
        known = {name: outputs[name] for name in layers if name in outputs and outputs[name].requires_grad}
        if not known or not best.requires_grad:
            return []
        found = torch.autograd.grad(best, list(known.values()), allow_unused=True)
    maps = [None if gradient is None else as_map(gradient, size, **hint) for gradient in found]
    return [name for name, gradient in zip(known, maps, strict=True) if gradient is not None and gradient.any()]


def _started(model: nn.Module) -> dict[str, Tensor]:
    """Return random values for weights that are all 0, as in the heads of timm's untrained mixers."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(weight.shape, generator=generator).to(weight)
        for name, weight in model.named_parameters()
        if weight.ndim > 1 and not weight.any()
    }


def _presentable(name: str, known: Mapping[str, nn.Module], maps: Container[str]) -> bool:
    """Return whether a layer is a block, a norm, or outside of blocks; not inside attention, and not a pass-through."""
    words = name.split(".")
    around = [".".join(words[:depth]) for depth in range(1, len(words))]
    if any(o.endswith(("attn", "attention")) or type(known[o]).__name__.endswith("Attention") for o in around):
        return False
    kind = type(known[name]).__name__.lower()
    if any(known[name].children()) or "norm" in kind:
        return True
    return not any(outer in maps for outer in around) and not any(word in kind for word in _PASSING)
