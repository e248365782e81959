"""Draw figures with matplotlib: from plain lists and arrays, without a display, at the sizes of a paper."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


FIXED = "fixed"
"""Group id (``set_gid``) of artists whose colors also hold on dark pages, such as numbers on colored bars."""


def readable(color: Any) -> str:
    """Return black or white, whichever is readable on ``color``, RGBA."""
    red, green, blue = color[:3]
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


COLUMN, PAGE = 3.4, 7.0
"""Widths of a paper's column and of its page, in inches."""

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#B8A800")
"""Colors of Okabe and Ito, which are safe for color-blind readers; the yellow is darkened for lines."""

MARKERS = "osD^vP*X"

_PAPER: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "figure.titlesize": 9,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "legend.frameon": False,
}


@contextmanager
def paper() -> Iterator[None]:
    """Use sizes that are readable at a paper's column width; a decorator or a context manager."""
    import matplotlib

    with matplotlib.rc_context(_PAPER):
        yield


def blank(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches with automatic layout; notebooks display it."""
    from widefield.report._shown import ShownFigure  # loads matplotlib

    return ShownFigure(figsize=(width, height), layout="constrained")


def expert_colors(count: int) -> list[Any]:
    """Return one RGBA color per expert, light for the first (small kernels) to dark for the last."""
    from matplotlib import colormaps

    return [colormaps["YlGnBu"](0.22 + 0.66 * i / max(count - 1, 1)) for i in range(count)]


def examples(
    images: Sequence[Any],
    captions: Sequence[str],
    weights: Sequence[Any],
    blocks: Sequence[str],
    experts: Sequence[str],
    title: str,
) -> Figure:
    """Draw images, and under each its routing weights: one row per block, one column per expert.

    Args:
        images: arrays (H, W, 3) in [0, 1].
        captions: one per image.
        weights: for each image an array (blocks, experts).
        blocks, experts: names.
        title: of the figure.
    """
    figure = blank(len(images) + 1.6, 1.2 + 0.18 * len(blocks) + 0.7)
    ratios = [1.0, 0.18 * len(blocks) + 0.35]
    axes = figure.subplots(2, len(images), squeeze=False, height_ratios=ratios)
    limit = max(float(abs(weight).max()) for weight in weights)
    signed = any(float(weight.min()) < 0 for weight in weights)
    shades: dict[str, Any] = (
        {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit} if signed else {"cmap": "YlGnBu", "vmin": 0, "vmax": limit}
    )
    shown = None
    for column, (image, caption, weight) in enumerate(zip(images, captions, weights, strict=True)):
        top, bottom = axes[0, column], axes[1, column]
        top.imshow(image, interpolation="nearest")
        top.set_title(caption, fontsize=8)
        top.axis("off")
        shown = bottom.imshow(weight, aspect="auto", **shades)
        bottom.set_xticks(range(len(experts)), experts, fontsize=6, rotation=90)
        bottom.set_yticks(range(len(blocks)), blocks if column == 0 else [""] * len(blocks), fontsize=6)
        bottom.tick_params(length=0)
    if shown is not None:
        bar = figure.colorbar(shown, ax=axes[1, :], shrink=0.9, pad=0.01)
        bar.ax.tick_params(labelsize=6)
    figure.suptitle(title, fontsize=11)
    return figure


def curves(lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], x_label: str, y_label: str) -> Figure:
    """Draw one line per name: (x values, y values)."""
    figure = blank(7.0, 3.2)
    axis = figure.subplots()
    for name, (x, y) in lines.items():
        axis.plot(x, y, marker="o", markersize=3, linewidth=1.5, label=name)
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    return figure
