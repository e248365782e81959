"""Compute theoretical receptive fields of any model: the pixels that a unit can depend on."""

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
from widefield.report import Report
from widefield.surgery.anatomy import anatomy, is_inside

Position = str | Sequence[int]
"""A unit of a map: "center" (row h // 2, column w // 2), or (row, column) from 0."""


@dataclass(frozen=True)
class Field(Report):
    """The theoretical receptive field of one unit, in pixels, as (rows, columns).

    Padding counts as image, so a field may be larger than the image.

    Attributes:
        size: its sides; None if it is the whole image or unknown, in which case ``reason`` says why.
        jump: pixels between the fields of neighboring units.
        center: of the field, relative to the center of the first pixel; may end in .5.
        reason: the first operator that reaches, or may reach, every position, and its layer.
        local: the sides the field would have if such operators returned constants, which is nearly true for the gates
            of squeeze-excite and the routing weights of a mixture; None if no grid is left.
        computed: False if the operators were not followed, so that the extent is unknown.
    """

    size: tuple[int, int] | None
    jump: tuple[float, float]
    center: tuple[float, float]
    reason: str | None
    local: tuple[int, int] | None
    computed: bool = True

    def summary(self) -> str:
        """Return the size, or why there is none."""
        if self.size is not None:
            return f"Theoretical receptive field: {_sides(self.size)} pixels"
        what = "the whole image" if self.computed else "unknown"
        return f"Theoretical receptive field: {what}, because of {self.reason}"

    def rows(self) -> list[dict[str, str]]:
        """Return one row: size, step to the next unit's field, center, and the size without global operators."""
        return [
            {
                "size, px": "-" if self.size is None else _sides(self.size),
                "step, px": _sides(self.jump),
                "center, px": ", ".join(f"{place:g}" for place in self.center),
                "size without global operators, px": "-" if self.local is None else _sides(self.local),
            }
        ]

    def clipped(self, image: Sequence[int]) -> tuple[int, int]:
        """Return how many (rows, columns) of an image (H, W) the field covers; the whole image if size is None."""
        if self.size is None:
            return int(image[0]), int(image[1])
        rows, columns = (
            max(0, min(int(center + (side - 1) / 2), int(end) - 1) - max(int(center - (side - 1) / 2), 0) + 1)
            for center, side, end in zip(self.center, self.size, image, strict=True)
        )
        return rows, columns


def _sides(sides: Sequence[float]) -> str:
    return "x".join(f"{side:g}" for side in sides)


@_checks.guided
def theoretical_receptive_field(
    model: nn.Module,
    images: Tensor | int | Sequence[int],
    *,
    layer: Layer | None = None,
    position: Position = "center",
) -> Field:
    """Return which pixels a unit of a layer's map can depend on, whatever the weights.

    One image runs through the model in evaluation mode, without gradients. The function follows operators, not modules,
    so any code made of PyTorch's and widefield's operators works. It understands convolutions, pooling, padding,
    slices, layout changes, products with weights and elementwise operators. Other operators are assumed to read the
    whole image and are named in ``reason``: attention (windowed attention too), interpolation, deformable sampling.

    Args:
        model: any model.
        images: (N, C, H, W) or clips (N, C, T, H, W), of which the first is used; or a size, 224 or (rows, columns),
            for a black image with the channels of the model's first convolution (3 without one).
        layer: a module or its name. Default: the last layer of the backbone that returns a map.
        position: "center", which is (h // 2, w // 2), or (row, column) on the map.

    Raises:
        ValueError: the layer does not exist, returns no map, or does not depend on the image; the position lies outside
            the map; there is no image; the model rejects the size.
        TypeError: images or layer have the wrong type.
    """
    if not isinstance(images, Tensor):
        images = made_up(model, images, 1, noise=False)
    one = next(chunks(images.detach(), model, 1, clips=True)).clone()  # models may modify their input
    name = candidates(model, one)[-1] if layer is None else layer_name(model, layer)
    tracer = Tracer(one)
    with visited(model), torch.no_grad(), tracer.inside(model), tracer:
        found = feature_map(model, name, one)
    row, column = unit(position, found, name)
    trace = tracer.of(found)
    if trace is None:
        raise ValueError(f"layer {name!r} of {type(model).__name__} does not depend on the image.")
    grid = trace.grid
    if grid is None:
        return unknown(one, found.shape[2:], (row, column), trace.reason or trace.moved or "its operators are unknown")
    local = grid.y.size, grid.x.size
    center = grid.y.center(row), grid.x.center(column)
    return Field(None if trace.reason else local, (grid.y.jump, grid.x.jump), center, trace.reason, local)


def candidates(model: nn.Module, images: Tensor) -> list[str]:
    """Return the names of the layers that return maps, the last one at the end; raises ValueError if there are none."""
    names = last_maps(model, images)
    if not names:
        raise _without_maps(model, images)
    return names


def _without_maps(model: nn.Module, images: Tensor) -> ValueError:
    return ValueError(
        f"no layer of {type(model).__name__} returns a map of more than one position for images of "
        f"{tuple(images.shape[1:])}: give larger images."
    )


def last_feature_maps(model: nn.Module, images: Tensor, count: int) -> dict[str, Tensor]:
    """Run a model once and return the maps (N, C, h, w) of the last :func:`candidates` by name, the last one first.

    Args:
        model: any model. Gradients flow through the maps.
        images: (N, C, H, W), or clips.
        count: number of maps to keep at most.

    Raises:
        ValueError: no layer returns a map.
    """
    size, hint, backbone = images.shape[2:], map_hint(model), anatomy(model).backbone
    inside: dict[str, Tensor] = {}
    anywhere: dict[str, Tensor] = {}

    def see(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found = inner_map(output, size, **hint)
        if found is None:
            return
        for kept in (anywhere, inside) if is_inside(name, backbone) else (anywhere,):
            kept.pop(name, None)  # the last call counts
            kept[name] = found[1]
            if len(kept) > count:
                del kept[next(iter(kept))]

    with running(model, images), watched(dict(model.named_modules()), see):
        getattr(model, "forward_features", model)(images)
    if not anywhere:
        raise _without_maps(model, images)
    return dict(reversed((inside or anywhere).items()))


def feature_map(model: nn.Module, layer: str, images: Tensor) -> Tensor:
    """Run a model and return a layer's map (N, C, h, w); that of the last call if the layer runs several times.

    Raises ValueError if the layer returns no map.
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
            maps.append(output)  # a layer that was named may change proportions

    with running(model, images), watched({layer: submodule(model, layer)}, see):
        # Heads may reject sizes that features accept, so the head runs only if the layer is in it.
        for run in (getattr(model, "forward_features", None), model):
            if run is not None and not seen:
                run(images)
    if not seen:
        raise never_called(model, layer)
    if not maps:
        raise ValueError(
            f"layer {layer!r} of {type(model).__name__} returns no map of images of {tuple(images.shape[1:])}: it "
            f"returns {no_map(seen[-1])}."
        )
    return maps[-1]


def unknown(images: Tensor, places: Sequence[int], unit: tuple[int, int], reason: str) -> Field:
    """Return the field of a unit whose extent is unknown, centered on the unit's share of the image."""
    y, x = images.shape[-2] / places[0], images.shape[-1] / places[1]
    return Field(None, (y, x), ((unit[0] + 0.5) * y - 0.5, (unit[1] + 0.5) * x - 0.5), reason, None, False)


def unit(position: Position, found: Tensor, layer: str) -> tuple[int, int]:
    """Return the (row, column) of a position on a map; raises ValueError or TypeError."""
    h, w = found.shape[2:]
    if isinstance(position, str):
        _checks.choice("position", position, ("center",))
        return h // 2, w // 2
    row, column = _checks.pair("position", position, minimum=0)
    if row >= h or column >= w:
        raise ValueError(f"position {(row, column)} lies outside the map of layer {layer!r}, which is {h}x{w}.")
    return row, column
