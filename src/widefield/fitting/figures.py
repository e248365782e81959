"""Draw what a fit chose: the effect of each size, and loss against cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from widefield import report
from widefield.fitting.choose import Choice, key_of
from widefield.fitting.costs import UNITS, Costs
from widefield.fitting.groups import Groups

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIELD, DRAWN_FIELD = "erf.png", "erf.svg"
"""Files with the effective receptive fields in a fit's folder; the second one has light and dark colors."""


@report.paper()
def draw_wanted(choice: Choice, groups: Groups) -> Figure:
    """Draw the effect of each size on the loss, a line for each group."""
    figure = report.blank(report.PAGE * 0.75, 2.6)
    axis = figure.subplots()
    ticks = groups.sizes
    colors = report.expert_colors(len(groups))
    for group, chosen, color in zip(groups, choice.sizes, colors, strict=True):
        effects = choice.model.effects[group.name]
        places = [ticks.index(size) for size in group.sizes]
        axis.plot(places, [effects[size] for size in group.sizes], color=color, marker=".", label=group.name)
        axis.plot(ticks.index(group.own), 0, "o", color=color, markersize=7, fillstyle="none")
        axis.plot(ticks.index(chosen), effects[chosen], "*", color=color, markersize=10)
    axis.axhline(0, color="0.8", linewidth=0.6, zorder=0)
    axis.set_xticks(range(len(ticks)), [f"{size}x{size}" for size in ticks])
    axis.set(xlabel="kernel size", ylabel="change of the loss")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


@report.paper()
def draw_front(choice: Choice, groups: Groups, costs: Costs, limit: float | None) -> Figure:
    """Draw loss against cost: the predicted front, the candidates, the choice and the unchanged network."""
    figure = report.blank(report.PAGE * 0.75, 2.8)
    axis = figure.subplots()
    axis.plot(
        [point.cost for point in choice.front], [point.loss for point in choice.front],
        color="0.7", drawstyle="steps-post", label="predicted front", zorder=0,
    )  # fmt: skip
    best = min((found for found in choice.candidates if found.allowed), key=lambda found: found.loss)
    for found in choice.candidates:
        color = report.COLORS[0] if found.allowed else "0.75"
        ends = (found.to_best.mean - found.to_best.low, found.to_best.high - found.to_best.mean)
        axis.errorbar(
            found.cost, best.loss + found.to_best.mean, np.array(ends)[:, None], fmt=".", color=color, elinewidth=0.6
        )
    marks = (
        ("chosen", choice.sizes, "*", report.COLORS[5]),
        ("unchanged", key_of(groups.unchanged, groups), "s", report.COLORS[1]),
    )
    for label, sizes, marker, color in marks:
        found = next(candidate for candidate in choice.candidates if candidate.sizes == sizes)
        axis.plot(found.cost, found.loss, marker, color=color, markersize=9, fillstyle="none", label=label)
    if limit is not None:
        axis.axvline(limit, color="0.6", linestyle=":", linewidth=0.8, label="limit")
    unit = UNITS[costs.budget]
    axis.set(xlabel=f"{costs.budget} ({unit}), relative to the unchanged network", ylabel="loss of the probe")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=6)
    return figure
