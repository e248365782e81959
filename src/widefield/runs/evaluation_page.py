"""Show an evaluation on a page: the result of each class, what is mistaken for what, the best and the worst images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from widefield import bench, report
from widefield._files import check_place, write_whole
from widefield.data.listing import counted
from widefield.drawing.kinds import DRAWINGS, drawing_of
from widefield.drawing.parts import MIN_SCORE
from widefield.loading.subjects import Subject
from widefield.report import Part, Plot, Section, Table
from widefield.runs.accuracy import Evaluation, Example
from widefield.runs.confusion_figure import MOST, confusion_figure
from widefield.runs.detection_page import detection_sections
from widefield.runs.headline import Found, evaluated_words
from widefield.runs.pose_page import pose_sections
from widefield.tasks import (
    HEADLINES,
    ClassificationScores,
    DetectionScores,
    MultiLabelScores,
    PoseScores,
    SegmentationScores,
)
from widefield.tasks.metric_names import meaning, percent, shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_evaluation(
    found: Mapping[str, tuple[Evaluation, Subject, str]], page: str | Path, *, min_score: float = MIN_SCORE
) -> Path:
    """Write a page about evaluations, by title: each with its model and the name of its data; return its path.

    ``min_score`` is the least score of the objects that are drawn.

    Raises OSError if it cannot be written.
    """
    page = Path(page)
    check_place(page)
    shown_by = {
        title: evaluation_sections(evaluation, subject, source, min_score=min_score)
        for title, (evaluation, subject, source) in found.items()
    }
    sections = [together(shown_by)] if len(found) > 1 else next(iter(shown_by.values()))
    headline = evaluated_words(
        {
            title: Found(evaluation, source, HEADLINES[subject.work], "image")
            for title, (evaluation, subject, source) in found.items()
            if subject.work in HEADLINES
        }
    )
    names = ", ".join(dict.fromkeys(subject.name for _, subject, _ in found.values()))
    devices = {evaluation.device for evaluation, _, _ in found.values()}
    lead = "Metrics, the result of each class, what is mistaken for what, and the best and worst images."
    if all(subject.work == "multilabel" for _, subject, _ in found.values()):
        lead = "Metrics, the result of each class, and the best and worst images."
    if all(subject.work == "masked_image" for _, subject, _ in found.values()):
        lead = "How well hidden parts of images are predicted: metrics, some images, and the best and worst ones."
    page.parent.mkdir(parents=True, exist_ok=True)
    environment = bench.environment(devices.pop())
    write_whole(page, report.page(f"Evaluation of {names}", lead, sections, environment, headline).encode())
    return page


def together(shown: Mapping[str, Sequence[Section]]) -> Section:
    """Return several evaluations, by title, as one section: metrics in one table, and the rest folded."""
    rows: list[dict[str, str]] = []
    notes: list[Part] = []
    shared: list[Part] = []
    folds: list[Part] = []
    for name, (first, *others) in shown.items():
        for part in first.parts:
            if isinstance(part, Table):
                rows += [{"": name, **row} for row in part.rows]
            elif isinstance(part, str):
                notes.append(f"{name}: {part}")
            elif part not in shared:  # what metrics mean is the same for all
                shared.append(part)
        folds += [report.Fold(f"{name}: {one.heading.lower()}", one.parts) for one in others]
    columns = dict.fromkeys(key for row in rows for key in row)
    table = [Table([{key: row.get(key, "-") for key in columns} for row in rows])] if rows else []
    return Section("Evaluation", [*table, *notes, *shared, *folds])


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
    explained = [_MASKED] if subject.work == "masked_image" else []
    words = {name: meaning(name) for name in row if meaning(name)}
    terms = [report.Fold("What the metrics mean", [report.Terms(words)])] if words else []
    sections = [Section("Metrics", [Table([row]), about, *explained, *terms])]
    scores = evaluation.scores
    if isinstance(scores, ClassificationScores):
        sections += _of_classification(scores)
    elif isinstance(scores, MultiLabelScores):
        sections.append(Section("Classes", [Table(scores.weakest(len(scores.classes)), "Classes"), _LABELS]))
    elif isinstance(scores, SegmentationScores):
        sections += _of_segmentation(scores)
    elif isinstance(scores, DetectionScores):
        sections += detection_sections(scores)
    elif isinstance(scores, PoseScores):
        sections += pose_sections(scores)
    elif scores is not None and (rows := scores.rows()):
        sections.append(Section("Details", [Table(rows, "Details")]))
    half = -(-len(evaluation.examples) // 2)
    for heading, examples in (
        ("Reconstructions", evaluation.spread),
        ("Best images", evaluation.examples[:half]),
        ("Worst images", evaluation.examples[half:][::-1]),
    ):
        if examples:
            wide = DRAWINGS[type(examples[0].prediction)].wide
            blocks = [example_card(one, subject, min_score) for one in examples]
            rating = f"The title of each image is {evaluation.rating}."
            sections.append(Section(heading, [rating, report.Cards(blocks, wide=wide)]))
    return sections


def _of_classification(scores: ClassificationScores) -> list[Section]:
    classes, shown_classes = len(scores.classes), scores.weakest(MOST)
    listed = f"The {MOST} of {classes} classes with the lowest accuracy. " if classes > MOST else ""
    figure = confusion_figure(scores.confusion.double().numpy(), scores.classes, "images")
    return [
        Section("Classes", [Table(shown_classes, "Classes"), listed + _INTERVALS]),
        Section("What is mistaken for what", [Plot(figure, _MISTAKEN)]),
    ]


def _of_segmentation(scores: SegmentationScores) -> list[Section]:
    sections = [Section("Classes", [Table(scores.rows(), "Classes")])]
    if scores.size_groups:
        by_size = Table(rows_by_size(scores), "Classes by object size")
        sections.append(Section("Classes by object size", [by_size, _SIZES]))
    sections.append(Section("What is mistaken for what", [Plot(draw_confusion(scores), _CONFUSION)]))
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
_LABELS = (
    "Classes with the lowest average precision (AP) come first. AP does not depend on a threshold; precision, recall "
    "and F1 are those of the classes that images are given at the task's threshold."
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
            rows.append({"class": name, **{group: percent(value) for group, value in found.items()}})
    return rows


def draw_confusion(scores: SegmentationScores) -> Figure:
    """Draw which class the pixels of each class get, as shares of the true class.

    Args:
        scores: of an evaluation.
    """
    return confusion_figure(scores.confusion.double().numpy(), scores.classes, "pixels")


def example_card(example: Example, subject: Subject, min_score: float = MIN_SCORE) -> report.Card:
    """Return an image with its label and prediction as a card of a page."""
    drawing = drawing_of(example.prediction, subject.class_names, subject.palette, min_score=min_score)
    title = f"{Path(example.name).name}: {example.rated}"
    return drawing.card(title, example.image, example.prediction, example.truth)
