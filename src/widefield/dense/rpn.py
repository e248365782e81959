"""The region proposal network: where objects may be, from anchors at every position of a feature pyramid.

Paper: Ren, He, Girshick, Sun, "Faster R-CNN", NeurIPS 2015, section 3.1; on a pyramid: Lin et al., "Feature Pyramid
Networks for Object Detection", CVPR 2017, section 4.1. Names, targets and losses are those of OpenMMLab's ``RPNHead``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widefield import _checks
from widefield.dense.anchors import Anchors, by_anchor
from widefield.dense.boxes import Assigner, BoxCoder, Sample, Sampler, Size, clip, nms_by_label
from widefield.dense.detection_losses import EPS, differences, mean_over_processes, sums_by_level
from widefield.dense.detector import Targets, size_of
from widefield.dense.layers import observed, widened


@dataclass(frozen=True)
class ProposalLimits:
    """How many proposals are kept.

    Args:
        before_nms: anchors of each level that are kept, by score.
        max_per_image: proposals of an image, of all levels together.
        nms_threshold: largest IoU of two proposals of one level.
        min_side: width and height must exceed it, in pixels.
    """

    before_nms: int = 1000
    max_per_image: int = 1000
    nms_threshold: float = 0.7
    min_side: float = 0.0

    def __post_init__(self) -> None:
        _checks.integer("before_nms", self.before_nms)
        _checks.integer("max_per_image", self.max_per_image)
        _checks.number("nms_threshold", self.nms_threshold, maximum=1.0)
        _checks.number("min_side", self.min_side)


class Proposals(NamedTuple):
    """The proposals of one image.

    Attributes:
        boxes: (P, 4) xyxy, within the image.
        scores: (P,), probabilities of an object, falling.
    """

    boxes: Tensor
    scores: Tensor


class RPNOutputs(NamedTuple):
    """What the head says at every position, per level.

    Attributes:
        objectness: logits (N, A, H_i, W_i), A anchors per position.
        deltas: (N, 4 A, H_i, W_i), differences between boxes and anchors.
    """

    objectness: list[Tensor]
    deltas: list[Tensor]


class RPNHead(nn.Module):
    """The head of a region proposal network, shared by all levels.

    Args:
        in_channels: channels of every map.
        channels: of the convolution before the outputs; None: ``in_channels``.
        anchors: at every position.
        coder: how differences are scaled.
        assigner: which anchors stand for objects.
        sampler: which of them are used for training.
        allowed_border: anchors that leave the image by more pixels are not used for training. None: all are used.
        smooth_l1_beta: of the smooth L1 loss of boxes. None: L1.
        for_training: limits of the proposals that heads are trained on.
        for_testing: limits of the proposals in evaluation.
    """

    def __init__(
        self,
        in_channels: int = 256,
        *,
        channels: int | None = None,
        anchors: Anchors | None = None,
        coder: BoxCoder | None = None,
        assigner: Assigner | None = None,
        sampler: Sampler | None = None,
        allowed_border: float | None = None,
        smooth_l1_beta: float | None = None,
        for_training: ProposalLimits | None = None,
        for_testing: ProposalLimits | None = None,
    ) -> None:
        super().__init__()
        width = in_channels if channels is None else channels
        self.anchors = anchors or Anchors()
        self.coder = coder or BoxCoder()
        self.assigner = assigner or Assigner()
        self.sampler = sampler or Sampler()
        self.allowed_border = None if allowed_border is None else _checks.number("allowed_border", allowed_border)
        self.smooth_l1_beta = None if smooth_l1_beta is None else _checks.number("smooth_l1_beta", smooth_l1_beta)
        self.for_training = for_training or ProposalLimits(before_nms=2000)
        self.for_testing = for_testing or ProposalLimits()
        self.rpn_conv = nn.Conv2d(_checks.integer("in_channels", in_channels), width, 3, padding=1)
        self.rpn_cls = nn.Conv2d(width, self.anchors.per_cell, 1)
        self.rpn_reg = nn.Conv2d(width, 4 * self.anchors.per_cell, 1)
        for conv in (self.rpn_conv, self.rpn_cls, self.rpn_reg):
            nn.init.normal_(conv.weight, std=0.01)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

    def forward(self, maps: Sequence[Tensor]) -> RPNOutputs:
        """Maps (N, in_channels, H_i, W_i), finest first -> logits and differences of every level."""
        outputs = RPNOutputs([], [])
        for x in maps:
            hidden = F.relu(self.rpn_conv(x), inplace=not observed(self.rpn_conv))
            outputs.objectness.append(self.rpn_cls(hidden))
            outputs.deltas.append(self.rpn_reg(hidden))
        return outputs

    # Training

    def losses(self, outputs: RPNOutputs, targets: Sequence[Targets]) -> dict[str, Tensor]:
        """Return the scalars ``loss_rpn_cls`` and ``loss_rpn_bbox``.

        Both are sums divided by the number of sampled anchors of the batch; with several processes, by their mean.

        Args:
            outputs: of :meth:`forward`.
            targets: one per image; crowd and size must be set (see :meth:`Detector.prepared`).
        """
        return {name: values.sum() for name, values in self.losses_by_level(outputs, targets).items()}

    def losses_by_level(self, outputs: RPNOutputs, targets: Sequence[Targets]) -> dict[str, Tensor]:
        """Return the losses of :meth:`losses` as vectors with one entry per level."""
        maps = outputs.objectness
        lengths = [x.shape[1:].numel() for x in maps]
        logits, deltas = (torch.cat(by_anchor(part, values), 1) for part, values in zip(outputs, (1, 4), strict=True))
        anchors = torch.cat(self.anchors.grid(maps))
        count, rows, objectness, moved_rows, moved = 0, [], [], [], []
        for image, target in enumerate(targets):
            usable = self.anchors.usable(maps, size_of(target), self.allowed_border)
            sample, wanted = self._sample(anchors, usable, target)
            both = torch.cat(sample)
            truth = torch.zeros_like(both, dtype=anchors.dtype)
            truth[: len(sample.positive)] = 1
            found = widened(logits[image, both, 0])
            objectness.append(F.binary_cross_entropy_with_logits(found, truth.to(found), reduction="none"))
            goals = self.coder.encode(anchors[sample.positive], wanted)
            moved.append(differences(deltas[image, sample.positive], goals, self.smooth_l1_beta).sum(1))
            rows.append(both)
            moved_rows.append(sample.positive)
            # Published: at least one of each per image, also if there are none.
            count += max(len(sample.positive), 1) + max(len(sample.negative), 1)
        total = mean_over_processes(anchors.new_tensor(count)) + EPS
        return {
            "loss_rpn_cls": sums_by_level(torch.cat(objectness), torch.cat(rows), lengths) / total,
            "loss_rpn_bbox": sums_by_level(torch.cat(moved), torch.cat(moved_rows), lengths) / total,
        }

    @torch.no_grad()
    def _sample(self, anchors: Tensor, usable: Tensor, target: Targets) -> tuple[Sample, Tensor]:
        """Return the anchors to train on, and the object of each positive one."""
        crowd = torch.zeros_like(target.labels, dtype=torch.bool) if target.crowd is None else target.crowd
        objects = target.boxes[~crowd]
        assignment = self.assigner(anchors[usable], objects, target.boxes[crowd])
        sample = self.sampler(assignment)
        wanted = objects[assignment.objects[sample.positive]]
        return Sample(usable[sample.positive], usable[sample.negative]), wanted

    # Proposals

    @torch.no_grad()
    def proposals(self, outputs: RPNOutputs, sizes: Sequence[Size], *, training: bool) -> list[Proposals]:
        """Return the proposals of every image, without gradients.

        Args:
            outputs: of :meth:`forward`.
            sizes: (height, width) of each image without its padding.
            training: whether the limits of training hold, or those of evaluation.
        """
        limits = self.for_training if training else self.for_testing
        boxes, logits, levels = self.candidates(outputs, limits.before_nms)
        found = []
        for image, size in enumerate(sizes):
            inner = clip(boxes[image], size)
            kept = ((inner[:, 2:] - inner[:, :2]) > limits.min_side).all(1).nonzero().flatten()
            best = nms_by_label(inner[kept], logits[image, kept], levels[kept], limits.nms_threshold)
            best = kept[best[: limits.max_per_image]]
            found.append(Proposals(inner[best], logits[image, best].sigmoid()))
        return found

    def candidates(self, outputs: RPNOutputs, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the best ``count`` boxes of each level before NMS, P in all.

        Returns:
            Boxes (N, P, 4), not clipped; logits (N, P); level of each one, int64 (P,).
        """
        boxes, logits, levels = [], [], []
        anchors = self.anchors.grid(outputs.objectness)
        flat = zip(by_anchor(outputs.objectness, 1), by_anchor(outputs.deltas, 4), strict=True)
        for level, (scores, deltas) in enumerate(flat):
            best = widened(scores[..., 0]).topk(min(count, scores.shape[1]))
            chosen = deltas.gather(1, best.indices[..., None].expand(-1, -1, 4))
            boxes.append(self.coder.decode(anchors[level][best.indices], chosen))
            logits.append(best.values)
            levels.append(torch.full_like(best.indices[0], level))
        return torch.cat(boxes, 1), torch.cat(logits, 1), torch.cat(levels)
