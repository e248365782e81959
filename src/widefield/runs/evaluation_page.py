"""Show an evaluation on a page: the result of each class, what is mistaken for what, the best and the worst images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from widefield import bench, report
from widefield._files import check_place, write_whole
from widefield.data.listing import counted
from widefield.runs.accuracy import Evaluation, Example
from widefield.runs.drawing import DRAWINGS, drawing_of
from widefield.runs.records import shown
from widefield.runs.subjects import Subject
from widefield.tasks import SegmentationScores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Section = tuple[str, str]
"""Heading, HTML."""

_MOST = 30
"""Largest number of classes in the figure of what is mistaken for what."""


def write_evaluation(found: Mapping[str, tuple[Evaluation, Subject, str]], page: str | Path) -> Path:
    """Write a page about evaluations, by title: each with its model and the name of its data; return its path.

    Raises OSError if it cannot be written.
    """
    page = Path(page)
    check_place(page)
    several = len(found) > 1
    sections: list[Section] = []
    for title, (evaluation, subject, source) in found.items():
        for heading, body in evaluation_sections(evaluation, subject, source):
            sections.append((f"{title}: {heading}" if several else heading, body))
    names = ", ".join(dict.fromkeys(subject.name for _, subject, _ in found.values()))
    devices = {evaluation.device for evaluation, _, _ in found.values()}
    lead = "Metrics, the result of each class, what is mistaken for what, and the best and worst images."
    page.parent.mkdir(parents=True, exist_ok=True)
    write_whole(page, report.page(f"Evaluation of {names}", lead, sections, bench.environment(devices.pop())).encode())
    return page


def evaluation_sections(evaluation: Evaluation, subject: Subject, source: str, note: str = "") -> list[Section]:
    """Return the sections of a page about an evaluation.

    Args:
        evaluation: of ``evaluate_model``, with examples to show.
        subject: the model.
        source: name of the data.
        note: a sentence about the choice of images.
    """
    row = {name: shown(name, value) for name, value in evaluation.metrics.items()}
    about = f"{counted(evaluation.images, 'image')} of {source}, weights {subject.weights}. {note}".strip()
    sections = [("Metrics", report.table([row]) + report.paragraph(about))]
    scores = evaluation.scores
    if isinstance(scores, SegmentationScores):
        sections.append(("Classes", report.table(scores.rows())))
        if scores.size_groups:
            sections.append(("Classes by object size", report.table(rows_by_size(scores)) + report.paragraph(_SIZES)))
        sections.append(("What is mistaken for what", report.picture(draw_confusion(scores), _CONFUSION)))
    elif scores is not None and (rows := scores.rows()):
        sections.append(("Details", report.table(rows)))
    half = -(-len(evaluation.examples) // 2)
    for heading, examples in (
        ("Best images", evaluation.examples[:half]),
        ("Worst images", evaluation.examples[half:][::-1]),
    ):
        if examples:
            wide = DRAWINGS[type(examples[0].prediction)].wide
            blocks = [example_card(one, subject) for one in examples]
            sections.append((heading, report.paragraph(_RATING) + report.cards(blocks, wide=wide)))
    return sections


_RATING = "The title of each image is its mean IoU, over the classes in its label or its prediction."
_SIZES = (
    "IoU of each class among the objects of one size: pixels of the other objects are ignored, and pixels outside of "
    "objects count. A class without objects of a size has no number."
)
_CONFUSION = (
    "Rows: true classes. Columns: predicted classes. The color is the share of the true class's pixels that get the "
    "predicted class, so that a row adds up to 100 %."
)


def rows_by_size(scores: SegmentationScores) -> list[dict[str, str]]:
    """Return one row per class that has objects: its IoU among the objects of each size."""
    values = scores.iou_by_size()
    rows = []
    for index, name in enumerate(scores.classes):
        found = {group: float(column[index]) for group, column in values.items()}
        if not all(np.isnan(value) for value in found.values()):
            texts = {group: "-" if np.isnan(value) else f"{100 * value:.2f}%" for group, value in found.items()}
            rows.append({"class": name, **texts})
    return rows


@report.paper()
def draw_confusion(scores: SegmentationScores, most: int = _MOST) -> Figure:
    """Draw which class the pixels of each class get, as shares of the true class.

    Args:
        scores: of an evaluation.
        most: largest number of classes; of more, those with the most wrong pixels are drawn.
    """
    counts = scores.confusion.double().numpy()
    wrong = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()
    present = np.flatnonzero(counts.sum(0) + counts.sum(1))
    chosen = np.sort(present[np.argsort(-wrong[present], kind="stable")][:most])
    total = counts.sum(1, keepdims=True)
    shares = np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)[np.ix_(chosen, chosen)]
    names = [_short(scores.classes[k]) for k in chosen]
    side = min(report.PAGE, 1.4 + 0.3 * len(names))
    figure = report.blank(side + 0.9, side)
    axis = figure.subplots()
    image = axis.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
    size = 7 if len(names) <= 20 else 5.5
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    axis.set_yticks(range(len(names)), names, fontsize=size)
    axis.set(xlabel="predicted", ylabel="true")
    axis.tick_params(length=0)
    if len(names) <= 20:
        for (y, x), share in np.ndenumerate(100 * shares):
            if share >= 0.5:
                dark = share > 55
                axis.text(x, y, f"{share:.0f}", ha="center", va="center", fontsize=6, color="w" if dark else "k")
    if len(chosen) < len(present):
        axis.set_title(f"the {len(chosen)} of {len(present)} classes with the most wrong pixels")
    figure.colorbar(image, shrink=0.7, label="share of the true class (%)", ax=axis)
    return figure


def example_card(example: Example, subject: Subject) -> str:
    """Return an image with its label and prediction as a card of a page (HTML)."""
    drawing = drawing_of(example.prediction, subject.class_names, subject.palette)
    title = f"{Path(example.name).name}: {100 * example.rating:.1f} %"
    return drawing.card(title, example.image, example.prediction, example.truth)


def _short(name: str, letters: int = 18) -> str:
    return name if len(name) <= letters else f"{name[: letters - 1]}…"
