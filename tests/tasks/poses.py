"""Random poses and people, and the reference that measures them."""

from __future__ import annotations

import contextlib
import io
from typing import Any, NamedTuple

import numpy as np


class Case(NamedTuple):
    """Poses and people of some images; one entry of each list for each image."""

    points: list[np.ndarray]
    """Of the poses, (D, K, 2)."""
    scores: list[np.ndarray]
    labels: list[np.ndarray]
    keypoints: list[np.ndarray]
    """Of the people, (M, K, 3)."""
    areas: list[np.ndarray]
    boxes: list[np.ndarray]
    kinds: list[np.ndarray]
    """Classes of the people, (M,)."""
    crowd: list[np.ndarray]
    sigmas: np.ndarray
    classes: int

    def only(self, keypoint: int) -> Case:
        """Return the same case with one key point."""
        part = slice(keypoint, keypoint + 1)
        return self._replace(
            points=[x[:, part] for x in self.points],
            keypoints=[x[:, part] for x in self.keypoints],
            sigmas=self.sigmas[part],
        )


def random_case(
    seed: int, *, images: int = 4, keypoints: int = 7, classes: int = 1, most: int = 6, found: int = 14,
    side: float = 300, crowd: float = 0.1, unlabeled: float = 0.2, ties: bool = True,
) -> Case:  # fmt: skip
    """Return poses near people: moved, doubled, of other classes, and elsewhere; whole pixels make ties."""
    draw = np.random.default_rng(seed)
    parts: list[list[np.ndarray]] = [[] for _ in range(8)]
    sigmas = draw.uniform(0.025, 0.11, keypoints)
    for _ in range(images):
        count, extra = int(draw.integers(0, most + 1)), int(draw.integers(0, found + 1))
        start, sides = draw.random((count, 2)) * side, np.exp(draw.uniform(1, np.log(side), (count, 2)))
        places = start[:, None] + draw.random((count, keypoints, 2)) * sides[:, None]
        visible = draw.choice([0.0, 1.0, 2.0], (count, keypoints), p=[0.3, 0.2, 0.5])
        visible[draw.random(count) < unlabeled] = 0
        boxes = np.concatenate([start, start + sides], 1)
        kinds = draw.integers(0, classes, count)
        near = draw.integers(0, max(count, 1), extra)
        moves = draw.normal(0, 1, (extra, keypoints, 2)) * draw.choice([0, 1, 4, 20, 90], (extra, 1, 1))
        guess = places[near] + moves if count else draw.random((extra, keypoints, 2)) * side
        if ties:
            places, boxes, guess = places.round(), boxes.round(), guess.round()
        people = np.concatenate([places, visible[..., None]], 2)
        people[visible == 0] = 0
        own = kinds[near] if count else draw.integers(0, classes, extra)
        label = np.where(draw.random(extra) < 0.8, own, draw.integers(0, classes, extra))
        scores = draw.random(extra)
        values = (
            guess, scores.round(1) if ties else scores, label, people,
            (sides[:, 0] * sides[:, 1] * draw.uniform(0.3, 1, count)), boxes, kinds, draw.random(count) < crowd,
        )  # fmt: skip
        for part, value in zip(parts, values, strict=True):
            part.append(value)
    return Case(*parts, sigmas, classes)


def as_coco(case: Case) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the people and the poses in the form of COCO's files."""
    annotations, results = [], []
    for image in range(len(case.points)):
        for row, person in enumerate(case.keypoints[image]):
            left, top, right, bottom = case.boxes[image][row].tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": image + 1, "iscrowd": int(case.crowd[image][row]),
                    "category_id": int(case.kinds[image][row]) + 1, "area": float(case.areas[image][row]),
                    "bbox": [left, top, right - left, bottom - top], "keypoints": person.flatten().tolist(),
                    "num_keypoints": int((person[:, 2] > 0).sum()),
                }
            )  # fmt: skip
        for row, points in enumerate(case.points[image]):
            values = np.concatenate([points, np.ones((len(points), 1))], 1)
            results.append(
                {
                    "image_id": image + 1, "category_id": int(case.labels[image][row]) + 1,
                    "keypoints": values.flatten().tolist(), "score": float(case.scores[image][row]),
                }
            )  # fmt: skip
    images = [{"id": index + 1, "height": 1000, "width": 1000} for index in range(len(case.points))]
    names = [{"id": index + 1, "name": f"class {index}"} for index in range(case.classes)]
    return {"images": images, "annotations": annotations, "categories": names, "info": {}}, results


def reference(case: Case, ranges: list[tuple[float, float]] | None = None) -> Any:
    """Return the evaluated ``COCOeval`` of pycocotools; ``ranges`` are areas in place of COCO's."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, results = as_coco(case)
    with contextlib.redirect_stdout(io.StringIO()):
        data = COCO()
        data.dataset = truth
        data.createIndex()
        found = data.loadRes(results) if results else COCO()
        if not results:
            found.dataset = {**truth, "annotations": []}
            found.createIndex()
        evaluator = COCOeval(data, found, "keypoints")
        evaluator.params.kpt_oks_sigmas = case.sigmas
        if ranges is not None:
            evaluator.params.areaRng = ranges
            evaluator.params.areaRngLbl = [str(index) for index in range(len(ranges))]
        evaluator.evaluate()
        evaluator.accumulate()
        if ranges is None:
            evaluator.summarize()
    return evaluator
