"""Which expert each image got: MoRF (Lian, Yu, Wang 2024), section 4.3 and figure 3."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from widefield.nn import FusedMoRFConv2d, MoRFConv2d


@dataclass(frozen=True)
class Routing:
    """Routing weights of one mixture over a set of images."""

    name: str
    """Module name in the model."""
    experts: tuple[str, ...]
    """What to call each expert: "7x7", or "3x3 d2" with a dilation."""
    weights: Tensor
    """(N, n), float32, on the CPU; exactly 0 where hard routing did not choose the expert."""
    hard: bool

    def frequencies(self) -> Tensor:
        """Return how often each expert is preferred: (n,), summing to 1.

        Hard routing: the share of all choices that fell on it. Soft routing: the share of images for which its weight
        is the largest in absolute value.
        """
        if self.hard:
            chosen = (self.weights != 0).sum(0).float()
        else:
            chosen = torch.bincount(self.weights.abs().argmax(1), minlength=self.weights.shape[1]).float()
        return chosen / chosen.sum().clamp(min=1)

    def mean(self) -> Tensor:
        """Return the mean routing weight of each expert, (n,)."""
        return self.weights.mean(0)

    def to_dict(self) -> dict[str, Any]:
        """Return the summary, without the weights of every image."""
        return {
            "block": self.name,
            "experts": list(self.experts),
            "frequencies": self.frequencies().tolist(),
            "mean_weights": self.mean().tolist(),
            "std_weights": self.weights.std(0, correction=0).tolist(),
        }


def routing_weights(model: nn.Module, batches: Iterable[Tensor]) -> list[Routing]:
    """Run ``model`` over batches of images (N, C, H, W) and collect the routing weights of every mixture in it.

    Evaluation mode, no gradients; the model's mode is put back, and no hook is left behind. One entry per mixture, in
    the order of the modules, re-parameterised ones included.

    Raises:
        ValueError: the model has no mixture, or there are no images.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (MoRFConv2d, FusedMoRFConv2d))}
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no mixture of receptive fields: convert it with widefield.MoRF first."
        )
    collected: dict[str, list[Tensor]] = {name: [] for name in layers}
    modes = {module: module.training for module in model.modules()}
    handles = [
        layer.router.register_forward_hook(
            lambda module, args, output, into=collected[name]: into.append(output.detach().float().cpu())
        )
        for name, layer in layers.items()
    ]
    try:
        model.eval()
        with torch.no_grad():
            for images in batches:
                model(images)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    if not all(collected.values()):
        raise ValueError("there are no images to route: batches is empty, or the model does not call its mixtures.")
    return [
        Routing(name, _experts(layer), torch.cat(collected[name]), layer.router.routing == "hard")
        for name, layer in layers.items()
    ]


def _experts(layer: MoRFConv2d | FusedMoRFConv2d) -> tuple[str, ...]:
    pairs = zip(layer.kernel_sizes, layer.dilations, strict=True)
    return tuple(f"{size}x{size}" + (f" d{dilation}" if dilation > 1 else "") for size, dilation in pairs)
