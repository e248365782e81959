"""Random detections and objects, and the reference that measures them."""

from __future__ import annotations

import contextlib
import io
from typing import Any, NamedTuple

import numpy as np
import torch

from widefield.dense import Detections
from widefield.tasks import CocoMetric, TrueObjects


class Case(NamedTuple):
    """Detections and objects of some images."""

    found: list[Detections]
    true: list[TrueObjects]
    classes: tuple[str, ...]


def random_case(
    seed: int, *, images: int = 4, classes: int = 3, most: int = 6, found: int = 12, side: int = 160,
    crowd: float = 0.2, masks: bool = False, dtype: torch.dtype = torch.float64, ties: bool = True,
) -> Case:  # fmt: skip
    """Return detections near objects: moved, doubled, of other classes, and elsewhere; integer boxes make ties."""
    draw = np.random.default_rng(seed)
    all_found, all_true = [], []
    for _ in range(images):
        height, width = (int(x) for x in draw.integers(side // 2, side + 1, 2))
        count, extra = int(draw.integers(0, most + 1)), int(draw.integers(0, found + 1))
        boxes = _boxes(draw, count, height, width, ties)
        labels = draw.integers(0, classes, count)
        near = draw.integers(0, max(count, 1), extra)
        moved = boxes[near] + draw.normal(0, 1, (extra, 4)) * draw.choice([0, 2, 8, 30], (extra, 1)) if count else None
        guess = _boxes(draw, extra, height, width, ties) if moved is None else moved
        if ties:
            guess = guess.round()
        guess[:, 2:] = np.maximum(guess[:, 2:], guess[:, :2] + 1)
        guess = guess.clip(0, [width, height, width, height])
        guess[:, :2] = np.minimum(guess[:, :2], [width - 1, height - 1])
        guess[:, 2:] = np.maximum(guess[:, 2:], guess[:, :2] + 1)
        own = labels[near] if count else draw.integers(0, classes, extra)
        label = np.where(draw.random(extra) < 0.7, own, draw.integers(0, classes, extra))
        scores = draw.random(extra)
        scores = np.sort(scores.round(1) if ties else scores)[::-1].copy()
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) * draw.uniform(0.4, 1, count)
        all_true.append(
            TrueObjects(
                boxes=torch.tensor(boxes).to(dtype), labels=torch.tensor(labels), size=(height, width),
                crowd=torch.tensor(draw.random(count) < crowd), area=torch.tensor(areas),
                masks=_ellipses(boxes, height, width) if masks else None,
            )
        )  # fmt: skip
        all_found.append(
            Detections(
                torch.tensor(guess).to(dtype).reshape(-1, 4), torch.tensor(scores), torch.tensor(label).long(),
                _ellipses(guess, height, width) if masks else None,
            )
        )  # fmt: skip
    return Case(all_found, all_true, tuple(f"class {index}" for index in range(classes)))


def _boxes(draw: np.random.Generator, count: int, height: int, width: int, whole: bool) -> np.ndarray:
    sides = np.exp(draw.uniform(np.log(4), np.log(min(height, width)), (count, 2)))
    start = draw.random((count, 2)) * ([width, height] - sides)
    boxes = np.concatenate([start, start + sides], 1)
    if whole:
        boxes = boxes.round()
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    return boxes


def _ellipses(boxes: np.ndarray, height: int, width: int) -> torch.Tensor:
    y, x = np.mgrid[:height, :width] + 0.5
    masks = np.zeros((len(boxes), height, width), bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[:] = ((x - (left + right) / 2) * 2 / (right - left)) ** 2 + (
            (y - (top + bottom) / 2) * 2 / (bottom - top)
        ) ** 2 <= 1
    return torch.from_numpy(masks)


def updated(case: Case, **options: Any) -> CocoMetric:
    """Return a metric of all images of a case."""
    metric = CocoMetric(case.classes, sync_on_compute=False, **options)
    metric.update(case.found, case.true)
    return metric


def as_coco(case: Case, *, masks: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the objects and the detections in the form of COCO's files."""
    from pycocotools import mask as files

    annotations, results = [], []
    for image, (found, true) in enumerate(zip(case.found, case.true, strict=True), start=1):
        for row in range(len(true.boxes)):
            entry = {
                "id": len(annotations) + 1, "image_id": image, "category_id": int(true.labels[row]) + 1,
                "bbox": _xywh(true.boxes[row]), "area": float(true.area[row]), "iscrowd": int(true.crowd[row]),
            }  # fmt: skip
            if masks:
                entry["segmentation"] = files.encode(np.asfortranarray(true.masks[row].numpy().astype(np.uint8)))
            annotations.append(entry)
        for row in range(len(found.boxes)):
            result = {
                "image_id": image, "category_id": int(found.labels[row]) + 1, "score": float(found.scores[row]),
            }  # fmt: skip
            if masks:
                result["segmentation"] = files.encode(np.asfortranarray(found.masks[row].numpy().astype(np.uint8)))
            else:
                result["bbox"] = _xywh(found.boxes[row])
            results.append(result)
    sizes = [true.size for true in case.true]
    images = [{"id": i, "height": height, "width": width} for i, (height, width) in enumerate(sizes, start=1)]
    names = [{"id": index, "name": name} for index, name in enumerate(case.classes, start=1)]
    return {"images": images, "annotations": annotations, "categories": names, "info": {}}, results


def _xywh(box: torch.Tensor) -> list[float]:
    left, top, right, bottom = box.double().tolist()
    return [left, top, right - left, bottom - top]


def reference(case: Case, *, masks: bool = False, fast: bool = False, most: int = 100) -> Any:
    """Return the evaluated ``COCOeval`` of pycocotools, or of faster-coco-eval."""
    if fast:
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as Evaluator
    else:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval as Evaluator
    truth, results = as_coco(case, masks=masks)
    with contextlib.redirect_stdout(io.StringIO()):
        if fast:
            data = COCO(truth)
        else:
            data = COCO()
            data.dataset = truth
            data.createIndex()
        found = data.loadRes(results) if results else COCO()
        if not results and not fast:
            found.dataset = {**truth, "annotations": []}
            found.createIndex()
        evaluator = Evaluator(data, found, "segm" if masks else "bbox")
        evaluator.params.maxDets = [1, 10, most]
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator
