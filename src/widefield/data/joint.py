"""Transform an image together with its masks, boxes and key points, on torchvision.transforms.v2.

The pipelines are those of published segmentation results: OpenMMLab's random resize, crop, flip and photometric
distortion for training, and a resize that keeps the aspect ratio for testing. All transforms draw from PyTorch's global
CPU generator, which `widefield.data.base.seeded` seeds from the key of a sample.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from widefield._pixels import IGNORED
from widefield.data.base import Sample
from widefield.data.transforms import JointAugmentation

Transform = Callable[[Sample], Sample]
"""A sample whose entries are tv_tensors -> the same, transformed."""

_TRIES = 10  # crops drawn in search of one that ``cat_max_ratio`` allows
_DEGREES = 360


def training(
    crop_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    augmentation: JointAugmentation,
) -> Transform:
    """Return the transform of a train split: random resize, crop, flip and distortion, normalization, padding.

    Args:
        crop_size: (height, width) of the result in pixels. Smaller images are padded on the right and at the bottom, by
            0 after normalization, and their masks by 255.
        mean, std: of each channel for pixels in [0, 1].
        augmentation: of the train split.
    """
    distortion = [PhotometricDistortion()] if augmentation.photometric else []
    steps = [
        RandomResize(augmentation.scale, augmentation.ratio, antialias=augmentation.antialias),
        RandomCrop(crop_size, augmentation.cat_max_ratio),
        v2.RandomHorizontalFlip(augmentation.hflip),
        ToFloat(),
        *distortion,
        normalization(mean, std),
        Pad(crop_size),
    ]
    made: Transform = v2.Compose(steps)
    return made


def evaluation(
    scale: Sequence[int] | None, mean: Sequence[float], std: Sequence[float], *, antialias: bool = False
) -> Transform:
    """Return the transform of a val split for everything that the model sees: a resize and the normalization.

    Args:
        scale: (longer side, shorter side) of the rectangle that images are fitted into; None keeps their size.
        mean, std: of each channel for pixels in [0, 1].
        antialias: smooth images before they are shrunk.
    """
    steps = [
        Resize(scale, antialias=antialias),
        ToFloat(),
        normalization(mean, std),
    ]
    made: Transform = v2.Compose(steps)
    return made


def normalization(mean: Sequence[float], std: Sequence[float]) -> v2.Transform:
    """Return the transform that normalizes float images in place, for pipelines that `apply` runs."""
    return v2.Normalize(list(mean), list(std), inplace=True)


def apply(transform: Transform, sample: Sample) -> Sample:
    """Transform the entries of a sample together, and return plain tensors; those of ``sample`` stay as they are.

    Args:
        transform: such as `training`, or any transform of torchvision.transforms.v2.
        sample: ``image`` (C, H, W), uint8 or float; optionally ``mask`` and ``size_group`` (H, W), ``masks`` bool
            (M, H, W), ``boxes`` (M, 4) as x1, y1, x2, y2, ``keypoints`` (M, K, 3) as x, y, visibility. Other entries
            are left as they are.

    Returns:
        The sample. Boxes are clipped to the image; objects outside it are kept. Key points outside have visibility 0.
    """
    height, width = sample["image"].shape[-2:]
    canvas = {"canvas_size": (height, width)}
    wrapped = dict(sample)
    for name, value in sample.items():
        if name == "image":
            # Transforms normalize in place; of other types they make floats first.
            wrapped[name] = tv_tensors.Image(value.clone() if value.is_floating_point() else value)
        elif name in ("mask", "size_group", "masks"):
            wrapped[name] = tv_tensors.Mask(value)
        elif name == "boxes":
            wrapped[name] = tv_tensors.BoundingBoxes(value, format="XYXY", **canvas)
        elif name == "keypoints":
            wrapped[name] = tv_tensors.KeyPoints(value[..., :2], **canvas)
    result = transform(wrapped)
    done = {name: value.as_subclass(Tensor) if isinstance(value, Tensor) else value for name, value in result.items()}
    if "keypoints" in done:
        done["keypoints"] = _visible(done["keypoints"], sample["keypoints"][..., 2:], done["image"].shape[-2:])
    return done


def _visible(points: Tensor, visibility: Tensor, size: Sequence[int]) -> Tensor:
    """Return key points (..., 3) from points (..., 2); visibility is 0 outside an image of ``size`` (height, width)."""
    inside = ((points >= 0) & (points < points.new_tensor([size[1], size[0]]))).all(-1, keepdim=True)
    return torch.cat([points, visibility * inside], -1)


class ToFloat(v2.Transform):
    """Images uint8 or float as float32 in [0, 1]; those of uint8 with one plane per channel in memory.

    The values are those of ``v2.ToDtype``. That keeps the layout of decoded files, channel beside channel, in which
    the normalization takes three times as long.
    """

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Return an entry of the sample, converted."""
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        if inpt.is_floating_point():
            return functional.to_dtype(inpt, torch.float32)
        planes = inpt.as_subclass(Tensor).to(torch.float32, memory_format=torch.contiguous_format)
        return tv_tensors.wrap(planes.mul_(1 / 255), like=inpt)


class Resize(v2.Transform):
    """Fit everything into a rectangle, keeping the aspect ratio; masks by the nearest pixel, images bilinearly.

    Args:
        scale: (longer side, shorter side) in pixels; None keeps the size.
        antialias: smooth images before they are shrunk.
    """

    def __init__(self, scale: Sequence[int] | None, *, antialias: bool = False) -> None:
        super().__init__()
        self.scale, self.antialias = scale, antialias

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Return the size of the result."""
        return {"size": list(self._size(*size_of(flat_inputs)))}

    def _size(self, height: int, width: int) -> tuple[int, int]:
        return (height, width) if self.scale is None else fitted(height, width, self.scale)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Return an entry of the sample, resized."""
        if isinstance(inpt, tv_tensors.Mask):
            return tv_tensors.wrap(nearest(inpt.as_subclass(Tensor), params["size"]), like=inpt)
        return functional.resize(inpt, params["size"], antialias=self.antialias)


def nearest(masks: Tensor, size: Sequence[int]) -> Tensor:
    """Return masks (..., H, W) on the CPU resized to the nearest pixel, as ``interpolate(mode="nearest")`` of float32.

    That converts bool, and takes twice the time. Of float64 it takes some pixels from elsewhere.

    Args:
        masks: of any type.
        size: (height, width) of the result.
    """
    if tuple(masks.shape[-2:]) == tuple(size):
        return masks
    places = [_sources(*pair) for pair in zip(masks.shape[-2:], size, strict=True)]
    values = masks.numpy()
    for axis in (-2, -1) if size[0] < masks.shape[-2] else (-1, -2):  # the fewer pixels first
        values = values.take(places[axis], axis)
    return torch.from_numpy(values)


def _sources(before: int, after: int) -> NDArray[np.int64]:
    """Return the pixel that each one of a resized axis is taken from, with PyTorch's arithmetic in float32."""
    scale = np.float32(before) / np.float32(after)
    return np.minimum((np.arange(after, dtype=np.float32) * scale).astype(np.int64), before - 1)


class RandomResize(Resize):
    """Fit everything into a rectangle scaled by a random factor, keeping the aspect ratio.

    Args:
        scale: (longer side, shorter side) in pixels at factor 1; None means the size of each image.
        ratio: range of the uniformly drawn factor. The scaled sides are rounded down, as OpenMMLab does.
        antialias: smooth images before they are shrunk.
    """

    def __init__(
        self, scale: Sequence[int] | None, ratio: Sequence[float] = (0.5, 2.0), *, antialias: bool = False
    ) -> None:
        super().__init__(scale, antialias=antialias)
        self.ratio = ratio

    def _size(self, height: int, width: int) -> tuple[int, int]:
        factor = _uniform(*self.ratio)
        scale = (height, width) if self.scale is None else self.scale
        return fitted(height, width, [max(1, int(side * factor)) for side in scale])


class RandomCrop(v2.Transform):
    """Cut a random rectangle that shows more than one class; smaller images are left to `Pad`.

    Args:
        size: (height, width) of the crop in pixels.
        cat_max_ratio: largest fraction of the crop's labeled pixels that one class may cover. A crop above it, or with
            one class only, is drawn again, at most 10 times; the last is taken as it is. 1 accepts every crop. The
            first mask (H, W) of the sample decides.
        ignore_index: value of mask pixels that do not count.
    """

    def __init__(self, size: tuple[int, int], cat_max_ratio: float = 0.75, *, ignore_index: int = IGNORED) -> None:
        super().__init__()
        self.size, self.cat_max_ratio, self.ignore_index = size, cat_max_ratio, ignore_index

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Return the rectangle."""
        size = size_of(flat_inputs)
        box = self._drawn(size)
        mask = next((entry for entry in flat_inputs if isinstance(entry, tv_tensors.Mask) and entry.ndim == 2), None)
        if mask is not None and self.cat_max_ratio < 1:
            plain = mask.as_subclass(Tensor)
            for _ in range(_TRIES):
                if self._is_mixed(functional.crop(plain[None], **box)):
                    break
                box = self._drawn(size)
        return box

    def _drawn(self, size: tuple[int, int]) -> dict[str, int]:
        height, width = (min(pair) for pair in zip(size, self.size, strict=True))
        top = int(torch.randint(size[0] - height + 1, ()))
        left = int(torch.randint(size[1] - width + 1, ()))
        return {"top": top, "left": left, "height": height, "width": width}

    def _is_mixed(self, mask: Tensor) -> bool:
        counts = torch.bincount(mask.flatten())
        if self.ignore_index < len(counts):
            counts[self.ignore_index] = 0
        present = counts[counts > 0]
        return len(present) > 1 and int(present.max()) < self.cat_max_ratio * int(present.sum())

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Return an entry of the sample, cropped."""
        return functional.crop(inpt, **params)


class Pad(v2.Transform):
    """Pad everything on the right and at the bottom: images and masks of objects by 0, masks of classes by 255.

    Args:
        size: least (height, width) of the result in pixels.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Return the number of rows and columns to add."""
        bottom, right = (max(0, least - side) for least, side in zip(self.size, size_of(flat_inputs), strict=True))
        return {"padding": [0, 0, right, bottom]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Return an entry of the sample, padded."""
        if not any(params["padding"]):
            return inpt
        of_classes = isinstance(inpt, tv_tensors.Mask) and inpt.dtype != torch.bool
        return functional.pad(inpt, params["padding"], fill=IGNORED if of_classes else 0)


class PhotometricDistortion(v2.Transform):
    """Change brightness, contrast, saturation and hue of a float image in [0, 1], each with probability 0.5.

    The order is brightness, contrast, saturation, hue; contrast comes last in half of the cases. Values are clamped
    to [0, 1] after each change. The defaults are OpenMMLab's: 32 levels of brightness, factors from 0.5 to 1.5, and 18
    of OpenCV's units of hue, which are 2 degrees.

    Args:
        brightness: largest offset either way, in units of the full range.
        contrast: range of the factor on all values.
        saturation: range of the factor on the saturation (of HSV).
        hue: largest rotation of the hue either way, in degrees up to 180.
    """

    def __init__(
        self,
        brightness: float = 32 / 255,
        contrast: Sequence[float] = (0.5, 1.5),
        saturation: Sequence[float] = (0.5, 1.5),
        hue: float = 36,
    ) -> None:
        super().__init__()
        self.brightness, self.contrast, self.saturation, self.hue = brightness, contrast, saturation, hue

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Return the drawn changes in their order."""
        changes = {
            "brightness": _uniform(-self.brightness, self.brightness),
            "contrast": _uniform(*self.contrast),
            "saturation": _uniform(*self.saturation),
            "hue": _uniform(-self.hue, self.hue) / _DEGREES,
        }
        changes = {name: value for name, value in changes.items() if torch.rand(()) < 0.5}
        if torch.rand(()) < 0.5 and "contrast" in changes:
            changes["contrast"] = changes.pop("contrast")  # to the end
        return {"changes": changes}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Return an image with the changes, and anything else as it is."""
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        image = inpt.as_subclass(Tensor)
        for name, value in params["changes"].items():
            image = _CHANGES[name](image, value).clamp_(0, 1)
        return tv_tensors.wrap(image, like=inpt)


def _saturated(image: Tensor, factor: float) -> Tensor:
    """Multiply the saturation s = (max - min) / max of HSV, up to 1, at the same hue and value."""
    value, least = _extremes(image)
    limit = value / (value - least).clamp_min_(torch.finfo(image.dtype).tiny)  # 1 / s
    less = (value - image).mul_(limit.clamp_(max=factor))
    return torch.sub(value, less, out=less)


def _hued(image: Tensor, turn: float) -> Tensor:
    """Rotate the hue of HSV by a fraction of a full turn, at the same saturation and value.

    With the hue in sixths of a turn, red has the value minus the range times max(0, min(1, 2 - |hue - 3|)), green and
    blue max(0, min(1, |hue - 2| - 1)) and max(0, min(1, |hue - 4| - 1)).
    """
    if len(image) == 1:
        return image.clone()
    red, green, blue = image
    value, least = _extremes(image)
    span = value - least
    scale = span.clamp_min(torch.finfo(image.dtype).tiny).reciprocal_()  # gray has span 0 and any hue
    hue = torch.where(value == red, (green - blue).mul_(scale), (red - green).mul_(scale).add_(4))
    hue = torch.where((value == green) & (value != red), (blue - red).mul_(scale).add_(2), hue)
    hue.add_(6 * turn).remainder_(6)
    found = torch.empty_like(image)
    for channel, (middle, sign, offset) in zip(found, ((3, -1, 2), (2, 1, -1), (4, 1, -1)), strict=True):
        torch.sub(hue, middle, out=channel)
        channel.abs_().mul_(sign).add_(offset).clamp_(0, 1).mul_(span)
        torch.sub(value, channel, out=channel)
    return found


def _extremes(image: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest and the smallest channel at each pixel, (H, W); faster than ``amax`` and ``amin``."""
    channels = image.unbind(0)
    return functools.reduce(torch.maximum, channels), functools.reduce(torch.minimum, channels)


_CHANGES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "brightness": torch.add,
    "contrast": torch.mul,
    "saturation": _saturated,
    "hue": _hued,
}


def fitted(height: int, width: int, scale: Sequence[int]) -> tuple[int, int]:
    """Return the largest (height, width) of the same aspect ratio inside a rectangle, rounded as mmcv does.

    Each side is ``int(side * factor + 0.5)``.

    Args:
        height, width: of the image, in pixels.
        scale: the two sides of the rectangle in any order; the longer one bounds the image's longer side.
    """
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def size_of(flat_inputs: Sequence[Any]) -> tuple[int, int]:
    """Return (height, width) of the first image or mask of a sample."""
    found = next(entry for entry in flat_inputs if isinstance(entry, (tv_tensors.Image, tv_tensors.Mask)))
    height, width = found.shape[-2:]
    return int(height), int(width)


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))
