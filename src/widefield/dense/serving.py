"""Detectors as graphs: the rules of test time on whole batches, with outputs of fixed shapes.

In eager mode every image has its own number of proposals and detections. Exporters need shapes that do not depend on
the data, for any batch and image size. Here each step keeps a fixed number of boxes, marks those that do not count by
their score, and gives the same detections.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from widefield import _checks
from widefield.dense.anchors import points
from widefield.dense.backbone import FeatureMaps
from widefield.dense.box_head import probabilities
from widefield.dense.boxes import Size, clip, from_distances, nms_by_label
from widefield.dense.detection_rules import DetectionRules
from widefield.dense.detector import Detections, Detector, enlarged
from widefield.dense.fcos import FCOSHead
from widefield.dense.layers import widened
from widefield.dense.retinanet import RetinaHead
from widefield.dense.roi import roi_levels
from widefield.dense.roi_head import RoIHead
from widefield.dense.rpn import RPNHead

NMS = ("inside", "outside")
"""Where the last non-maximum suppression is: see :class:`ServedDetector`."""

_LEAST = torch.finfo(torch.float32).min
_NONE = _LEAST / 2
"""Scores below it mark boxes that do not count."""


@torch.library.custom_op("widefield::nms_mask", mutates_args=())
def nms_mask(boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float) -> Tensor:
    """Return which boxes non-maximum suppression keeps, bool (B, K, R): ONNX's operator with an output of fixed shape.

    Args:
        boxes: (B, R, 4) xyxy, shared by the K classes.
        scores: (B, K, R).
        iou_threshold: largest IoU of two kept boxes of one class.
        score_threshold: scores must exceed it.
    """
    kept = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    for own, values, marks in zip(boxes, scores, kept, strict=True):
        labels, places = (values > score_threshold).nonzero().unbind(1)
        best = nms_by_label(own[places], values[labels, places], labels, iou_threshold)
        marks[labels[best], places[best]] = True
    return kept


@nms_mask.register_fake
def _(boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float) -> Tensor:
    return torch.empty(scores.shape, dtype=torch.bool, device=scores.device)


class ServedDetector(nn.Module):
    """A detector whose outputs have fixed shapes; parts and weights are those of the model.

    The whole batch counts as image: boxes are in its pixels, and clipped to its size. In graphs for any size, images
    with a side below the backbone's largest stride, usually 32, must be padded to it; models do that themselves. R is
    the number of candidates of an image, D the most detections, K the number of classes.

    - ``nms="inside"``: ``boxes`` (N, D, 4), ``scores`` (N, D), falling and then 0, ``labels`` int64 (N, D), ``count``
      int64 (N,), and ``masks`` (N, D, S, S) from models that have them.
    - ``nms="outside"``: ``boxes`` (N, R, 4), or (N, R, K, 4) where each class has its own, and ``scores`` (N, R, K), 0
      for all that do not exceed the score threshold (of FCOS: before they are multiplied by the centerness).
      The suppression and the choice of the best are up to the caller. Two-stage detectors still have that of proposals
      inside.

    Args:
        model: a detector of this package.
        nms: "inside" or "outside".

    Raises:
        ValueError: an unknown ``nms``; "outside" with masks, which are computed for the final boxes.
    """

    backbone: FeatureMaps
    neck: nn.Module
    rpn_head: RPNHead
    roi_head: RoIHead
    bbox_head: RetinaHead | FCOSHead

    def __init__(self, model: Detector, nms: str = "inside") -> None:
        super().__init__()
        self.nms = _checks.choice("nms", nms, NMS)
        if nms == "outside" and model.has_masks:
            raise ValueError(
                "nms='outside' is for models without masks, as masks are computed for the boxes that are left: pass "
                "nms='inside'."
            )
        for name, child in model.named_children():
            self.add_module(name, child)
        self.rules = model.rules
        self.train(model.training)

    @property
    def largest_stride(self) -> int:
        """Return the stride of the coarsest map."""
        head = self.rpn_head if "rpn_head" in self._modules else self.bbox_head
        return int(max(head.strides if isinstance(head, FCOSHead) else head.anchors.strides))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the outputs above for images (N, C, H, W)."""
        size = images.shape[2], images.shape[3]
        maps = self.neck(self.backbone(enlarged(images, max(self.backbone.strides))))
        if "roi_head" in self._modules:
            boxes, scores = self._of_rois(maps, size)
        else:
            boxes, scores = dense_candidates(self.bbox_head, maps, size, self.rules)
        if self.nms == "outside":
            return {"boxes": boxes, "scores": scores}
        found = best_of(boxes, scores, self.rules)
        heads = self.roi_head.mask_heads if "roi_head" in self._modules else []
        if heads:
            labels = found["labels"].flatten()
            features = features_of(maps, found["boxes"], self.roi_head.strides, heads[0].roi_size)
            masks = torch.stack([head.of_labels(head(features), labels).sigmoid() for head in heads]).mean(0)
            found["masks"] = masks.unflatten(0, (-1, found["labels"].shape[1]))
        return found

    def detections(self, outputs: Mapping[str, Tensor]) -> list[Detections]:
        """Return the detections of each image from outputs of this module or of its exported file."""
        if self.nms == "inside":
            return [
                Detections(
                    outputs["boxes"][i, :count],
                    outputs["scores"][i, :count],
                    outputs["labels"][i, :count],
                    outputs["masks"][i, :count] if "masks" in outputs else None,
                )
                for i, count in enumerate(outputs["count"].tolist())
            ]
        rules = replace(self.rules, score_threshold=0.0)  # candidates exceed it already
        kept = [rules.of_rois(*pair) for pair in zip(outputs["boxes"], outputs["scores"], strict=True)]
        return [Detections(found.boxes, found.scores, found.labels) for found in kept]

    def _of_rois(self, maps: Sequence[Tensor], size: Size) -> tuple[Tensor, Tensor]:
        """Return the boxes and scores of the second stage."""
        boxes, known = proposals(self.rpn_head, maps, size)
        heads = self.roi_head.box_heads
        said: list[Tensor] = []
        for stage, head in enumerate(heads):
            logits, deltas = head(features_of(maps, boxes, self.roi_head.strides, head.roi_size))
            said.append(widened(logits))
            flat = boxes.flatten(0, 1)
            if stage + 1 < len(heads):
                boxes = head.refined(flat, logits, deltas, size).unflatten(0, (-1, boxes.shape[1]))
        moved = head.decode(flat, deltas, size).unflatten(0, (-1, boxes.shape[1]))
        scores = probabilities(torch.stack(said).mean(0)).unflatten(0, (-1, boxes.shape[1]))
        return moved, torch.where(known[..., None] & (scores > self.rules.score_threshold), scores, 0.0)


# Steps


def proposals(head: RPNHead, maps: Sequence[Tensor], size: Size) -> tuple[Tensor, Tensor]:
    """Return the proposals of each image, (N, P, 4), and which of them count, bool (N, P).

    Args:
        head: of the region proposal network.
        maps: of the neck, finest first.
        size: (height, width) of the images.
    """
    limits, outputs = head.for_testing, head(maps)
    boxes, logits = [], []
    for anchors, scores, deltas in zip(head.anchors.grid(outputs.objectness), *outputs, strict=True):
        values, (reference, delta) = _best(
            widened(_by_anchor(scores, 1)).flatten(1), limits.before_nms, anchors, _by_anchor(deltas, 4)
        )
        boxes.append(clip(head.coder.decode(reference, delta), size))
        whole = ((boxes[-1][..., 2:] - boxes[-1][..., :2]) > limits.min_side).all(-1)
        logits.append(torch.where(whole, values, _LEAST))
    by_level, ranks = torch.stack(boxes, 1), torch.stack(logits, 1)
    kept = nms_mask(by_level.flatten(0, 1), ranks.flatten(0, 1)[:, None], limits.nms_threshold, _NONE)
    ranks = torch.where(kept.view_as(ranks), ranks, _LEAST).flatten(1)
    best = ranks.topk(min(limits.max_per_image, ranks.shape[1]))
    return _rows(by_level.flatten(1, 2), best.indices), best.values > _NONE


def dense_candidates(
    head: RetinaHead | FCOSHead, maps: Sequence[Tensor], size: Size, rules: DetectionRules
) -> tuple[Tensor, Tensor]:
    """Return the boxes of a one-stage detector before suppression, (N, R, 4), and their scores, (N, R, K).

    Each box has a score for one class, and 0 for the others.

    Args:
        head: predicts at every position.
        maps: of the neck, finest first.
        size: (height, width) of the images.
        rules: the score threshold, and the number of candidates to keep per level.
    """
    boxes, scores = [], []
    outputs, classes = head(maps), head.num_classes
    if isinstance(head, FCOSHead):
        places = points(outputs.logits, head.strides, head.point_offset)
    else:
        places = head.anchors.grid(outputs.logits)
    for reference, *level in zip(places, *outputs, strict=True):
        widths = (classes, 4, 1)[: len(level)]
        logits, *others = (widened(_by_anchor(x, width)) for x, width in zip(level, widths, strict=True))
        values = logits.sigmoid().flatten(1)
        values = torch.where(values > rules.score_threshold, values, 0.0)
        values, (label, at, moved, *central) = _best(values, rules.candidates, None, reference, *others, per=classes)
        if isinstance(head, FCOSHead):
            found = from_distances(at, moved, size)
            values = values * central[0][..., 0].sigmoid()
        else:
            found = head.coder.decode(at, moved, size)
        whole = (found[..., 2:] > found[..., :2]).all(-1)
        own = label[..., None] == torch.arange(classes, device=label.device)
        boxes.append(found)
        scores.append(torch.where(own & whole[..., None], values[..., None], 0.0))
    return torch.cat(boxes, 1), torch.cat(scores, 1)


def best_of(boxes: Tensor, scores: Tensor, rules: DetectionRules) -> dict[str, Tensor]:
    """Return the best detections: the outputs of :class:`ServedDetector` with the suppression inside.

    Args:
        boxes: (N, R, 4) or (N, R, K, 4).
        scores: (N, R, K); 0 for what does not count, as what does not exceed the score threshold.
        rules: the largest IoU of two detections of one class, and D.
    """
    rows, classes = scores.shape[1:]
    count = rules.max_per_image
    values = scores.transpose(1, 2)
    if boxes.ndim == 4:
        flat = boxes.transpose(1, 2).flatten(0, 1)
        kept = nms_mask(flat, values.flatten(0, 1)[:, None], rules.nms_threshold, 0.0).view_as(values)
    else:
        kept = nms_mask(boxes, values, rules.nms_threshold, 0.0)
    ranks = torch.where(kept, values, 0.0).flatten(1)
    best = F.pad(ranks, (0, max(0, count - rows * classes))).topk(count)
    places = best.indices.clamp(max=rows * classes - 1)
    labels = places // rows
    shared = boxes.ndim == 3
    chosen = _rows(boxes if shared else boxes.transpose(1, 2).flatten(1, 2), places % rows if shared else places)
    known = best.values > 0
    return {
        "boxes": torch.where(known[..., None], chosen, 0.0),
        "scores": best.values,
        "labels": torch.where(known, labels, 0),
        "count": known.sum(1),
    }


def features_of(maps: Sequence[Tensor], boxes: Tensor, strides: Sequence[int], side: int) -> Tensor:
    """Return the features in boxes (N, R, 4), each from the level that fits its area: (N * R, C, side, side).

    RoIAlign runs on all boxes at every level, with a single cell in place of boxes of other levels, which costs little.
    """
    count = boxes.shape[1]
    image = torch.arange(boxes.shape[0], device=boxes.device).to(boxes)[:, None, None].expand(-1, count, 1)
    rois = torch.cat((image, boxes), 2).flatten(0, 1)
    levels = roi_levels(rois, strides)
    found = maps[0].new_zeros(())
    for level, (x, stride) in enumerate(zip(maps, strides, strict=False)):
        own = (levels == level)[:, None]
        cell = torch.cat((rois[:, :1], torch.zeros_like(rois[:, :2]), torch.full_like(rois[:, :2], stride)), 1)
        part = roi_align(x, torch.where(own, rois, cell), side, 1 / stride, sampling_ratio=0, aligned=True)
        found = torch.where(own[..., None, None], part, found)
    return found


def _by_anchor(outputs: Tensor, values: int) -> Tensor:
    """(N, A * values, H, W) -> (N, H * W * A, values)."""
    return outputs.permute(0, 2, 3, 1).reshape(outputs.shape[0], -1, values)


def _best(scores: Tensor, count: int, *rows: Tensor | None, per: int = 1) -> tuple[Tensor, list[Tensor]]:
    """Return the ``count`` largest scores of each image, and the rows that belong to them.

    Scores and rows are padded, so that the result has this length on small maps, too. The padding has the lowest score.

    Args:
        scores: (N, P * per).
        count: how many.
        rows: (P, ...) or (N, P, ...) each; None stands for the remainder of a score's position, its class.
        per: scores in a row.
    """
    best = F.pad(scores, (0, count), value=_LEAST if per == 1 else 0.0).topk(count)
    places, found = best.indices // per, []
    for row in rows:
        if row is None:
            found.append(best.indices % per)
            continue
        padded = F.pad(row, (0, 0, 0, count))
        found.append(padded[places] if row.ndim == 2 else _rows(padded, places))
    return best.values, found


def _rows(x: Tensor, places: Tensor) -> Tensor:
    """Return the rows of x (N, P, C) at places (N, Q): (N, Q, C)."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))
