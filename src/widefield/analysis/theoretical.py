"""How far a unit can see: theoretical receptive fields of any model, by arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from widefield import _checks
from widefield.analysis._maps import inner_map, map_hint, no_map
from widefield.analysis._model import (
    Layer,
    chunks,
    last_maps,
    layer_name,
    made_up,
    never_called,
    running,
    submodule,
    visited,
    watched,
)
from widefield.analysis._places import Tracer

Target = str | Sequence[int]
"""A unit of a map: "center" (row h // 2, column w // 2), or (row, column) from 0."""


@dataclass(frozen=True)
class Field:
    """The theoretical receptive field of one unit, in pixels, (rows, columns).

    Padding is counted as if the image went on beyond its border: a field may be larger than the image.

    Attributes:
        size: its sides; None where it is the whole image, or nobody can tell: then there is a reason.
        jump: pixels between the fields of neighbouring units.
        centre: of the field, counted from the centre of the first pixel; may end in .5.
        reason: the first operator that reaches, or may reach, every place, and the layer that it is in.
        local: the sides that the field would have if such operators gave constants, as the gates of squeeze-excite and
            the routing weights of a mixture nearly do; None where no grid is left.
    """

    size: tuple[int, int] | None
    jump: tuple[float, float]
    centre: tuple[float, float]
    reason: str | None
    local: tuple[int, int] | None

    def clipped(self, image: Sequence[int]) -> tuple[int, int]:
        """Return how many (rows, columns) of an image (H, W) the field covers; all of them where size is None."""
        if self.size is None:
            return int(image[0]), int(image[1])
        rows, columns = (
            max(0, min(int(centre + (side - 1) / 2), int(end) - 1) - max(int(centre - (side - 1) / 2), 0) + 1)
            for centre, side, end in zip(self.centre, self.size, image, strict=True)
        )
        return rows, columns


def theoretical_receptive_field(
    model: nn.Module, images: Tensor | int | Sequence[int], layer: Layer | None = None, target: Target = "center"
) -> Field:
    """Return what a unit of a layer's map can see, whatever the weights.

    One image runs through the model, in evaluation mode and without gradients. Its operators are followed, not its
    modules: any code made of PyTorch's operators and of widefield's will do. Convolutions, pools, padding, slices,
    changes of layout, products with weights and what works place by place are understood. What else reads the image is
    taken to read all of it and named in ``reason``: attention (in windows, too), interpolation, deformable sampling.

    Args:
        model: any.
        images: (N, C, H, W), or clips (N, C, T, H, W), of which the first is taken; or the side or (rows, columns) of a
            black image, which has as many channels as the model's first convolution takes (3 without any).
        layer: a module, or its name; None: the last in the backbone that gives a map.
        target: "center", which is the unit (h // 2, w // 2) of the map, or (row, column).

    Raises:
        ValueError: an unknown layer, one that gives no map or none of the image, a target outside of it, no image, or
            a size that the model refuses.
        TypeError: images or a layer of another kind.
    """
    if not isinstance(images, Tensor):
        images = made_up(model, images, 1, noise=False)
    one = next(chunks(images.detach(), model, 1, clips=True)).clone()  # models may write on their input
    name = candidates(model, one)[-1] if layer is None else layer_name(model, layer)
    tracer = Tracer(one)
    with visited(model), torch.no_grad(), tracer.inside(model), tracer:
        found = feature_map(model, name, one)
    row, column = unit(target, found, name)
    trace = tracer.of(found)
    if trace is None:
        raise ValueError(f"layer {name!r} of {type(model).__name__} does not depend on the image.")
    grid = trace.grid
    if grid is None:
        return unknown(one, found.shape[2:], (row, column), trace.reason or trace.moved or "no operator is known")
    local = grid.y.size, grid.x.size
    centre = grid.y.centre(row), grid.x.centre(column)
    return Field(None if trace.reason else local, (grid.y.jump, grid.x.jump), centre, trace.reason, local)


def candidates(model: nn.Module, images: Tensor) -> list[str]:
    """Return the layers that give maps, the last at the end; raises ValueError where there are none."""
    names = last_maps(model, images)
    if not names:
        raise ValueError(
            f"no layer of {type(model).__name__} gives a map, of more than one place, of images of "
            f"{tuple(images.shape[1:])}: give larger ones."
        )
    return names


def feature_map(model: nn.Module, layer: str, images: Tensor) -> Tensor:
    """Run a model and return the map (N, C, h, w) that a layer gives, the last if it is called several times.

    Raises ValueError where it gives none.
    """
    size, hint = images.shape[2:], map_hint(model)
    maps: list[Tensor] = []
    seen: list[Any] = []

    def see(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append(output)
        found = inner_map(output, size, **hint)
        if found is not None:
            maps.append(found[1])
        elif isinstance(output, Tensor) and output.ndim == 4 and output.is_floating_point():
            maps.append(output)  # who asks for a layer by name may ask for one that does not keep proportions

    with running(model, images), watched({layer: submodule(model, layer)}, see):
        # Heads may refuse sizes that features take, so that only a layer of the head calls for the head.
        for run in (getattr(model, "forward_features", None), model):
            if run is not None and not seen:
                run(images)
    if not seen:
        raise never_called(model, layer)
    if not maps:
        raise ValueError(
            f"layer {layer!r} of {type(model).__name__} makes no map of images of {tuple(images.shape[1:])}: it gives "
            f"{no_map(seen[-1])}."
        )
    return maps[-1]


def unknown(images: Tensor, places: Sequence[int], unit: tuple[int, int], reason: str) -> Field:
    """Return the field of a unit of which nobody can tell what it sees: centred on its share of the image."""
    y, x = images.shape[-2] / places[0], images.shape[-1] / places[1]
    return Field(None, (y, x), ((unit[0] + 0.5) * y - 0.5, (unit[1] + 0.5) * x - 0.5), reason, None)


def unit(target: Target, found: Tensor, layer: str) -> tuple[int, int]:
    """Return (row, column) of a target in a map; raises ValueError or TypeError."""
    h, w = found.shape[2:]
    if isinstance(target, str):
        _checks.choice("target", target, ("center",))
        return h // 2, w // 2
    row, column = _checks.pair("target", target, minimum=0)
    if row >= h or column >= w:
        raise ValueError(f"target {(row, column)} lies outside of the map of layer {layer!r}, which is {h}x{w}.")
    return row, column
