"""Regions of interest (RoIs): their features, and which of them are learned from.

A RoI is (b, x1, y1, x2, y2): the image of the batch, and a box in pixels. Papers: Lin et al., "Feature Pyramid Networks
for Object Detection", CVPR 2017, equation 1 (levels); He et al., "Mask R-CNN", ICCV 2017, section 3 (RoIAlign).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torchvision.ops import roi_align

from widefield.dense.boxes import Assigner, Sampler
from widefield.dense.detector import Targets
from widefield.dense.layers import widened

SIDE_PER_STRIDE = 14
"""Side of a RoI in strides of the finest map, where its levels start: below twice this side it belongs to that map."""

_SHIFT = 1e-6
"""Added to the relative side of a RoI before its logarithm, as published."""


def batched(boxes: Sequence[Tensor]) -> Tensor:
    """Return the boxes of all images, each (M_i, 4), as RoIs (M, 5)."""
    return torch.cat([torch.cat((entry.new_full((len(entry), 1), i), entry), 1) for i, entry in enumerate(boxes)])


def roi_levels(rois: Tensor, strides: Sequence[int]) -> Tensor:
    """Return the level of the pyramid for each RoI, int64 (R,), from 0 for the finest.

    Args:
        rois: (R, 5).
        strides: of the levels; each is twice the one before.
    """
    side = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).sqrt()
    level = torch.log2(side / (SIDE_PER_STRIDE * strides[0]) + _SHIFT).floor()
    return level.clamp(min=0, max=len(strides) - 1).long()


def for_rois(maps: Sequence[Tensor], strides: Sequence[int]) -> list[Tensor]:
    """Return the maps that RoIs use, in the layout that RoIAlign reads; otherwise it copies them at each call."""
    return [x.contiguous() for x, _ in zip(maps, strides, strict=False)]


def roi_features(maps: Sequence[Tensor], rois: Tensor, strides: Sequence[int], size: int) -> Tensor:
    """Return the features inside each RoI, (R, C, size, size), by RoIAlign on the level that fits its area.

    Samples are aligned to the centers of cells, with as many per bin as it has cells along each axis (rounded up). Maps
    that no RoI uses get a gradient of zeros.

    Args:
        maps: levels of the pyramid, finest first, (N, C, H_i, W_i). Those beyond ``strides`` are not used.
        rois: (R, 5).
        strides: of the levels.
        size: height and width of the features.
    """
    rois = widened(rois)
    levels = roi_levels(rois, strides)
    features = maps[0].new_zeros(len(rois), maps[0].shape[1], size, size)
    for index, (x, stride) in enumerate(zip(maps, strides, strict=False)):
        places = torch.where(levels == index)[0]
        wide = widened(x)  # coordinates need the precision, and the kernels lack bfloat16
        found = _aligned(wide, rois[places].to(wide), size, 1 / stride)
        features[places] = found.to(features)
    return features


def _aligned(x: Tensor, rois: Tensor, size: int, scale: float) -> Tensor:
    """Return RoIAlign of one map, (R, C, size, size)."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    if x.device.type != "cpu" or torch.get_num_threads() == 1 or traced:
        return _align(x, rois, size, scale)
    found: Tensor = _ThreadedRoIAlign.apply(x, rois, size, scale)
    return found


def _align(x: Tensor, rois: Tensor, size: int, scale: float) -> Tensor:
    found: Tensor = roi_align(x, rois, size, scale, sampling_ratio=0, aligned=True)
    return found


class _ThreadedRoIAlign(torch.autograd.Function):
    """RoIAlign on all threads: torchvision's kernels for CPUs run on one. Each thread takes a part of the channels.

    Parts of the RoIs instead would each have a gradient of the whole map.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rois: Tensor, size: int, scale: float) -> Tensor:
        ctx.save_for_backward(rois)
        ctx.shape, ctx.size, ctx.scale = x.shape, size, scale
        return _by_channels(lambda part: _align(part.contiguous(), rois, size, scale), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (rois,) = ctx.saved_tensors
        batch, _, height, width = ctx.shape

        def run(part: Tensor) -> Tensor:
            found: Tensor = torch.ops.torchvision._roi_align_backward(
                part, rois, ctx.scale, ctx.size, ctx.size, batch, part.shape[1], height, width, 0, True
            )
            return found

        return _by_channels(run, grad), None, None, None


def _by_channels(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return ``run(x)`` from parts of the channels, one for each of PyTorch's threads."""
    threads = torch.get_num_threads()

    def without_graph(part: Tensor) -> Tensor:
        with torch.no_grad():  # a state of each thread
            return run(part)

    with ThreadPoolExecutor(threads) as pool:
        return torch.cat(list(pool.map(without_graph, x.chunk(threads, 1))), 1)


def of_labels(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return what a head says for the label of each RoI: (R, K, ...) and int64 (R,) -> (R, ...)."""
    return outputs[torch.arange(labels.shape[0], device=labels.device), labels]  # len() would fix it in exports


@dataclass(frozen=True)
class RoISample:
    """The RoIs of one image that are learned from: first the P that stand for objects, then background.

    Attributes:
        boxes: (R, 4).
        labels: int64 (R,); the number of classes stands for the background.
        objects: int64 (P,): position of the object among those of the image that are not crowd regions.
        truth: (P, 4): the boxes of these objects.
        given: bool (R,): boxes of objects that were added to the proposals.
    """

    boxes: Tensor
    labels: Tensor
    objects: Tensor
    truth: Tensor
    given: Tensor

    @property
    def positive(self) -> Tensor:
        """Return the boxes that stand for objects, (P, 4)."""
        return self.boxes[: len(self.objects)]


@torch.no_grad()
def sampled_rois(
    proposals: Tensor, target: Targets, assigner: Assigner, sampler: Sampler, num_classes: int
) -> RoISample:
    """Choose the RoIs of one image that are learned from. The boxes of objects are added to the proposals.

    Args:
        proposals: (R, 4).
        target: the objects of the image; crowd regions go to the assigner.
        assigner: which object a proposal stands for.
        sampler: how many are used.
        num_classes: label of the background.
    """
    known = ~target.crowd  # type: ignore[operator]
    truth, labels = target.boxes[known], target.labels[known]
    assignment = assigner(proposals, truth, target.boxes[~known]).with_objects(len(truth))
    positive, negative = sampler(assignment)
    chosen = torch.cat((positive, negative))
    objects = assignment.objects[positive]
    return RoISample(
        boxes=torch.cat((truth.to(proposals), proposals))[chosen],
        labels=torch.cat((labels[objects], labels.new_full((len(negative),), num_classes))),
        objects=objects,
        truth=truth[objects],
        given=chosen < len(truth),
    )
