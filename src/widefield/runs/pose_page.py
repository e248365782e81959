"""Show an evaluation of poses on a page: average precision, errors by key point and by size, and kinds of errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from widefield import report
from widefield.report import Plot, Section, Table
from widefield.tasks import PoseScores
from widefield.tasks.pose_errors import GOOD, NEAR

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FIGURES = (
    "Average precision and recall at object keypoint similarities (OKS) from 0.5 to 0.95. Medium people have an area "
    "of 32x32 to 96x96 pixels, large ones a larger one."
)
_KEYPOINTS = (
    "Left: mean distance to the true key point in pixels of the file. Right: average precision if this key point alone "
    "is compared. Distances need true boxes: with those of a detector they are left out."
)
_SIZES = "Average precision of the people of each size: the square root of their area. Bars: number of people."
_ERRORS = (
    f"Kinds of key points in poses that were found (Ronchi, Perona 2017). Good: a similarity to the true key point of "
    f"at least {GOOD:g}. Jitter: {NEAR:g} to {GOOD:g}. Inversion: near the same person's key point of the other side. "
    "Swap: near such a key point of another person. Miss: near none of them."
)
_SHADES = {"good": "0.85", "jitter": report.COLORS[4], "inversion": report.COLORS[1], "swap": report.COLORS[3],
           "miss": report.COLORS[5]}  # fmt: skip


def pose_sections(scores: PoseScores) -> list[Section]:
    """Return the sections of a page about an evaluation of poses."""
    keypoints = [Plot(draw_keypoints(scores), _KEYPOINTS), Table(scores.rows(), "Key points")]
    sections = [
        Section("COCO's figures", [Table(scores.figure_rows()), _FIGURES]),
        Section("Key points", keypoints),
    ]
    if int(scores.by_size.count.sum()):
        sections.append(Section("People by size", [Plot(draw_sizes(scores), _SIZES), Table(scores.size_rows())]))
    if int(scores.errors.counts.sum()):
        errors = [Plot(draw_errors(scores), _ERRORS), Table(scores.error_rows(), "Kinds of errors by key point")]
        sections.append(Section("Kinds of errors", errors))
    if len(scores.classes) > 1:
        sections.append(Section("Classes", [Table(scores.class_rows(), "Classes")]))
    return sections


@report.paper()
def draw_keypoints(scores: PoseScores) -> Figure:
    """Draw the error and the average precision of each key point."""
    found = scores.by_keypoint
    places = np.arange(len(found.names))
    figure = report.blank(report.PAGE, 0.7 + 0.17 * len(places))
    left, right = figure.subplots(1, 2, sharey=True)
    for axis, values, label, form in (
        (left, found.error, "distance (pixels)", "{:.1f}"),
        (right, 100 * found.ap, "average precision (%)", "{:.0f}"),
    ):
        bars = axis.barh(places, np.nan_to_num(values), 0.75, color=report.COLORS[0])
        texts = ["-" if np.isnan(value) else form.format(value) for value in values]
        axis.bar_label(bars, texts, padding=2, fontsize=6)
        axis.set(xlabel=label)
        axis.margins(x=0.14)
        axis.spines[["top", "right"]].set_visible(False)
    left.set_yticks(places, found.names)
    left.invert_yaxis()
    return figure


@report.paper()
def draw_sizes(scores: PoseScores) -> Figure:
    """Draw the average precision of the people of each size, and how many there are."""
    found = scores.by_size
    occurring = np.flatnonzero(found.count)
    shown = slice(occurring.min(initial=0), occurring.max(initial=0) + 1)
    places = np.arange(len(found.count[shown]))
    figure = report.blank(min(report.PAGE, 2.4 + 0.6 * len(places)), 2.4)
    axis = figure.subplots()
    behind: Any = axis.twinx()
    behind.bar(places, found.count[shown], color="0.88", width=0.7)
    behind.set(ylabel="people")
    behind.yaxis.label.set_color("0.5")
    behind.tick_params(colors="0.5")
    behind.locator_params(axis="y", nbins=4, integer=True)
    for values, label, color, marker in (
        (found.ap, "OKS AP", report.COLORS[0], report.MARKERS[0]),
        (found.pck20, "PCK@0.2", report.COLORS[5], report.MARKERS[1]),
    ):
        if not np.isnan(values[shown]).all():
            axis.plot(places, 100 * values[shown], color=color, marker=marker, label=label)
    axis.set_zorder(behind.get_zorder() + 1)
    axis.patch.set_visible(False)
    axis.set_xticks(places, found.names[shown])
    axis.set_ylim(0, 105)
    axis.set(ylabel="%", xlabel="square root of the area (pixels)")
    for one in (axis, behind):
        one.spines["top"].set_visible(False)
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return figure


@report.paper()
def draw_errors(scores: PoseScores) -> Figure:
    """Draw the share of each kind of key point, by key point."""
    rows = scores.errors.counts
    names = [*scores.errors.keypoints, "all"]
    counts = np.concatenate([rows, rows.sum(0, keepdims=True)])
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    places = np.arange(len(names))
    figure = report.blank(report.PAGE * 0.8, 0.9 + 0.17 * len(names))
    axis = figure.subplots()
    start = np.zeros(len(names))
    for index, (kind, color) in enumerate(_SHADES.items()):
        axis.barh(places, shares[:, index], 0.75, left=start, color=color, label=kind)
        start = start + shares[:, index]
    axis.set_yticks(places, names)
    axis.invert_yaxis()
    axis.set(xlabel="share of the key points (%)", xlim=(0, 100))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(_SHADES))
    return figure
