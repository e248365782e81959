"""Show an evaluation of detections on a page: average precision by class and size, errors, and confusion."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from widefield import report
from widefield.report import Part, Plot, Section, Table
from widefield.runs.confusion_figure import confusion_figure
from widefield.tasks import DetectionScores
from widefield.tasks.detection_errors import CONFUSION_SCORE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SIZES = (
    "Average precision of the objects of each size: the side of a square with the object's area. Bars: number of "
    "objects."
)
_ERRORS = (
    "Why detections are wrong, at an IoU of 0.5 (Bolya et al. 2020, TIDE): points of AP50 that are gained if the "
    "errors of one type alone are corrected. The gains do not add up, as errors hide each other."
)
_CONFUSION = (
    f"Rows: true classes. Columns: classes of the detections with a score of at least {CONFUSION_SCORE:g} that overlap "
    "the object by at least half. The color is the share of the class's objects. Column none: objects without a "
    "detection. Row none: detections without an object, by their class."
)


def detection_sections(scores: DetectionScores) -> list[Section]:
    """Return the sections of a page about an evaluation of detections."""
    sections = [
        Section("COCO's figures", [Table(scores.figure_rows())]),
        Section("Classes", [Table(scores.rows(), "Classes")]),
    ]
    rows = scores.size_rows()
    if int(scores.objects_by_size.sum()):
        sections.append(Section("Objects by size", [Plot(draw_sizes(scores), _SIZES), Table(rows)]))
    body: list[Part] = [Plot(draw_errors(scores), _ERRORS)]
    for kind, found in scores.kinds.items():
        body += [f"Errors of {_PLURAL[kind]}, and the points of AP50 that they cost:", Table(found.errors.rows())]
    sections.append(Section("Types of errors", body))
    mistakes = scores.mistake_rows()
    confusion = Plot(draw_object_confusion(scores), _CONFUSION)
    listed = [Table(mistakes, "Mistakes")] if mistakes else []
    sections.append(Section("What is mistaken for what", [confusion, *listed]))
    return sections


_PLURAL = {"box": "boxes", "mask": "masks"}


@report.paper()
def draw_sizes(scores: DetectionScores) -> Figure:
    """Draw the average precision of the objects of each size, and how many objects there are."""
    occurring = np.flatnonzero(scores.objects_by_size.sum(1))
    shown = slice(occurring.min(initial=0), occurring.max(initial=0) + 1)
    counts, names = scores.objects_by_size.sum(1)[shown], scores.size_bins[shown]
    places = np.arange(len(counts))
    figure = report.blank(min(report.PAGE, 2.4 + 0.6 * len(counts)), 2.6)
    axis = figure.subplots()
    below = axis.twinx()
    below.bar(places, counts, color="0.88", width=0.7)
    below.set(ylabel="objects")
    below.yaxis.label.set_color("0.5")
    below.tick_params(colors="0.5")
    below.locator_params(axis="y", nbins=4, integer=True)
    for number, (kind, found) in enumerate(scores.kinds.items()):
        color, marker, label = report.COLORS[number], report.MARKERS[number], f"AP of {_PLURAL[kind]}"
        axis.plot(places, 100 * found.ap_by_size[shown], color=color, marker=marker, label=label)
    axis.set_zorder(below.get_zorder() + 1)
    axis.patch.set_visible(False)
    axis.set_xticks(places, names)
    highest = max(np.nanmax([*found.ap_by_size[shown], 0]) for found in scores.kinds.values())
    axis.set_ylim(0, max(115 * highest, 1))
    axis.set(ylabel="average precision (%)", xlabel="side of the objects (pixels)")
    for one in (axis, below):
        one.spines["top"].set_visible(False)
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return figure


@report.paper()
def draw_errors(scores: DetectionScores) -> Figure:
    """Draw the points of AP50 that each type of error costs."""
    names = list(next(iter(scores.kinds.values())).errors.gains)
    places = np.arange(len(names))
    figure = report.blank(report.PAGE * 0.7, 0.6 + 0.3 * len(names))
    axis = figure.subplots()
    height = 0.8 / len(scores.kinds)
    for number, (kind, found) in enumerate(scores.kinds.items()):
        values = 100 * np.array([found.errors.gains[name] for name in names])
        offset = (number - (len(scores.kinds) - 1) / 2) * height
        bars = axis.barh(places + offset, values, height * 0.9, color=report.COLORS[number], label=_PLURAL[kind])
        axis.bar_label(bars, [f"{value:.1f}" for value in values], padding=2, fontsize=6.5)
    axis.set_yticks(places, names)
    axis.invert_yaxis()
    axis.set(xlabel="points of AP50")
    axis.margins(x=0.12)
    axis.spines[["top", "right"]].set_visible(False)
    if len(scores.kinds) > 1:
        axis.legend()
    return figure


def draw_object_confusion(scores: DetectionScores) -> Figure:
    """Draw which class is detected where objects of each class are, as shares of the class's objects.

    Args:
        scores: of an evaluation.
    """
    return confusion_figure(scores.confusion.double().numpy(), [*scores.classes, "none"], "detections")
