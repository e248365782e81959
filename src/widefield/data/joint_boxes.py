"""Transform images together with their objects for the training of detectors, on torchvision.transforms.v2.

The pipelines are those of published detectors; see `widefield.data.transforms.DetectionAugmentation`. All transforms
draw from PyTorch's global CPU generator, which `widefield.data.base.seeded` seeds from the key of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from widefield.data import joint
from widefield.data.base import Sample
from widefield.data.transforms import SHORT_SIDES, DetectionAugmentation

OBJECT_ENTRIES = ("boxes", "labels", "crowd", "area", "masks", "keypoints", "sides")
"""Entries of a sample with one element for each object."""

_FIRST_SIDES = (400, 500, 600)  # shorter sides before the crop of "multi_scale_crop", in pixels
_CROP_RANGE = (384, 600)  # sides of that crop, in pixels
_LEAST_SIDE = 1e-2  # pixels of a box after a large-scale jitter, as in OpenMMLab's configuration
_MOST_PASTED = 100
_MOST_CHANGED = 10  # pixels by which an edge of a covered object's box may move, or else ...
_LEAST_SEEN = 300  # ... more pixels than these of it must be seen


class Training:
    """The transform of a train split: from an image and its objects in a file to a sample.

    Args:
        augmentation: of the train split.
        mean, std: of each channel for pixels in [0, 1].
    """

    def __init__(self, augmentation: DetectionAugmentation, mean: Sequence[float], std: Sequence[float]) -> None:
        self.augmentation = augmentation
        self._geometry = v2.Compose(_geometry(augmentation))
        distortion = [joint.PhotometricDistortion()] if augmentation.photometric else []
        self._colors = v2.Compose([joint.ToFloat(), *distortion, joint.normalization(mean, std)])

    def __call__(self, sample: Sample, other: Callable[[], Sample | None]) -> Sample:
        """Return the transformed sample; its ``area`` is that of the masks, or of the boxes if there are none.

        Args:
            sample: ``image`` uint8 (3, H, W), ``boxes`` float32 (M, 4), ``labels``, ``crowd`` and ``area`` (M,), and
                optionally ``masks`` bool (M, H, W).
            other: gives another such sample, or None, for copy-paste.
        """
        found = self._placed(sample)
        if self.augmentation.copy_paste and "masks" in found:
            size = (self.augmentation.size,) * 2
            found = joint.apply(joint.Pad(size), found)
            if torch.rand(()) < self.augmentation.copy_paste and (source := other()) is not None:
                found = copy_paste(found, joint.apply(joint.Pad(size), self._placed(source)))
        found = joint.apply(self._colors, found)
        return {**found, "area": _areas(found)}

    def _placed(self, sample: Sample) -> Sample:
        """Return a sample flipped, resized and cropped, with the objects that are left."""
        height, width = sample["image"].shape[-2:]
        inside = {**sample, "boxes": _clipped(sample["boxes"], height, width)}
        found = joint.apply(self._geometry, inside)
        found["boxes"] = _clipped(found["boxes"], *found["image"].shape[-2:])  # rounding may pass the border
        jitter = self.augmentation.pipeline == "large_scale_jitter"
        if jitter and "masks" in found:
            found["boxes"] = mask_boxes(found["masks"])
        least = max(self.augmentation.min_size, _LEAST_SIDE if jitter else 0.0)
        left, top, right, bottom = found["boxes"].unbind(1)
        regions = found["crowd"] & (right > left) & (bottom > top)
        return chosen(found, ((right - left > least) & (bottom - top > least)) | regions)


def _geometry(augmentation: DetectionAugmentation) -> list[Any]:
    """Return the transforms that move pixels."""
    flip = v2.RandomHorizontalFlip(augmentation.hflip)
    smooth = augmentation.antialias
    if augmentation.pipeline == "large_scale_jitter":
        size = augmentation.size
        resize = joint.RandomResize((size, size), augmentation.ratio, antialias=smooth)
        return [flip, resize, RangeCrop((size, size))]
    scale, fixed = augmentation.scale, augmentation.short_sides is None and augmentation.short_range is None
    if scale is None or (fixed and augmentation.pipeline == "resize"):
        return [flip, joint.Resize(scale, antialias=smooth)]
    longer = max(scale)
    sides = augmentation.short_sides or SHORT_SIDES
    resize = RandomSide(longer, sides, augmentation.short_range, antialias=smooth)
    if augmentation.pipeline == "resize":
        return [flip, resize]
    cropped = v2.Compose([RandomSide(longer, _FIRST_SIDES, antialias=smooth), RangeCrop(_CROP_RANGE), resize])
    return [flip, v2.RandomChoice([resize, cropped])]


class RandomSide(joint.Resize):
    """Fit everything into a rectangle whose shorter side is drawn, keeping the aspect ratio.

    Args:
        longer: longer side of the rectangle in pixels.
        sides: shorter sides in pixels; one is drawn.
        span: (smallest, largest) shorter side in pixels; replaces ``sides``.
        antialias: smooth images before they are shrunk.
    """

    def __init__(
        self, longer: int, sides: Sequence[int], span: Sequence[int] | None = None, *, antialias: bool = False
    ) -> None:
        super().__init__(None, antialias=antialias)
        self.longer, self.sides, self.span = longer, sides, span

    def _size(self, height: int, width: int) -> tuple[int, int]:
        if self.span is None:
            side = self.sides[int(torch.randint(len(self.sides), ()))]
        else:
            side = int(torch.randint(self.span[0], self.span[1] + 1, ()))
        return joint.fitted(height, width, (self.longer, side))


class RangeCrop(v2.Transform):
    """Cut a random rectangle, and leave out the objects whose box it does not touch; boxes are clipped to it.

    Args:
        span: (smallest, largest) side of the rectangle in pixels, drawn for each axis; at most that of the image.
    """

    def __init__(self, span: tuple[int, int]) -> None:
        super().__init__()
        self.span = span

    def forward(self, sample: Sample) -> Sample:
        """Return the sample, cropped."""
        cut: Sample = super().forward(sample)
        left, top, right, bottom = cut["boxes"].as_subclass(Tensor).unbind(1)
        return chosen(cut, (right > left) & (bottom > top))

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Return the rectangle."""
        size = joint.size_of(flat_inputs)
        height, width = (int(torch.randint(min(side, self.span[0]), min(side, self.span[1]) + 1, ())) for side in size)
        top, left = (
            int(torch.randint(whole - part + 1, ())) for whole, part in zip(size, (height, width), strict=True)
        )
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Return an entry of the sample, cropped."""
        return functional.crop(inpt, **params)


def chosen(sample: Sample, kept: Tensor) -> Sample:
    """Return a sample with some of its objects.

    Args:
        sample: with any of ``OBJECT_ENTRIES``.
        kept: which objects to keep, bool (M,).
    """
    if bool(kept.all()):
        return sample
    found = dict(sample)
    for name in OBJECT_ENTRIES:
        if name in sample:
            value = sample[name]
            part = value.as_subclass(Tensor)[kept]
            found[name] = tv_tensors.wrap(part, like=value) if isinstance(value, tv_tensors.TVTensor) else part
    return found


def copy_paste(sample: Sample, source: Sample) -> Sample:
    """Paste random objects of one image over another of the same size (Ghiasi et al. 2021, "Simple Copy-Paste").

    A random number of objects, up to 100, is chosen; crowd regions are not pasted. What they cover is cut off the masks
    and boxes of the others. An object goes if an edge of its box moves by more than 10 pixels and at most 300 pixels of
    it are still seen, as in mmdetection 3.3.0's ``CopyPaste``.

    Args:
        sample: with ``image``, ``masks`` and the other entries of objects.
        source: such a sample, whose objects are copied.
    """
    candidates = (~source["crowd"]).nonzero().flatten()
    if not len(candidates):
        return sample
    count = int(torch.randint(min(len(candidates), _MOST_PASTED) + 1, ()))
    pasted = candidates[torch.randperm(len(candidates))[:count]]
    if not count:
        return sample
    added = {name: source[name][pasted] for name in OBJECT_ENTRIES if name in source}
    cover = added["masks"].any(0)
    masks = sample["masks"] & ~cover
    boxes = mask_boxes(masks)
    unmoved = ((boxes - sample["boxes"]).abs() <= _MOST_CHANGED).all(1)
    seen = _pixels(masks)
    left = chosen({**sample, "masks": masks, "boxes": boxes}, (seen > _LEAST_SEEN) | unmoved & (seen > 0))
    joined = {name: torch.cat([left[name], added[name]]) for name in added}
    return {**left, **joined, "image": torch.where(cover, source["image"], sample["image"])}


def mask_boxes(masks: Tensor) -> Tensor:
    """Return the edges (left, top, right, bottom) of the pixels of masks, float32 (M, 4); 0 for an empty one.

    Args:
        masks: bool (M, H, W).
    """
    columns, rows = masks.any(1), masks.any(2)
    height, width = masks.shape[1:]

    def ends(seen: Tensor, length: int) -> tuple[Tensor, Tensor]:
        first = seen.to(torch.uint8).argmax(1)
        last = length - seen.flip(1).to(torch.uint8).argmax(1)
        return first, torch.where(seen.any(1), last, 0)

    if not len(masks):
        return torch.zeros(0, 4)
    (left, right), (top, bottom) = ends(columns, width), ends(rows, height)
    return torch.stack([left, top, right, bottom], 1).float()


def _clipped(boxes: Tensor, height: int, width: int) -> Tensor:
    limit = boxes.new_tensor([width, height, width, height])
    return torch.minimum(boxes.clamp(min=0), limit)


def _pixels(masks: Tensor) -> Tensor:
    """Return the number of pixels of each mask, float32 (M,); ``masks.sum`` would convert every pixel to int64."""
    return torch.tensor([np.count_nonzero(mask) for mask in masks.numpy()], dtype=torch.float32)


def _areas(sample: Sample) -> Tensor:
    if "masks" in sample:
        return _pixels(sample["masks"])
    boxes: Tensor = sample["boxes"]
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
