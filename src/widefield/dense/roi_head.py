"""The second stage of two-stage detectors: classify RoIs, move their boxes, predict their masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from widefield.dense.box_head import BoxHead, probabilities
from widefield.dense.boxes import Assigner, Sampler, Size
from widefield.dense.detection_rules import DetectionRules
from widefield.dense.detector import BoxScores, Detections, Targets, size_of
from widefield.dense.layers import widened
from widefield.dense.mask_head import FCNMaskHead
from widefield.dense.roi import RoISample, batched, for_rois, roi_features, sampled_rois

MASKS_AT_ONCE = 32
"""Masks that are computed together on a CPU: features of all detections would be the largest tensors of inference."""


class RoIHead(nn.Module):
    """Box heads and perhaps mask heads on the RoIs of a pyramid: one of each, or one for each stage of a cascade.

    Fast R-CNN and Mask R-CNN have a single stage, whose losses have names without prefix. In a cascade every stage
    works on the boxes of the one before. At test, the logits of all stages are averaged, and the boxes are those of the
    last one; the probabilities of masks are averaged.

    Args:
        bbox_head: the box head, or a list of the stages' heads.
        mask_head: the mask head, or a list; None or an empty list: no masks.
        strides: of the pyramid's levels that give features, finest first.
        assigners: of each stage: which object a proposal stands for.
        sampler: how many RoIs of an image are learned from.
        weights: of each stage's losses.
    """

    def __init__(
        self,
        bbox_head: BoxHead | Sequence[BoxHead],
        mask_head: FCNMaskHead | Sequence[FCNMaskHead] | None,
        *,
        strides: Sequence[int],
        assigners: Sequence[Assigner],
        sampler: Sampler,
        weights: Sequence[float] = (1.0,),
    ) -> None:
        super().__init__()
        self.bbox_head = bbox_head if isinstance(bbox_head, nn.Module) else nn.ModuleList(bbox_head)
        if mask_head:
            self.mask_head = mask_head if isinstance(mask_head, nn.Module) else nn.ModuleList(mask_head)
        self.strides = tuple(strides)
        self.assigners, self.weights, self.sampler = tuple(assigners), tuple(weights), sampler

    @property
    def box_heads(self) -> list[BoxHead]:
        """Return the box heads, first stage first."""
        return _listed(self.bbox_head)

    @property
    def mask_heads(self) -> list[FCNMaskHead]:
        """Return the mask heads, first stage first; empty without masks."""
        return _listed(self._modules.get("mask_head"))

    def box_scores(self, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> BoxScores:
        """Return the scores of given boxes, (M_i, 4) of each image, as RoIs of all stages; the logits are averaged."""
        heads = self.box_heads
        features = roi_features(maps, batched([own.detach() for own in boxes]), self.strides, heads[0].roi_size)
        logits = torch.stack([head(features)[0] for head in heads]).mean(0)
        return BoxScores(logits[:, :-1], probabilities(logits))

    def losses(
        self, maps: Sequence[Tensor], proposals: Sequence[Tensor], targets: Sequence[Targets]
    ) -> dict[str, Tensor]:
        """Return ``loss_cls``, ``loss_bbox`` and with masks ``loss_mask``; of stages as ``s0.loss_cls``, weighted.

        Args:
            maps: of the neck, finest first.
            proposals: (M_i, 4) of each image.
            targets: of each image.
        """
        losses: dict[str, Tensor] = {}
        heads, maps = self.box_heads, for_rois(maps, self.strides)
        boxes = list(proposals)
        for stage, (head, assigner) in enumerate(zip(heads, self.assigners, strict=True)):
            samples = [
                sampled_rois(entry, target, assigner, self.sampler, head.num_classes)
                for entry, target in zip(boxes, targets, strict=True)
            ]
            rois = batched([sample.boxes for sample in samples])
            logits, deltas = head(roi_features(maps, rois, self.strides, head.roi_size))
            found = head.losses(logits, deltas, samples)
            for mask_head in self.mask_heads[stage : stage + 1]:
                found["loss_mask"] = mask_loss(mask_head, maps, samples, targets, self.strides)
            prefix = f"s{stage}." if len(heads) > 1 else ""
            losses |= {f"{prefix}{name}": self.weights[stage] * value for name, value in found.items()}
            if stage + 1 < len(heads):
                boxes = self._next(head, logits, deltas, samples, targets)
        return losses

    @staticmethod
    def _next(
        head: BoxHead, logits: Tensor, deltas: Tensor, samples: Sequence[RoISample], targets: Sequence[Targets]
    ) -> list[Tensor]:
        """Return the boxes that the next stage learns from, without those that were objects themselves."""
        counts = [len(sample.boxes) for sample in samples]
        boxes = []
        for sample, target, own, moved in zip(
            samples, targets, logits.split(counts), deltas.split(counts), strict=True
        ):
            refined = head.refined(sample.boxes, own, moved, size_of(target), sample.labels)
            boxes.append(refined[~sample.given])
        return boxes

    def detect(
        self, maps: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sequence[Size], rules: DetectionRules
    ) -> list[Detections]:
        """Return the detections of each image.

        Args:
            maps: of the neck, finest first.
            proposals: (M_i, 4) of each image.
            sizes: (height, width) of each image.
            rules: which boxes become detections.
        """
        heads, boxes, counts = self.box_heads, list(proposals), [len(entry) for entry in proposals]
        maps = for_rois(maps, self.strides)
        said: list[Tensor] = []
        for stage, head in enumerate(heads):
            logits, deltas = head(roi_features(maps, batched(boxes), self.strides, head.roi_size))
            said.append(widened(logits))
            outputs = list(zip(boxes, logits.split(counts), deltas.split(counts), sizes, strict=True))
            if stage + 1 < len(heads):
                boxes = [head.refined(*entry) for entry in outputs]
        scores = probabilities(torch.stack(said).mean(0)).split(counts)
        kept = [
            rules.of_rois(head.decode(entry, moved, size), own)
            for (entry, _, moved, size), own in zip(outputs, scores, strict=True)
        ]
        found = [Detections(entry.boxes, entry.scores, entry.labels) for entry in kept]
        return with_masks(self.mask_heads, maps, found, self.strides) if self.mask_heads else found


def _listed(heads: Any) -> list[Any]:
    """Return one head, a list of heads or None as a list."""
    return [] if heads is None else list(heads) if isinstance(heads, nn.ModuleList) else [heads]


def mask_loss(
    head: FCNMaskHead,
    maps: Sequence[Tensor],
    samples: Sequence[RoISample],
    targets: Sequence[Targets],
    strides: Sequence[int],
) -> Tensor:
    """Return the loss of a mask head on the RoIs that stand for objects."""
    rois = batched([sample.positive for sample in samples])
    return head.loss(head(roi_features(maps, rois, strides, head.roi_size)), samples, targets)


def with_masks(
    heads: Sequence[FCNMaskHead], maps: Sequence[Tensor], found: Sequence[Detections], strides: Sequence[int]
) -> list[Detections]:
    """Return detections with masks, the mean probabilities of the heads."""
    rois, labels = batched([entry.boxes for entry in found]), torch.cat([entry.labels for entry in found])
    step = MASKS_AT_ONCE if rois.device.type == "cpu" else max(1, len(rois))
    done = []
    for some, own in zip(rois.split(step), labels.split(step), strict=True):
        features = roi_features(maps, some, strides, heads[0].roi_size)
        done.append(torch.stack([head.probabilities(features, own) for head in heads]).mean(0))
    masks = torch.cat(done)
    parts = masks.split([len(entry.labels) for entry in found])
    return [entry._replace(masks=part) for entry, part in zip(found, parts, strict=True)]
