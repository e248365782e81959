"""Search the crops of a model's kernels for the cheapest ones that keep its outputs within a budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from widefield.surgery.compare import Difference, Reference
from widefield.surgery.inputs import batches, place
from widefield.surgery.quick import slow_layers
from widefield.surgery.trim_kernels import Layer, Sizes, crop_kernels
from widefield.surgery.walk import copied, replace

ROUNDING = 1e-4
"""Relative difference of float32 outputs that a different order of summation may cause."""

_PROBED = 32
"""Largest number of images for measuring single layers, which only sets the order; the budget uses all images."""

_ROUNDS = 4
"""How often the search continues without the layer at which it stopped."""


@dataclass(frozen=True)
class _Step:
    """One further crop of one layer."""

    layer: int
    index: int
    """Index in the layer's windows."""
    gain: float
    """Multiply-accumulates saved per unit of squared change."""


class Search:
    """Search for large crops that change the outputs by at most the budget; every candidate is measured."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer], loader: Iterable[Any], budget: float) -> None:
        model = copied(model, share=True)
        self._model = replace(model, slow_layers(model))
        self._layers, self._loader, self._budget = layers, loader, budget
        self._reference = Reference(self._model, loader)
        self._measured: dict[tuple[Sizes, ...], Difference] = {}

    def change(self, sizes: Mapping[str, Sizes]) -> Difference:
        """Return how much these crops change the outputs, on all of the data."""
        key = tuple(sizes.values())
        if key not in self._measured:
            self._measured[key] = self._reference.compare(crop_kernels(self._model, sizes, share=True))
        return self._measured[key]

    def run(self, chosen: list[int]) -> dict[str, Sizes]:
        """Return the kernel sizes found.

        Args:
            chosen: index of the window that each layer starts from.

        Raises:
            RuntimeError: crops that should lose nothing already break the budget.
        """
        lossless = chosen == [len(layer.windows.sizes) - 1 for layer in self._layers]
        rms = self.change(self._sizes(chosen)).rms
        if lossless and not rms <= self._budget + _rounding(self._model):
            raise RuntimeError(
                f"removing taps that are zero or never meet the map changes the outputs by {rms:.2g} (relative RMS), "
                f"more than tolerance={self._budget:g}. Either the maps on these images differ in size from those on "
                "the first ones, or the model is not deterministic."
            )
        if not self._budget or rms > self._budget:
            return self._sizes(chosen)
        pending = self._steps(chosen)
        for _ in range(_ROUNDS):
            low, high = 0, len(pending) + 1  # the first `low` steps fit
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if self._fits(_taken(chosen, pending[:middle])) else (low, middle)
            chosen = _taken(chosen, pending[:low])
            if low == len(pending):
                break
            pending = [step for step in pending[low + 1 :] if step.layer != pending[low].layer]
        return self._sizes(chosen)

    def _sizes(self, chosen: Sequence[int]) -> dict[str, Sizes]:
        return {layer.name: layer.inside(index) for layer, index in zip(self._layers, chosen, strict=True)}

    def _fits(self, chosen: Sequence[int]) -> bool:
        return self.change(self._sizes(chosen)).rms <= self._budget

    def _steps(self, start: Sequence[int]) -> list[_Step]:
        """Return the useful crops, those that save the most per squared change first.

        The change is measured for each layer alone on a few images, down to the crop that breaks the budget by itself.
        Squared changes of several layers are assumed to add up, as those of uncorrelated errors do.
        """
        images = next(batches(self._loader, self._model))[0]
        whole = Reference(crop_kernels(self._model, self._sizes(start), share=True), [images[:_PROBED]])
        steps: list[_Step] = []
        for which, (layer, first) in enumerate(zip(self._layers, start, strict=True)):
            work = [layer.macs * rows * columns for rows, columns in layer.windows.sizes]
            moved = {first: 0.0}
            for index in range(first - 1, -1, -1):
                sizes = self._sizes(_taken(start, [_Step(which, index, 0.0)]))
                change = whole.compare(crop_kernels(self._model, sizes, share=True))
                if change.rms > self._budget:
                    break
                moved[index] = change.rms**2
            index = first
            while index > min(moved):  # along the lower convex hull of work over squared change
                gains = {
                    k: (work[index] - work[k]) / max(moved[k] - moved[index], 1e-300) for k in range(min(moved), index)
                }
                index = max(gains, key=lambda k: (gains[k], -k))
                steps.append(_Step(which, index, gains[index]))
        return sorted(steps, key=lambda step: -step.gain)


def _taken(chosen: Sequence[int], steps: Sequence[_Step]) -> list[int]:
    taken = list(chosen)
    for step in steps:
        taken[step.layer] = step.index
    return taken


def _rounding(model: nn.Module) -> float:
    """Return the relative RMS difference that a different order of summation may cause in this model's dtype."""
    return max(ROUNDING, 4 * torch.finfo(place(model)[1]).eps)
