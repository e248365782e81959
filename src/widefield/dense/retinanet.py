"""RetinaNet: at every anchor of a pyramid, a score for each class and a box.

Paper: Lin, Goyal, Girshick, He, Dollár, "Focal Loss for Dense Object Detection", ICCV 2017. Structure, names, targets
and test rules are those of mmdetection's ``RetinaHead``. They differ from the paper in one place: an object without an
anchor of IoU 0.5 gets its best anchors, however low their IoU.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from widefield import _checks
from widefield.dense.anchors import Anchors, by_anchor
from widefield.dense.backbone import Backboned, StageNorms
from widefield.dense.boxes import IGNORED, Assigner, BoxCoder, Size, best_of_level, pairwise_iou
from widefield.dense.detection_losses import EPS, differences, focal, mean_over_processes, sums_by_level
from widefield.dense.detection_rules import DetectionRules
from widefield.dense.detector import BoxScores, Detections, Targets, size_of
from widefield.dense.fpn import FPN
from widefield.dense.layers import ConvModule, widened
from widefield.dense.one_stage import OneStageDetector, four_maps

PRIOR = 0.01
"""Score of every class at the start (section 4.1)."""


class RetinaOutputs(NamedTuple):
    """What a RetinaNet head predicts, one entry per level, finest first; A anchors per position.

    Attributes:
        logits: of the classes, (N, A * num_classes, H, W).
        deltas: differences between boxes and anchors, (N, A * 4, H, W).
    """

    logits: list[Tensor]
    deltas: list[Tensor]


class RetinaTargets(NamedTuple):
    """What the anchors of one image learn; P anchors of all levels, finest first.

    Attributes:
        labels: int64 (P,), num_classes for the background, -1 for anchors that are not used.
        positive: int64 (M,): positions of the anchors that stand for objects.
        deltas: (M, 4), differences between their objects and them.
    """

    labels: Tensor
    positive: Tensor
    deltas: Tensor


class RetinaHead(nn.Module):
    """The head of RetinaNet, shared by all levels.

    Args:
        in_channels: channels of each level.
        num_classes: number of classes, without the background.
        channels: of the convolutions.
        num_convs: convolutions in each of the two branches.
        norm: of these convolutions: "batch", "group" or None.
        anchors: at every position.
        coder: how differences are scaled.
        assigner: which anchors stand for objects.
        allowed_border: anchors that leave the image by more pixels are not used for training. None: all are used.
        smooth_l1_beta: of the smooth L1 loss of boxes. None: L1.
        alpha, gamma: of the focal loss; see :func:`widefield.dense.detection_losses.focal`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        channels: int = 256,
        num_convs: int = 4,
        norm: str | None = None,
        anchors: Anchors | None = None,
        coder: BoxCoder | None = None,
        assigner: Assigner | None = None,
        allowed_border: float | None = None,
        smooth_l1_beta: float | None = None,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ) -> None:
        super().__init__()
        self.alpha, self.gamma = _checks.number("alpha", alpha, maximum=1.0), _checks.number("gamma", gamma)
        self.num_classes = _checks.integer("num_classes", num_classes)
        self.anchors = anchors or Anchors.octaves()
        self.coder = coder or BoxCoder()
        self.assigner = assigner or Assigner(positive=0.5, negative=0.4, minimum=0.0)
        self.allowed_border = None if allowed_border is None else _checks.number("allowed_border", allowed_border)
        self.smooth_l1_beta = None if smooth_l1_beta is None else _checks.number("smooth_l1_beta", smooth_l1_beta)
        widths = [_checks.integer("in_channels", in_channels)]
        widths += [_checks.integer("channels", channels)] * _checks.integer("num_convs", num_convs, minimum=0)
        self.cls_convs, self.reg_convs = (
            nn.ModuleList(ConvModule(*pair, 3, padding=1, norm=norm) for pair in itertools.pairwise(widths))
            for _ in range(2)
        )
        self.retina_cls = nn.Conv2d(widths[-1], self.anchors.per_cell * self.num_classes, 3, padding=1)
        self.retina_reg = nn.Conv2d(widths[-1], self.anchors.per_cell * 4, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.constant_(self.retina_cls.bias, -math.log((1 - PRIOR) / PRIOR))  # type: ignore[arg-type]

    def forward(self, levels: Sequence[Tensor]) -> RetinaOutputs:
        """Levels, finest first, each (N, in_channels, H_i, W_i) -> predictions at each of their anchors."""
        found = [self._level(x) for x in levels]
        return RetinaOutputs([logits for logits, _ in found], [deltas for _, deltas in found])

    def _level(self, x: Tensor) -> tuple[Tensor, Tensor]:
        classes = boxes = x
        for conv in self.cls_convs:
            classes = conv(classes)
        for conv in self.reg_convs:
            boxes = conv(boxes)
        return self.retina_cls(classes), self.retina_reg(boxes)

    @torch.no_grad()
    def targets(self, maps: Sequence[Tensor], target: Targets) -> RetinaTargets:
        """Return what each anchor of the levels learns from the objects of one image (section 4).

        Args:
            maps: one tensor (..., H_i, W_i) per level; only shape, dtype and device are read.
            target: the objects; the size must be set.
        """
        anchors = torch.cat(self.anchors.grid(maps))
        usable = self.anchors.usable(maps, size_of(target), self.allowed_border)
        crowd = torch.zeros_like(target.labels, dtype=torch.bool) if target.crowd is None else target.crowd
        objects, classes = target.boxes[~crowd], target.labels[~crowd]
        assigned = self.assigner(anchors[usable], objects, target.boxes[crowd]).objects
        labels = classes.new_full((len(anchors),), -1)
        found = (assigned >= 0).nonzero().flatten()
        labels[usable] = torch.where(assigned == IGNORED, -1, self.num_classes)
        labels[usable[found]] = classes[assigned[found]]
        positive = usable[found]
        return RetinaTargets(labels, positive, self.coder.encode(anchors[positive], objects[assigned[found]]))

    def losses(self, outputs: RetinaOutputs, targets: Sequence[Targets]) -> dict[str, Tensor]:
        """Return the scalars ``loss_cls`` (focal) and ``loss_bbox``.

        Both are sums divided by the number of anchors that stand for objects; an image counts at least one. With
        several processes, it is the mean of their numbers.

        Args:
            outputs: of this head.
            targets: one per image; the size must be set.
        """
        return {name: values.sum() for name, values in self.losses_by_level(outputs, targets).items()}

    def losses_by_level(self, outputs: RetinaOutputs, targets: Sequence[Targets]) -> dict[str, Tensor]:
        """Return the losses of :meth:`losses` as vectors with one entry per level."""
        made = [self.targets(outputs.logits, target) for target in targets]
        classes, lengths = [], [x.shape[2] * x.shape[3] * self.anchors.per_cell for x in outputs.logits]
        count = sum(max(len(entry.positive), 1) for entry in made)
        total = mean_over_processes(widened(outputs.logits[0]).new_tensor(count))
        learned = torch.stack([entry.labels for entry in made]).split(lengths, 1)
        for x, labels in zip(outputs.logits, learned, strict=True):
            own = x.unflatten(1, (self.anchors.per_cell, -1)).permute(0, 3, 4, 1, 2)  # no copy: these are the most
            labels = labels.reshape(own.shape[:-1])
            classes.append(focal(own, labels, total, alpha=self.alpha, gamma=self.gamma))
        deltas = torch.cat(by_anchor(outputs.deltas, 4), 1)
        moved = [
            differences(deltas[image, entry.positive], entry.deltas, self.smooth_l1_beta).sum(1)
            for image, entry in enumerate(made)
        ]
        places = torch.cat([entry.positive for entry in made])
        boxes = sums_by_level(torch.cat(moved), places, lengths) / (total + EPS)
        return {"loss_cls": torch.stack(classes), "loss_bbox": boxes}

    def detections(self, outputs: RetinaOutputs, sizes: Sequence[Size], rules: DetectionRules) -> list[Detections]:
        """Return the detections of each image.

        Args:
            outputs: of this head.
            sizes: (height, width) of each image without its padding.
            rules: which boxes become detections.
        """
        grids = self.anchors.grid(outputs.logits)
        found = []
        for image, size in enumerate(sizes):
            parts = []
            for anchors, *level in zip(grids, *outputs, strict=True):
                logits, deltas = (x[image] for x in level)
                best = best_of_level(logits, self.num_classes, rules.score_threshold, rules.candidates)
                moved = by_anchor([deltas[None]], 4)[0][0, best.rows]
                boxes = self.coder.decode(anchors[best.rows], moved, size)
                parts.append((boxes, best.scores, best.labels))
            kept = rules.of_levels(parts)
            found.append(Detections(kept.boxes, kept.scores, kept.labels))
        return found


class RetinaNet(OneStageDetector):
    """RetinaNet on any backbone.

    The pyramid has the strides 8 to 128: three from the backbone's maps, two by convolutions of stride 2.

    Args:
        backbone: a timm name, or a module that gives feature maps; see :func:`widefield.dense.feature_maps`.
        num_classes: number of classes, without the background.
        neck_channels: channels of the pyramid and the head.
        num_convs: convolutions in each of the head's two branches.
        norm: of the head's convolutions: "batch", "group" or None.
        extra: where the two coarsest levels come from; see :class:`widefield.dense.FPN`.
        relu_before_extra: whether a ReLU is applied between them.
        anchors: at every position. None: three sizes per octave and three shapes, at the strides of the pyramid.
        allowed_border, smooth_l1_beta: see :class:`RetinaHead`.
        score_threshold, nms_threshold, max_per_image, candidates: see :class:`widefield.dense.DetectionRules`.
        frozen_stages, norm_eval: see :class:`widefield.dense.Detector`.
        stage_norms: norms between backbone and neck; None follows the published code of the backbone's family.
        out_indices: which four of the backbone's maps to use, of strides 4 to 32; None for the last four. The finest is
            not read.
        backbone_args: further arguments of ``timm.create_model``, such as ``pretrained=True``.

    Raises:
        TypeError, ValueError: an argument is out of range, or the backbone does not fit.
    """

    bbox_head: RetinaHead

    def __init__(
        self,
        backbone: Backboned,
        num_classes: int,
        *,
        neck_channels: int = 256,
        num_convs: int = 4,
        norm: str | None = None,
        extra: str = "on_input",
        relu_before_extra: bool = False,
        anchors: Anchors | None = None,
        allowed_border: float | None = None,
        smooth_l1_beta: float | None = None,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        max_per_image: int = 100,
        candidates: int = 1000,
        frozen_stages: int = 0,
        norm_eval: bool = False,
        stage_norms: StageNorms = None,
        out_indices: Sequence[int] | None = None,
        **backbone_args: Any,
    ) -> None:
        maps = four_maps(backbone, 1, "RetinaNet", out_indices=out_indices, stage_norms=stage_norms, **backbone_args)
        neck = FPN(
            maps.channels, neck_channels, num_outs=5, start_level=1, extra=extra, relu_before_extra=relu_before_extra
        )
        strides = (*maps.strides[1:], 2 * maps.strides[-1], 4 * maps.strides[-1])
        head = RetinaHead(
            neck_channels, num_classes, channels=neck_channels, num_convs=num_convs, norm=norm,
            anchors=anchors or Anchors.octaves(strides), allowed_border=allowed_border, smooth_l1_beta=smooth_l1_beta,
        )  # fmt: skip
        rules = DetectionRules(score_threshold, nms_threshold, max_per_image, candidates)
        super().__init__(
            maps, neck, head, num_classes=num_classes, frozen_stages=frozen_stages, norm_eval=norm_eval, rules=rules
        )

    def box_scores(self, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> BoxScores:
        """Return the scores of the anchor that overlaps each box (M_i, 4) of each image the most."""
        logits = self.bbox_head(maps).logits
        anchors = torch.cat(self.bbox_head.anchors.grid(logits))
        by_image = torch.cat(by_anchor(logits, self.num_classes), 1)
        chosen = [pairwise_iou(own.to(anchors), anchors).argmax(1) for own in boxes]
        found = torch.cat([own[places] for own, places in zip(by_image, chosen, strict=True)])
        return BoxScores(found, widened(found).sigmoid())
