"""The second stage of two-stage detectors: classify RoIs, move their boxes, predict their masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from widefield.dense.box_head import BoxHead, probabilities
from widefield.dense.boxes import Assigner, Sampler, Size
from widefield.dense.detection_rules import DetectionRules
from widefield.dense.detector import BoxScores, Detections, Targets
from widefield.dense.mask_head import FCNMaskHead
from widefield.dense.roi import RoISample, batched, roi_features, sampled_rois

MASKS_AT_ONCE = 32
"""Masks that are computed together on a CPU: features of all detections would be the largest tensors of inference."""


class RoIHead(nn.Module):
    """A box head and perhaps a mask head on the RoIs of a pyramid (Fast R-CNN, Mask R-CNN).

    Args:
        bbox_head: the box head.
        mask_head: the mask head, or None.
        strides: of the pyramid's levels that give features, finest first.
        assigner: which object a proposal stands for.
        sampler: how many RoIs of an image are learned from.
    """

    def __init__(
        self,
        bbox_head: BoxHead,
        mask_head: FCNMaskHead | None,
        *,
        strides: Sequence[int],
        assigner: Assigner,
        sampler: Sampler,
    ) -> None:
        super().__init__()
        self.bbox_head = bbox_head
        if mask_head is not None:
            self.mask_head = mask_head
        self.strides = tuple(strides)
        self.assigner, self.sampler = assigner, sampler

    @property
    def box_heads(self) -> list[BoxHead]:
        """Return the box head in a list."""
        return [self.bbox_head]

    @property
    def mask_heads(self) -> list[FCNMaskHead]:
        """Return the mask head in a list; empty without masks."""
        return [self.mask_head] if "mask_head" in self._modules else []

    def losses(
        self, maps: Sequence[Tensor], proposals: Sequence[Tensor], targets: Sequence[Targets]
    ) -> dict[str, Tensor]:
        """Return ``loss_cls``, ``loss_bbox`` and, with a mask head, ``loss_mask``.

        Args:
            maps: of the neck, finest first.
            proposals: (M_i, 4) of each image.
            targets: of each image.
        """
        classes = self.bbox_head.num_classes
        samples = [
            sampled_rois(boxes, target, self.assigner, self.sampler, classes)
            for boxes, target in zip(proposals, targets, strict=True)
        ]
        rois = batched([sample.boxes for sample in samples])
        logits, deltas = self.bbox_head(roi_features(maps, rois, self.strides, self.bbox_head.roi_size))
        losses = self.bbox_head.losses(logits, deltas, samples)
        for head in self.mask_heads:
            losses["loss_mask"] = mask_loss(head, maps, samples, targets, self.strides)
        return losses

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
        counts = [len(boxes) for boxes in proposals]
        said = self.bbox_head(roi_features(maps, batched(proposals), self.strides, self.bbox_head.roi_size))
        outputs = (x.split(counts) for x in said)
        found = []
        for boxes, size, logits, deltas in zip(proposals, sizes, *outputs, strict=True):
            kept = rules.of_rois(self.bbox_head.decode(boxes, deltas, size), probabilities(logits))
            found.append(Detections(kept.boxes, kept.scores, kept.labels))
        return with_masks(self.mask_heads, maps, found, self.strides) if self.mask_heads else found

    def box_scores(self, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> BoxScores:
        """Return the scores of given boxes, (M_i, 4) of each image, as RoIs."""
        return roi_scores([self.bbox_head], maps, boxes, self.strides)


def roi_scores(
    heads: Sequence[BoxHead], maps: Sequence[Tensor], boxes: Sequence[Tensor], strides: Sequence[int]
) -> BoxScores:
    """Return the scores of given boxes as RoIs, from the mean of the heads' logits."""
    features = roi_features(maps, batched([own.detach() for own in boxes]), strides, heads[0].roi_size)
    logits = torch.stack([head(features)[0] for head in heads]).mean(0)
    return BoxScores(logits[:, :-1], probabilities(logits))


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
