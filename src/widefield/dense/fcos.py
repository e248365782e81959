"""FCOS: every point of a pyramid predicts classes, the distances to the sides of its box, and how central it is.

Paper: Tian, Shen, Chen, He, "FCOS: Fully Convolutional One-Stage Object Detection", ICCV 2019. Structure, names,
targets and test rules are those of mmdetection's ``FCOSHead``. They differ from the paper in one place: scores are
compared with the threshold before they are multiplied by the centerness.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widefield import _checks
from widefield.dense.anchors import points
from widefield.dense.backbone import Backboned, StageNorms
from widefield.dense.boxes import Size, area, best_of_level, from_distances
from widefield.dense.detection_losses import binary_cross_entropy, focal, giou_loss, iou_loss, mean_over_processes
from widefield.dense.detection_rules import DetectionRules
from widefield.dense.detector import BoxScores, Detections, Targets
from widefield.dense.fpn import FPN
from widefield.dense.layers import ConvModule, widened
from widefield.dense.one_stage import OneStageDetector, four_maps

RANGES = (64, 128, 256, 512)
"""Pixels between the published levels: a level has the boxes whose farthest side is in its range, ends included."""

CENTERNESS = ("classification", "boxes")
"""The branch that predicts the centerness."""

DISTANCES = ("exp", "relu")
"""How distances are predicted: exp(scale * x) pixels, or relu(scale * x) strides."""

PRIOR = 0.01
"""Score of every class at the start (Lin et al. 2017, "Focal Loss", section 4.1)."""

_BLOCK = 2**18  # pairs of points and objects that are compared at once

LEAST_CENTERNESS = 1e-6
"""The sum of the centerness that the box loss is divided by is at least this."""


class FCOSOutputs(NamedTuple):
    """What an FCOS head predicts, one entry per level, finest first.

    Attributes:
        logits: of the classes, (N, num_classes, H, W).
        distances: from each point to the left, top, right and bottom side, (N, 4, H, W), float32 or wider. In pixels;
            in strides in training mode with ``distances="relu"``.
        centerness: its logits, (N, 1, H, W).
    """

    logits: list[Tensor]
    distances: list[Tensor]
    centerness: list[Tensor]


class FCOSTargets(NamedTuple):
    """What the points of one image learn; P points of all levels, finest first, row by row.

    Attributes:
        labels: int64 (P,); the number of classes at points without an object.
        distances: to the left, top, right and bottom side in pixels, (P, 4). Meaningless without an object.
    """

    labels: Tensor
    distances: Tensor


class _Scale(nn.Module):
    """A factor that is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class FCOSHead(nn.Module):
    """The head of FCOS, shared by all levels but for one factor each.

    Args:
        in_channels: channels of every level.
        num_classes: number of classes.
        channels: channels of the convolutions inside.
        num_convs: convolutions in each of the two branches.
        strides: of the levels, finest first.
        ranges: pixels between the levels: a level has the boxes whose farthest side is in its range.
        norm: of the branches: "group" (32 groups), "batch" or None.
        conv_bias: whether the branches' convolutions have a bias next to the norm.
        centerness_on: the branch that predicts the centerness, "classification" or "boxes".
        distances: "exp": exp(scale * x) pixels; "relu": relu(scale * x) strides.
        center_radius: an object is learned only within this many strides of the center of its box; None: everywhere in
            the box.
        box_loss: "iou" or "giou".
        point_offset: of a point from the top left corner of its cell, in strides. torchvision's is 0.
        alpha, gamma: of the focal loss; see :func:`widefield.dense.detection_losses.focal`.

    Raises:
        ValueError: an argument is out of range, or there are not as many ranges as levels.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        channels: int = 256,
        num_convs: int = 4,
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        ranges: Sequence[float] = RANGES,
        norm: str | None = "group",
        conv_bias: bool = False,
        centerness_on: str = "classification",
        distances: str = "exp",
        center_radius: float | None = None,
        box_loss: str = "iou",
        point_offset: float = 0.5,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ) -> None:
        super().__init__()
        self.alpha, self.gamma = _checks.number("alpha", alpha, maximum=1.0), _checks.number("gamma", gamma)
        self.num_classes = _checks.integer("num_classes", num_classes)
        self.strides = tuple(_checks.integer("every entry of strides", stride) for stride in strides)
        self.ranges = tuple(_checks.number("every entry of ranges", value) for value in ranges)
        if len(self.ranges) != len(self.strides) - 1 or list(self.ranges) != sorted(self.ranges):
            raise ValueError(
                f"ranges must be {len(self.strides) - 1} rising numbers, one between two levels; got {tuple(ranges)}."
            )
        self.centerness_on = _checks.choice("centerness_on", centerness_on, CENTERNESS)
        self.distances = _checks.choice("distances", distances, DISTANCES)
        self.center_radius = None if center_radius is None else _checks.number("center_radius", center_radius)
        self.box_loss = _checks.choice("box_loss", box_loss, ("iou", "giou"))
        self.point_offset = _checks.number("point_offset", point_offset, maximum=1.0)
        widths = [_checks.integer("in_channels", in_channels)]
        widths += [_checks.integer("channels", channels)] * _checks.integer("num_convs", num_convs, minimum=0)
        self.cls_convs, self.reg_convs = (
            nn.ModuleList(
                ConvModule(*pair, 3, padding=1, norm=norm, bias=True if conv_bias else None)
                for pair in itertools.pairwise(widths)
            )
            for _ in range(2)
        )
        self.conv_cls = nn.Conv2d(widths[-1], self.num_classes, 3, padding=1)
        self.conv_reg = nn.Conv2d(widths[-1], 4, 3, padding=1)
        self.conv_centerness = nn.Conv2d(widths[-1], 1, 3, padding=1)
        self.scales = nn.ModuleList(_Scale() for _ in self.strides)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.constant_(self.conv_cls.bias, -math.log((1 - PRIOR) / PRIOR))  # type: ignore[arg-type]

    def forward(self, levels: Sequence[Tensor]) -> FCOSOutputs:
        """Levels, finest first, each (N, in_channels, H_i, W_i) -> predictions at each of their points."""
        if len(levels) != len(self.strides):
            raise ValueError(f"this head was built for {len(self.strides)} levels; got {len(levels)}.")
        found = [self._level(*given) for given in zip(levels, self.scales, self.strides, strict=True)]
        logits, distances, centerness = (list(part) for part in zip(*found, strict=True))
        return FCOSOutputs(logits, distances, centerness)

    def _level(self, x: Tensor, scale: nn.Module, stride: int) -> tuple[Tensor, Tensor, Tensor]:
        classes = boxes = x
        for conv in self.cls_convs:
            classes = conv(classes)
        for conv in self.reg_convs:
            boxes = conv(boxes)
        centerness = self.conv_centerness(classes if self.centerness_on == "classification" else boxes)
        distances = widened(scale(self.conv_reg(boxes)))
        if self.distances == "exp":
            return self.conv_cls(classes), distances.exp(), centerness
        distances = F.relu(distances)
        return self.conv_cls(classes), distances if self.training else distances * stride, centerness

    def targets(self, maps: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> FCOSTargets:
        """Return what each point of the levels learns from the objects of one image (FCOS, section 3.1 and 3.2).

        A point learns the smallest object that it is inside of, near enough to the center if there is a center radius,
        and whose farthest side is in the range of the point's level.

        Args:
            maps: one tensor (..., H_i, W_i) per level; only shape, dtype and device are read.
            boxes: (M, 4) xyxy.
            labels: int64 (M,).
        """
        if not len(boxes):
            count = sum(x.shape[-2] * x.shape[-1] for x in maps)
            return FCOSTargets(labels.new_full((count,), self.num_classes), boxes.new_zeros(count, 4))
        order = area(boxes).argsort(stable=True)  # the first that fits is the smallest
        boxes, labels = boxes[order], labels[order]
        grids = points(maps, self.strides, self.point_offset)
        bounds = itertools.pairwise((-1.0, *self.ranges, math.inf))
        chosen = [
            self._first_fits(grid.to(boxes).unflatten(0, x.shape[-2:]), stride, span, boxes)
            for x, grid, stride, span in zip(maps, grids, self.strides, bounds, strict=True)
        ]
        index, place = torch.cat(chosen), torch.cat(grids).to(boxes)
        own = torch.where(index == len(boxes), self.num_classes, labels[index.clamp(max=len(boxes) - 1)])
        box = boxes[index.clamp(max=len(boxes) - 1)]
        return FCOSTargets(own, torch.cat((place - box[:, :2], box[:, 2:] - place), 1))

    def _first_fits(self, grid: Tensor, stride: int, span: tuple[float, float], boxes: Tensor) -> Tensor:
        """Return the first of M boxes that each point of a level learns, int64 (H * W,); M for none.

        Every condition is one on the columns and one on the rows, so that pairs of points and boxes need bits only.

        Args:
            grid: (H, W, 2), the points.
            stride: of the level.
            span: smallest and largest distance to the farthest side.
            boxes: (M, 4).
        """
        height, width = grid.shape[:2]
        (across, across_fits, across_far), (down, down_fits, down_far) = (
            self._axis(places, boxes[:, axis::2], stride, span)
            for axis, places in enumerate((grid[0, :, 0], grid[:, 0, 1]))
        )
        across, down = across & across_fits, down & down_fits
        small = len(boxes) < torch.iinfo(torch.int16).max
        ranks = torch.arange(len(boxes), device=boxes.device, dtype=torch.int16 if small else torch.int64)
        rows = max(1, _BLOCK // (len(boxes) * width))
        found = []
        for start in range(0, height, rows):
            part = slice(start, start + rows)
            fits = down[:, part, None] & across[:, None] & (down_far[:, part, None] | across_far[:, None])
            found.append(torch.where(fits, ranks[:, None, None], len(boxes)).amin(0).flatten())
        return torch.cat(found).long()

    def _axis(
        self, places: Tensor, edges: Tensor, stride: int, span: tuple[float, float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the conditions on one axis, each (M, L): inside and near the center; not too far; far enough.

        Args:
            places: (L,), coordinates of the points.
            edges: (M, 2), near and far edges of the boxes.
            stride, span: as of :meth:`_first_fits`.
        """
        near, far = edges[:, :1], edges[:, 1:]
        before, after = places - near, far - places
        inside = torch.minimum(before, after) > 0
        if self.center_radius is not None:
            inside &= stride * self.center_radius - (places - (near + far) / 2).abs() > 0
        farthest = torch.maximum(before, after)
        return inside, farthest <= span[1], farthest >= span[0]

    def losses(self, outputs: FCOSOutputs, targets: Sequence[Targets]) -> dict[str, Tensor]:
        """Return ``loss_cls``, ``loss_bbox`` and ``loss_centerness``.

        Focal loss over the number of positive points; IoU loss weighted by the centerness, over its sum; cross-entropy
        of the centerness over the number of positive points. Both denominators are means over the processes of
        distributed training. Crowd regions count as background, as published.

        Args:
            outputs: of this head.
            targets: one per image, with ``crowd``.
        """
        found = []
        for target in targets:
            single = torch.zeros_like(target.labels, dtype=torch.bool) if target.crowd is None else target.crowd
            found.append(self.targets(outputs.logits, target.boxes[~single], target.labels[~single]))
        labels = torch.cat([target.labels for target in found])
        positive = (labels < self.num_classes).nonzero().flatten()
        distances = torch.cat([target.distances for target in found])[positive]
        logits, predicted, centerness = (_by_image(part) for part in outputs)
        wanted = centerness_of(distances)
        total = mean_over_processes(torch.stack([wanted.new_tensor(len(positive)), wanted.sum()]))
        count, weight = total[0].clamp(min=1), total[1].clamp(min=LEAST_CENTERNESS)
        if self.distances == "relu":
            strides = torch.cat([labels.new_full(x.shape[2:], s).flatten() for x, s in self._levels(outputs)])
            distances = distances / strides.repeat(len(targets))[positive, None]
        origin = distances.new_zeros(len(positive), 2)  # the overlap of boxes around one point is the same everywhere
        loss = iou_loss if self.box_loss == "iou" else giou_loss
        boxes = from_distances(origin, predicted[positive]), from_distances(origin, distances)
        return {
            "loss_cls": focal(logits, labels, count, alpha=self.alpha, gamma=self.gamma),
            "loss_bbox": loss(*boxes, weight, wanted),
            "loss_centerness": binary_cross_entropy(centerness[positive, 0], wanted, count),
        }

    def _levels(self, outputs: FCOSOutputs) -> list[tuple[Tensor, int]]:
        return list(zip(outputs.logits, self.strides, strict=True))

    def places(self, boxes: Tensor) -> Tensor:
        """Return the point in the middle of each box (M, 4), on the level of the box's size: int64 (M, 3).

        A row is (level, row, column). Boxes are not clipped, so that the row and the column may be beyond the level.
        """
        middle = (boxes[:, :2] + boxes[:, 2:]) / 2
        strides = boxes.new_tensor(self.strides)[:, None, None]
        cells = (middle / strides).long()  # (levels, M, 2): column and row
        points_ = (cells + self.point_offset) * strides
        farthest = torch.maximum(points_ - boxes[:, :2], boxes[:, 2:] - points_).amax(2)
        fits = farthest <= boxes.new_tensor((*self.ranges, math.inf))[:, None]
        level = fits.to(torch.uint8).argmax(0)
        chosen = cells[level, torch.arange(len(boxes), device=boxes.device)]
        return torch.cat((level[:, None], chosen.flip(1)), 1)

    def detections(self, outputs: FCOSOutputs, sizes: Sequence[Size], rules: DetectionRules) -> list[Detections]:
        """Return the detections of each image.

        Args:
            outputs: of this head in evaluation mode.
            sizes: (height, width) of each image without its padding.
            rules: which boxes become detections. Scores that exceed the threshold are multiplied by the centerness.
        """
        grids = points(outputs.logits, self.strides, self.point_offset)
        found = []
        for image, size in enumerate(sizes):
            parts = []
            for grid, *level in zip(grids, *outputs, strict=True):
                logits, distances, centerness = (x[image] for x in level)
                best = best_of_level(logits, self.num_classes, rules.score_threshold, rules.candidates)
                boxes = from_distances(grid[best.rows], distances.flatten(1)[:, best.rows].t(), size)
                central = widened(centerness.flatten()[best.rows]).sigmoid()
                parts.append((boxes, best.scores * central, best.labels))
            kept = rules.of_levels(parts)
            found.append(Detections(kept.boxes, kept.scores, kept.labels))
        return found


def centerness_of(distances: Tensor) -> Tensor:
    """Return how central points are in their boxes, from 0 to 1 (FCOS, equation 3).

    Args:
        distances: (P, 4), to the left, top, right and bottom side.

    Returns:
        (P,).
    """
    left, top, right, bottom = distances.unbind(1)
    sides = (left, right), (top, bottom)
    return torch.stack([torch.minimum(*pair) / torch.maximum(*pair) for pair in sides]).prod(0).sqrt()


def _by_image(levels: Sequence[Tensor]) -> Tensor:
    """Levels, each (N, C, H, W) -> (N * P, C) in float32 or wider: image by image, the points of all levels."""
    return widened(torch.cat([x.flatten(2) for x in levels], 2).transpose(1, 2).flatten(0, 1))


class FCOS(OneStageDetector):
    """FCOS on any backbone.

    The pyramid has the strides 8 to 128: three from the backbone's maps, two by convolutions of stride 2 on the
    coarsest one with a ReLU in between. ``start_level`` and ``ranges`` change that.

    Args:
        backbone: a timm name, or a module that gives feature maps; see :func:`widefield.dense.feature_maps`.
        num_classes: number of classes, without the background.
        neck_channels: channels of the pyramid and the head.
        num_convs: convolutions in each of the head's two branches.
        start_level: which of the backbone's maps is the finest level, from 0. Small objects need 0, stride 4.
        ranges: pixels between the levels, of which there is one more; see :class:`FCOSHead`.
        conv_bias, centerness_on, distances, center_radius, box_loss, point_offset: see :class:`FCOSHead`. The published
            models with "center-normbbox-centeronreg-giou" in their name have ``conv_bias=True, centerness_on="boxes",
            distances="relu", center_radius=1.5, box_loss="giou", nms_threshold=0.6``.
        score_threshold, nms_threshold, max_per_image, candidates: see :class:`widefield.dense.DetectionRules`.
        frozen_stages, norm_eval: see :class:`widefield.dense.Detector`.
        stage_norms: norms between backbone and neck; None follows the published code of the backbone's family.
        out_indices: which four of the backbone's maps to use, of strides 4 to 32; None for the last four. Those before
            ``start_level`` are not read.
        backbone_args: further arguments of ``timm.create_model``, such as ``pretrained=True``.

    Raises:
        TypeError, ValueError: an argument is out of range, or the backbone does not fit.
    """

    bbox_head: FCOSHead
    least_score = None  # scores are products with the centerness, which may be any

    def __init__(
        self,
        backbone: Backboned,
        num_classes: int,
        *,
        neck_channels: int = 256,
        num_convs: int = 4,
        start_level: int = 1,
        ranges: Sequence[float] = RANGES,
        conv_bias: bool = False,
        centerness_on: str = "classification",
        distances: str = "exp",
        center_radius: float | None = None,
        box_loss: str = "iou",
        point_offset: float = 0.5,
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
        first = _checks.integer("start_level", start_level, minimum=0, maximum=3)
        maps = four_maps(backbone, first, "FCOS", out_indices=out_indices, stage_norms=stage_norms, **backbone_args)
        levels = len(ranges) + 1
        neck = FPN(
            maps.channels, neck_channels, num_outs=levels, start_level=first, extra="on_output", relu_before_extra=True
        )
        head = FCOSHead(
            neck_channels, num_classes, channels=neck_channels, num_convs=num_convs, conv_bias=conv_bias,
            strides=[maps.strides[first] * 2**level for level in range(levels)], ranges=ranges,
            centerness_on=centerness_on, distances=distances, center_radius=center_radius, box_loss=box_loss,
            point_offset=point_offset,
        )  # fmt: skip
        rules = DetectionRules(score_threshold, nms_threshold, max_per_image, candidates)
        super().__init__(
            maps, neck, head, num_classes=num_classes, frozen_stages=frozen_stages, norm_eval=norm_eval, rules=rules
        )

    def box_scores(self, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> BoxScores:
        """Return the scores at the point in the middle of each box, on the level of its size; without centerness."""
        logits = self.bbox_head(maps).logits
        sizes = [x.shape[2] * x.shape[3] for x in logits]
        starts = torch.tensor([0, *itertools.accumulate(sizes)], device=logits[0].device)
        shapes = torch.tensor([x.shape[2:] for x in logits], device=logits[0].device)
        by_image = torch.cat([x.flatten(2) for x in logits], 2)
        found = []
        for own, said in zip(boxes, by_image, strict=True):
            level, row, column = self.bbox_head.places(own.to(said.device)).unbind(1)
            height, width = shapes[level].unbind(1)
            place = starts[level] + torch.minimum(row, height - 1) * width + torch.minimum(column, width - 1)
            found.append(said[:, place].t())
        stacked = torch.cat(found)
        return BoxScores(stacked, widened(stacked).sigmoid())
