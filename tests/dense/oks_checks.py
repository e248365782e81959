"""Checks of the fixtures of pose estimation: object keypoint similarity, COCO's figures, suppression."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dense.rules import Differences
from widefield._coco.keypoints import oks, oks_nms
from widefield.data import Skeleton
from widefield.tasks import FoundPoses, People, PoseMetric, TruePoses

Document = Mapping[str, Any]

SINGLE = 1e-6
"""The reference keeps similarities of the suppression in float32."""
_FIGURES = {
    "AP": "ap", "AP50": "ap50", "AP75": "ap75", "AP_M": "ap_medium", "AP_L": "ap_large",
    "AR": "ar", "AR50": "ar50", "AR75": "ar75", "AR_M": "ar_medium", "AR_L": "ar_large",
}  # fmt: skip
"""Name in the file -> in ``PoseScores.figures``."""
_COUNTS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def check_oks(document: Document, differences: Differences) -> None:
    """Check the matrices of similarities, and the figures of all images."""
    entry = document["oks"]
    known = ("sigmas", "ground_truth", "detections", "oks_matrices_by_image_sorted_by_score", "stats")
    differences.fields("oks", entry, known)
    sigmas = np.array(entry["sigmas"])
    truth = entry["ground_truth"]
    categories = [one["id"] for one in truth["categories"]]
    skeleton = Skeleton(tuple(map(str, range(len(sigmas)))), tuple(range(len(sigmas))), tuple(sigmas.tolist()))
    metric = PoseMetric([str(one) for one in categories], skeleton, nms_threshold=1.0)
    for image in truth["images"]:
        found, annotated = (_of(image, part, categories) for part in (entry["detections"], truth["annotations"]))
        preds, people = _poses(found, image["id"], len(sigmas)), _people(annotated, len(sigmas))
        metric.update(preds, _compared(preds, people))
        rows = entry["oks_matrices_by_image_sorted_by_score"].get(str(image["id"]))
        if rows is not None:
            best = preds.points[torch.argsort(preds.scores, descending=True, stable=True)].numpy()
            parts = (part.numpy() for part in (people.keypoints, people.areas, people.boxes))
            differences.numbers(f"oks.matrix of image {image['id']}", oks(best, *parts, sigmas).tolist(), rows)
    figures, names = metric.scores().figures, entry["stats_order"].split(", ")
    differences.equal("oks.stats_order", sorted(names), sorted(_FIGURES))
    values = np.array([figures[_FIGURES[name]] for name in names])
    differences.numbers("oks.stats", np.where(np.isnan(values), -1.0, values), entry["stats"])


def check_nms(document: Document, differences: Differences) -> None:
    """Check which of the first detections are left, and how much they are like the first."""
    entry = document["oks_nms"]
    rule = re.fullmatch(r"the first (\w+) detections, area ([\d.]+), threshold ([\d.]+)", entry["on"])
    if rule is None or rule[1] not in _COUNTS:
        differences.lines.append(f"oks_nms.on: this rule is unknown: {entry['on']!r}")
        return
    count, area = _COUNTS.index(rule[1]) + 2, float(rule[2])
    found = document["oks"]["detections"][:count]
    points, sigmas = _keypoints(found, len(document["oks"]["sigmas"])), np.array(document["oks"]["sigmas"])
    scores, areas = np.array([one["score"] for one in found]), np.full(count, area)
    kept = oks_nms(points[..., :2].numpy(), scores, areas, sigmas, float(rule[3]))
    differences.equal("oks_nms.keep", kept.tolist(), entry["keep"])
    for name in (name for name in entry if name.startswith("oks_of_")):
        one, *others = map(int, re.findall(r"\d+", name))
        alike = oks(points[others].numpy(), points[[one]].numpy(), areas[:1], np.zeros((1, 4)), sigmas)
        differences.numbers(f"oks_nms.{name}", alike[:, 0].tolist(), entry[name], SINGLE)
    differences.fields("oks_nms", entry, ("keep", *(name for name in entry if name.startswith("oks_of_"))))


def _of(image: Document, entries: Sequence[Document], categories: Sequence[int]) -> list[dict[str, Any]]:
    """Return the entries of an image, with the place of their category."""
    return [{**one, "label": categories.index(one["category_id"])} for one in entries if one["image_id"] == image["id"]]


def _keypoints(entries: Sequence[Document], count: int) -> torch.Tensor:
    return torch.tensor([one["keypoints"] for one in entries], dtype=torch.float64).reshape(len(entries), count, 3)


def _poses(entries: Sequence[Document], image: int, count: int) -> FoundPoses:
    """Return the poses in an image; without any, one that does not count, which brings the people."""
    rows = max(len(entries), 1)
    points = _keypoints(entries, count)[..., :2] if entries else torch.zeros(1, count, 2, dtype=torch.float64)
    return FoundPoses(
        points=points,
        scores=torch.tensor([one["score"] for one in entries] or [torch.nan], dtype=torch.float64),
        boxes=torch.zeros(rows, 4),
        areas=torch.ones(rows),
        labels=torch.tensor([one["label"] for one in entries] or [0]),
        images=torch.full((rows,), image),
    )


def _people(entries: Sequence[Document], count: int) -> People:
    boxes = torch.tensor([one["bbox"] for one in entries], dtype=torch.float64).reshape(-1, 4)
    return People(
        keypoints=_keypoints(entries, count),
        boxes=torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1),
        areas=torch.tensor([one["area"] for one in entries], dtype=torch.float64),
        labels=torch.tensor([one["label"] for one in entries], dtype=torch.int64),
        crowd=torch.tensor([bool(one["iscrowd"]) for one in entries], dtype=torch.bool),
    )


def _compared(preds: FoundPoses, people: People) -> TruePoses:
    nobody = People(*(getattr(people, name)[:0] for name in ("keypoints", "boxes", "areas", "labels", "crowd")))
    shape = (*preds.points.shape[:2], 3)
    return TruePoses(torch.zeros(shape), torch.zeros(shape[0]), [people, *[nobody] * (shape[0] - 1)])
