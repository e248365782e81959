"""Slow twins of the functions of boxes: Python loops over plain numbers, written from the papers' definitions."""

from __future__ import annotations

from collections.abc import Sequence

Box = Sequence[float]


def overlap(a: Box, b: Box, mode: str = "iou") -> float:
    """Return the overlap of two boxes."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    shared, own, other = width * height, (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])
    whole = max(own if mode == "iof" else own + other - shared, 1e-6)
    if mode != "giou":
        return shared / whole
    hull = max((max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1])), 1e-6)
    return shared / whole - (hull - whole) / hull


def assign(
    boxes: Sequence[Box],
    objects: Sequence[Box],
    crowd: Sequence[Box],
    *,
    positive: float,
    negative: float,
    minimum: float,
    low_quality: bool,
    crowd_part: float | None,
) -> tuple[list[int], list[float]]:
    """Return for each box the object (-1: background, -2: ignored), and the best IoU."""
    if not objects:
        return [-1] * len(boxes), [0.0] * len(boxes)
    table = [[overlap(box, entry) for entry in objects] for box in boxes]
    for row, box in enumerate(boxes):
        if crowd_part and any(overlap(box, region, "iof") > crowd_part for region in crowd):
            table[row] = [-1.0] * len(objects)
    found = []
    for row in table:
        best = max(row)
        found.append(row.index(best) if best >= positive else -1 if 0 <= best < negative else -2)
    if low_quality and boxes:
        for place in range(len(objects)):
            largest = max(row[place] for row in table)
            if largest >= minimum:
                for number, row in enumerate(table):
                    if row[place] == largest:
                        found[number] = place
    return found, [max(row) for row in table]


def nms(boxes: Sequence[Box], scores: Sequence[float], labels: Sequence[int], threshold: float) -> list[int]:
    """Return the places of the boxes that are left, best first; of equal scores, the first comes first."""
    kept: list[int] = []
    for place in sorted(range(len(boxes)), key=lambda place: (-scores[place], place)):
        rivals = (other for other in kept if labels[other] == labels[place])
        if all(overlap(boxes[place], boxes[other]) <= threshold for other in rivals):
            kept.append(place)
    return kept
