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
from widefield.runs.confusion_figure import MOST, confusion_figure
from widefield.runs.detection_page import detection_sections
from widefield.runs.drawing import DRAWINGS, drawing_of
from widefield.runs.drawing_parts import MIN_SCORE
from widefield.runs.pose_page import pose_sections
from widefield.runs.records import shown
from widefield.runs.subjects import Subject
from widefield.tasks import ClassificationScores, DetectionScores, PoseScores, SegmentationScores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Section = tuple[str, str]
"""Heading, HTML."""


def write_evaluation(
    found: Mapping[str, tuple[Evaluation, Subject, str]], page: str | Path, *, min_score: float = MIN_SCORE
) -> Path:
    """Write a page about evaluations, by title: each with its model and the name of its data; return its path.

    ``min_score`` is the least score of the objects that are drawn.

    Raises OSError if it cannot be written.
    """
    page = Path(page)
    check_place(page)
    several = len(found) > 1
    sections: list[Section] = []
    for title, (evaluation, subject, source) in found.items():
        for heading, body in evaluation_sections(evaluation, subject, source, min_score=min_score):
            sections.append((f"{title}: {heading}" if several else heading, body))
    names = ", ".join(dict.fromkeys(subject.name for _, subject, _ in found.values()))
    devices = {evaluation.device for evaluation, _, _ in found.values()}
    lead = "Metrics, the result of each class, what is mistaken for what, and the best and worst images."
    if all(subject.work == "masked_image" for _, subject, _ in found.values()):
        lead = "How well hidden parts of images are predicted: metrics, some images, and the best and worst ones."
    page.parent.mkdir(parents=True, exist_ok=True)
    write_whole(page, report.page(f"Evaluation of {names}", lead, sections, bench.environment(devices.pop())).encode())
    return page


def evaluation_sections(
    evaluation: Evaluation, subject: Subject, source: str, note: str = "", *, min_score: float = MIN_SCORE
) -> list[Section]:
    """Return the sections of a page about an evaluation.

    Args:
        evaluation: of ``evaluate_model``, with examples to show.
        subject: the model.
        source: name of the data.
        note: a sentence about the choice of images.
        min_score: least score of the objects that are drawn.
    """
    row = {name: shown(name, value) for name, value in evaluation.metrics.items()}
    samples = counted(evaluation.images, "crop" if isinstance(evaluation.scores, PoseScores) else "image")
    about = f"{samples} of {source}, weights {subject.weights}. {note}".strip()
    meaning = report.paragraph(_MASKED) if subject.work == "masked_image" else ""
    sections = [("Metrics", report.table([row]) + report.paragraph(about) + meaning)]
    scores = evaluation.scores
    if isinstance(scores, ClassificationScores):
        sections += _of_classification(scores)
    elif isinstance(scores, SegmentationScores):
        sections += _of_segmentation(scores)
    elif isinstance(scores, DetectionScores):
        sections += detection_sections(scores)
    elif isinstance(scores, PoseScores):
        sections += pose_sections(scores)
    elif scores is not None and (rows := scores.rows()):
        sections.append(("Details", report.table(rows)))
    half = -(-len(evaluation.examples) // 2)
    for heading, examples in (
        ("Reconstructions", evaluation.spread),
        ("Best images", evaluation.examples[:half]),
        ("Worst images", evaluation.examples[half:][::-1]),
    ):
        if examples:
            wide = DRAWINGS[type(examples[0].prediction)].wide
            blocks = [example_card(one, subject, min_score) for one in examples]
            rating = report.paragraph(f"The title of each image is {evaluation.rating}.")
            sections.append((heading, rating + report.cards(blocks, wide=wide)))
    return sections


def _of_classification(scores: ClassificationScores) -> list[Section]:
    classes, shown_classes = len(scores.classes), scores.weakest(MOST)
    listed = f"The {MOST} of {classes} classes with the lowest accuracy. " if classes > MOST else ""
    figure = confusion_figure(scores.confusion.double().numpy(), scores.classes, "images", MOST)
    return [
        ("Classes", report.table(shown_classes) + report.paragraph(listed + _INTERVALS)),
        ("What is mistaken for what", report.picture(figure, _MISTAKEN)),
    ]


def _of_segmentation(scores: SegmentationScores) -> list[Section]:
    sections = [("Classes", report.table(scores.rows()))]
    if scores.size_groups:
        sections.append(("Classes by object size", report.table(rows_by_size(scores)) + report.paragraph(_SIZES)))
    sections.append(("What is mistaken for what", report.picture(draw_confusion(scores), _CONFUSION)))
    return sections


_MASKED = (
    "The loss is that of the hidden places, with one fixed mask for each image. knn_top1 is the share of images whose "
    "class is that of their nearest neighbors among these images, by the encoder's features; fewer images give lower "
    "values. The encoder itself knows no classes."
)
_INTERVALS = (
    "Classes with the lowest accuracy come first. 95 %: the interval of a class's accuracy in percent, from its number "
    "of images alone (Wilson's score interval). Where intervals of two classes overlap, their order may be chance."
)
_MISTAKEN = (
    "Rows: true classes. Columns: predicted classes. The color is the share of the true class's images that get the "
    "predicted class, so that a row adds up to 100 %."
)
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


def draw_confusion(scores: SegmentationScores, most: int = MOST) -> Figure:
    """Draw which class the pixels of each class get, as shares of the true class.

    Args:
        scores: of an evaluation.
        most: largest number of classes; of more, those with the most wrong pixels are drawn.
    """
    return confusion_figure(scores.confusion.double().numpy(), scores.classes, "pixels", most)


def example_card(example: Example, subject: Subject, min_score: float = MIN_SCORE) -> str:
    """Return an image with its label and prediction as a card of a page (HTML)."""
    drawing = drawing_of(example.prediction, subject.class_names, subject.palette, min_score=min_score)
    title = f"{Path(example.name).name}: {example.rated}"
    return drawing.card(title, example.image, example.prediction, example.truth)
