"""Average maps of kernels and masks over the layers of a stage, and draw them on one scale of pixels and colors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from widefield import report
from widefield._checks import Pair
from widefield.ops import fold

COLUMNS = 8
"""Largest number of maps side by side."""


def span(size: Pair, dilation: Pair) -> Pair:
    """Return how many pixels a kernel covers, (rows, columns)."""
    return fold.effective_size(size[0], dilation[0]), fold.effective_size(size[1], dilation[1])


def average(maps: Sequence[np.ndarray], dilations: Sequence[Pair], side: int) -> np.ndarray:
    """Return the mean of maps of taps, each spread by its dilation and centered: (2 * side, 2 * side), float64.

    The grid has half pixels, as the center of an even kernel lies between two pixels. The mean at a point is taken over
    the maps with a tap there; NaN if none has one.

    Args:
        maps: arrays (rows, columns) of any shapes.
        dilations: of each.
        side: in pixels, at least the largest span.
    """
    total, count = np.zeros((2 * side, 2 * side)), np.zeros((2 * side, 2 * side))
    for taps, dilation in zip(maps, dilations, strict=True):
        places = []
        for size, step in zip(taps.shape, dilation, strict=True):
            first = side - fold.effective_size(size, step) + 2 * step * np.arange(size)
            places.append(np.stack((first, first + 1), 1).ravel())
        total[np.ix_(*places)] += taps.repeat(2, 0).repeat(2, 1)
        count[np.ix_(*places)] += 1
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def tiles(layers: Sequence[tuple[int, np.ndarray, Pair]], side: int) -> list[tuple[str, np.ndarray]]:
    """Return (title, :func:`average`) of each stage, given (stage, map, dilation) of each layer."""
    found = []
    for stage in sorted({stage for stage, _, _ in layers}):
        here = [(taps, dilation) for number, taps, dilation in layers if number == stage]
        title = f"stage {stage + 1}: {len(here)} layer" + "s" * (len(here) > 1)
        found.append((title, average([taps for taps, _ in here], [dilation for _, dilation in here], side)))
    return found


def height(models: Mapping[str, Sequence[Any]]) -> float:
    """Return the height in inches that :func:`draw` needs."""
    return 0.3 + sum(_heights(models))


def _heights(models: Mapping[str, Sequence[Any]]) -> list[float]:
    columns = min(max(map(len, models.values())), COLUMNS)
    tall = (0.3 if columns < 6 else 0.45) + min(1.3, 6 / columns)
    return [0.3 * (len(models) > 1) + tall * -(-len(maps) // COLUMNS) for maps in models.values()]


def draw(canvas: Any, models: Mapping[str, Sequence[tuple[str, np.ndarray]]], side: int, label: str) -> None:
    """Draw the maps of each model in its own row, on one color scale (0 to 1) and one scale of pixels.

    Positions without any tap are gray.

    Args:
        canvas: a figure or subfigure.
        models: name -> (title, map as returned by :func:`average`) of each stage.
        side: of all maps, in pixels.
        label: of the color scale.
    """
    columns = min(max(map(len, models.values())), COLUMNS)
    canvas.figure.get_layout_engine().set(h_pad=0.06)  # or titles touch names
    parts = canvas.subfigures(len(models), 1, height_ratios=_heights(models), squeeze=False)[:, 0]
    extent = (-side / 2, side / 2, side / 2, -side / 2)
    for (name, maps), part in zip(models.items(), parts, strict=True):
        if len(models) > 1:
            part.suptitle(short(name, 90), x=0.01, ha="left", fontsize=8)
        grid = part.subplots(-(-len(maps) // COLUMNS), columns, squeeze=False, sharex=True, sharey=True)
        for axis, (title, values) in zip(grid.ravel(), maps, strict=False):
            shown = axis.imshow(values, cmap="viridis", vmin=0, vmax=1, extent=extent, interpolation="nearest")
            axis.set_facecolor("0.88")
            axis.set_title(title if columns < 6 else title.replace(": ", "\n"), fontsize=7, pad=3)
            axis.locator_params(nbins=3, integer=True)
        for axis in grid.ravel()[len(maps) :]:
            axis.set_axis_off()
        grid[-1, 0].set_xlabel("pixels")
        grid[-1, 0].set_ylabel("pixels")
        bar = part.colorbar(shown, ax=list(grid.ravel()), shrink=0.85, pad=0.01, aspect=14)
        bar.set_label(label, fontsize=7)


def short(name: str, length: int = 34) -> str:
    """Shorten a name for a legend by leaving out its middle."""
    return name if len(name) <= length else f"{name[: length - 9]}…{name[-8:]}"


def stage_colors(count: int) -> list[Any]:
    """Return one color per stage, light to dark from the image on."""
    return report.expert_colors(count) if count > 1 else [report.COLORS[0]]
