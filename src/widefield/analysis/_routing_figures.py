"""Draw figures of routing statistics: pies, heat maps, and preferred field sizes."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from widefield import report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from widefield.analysis._routing import RoutedImages, Routing

_A_ROW = 6
"""Panels in one row of a page."""
_CLASSES = 20
"""Largest number of classes in a figure."""


def _pies(results: Mapping[str, RoutedImages]) -> Figure:
    experts = _experts(block for result in results.values() for block in result.blocks)
    colors = dict(zip(experts, report.expert_colors(len(experts)), strict=True))
    figure, grids = _grids(results, 1.2, 0.4)
    handles: dict[str, Any] = {}
    for result, axes in zip(results.values(), grids, strict=True):
        for axis, block in zip(axes, result.blocks, strict=True):
            wedges, _, texts = axis.pie(
                block.frequencies(),
                colors=[colors[name] for name in block.experts],
                startangle=90,
                counterclock=False,
                radius=1.25,
                autopct=lambda percent: f"{percent:.0f}" if percent >= 5 else "",
                pctdistance=0.68,
                textprops={"fontsize": 6},
                wedgeprops={"edgecolor": "white"},
            )
            for wedge, text, share in zip(wedges, texts, block.frequencies(), strict=True):
                text.set_color(_readable(wedge.get_facecolor()))
                wedge.set_linewidth(0.5 if share else 0)
            handles |= zip(block.experts, wedges, strict=True)
    figure.legend(
        [handles[name] for name in experts],
        experts,
        loc="outside lower center",
        ncols=min(len(experts), 6),
        title="expert (numbers in %)",
        title_fontsize=7,
    )
    return figure


def _heat(results: Mapping[str, RoutedImages]) -> Figure:
    figure, axes = _columns(results, report.COLUMN if len(results) == 1 else report.PAGE)
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
                color = _readable(shown.cmap(shown.norm(100 * value)))
                text = "dead" if dead else f"{100 * value:.0f}"
                axis.text(column, row, text, ha="center", va="center", fontsize=6, color=color)
        axis.set_xticks(range(len(experts)), experts, rotation=90 if max(map(len, experts)) > 5 else 0)
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
    figure, axes = _columns(results, report.PAGE)
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
    "pies": _pies,
    "heat": _heat,
    "classes": _classes,
    "fields": _fields,
}
CAPTIONS = {
    "pies": "How often each expert is chosen in each block. Hard routing: its share of all choices. Soft routing: the "
    "share of images that give it the largest weight.",
    "heat": "Share of the routing weight that each expert gets, averaged over images.",
    "classes": "Difference of these shares between each class and the mean over classes; of more than "
    f"{_CLASSES} classes, those that differ most.",
    "fields": "Field size that images prefer, in pixels of the block's input: the experts' sizes averaged with the "
    "image's routing weights. At both ends, the images with the smallest and the largest.",
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
        labels, pattern = _labels(result.blocks)
        part.suptitle(_wrapped(f"{name}, {pattern}" if "*" in pattern else name, width), fontsize=8)
        axes = part.subplots(n, columns, squeeze=False).ravel()
        for axis in axes[len(labels) :]:
            axis.remove()
        for axis, label in zip(axes, labels, strict=False):
            axis.set_title(label, fontsize=7, pad=3)
        grids.append(list(axes[: len(labels)]))
    return figure, grids


def _columns(results: Mapping[str, RoutedImages], width: float) -> tuple[Figure, Any]:
    """Return a figure with one column per result, blocks from top to bottom, and the columns' axes."""
    blocks = max(len(result.blocks) for result in results.values())
    figure = report.blank(width, 1.1 + 0.17 * max(blocks, 9))
    axes = figure.subplots(1, len(results), squeeze=False)[0]
    for axis, (name, result) in zip(axes, results.items(), strict=True):
        labels, pattern = _labels(result.blocks)
        constant = ["" if block.depends_on_input else " (constant)" for block in result.blocks]
        axis.set_yticks(range(len(labels)), [a + b for a, b in zip(labels, constant, strict=True)])
        axis.set_ylabel(pattern)
        axis.set_title(_wrapped(name, width / len(results) - 0.8))
    return figure, axes


def _experts(blocks: Iterable[Routing]) -> list[str]:
    """Return the distinct experts of several mixtures, ordered by field size."""
    found = {name: size for block in blocks for name, size in zip(block.experts, block.sizes, strict=True)}
    return sorted(found, key=lambda name: (found[name], name))


def _labels(blocks: Sequence[Routing]) -> tuple[list[str], str]:
    """Return what distinguishes the blocks' names, and what they share: "2.0" and "stages.*.blocks.*.conv_dw"."""
    names = [block.name.split(".") for block in blocks]
    same = [len(set(column)) == 1 for column in zip(*names, strict=False)]
    if len(names) == 1 or len({len(parts) for parts in names}) > 1 or not any(same):
        return [block.name for block in blocks], "block"
    labels = [".".join(part for part, s in zip(parts, same, strict=True) if not s) for parts in names]
    return labels, ".".join(part if s else "*" for part, s in zip(names[0], same, strict=True))


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


def _readable(color: Any) -> str:
    """Return black or white, whichever is readable on ``color``, RGBA."""
    red, green, blue = color[:3]
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def _wrapped(text: str, width: float) -> str:
    """Break a title into lines that fit ``width`` inches."""
    return textwrap.fill(text, max(12, int(15 * width)))


def _head(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _tail(text: str, length: int) -> str:
    return text if len(text) <= length else f"…{text[1 - length :]}"
