"""Error types of detections, against the paper's definitions in plain loops, and corrected files in pycocotools."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.detections import Case, random_case, reference, updated
from widefield.dense import Detections
from widefield.tasks import CocoMetric, DetectionErrors, TrueObjects
from widefield.tasks.detection_errors import ERRORS

TYPES = tuple(ERRORS)


def iou(a: list[float], b: list[float], crowd: bool = False) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    own, other = (x[2] - x[0] for x in (a, b))
    areas = own * (a[3] - a[1]), other * (b[3] - b[1])
    return width * height / (areas[0] if crowd else areas[0] + areas[1] - width * height)


class Explained:
    """One image: what each detection is, and the object that corrects it, from loops over pairs."""

    def __init__(self, found: Detections, true: TrueObjects) -> None:
        boxes, objects = found.boxes.tolist(), true.boxes.tolist()
        labels, names, crowd = found.labels.tolist(), true.labels.tolist(), true.crowd.tolist()
        real = [j for j in range(len(objects)) if not crowd[j]]
        self.owner: dict[int, int] = {}
        for i, box in enumerate(boxes):
            free = [j for j in real if names[j] == labels[i] and j not in self.owner.values()]
            best = max(free, key=lambda j: (iou(box, objects[j]), j), default=None)
            if best is not None and iou(box, objects[best]) >= 0.5:
                self.owner[i] = best
        self.kinds: list[str] = []
        self.corrected: dict[int, int] = {}
        for i, box in enumerate(boxes):
            own = max((iou(box, objects[j]) for j in real if names[j] == labels[i]), default=0)
            other = max((iou(box, objects[j]) for j in real if names[j] != labels[i]), default=0)
            in_crowd = any(
                crowd[j] and names[j] == labels[i] and iou(box, objects[j], True) >= 0.5 for j in range(len(objects))
            )
            if i in self.owner:
                self.kinds.append("right")
            elif in_crowd:
                self.kinds.append("ignored")
            elif 0.1 <= own < 0.5:
                self.kinds.append("localization")
                self.correct(i, [j for j in real if names[j] == labels[i] and iou(box, objects[j]) == own])
            elif other >= 0.5:
                self.kinds.append("classification")
                self.correct(i, [j for j in real if names[j] != labels[i] and iou(box, objects[j]) == other])
            elif own >= 0.5:
                self.kinds.append("duplicate")
            else:
                self.kinds.append("background" if other <= 0.1 else "both")
        self.missed = [j for j in real if j not in {*self.owner.values(), *self.corrected.values()}]

    def correct(self, detection: int, places: list[int]) -> None:
        place = places[0]
        if place not in self.owner.values() and place not in self.corrected.values():
            self.corrected[detection] = place


def explained(case: Case) -> list[Explained]:
    return [Explained(*pair) for pair in zip(case.found, case.true, strict=True)]


def without(case: Case, kind: str) -> Case:
    """Return the case with all errors of a type corrected."""
    found, true = [], []
    for answer, mine, objects in zip(explained(case), case.found, case.true, strict=True):
        boxes, labels = mine.boxes.clone(), mine.labels.clone()
        keep = [kind != name or i in answer.corrected for i, name in enumerate(answer.kinds)]
        for i, place in answer.corrected.items():
            if answer.kinds[i] == kind == "localization":
                boxes[i] = objects.boxes[place]
            elif answer.kinds[i] == kind == "classification":
                labels[i] = objects.labels[place]
        found.append(Detections(boxes[keep], mine.scores[keep], labels[keep]))
        stay = [kind != "missed" or j not in answer.missed for j in range(len(objects.boxes))]
        fields = (x[stay] for x in (objects.boxes, objects.labels))
        true.append(TrueObjects(*fields, objects.size, objects.crowd[stay], objects.area[stay]))
    return case._replace(found=found, true=true)


def ap50(case: Case, classes: list[int]) -> float:
    """Return pycocotools' AP50 over these classes; 0 for those that have no objects left."""
    precision = reference(case).eval["precision"][0, :, :, 0, 2]
    return float(np.mean([np.where(precision[:, k] < 0, 0, precision[:, k]).mean() for k in classes]))


def errors(case: Case) -> DetectionErrors:
    return updated(case).scores().kinds["box"].errors


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.3]))
def test_types_are_those_of_the_paper(seed: int, crowd: float) -> None:
    case = random_case(seed, crowd=crowd, ties=False, found=25)
    kinds = [kind for answer in explained(case) for kind in answer.kinds]
    expected = {name: kinds.count(name) for name in TYPES}
    expected["missed"] = sum(len(answer.missed) for answer in explained(case))
    assert errors(case).counts == expected


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_gains_are_those_of_corrected_files(seed: int) -> None:
    case = random_case(seed, ties=False, images=5, found=25)
    classes = sorted({int(k) for true in case.true for k in true.labels[~true.crowd]})
    if not classes:
        return
    mine = errors(case)
    assert mine.ap50 == pytest.approx(ap50(case, classes), abs=1e-12)
    for kind in TYPES:
        gain = max(ap50(without(case, kind), classes) - mine.ap50, 0)
        assert mine.gains[kind] == pytest.approx(gain, abs=1e-12), kind


def test_each_type_in_one_image() -> None:
    objects = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10], [80, 0, 90, 10]])
    true = TrueObjects(objects, torch.tensor([0, 0, 0, 1, 1]), (20, 100))
    boxes = torch.tensor(
        [
            [0.0, 0, 10, 10],  # right
            [0, 0, 10, 9],  # duplicate
            [20, 0, 30, 10],  # class 1 on an object of class 0
            [44, 0, 54, 10],  # a third of the object
            [64, 0, 74, 10],  # a third of an object of another class
            [0, 15, 5, 20],  # nothing
        ]
    )
    scores = torch.linspace(0.9, 0.4, 6)
    metric = CocoMetric(["a", "b"])
    metric.update([Detections(boxes, scores, torch.tensor([0, 0, 1, 0, 0, 0]))], [true])
    found = metric.scores()
    mine = found.kinds["box"].errors
    assert mine.counts == {
        "classification": 1, "localization": 1, "both": 1, "duplicate": 1, "background": 1, "missed": 2,
    }  # fmt: skip
    assert mine.gains["classification"] > 0.1
    assert mine.gains["localization"] > 0
    assert mine.without_misses > 0
    # true a: one right, one taken for b, one without a detection; b: none of two; three detections on no object
    assert found.confusion.tolist() == [[1, 1, 1], [0, 0, 2], [4, 0, 0]]
    assert found.mistake_rows()[0] == {
        "class": "a", "found": "33.3%", "no detection": "33.3%", "mistaken for": "b", "in": "33.3%",
    }  # fmt: skip
    rows = mine.rows()
    assert [row["error"] for row in rows] == list(TYPES)
    assert rows[0]["AP50"] == f"+{100 * mine.gains['classification']:.2f}"
    assert "duplicate 0.0 (1)" in str(mine) or "duplicate" in str(mine)
    json.dumps(mine.to_dict(), allow_nan=False)


def test_without_misses_and_without_false_positives() -> None:
    """One of two objects is found, after a wrong detection."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10]])
    found = torch.tensor([[50.0, 50, 60, 60], [0, 0, 10, 10]])
    metric = CocoMetric(["a"])
    metric.update(
        [Detections(found, torch.tensor([0.9, 0.8]), torch.zeros(2).long())],
        [TrueObjects(boxes, torch.zeros(2).long(), (100, 100))],
    )
    mine = metric.scores().kinds["box"].errors
    half = 51 / 101  # recalls up to 0.5 are reached
    assert mine.ap50 == pytest.approx(0.5 * half)
    assert mine.without_false_positives == pytest.approx(half - 0.5 * half)
    assert mine.without_misses == pytest.approx(0.5 - 0.5 * half)
    assert mine.gains["missed"] == pytest.approx(0.5 - 0.5 * half)
    assert mine.gains["background"] == pytest.approx(half - 0.5 * half)


def confusion(case: Case) -> np.ndarray:
    """Count pairs of classes in plain loops."""
    size = len(case.classes)
    counts = np.zeros((size + 1, size + 1), int)
    for mine, true in zip(case.found, case.true, strict=True):
        taken: set[int] = set()
        real = [j for j in range(len(true.boxes)) if not true.crowd[j]]
        for box, label, score in zip(mine.boxes.tolist(), mine.labels.tolist(), mine.scores.tolist(), strict=True):
            if score < 0.3:
                continue
            free = [j for j in real if j not in taken]
            best = max(free, key=lambda j: iou(box, true.boxes[j].tolist()), default=None)
            if best is not None and iou(box, true.boxes[best].tolist()) >= 0.5:
                taken.add(best)
                counts[true.labels[best], label] += 1
            elif not any(c and iou(box, b, True) >= 0.5 for b, c in zip(true.boxes.tolist(), true.crowd, strict=True)):
                counts[size, label] += 1
        for j in set(real) - taken:
            counts[true.labels[j], size] += 1
    return counts


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.3]))
def test_confusion_between_classes(seed: int, crowd: float) -> None:
    case = random_case(seed, crowd=crowd, ties=False, found=25)
    assert np.array_equal(updated(case).scores().confusion.numpy(), confusion(case))
