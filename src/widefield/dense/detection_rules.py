"""Which boxes become detections: the rules of test time, which all detectors share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from widefield import _checks
from widefield.dense.boxes import Kept, nms_by_label, nms_per_class


@dataclass(frozen=True)
class DetectionRules:
    """Which boxes become detections.

    Args:
        score_threshold: scores of classes must exceed it. FCOS multiplies those that do by the centerness.
        nms_threshold: largest IoU of two detections of one class.
        max_per_image: number of detections to keep.
        candidates: number of scores that a one-stage detector keeps per level. Two-stage detectors do not read it.

    Raises:
        TypeError, ValueError: a rule is out of range.
    """

    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    max_per_image: int = 100
    candidates: int = 1000

    def __post_init__(self) -> None:
        _checks.number("score_threshold", self.score_threshold, maximum=1.0)
        _checks.number("nms_threshold", self.nms_threshold, maximum=1.0)
        _checks.integer("max_per_image", self.max_per_image)
        _checks.integer("candidates", self.candidates)

    def of_rois(self, boxes: Tensor, scores: Tensor) -> Kept:
        """Return the detections of one image from boxes (R, 4) or (R, K, 4) and scores (R, K)."""
        return nms_per_class(
            boxes,
            scores,
            score_threshold=self.score_threshold,
            nms_threshold=self.nms_threshold,
            max_per_image=self.max_per_image,
        )

    def of_levels(self, levels: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Kept:
        """Return the detections of one image; boxes without area are none.

        Args:
            levels: candidates of each level: boxes (P, 4), scores (P,) and labels (P,).
        """
        boxes, scores, labels = (torch.cat(part) for part in zip(*levels, strict=True))
        whole = (boxes[:, 2:] > boxes[:, :2]).all(1).nonzero()[:, 0]
        places = whole[nms_by_label(boxes[whole], scores[whole], labels[whole], self.nms_threshold)]
        places = places[: self.max_per_image]
        return Kept(boxes[places], scores[places], labels[places], places)
