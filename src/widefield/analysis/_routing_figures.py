"""Draw figures of routing statistics: bars of choices, heat maps, and preferred field sizes."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from widefield import report
from widefield.analysis._routing import block_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from widefield.analysis._routing import RoutedImages, Routing

_A_ROW = 6
"""Panels in one row of a page."""
_CLASSES = 20
"""Largest number of classes in a figure."""
_ACROSS = 3
"""Largest number of models side by side."""
_NAMED = 7
"""Least percentage that is written on a bar."""
_CELL = 0.3
"""Width of a cell in which a word fits, in inches."""
_LETTER = 0.065
"""Width of a letter of a tick label, in inches."""


def _choices(results: Mapping[str, RoutedImages]) -> Figure:
    experts = _experts(block for result in results.values() for block in result.blocks)
    colors = dict(zip(experts, report.expert_colors(len(experts)), strict=True))
    figure, axes, _ = _panels(results, 0.15)
    handles: dict[str, Any] = {}
    for axis, result in zip(axes, results.values(), strict=True):
        for row, block in enumerate(result.blocks):
            start = 0.0
            for name, share in zip(block.experts, 100 * block.frequencies(), strict=True):
                (bar,) = axis.barh(row, share, 0.8, left=start, color=colors[name], edgecolor="white", linewidth=0.5)
                handles.setdefault(name, bar)
                if share >= _NAMED:
                    color = report.readable(colors[name])
                    axis.text(
                        start + share / 2, row, f"{share:.0f}", ha="center", va="center", fontsize=6, color=color,
                        gid=report.FIXED,
                    )  # fmt: skip
                start += share
        axis.set_xlim(0, 100)
        axis.set_ylim(len(result.blocks) - 0.5, -0.5)
        axis.set_xlabel("share of the choices (%)")
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(
        [handles[name] for name in experts], experts, loc="outside lower center", ncols=min(len(experts), 6),
        title="expert", title_fontsize=7,
    )  # fmt: skip
    return figure


def _heat(results: Mapping[str, RoutedImages]) -> Figure:
    figure, axes, room = _panels(results, 0.17)
    size = 6 if room / max(len(_experts(result.blocks)) for result in results.values()) > _CELL else 4.5
    limit = max(block.shares().max() for result in results.values() for block in result.blocks)
    for axis, result in zip(axes, results.values(), strict=True):
        experts = _experts(result.blocks)
        values = np.full((len(result.blocks), len(experts)), np.nan)
        for row, block in enumerate(result.blocks):
            values[row, [experts.index(name) for name in block.experts]] = block.shares()
        shown = axis.imshow(100 * values, aspect="auto", cmap="viridis", vmin=0, vmax=100 * limit)
        axis.tick_params(length=0)
        for (row, column), value in np.ndenumerate(values):
            if not np.isnan(value):
                dead = experts[column] in result.blocks[row].dead()
                color = report.readable(shown.cmap(shown.norm(100 * value)))
                text = "dead" if dead else f"{100 * value:.0f}"
                axis.text(column, row, text, ha="center", va="center", fontsize=size, color=color)
        axis.set_xticks(range(len(experts)), experts, rotation=_turned(experts, room))
        axis.set_xlabel("expert")
    figure.colorbar(shown, ax=axes, label="mean share of the routing weight, %", pad=0.02, aspect=30)
    return figure


def _classes(results: Mapping[str, RoutedImages]) -> Figure:
    for name, result in results.items():
        if (result.labels < 0).all():
            raise ValueError(f'kind="classes" needs images with labels, and those of {name!r} have none.')
    tables = [_by_class(result) for result in results.values()]
    figure, grids = _grids(results, 0.25 + 0.13 * max(len(classes) for classes, _ in tables), 0.3)
    limit = 100 * max(float(np.abs(values).max()) for _, blocks in tables for values in blocks) or 1.0
    for result, axes, (classes, blocks) in zip(results.values(), grids, tables, strict=True):
        below = (len(axes) - 1) // _A_ROW * _A_ROW
        for i, (axis, block, values) in enumerate(zip(axes, result.blocks, blocks, strict=True)):
            shown = axis.imshow(100 * values, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit)
            axis.tick_params(length=0)
            names = [_head(name, 16) if i % _A_ROW == 0 else "" for name in classes]
            axis.set_yticks(range(len(classes)), names, fontsize=6)
            experts = [name if i >= below else "" for name in block.experts]
            axis.set_xticks(range(len(experts)), experts, fontsize=6, rotation=90)
        part = axes[0].figure
        part.supylabel("class", fontsize=8)
        bar = part.colorbar(shown, ax=axes, pad=0.01, aspect=30)
        bar.set_label("difference in share (% points)", fontsize=7)
    return figure


def _fields(results: Mapping[str, RoutedImages]) -> Figure:
    figure, axes, _ = _panels(results, 0.17)
    fields = [[block.fields() for block in result.blocks] for result in results.values()]
    even = [[float(np.mean(block.sizes)) for block in result.blocks] for result in results.values()]
    every = np.concatenate([*even, *(values for blocks in fields for values in blocks)])
    low, high = float(every.min()), float(every.max())
    named = len(results) <= 2
    room = (high - low or 1) * (0.1 if not named else 0.25 * len(results))
    for axis, result, blocks, middle in zip(axes, results.values(), fields, even, strict=True):
        for row, (block, values) in enumerate(zip(result.blocks, blocks, strict=True)):
            quarters = np.quantile(values, (0.25, 0.5, 0.75))
            lines = [
                axis.plot([values.min(), values.max()], [row, row], color="0.55", linewidth=0.8)[0],
                axis.plot(quarters[[0, 2]], [row, row], color=report.COLORS[0], linewidth=3, solid_capstyle="butt")[0],
                axis.plot(quarters[1], row, "o", color="white", markeredgecolor="black", markersize=3)[0],
                axis.plot(middle[row], row, "|", color=report.COLORS[5], markersize=7)[0],
            ]
            if named and values.min() < values.max():
                for images, side, gap in zip(block.extremes(1), ("right", "left"), (-4, 4), strict=True):
                    axis.annotate(
                        _tail(PurePath(result.names[images[0]]).stem, 16),
                        (values[images[0]], row),
                        xytext=(gap, 0),
                        textcoords="offset points",
                        ha=side,
                        va="center",
                        fontsize=5.5,
                        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.1},
                    )
        axis.set_xlim(low - room, high + room)
        axis.set_ylim(len(result.blocks) - 0.5, -0.5)
        axis.set_xlabel("preferred field (px)")
        axis.grid(axis="x", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    words = ["all images", "middle half", "median", "even weights"]
    figure.legend(lines, words, loc="outside lower center", ncols=4)
    return figure


DRAWN: Mapping[str, Callable[[Mapping[str, RoutedImages]], Figure]] = {
    "choices": _choices,
    "heat": _heat,
    "classes": _classes,
    "fields": _fields,
}
CAPTIONS = {
    "choices": "How often each expert is chosen in each block. Hard routing: its share of all choices. Soft routing: "
    "the share of images that give it the largest weight. A bar of one color means that the block treats all images "
    "alike, and could do with one kernel.",
    "heat": "How much of the routing weight each expert gets, averaged over images; negative weights count by their "
    "size. A row with one bright cell hardly mixes. A dead expert gets less than a hundredth of an even share: without "
    "it, next to nothing would change. A constant block gives all images the same weights.",
    "classes": "Whether the kind of image decides: difference of these shares between each class and the mean over "
    f"classes; of more than {_CLASSES} classes, those that differ most. A pale panel means that the block's router "
    "does not tell classes apart.",
    "fields": "Which field size images prefer, in pixels of the block's input: the experts' sizes averaged with the "
    "image's routing weights. The images with the smallest and the largest are named. A wide line means that the block "
    "sees some images with larger fields than others; a point, that it does not.",
}


def _grids(results: Mapping[str, RoutedImages], height: float, extra: float) -> tuple[Figure, list[list[Any]]]:
    """Return a figure with one group of panels below another for the results, and each group's axes, one per block."""
    columns = min(max(len(result.blocks) for result in results.values()), _A_ROW)
    rows = [-(-len(result.blocks) // columns) for result in results.values()]
    width = report.COLUMN if columns <= 3 else report.PAGE
    figure = report.blank(width, extra + sum(height * n + 0.45 for n in rows))
    grids = []
    parts = figure.subfigures(len(rows), 1, squeeze=False, height_ratios=[height * n + 0.45 for n in rows])[:, 0]
    for part, n, (name, result) in zip(parts, rows, results.items(), strict=True):
        labels = block_names(result.blocks)
        part.suptitle(_wrapped(name, width), fontsize=8)
        axes = part.subplots(n, columns, squeeze=False).ravel()
        for axis in axes[len(labels) :]:
            axis.remove()
        for axis, label in zip(axes, labels, strict=False):
            axis.set_title(_tail(label, int(width / columns / _LETTER) + 2), fontsize=7, pad=3)
        grids.append(list(axes[: len(labels)]))
    return figure, grids


def _panels(results: Mapping[str, RoutedImages], height: float) -> tuple[Figure, list[Any], float]:
    """Return a figure with one panel per result, blocks from top to bottom; its axes; the panels' width in inches.

    ``height`` is that of a block, in inches.
    """
    columns = min(len(results), _ACROSS)
    rows = -(-len(results) // columns)
    width = 0.7 * report.PAGE if columns == 1 else report.PAGE
    blocks = max(len(result.blocks) for result in results.values())
    figure = report.blank(width, 0.5 + rows * (0.6 + height * max(blocks, 6)))
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in grid[len(results) :]:
        axis.remove()
    shown: list[list[str]] = []
    for place, (axis, (name, result)) in enumerate(zip(grid, results.items(), strict=False)):
        constant = ["" if block.depends_on_input else " (constant)" for block in result.blocks]
        labels = [a + b for a, b in zip(block_names(result.blocks), constant, strict=True)]
        alike = place % columns and labels == shown[-1]
        axis.set_yticks(range(len(labels)), [""] * len(labels) if alike else labels)
        axis.set_title(_wrapped(name, width / columns - 0.8))
        shown.append(labels)
    longest = max(len(label) for labels in shown for label in labels)
    return figure, list(grid[: len(results)]), width / columns - _LETTER * longest


def _turned(names: Sequence[str], room: float) -> int:
    """Return the angle at which names fit below a panel of this width in inches."""
    return 90 if (max(map(len, names)) + 1) * _LETTER * len(names) > room else 0


def _experts(blocks: Iterable[Routing]) -> list[str]:
    """Return the distinct experts of several mixtures, ordered by field size."""
    found = {name: size for block in blocks for name, size in zip(block.experts, block.sizes, strict=True)}
    return sorted(found, key=lambda name: (found[name], name))


def _by_class(result: RoutedImages) -> tuple[list[str], list[np.ndarray]]:
    """Return classes and, for each block, the difference of their mean shares from the mean over classes, (classes, n).

    If there are many classes, those that differ most.
    """
    parts = result.by_class()
    tables = [np.stack([part.blocks[i].shares() for part in parts.values()]) for i in range(len(result.blocks))]
    apart = [table - table.mean(0) for table in tables]
    far = np.sum([np.abs(table).sum(1) for table in apart], 0)
    kept = np.sort((-far).argsort(kind="stable")[:_CLASSES])
    return [list(parts)[k] for k in kept], [table[kept] for table in apart]


def _wrapped(text: str, width: float) -> str:
    """Break a title into lines that fit ``width`` inches."""
    return textwrap.fill(text, max(12, int(15 * width)))


def _head(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _tail(text: str, length: int) -> str:
    return text if len(text) <= length else f"…{text[1 - length :]}"
