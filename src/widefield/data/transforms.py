"""Transform decoded images to normalized tensors with timm's transforms, after checking their options."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
from PIL import Image

from widefield import _checks

Transform = Callable[[Image.Image], torch.Tensor]
"""An RGB image of any size -> float32 (3, size, size), normalized."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
TRIVIAL = "trivial"
"""The policy of ``auto_augment`` that torchvision has and timm does not."""


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of a train split, with timm's semantics and defaults.

    Args:
        interpolation: ``"bilinear"``, ``"bicubic"``, or ``"random"`` of the two (then val uses bicubic).
        scale: range of the random crop's area relative to the image.
        ratio: range of the random crop's aspect ratio.
        hflip: probability of a horizontal flip.
        auto_augment: timm's policy, such as ``"rand-m9-mstd0.5-inc1"``, or ``"3a"`` for the three of DeiT III; or
            ``"trivial"``, TrivialAugment (Müller, Hutter 2021) with torchvision's wide ranges; None means none.
            ``color_jitter`` is dropped next to any policy but ``"3a"``.
        color_jitter: strength of brightness, contrast and saturation jitter; 0 means none.
        re_prob: probability of random erasing.
        re_mode: values of erased pixels: ``"const"``, ``"rand"`` or ``"pixel"``.
        re_count: largest number of erased rectangles.

    Raises:
        ValueError, TypeError: an option is out of range or of the wrong type.
    """

    interpolation: str = "bicubic"
    scale: Sequence[float] = (0.08, 1.0)
    ratio: Sequence[float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    auto_augment: str | None = None
    color_jitter: float = 0.4
    re_prob: float = 0.0
    re_mode: str = "pixel"
    re_count: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.auto_augment, str | None):
            raise TypeError(f"auto_augment must be the name of a policy or None; got {self.auto_augment!r}.")
        checked = {
            "interpolation": _checks.choice("interpolation", self.interpolation, ("bilinear", "bicubic", "random")),
            "scale": _range("scale", self.scale),
            "ratio": _range("ratio", self.ratio),
            "hflip": _checks.number("hflip", self.hflip, maximum=1),
            "color_jitter": _checks.number("color_jitter", self.color_jitter),
            "re_prob": _checks.number("re_prob", self.re_prob, maximum=1),
            "re_mode": _checks.choice("re_mode", self.re_mode, ("const", "rand", "pixel")),
            "re_count": _checks.integer("re_count", self.re_count),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class JointAugmentation:
    """Augmentation of a train split for dense prediction, with OpenMMLab's semantics and defaults.

    Args:
        scale: (longer side, shorter side) in pixels of the rectangle that images are fitted into, before ``ratio``;
            None means the size of each image.
        ratio: range of the random factor on ``scale``.
        cat_max_ratio: largest fraction of the crop's labeled pixels that one class may cover, from 0 to 1. A crop above
            it is drawn again, at most 10 times. 1 accepts every crop.
        hflip: probability of a horizontal flip.
        photometric: distort brightness, contrast, saturation and hue; see `widefield.data.joint`.
        antialias: smooth images before they are shrunk. Published results come from OpenCV's bilinear resize, which
            does not. Applies to both splits.

    Raises:
        ValueError, TypeError: an option is out of range or of the wrong type.
    """

    scale: Sequence[int] | None = None
    ratio: Sequence[float] = (0.5, 2.0)
    cat_max_ratio: float = 0.75
    hflip: float = 0.5
    photometric: bool = True
    antialias: bool = False

    def __post_init__(self) -> None:
        for name in ("photometric", "antialias"):
            _checks.boolean(name, getattr(self, name))
        checked = {
            "scale": rectangle("scale", self.scale),
            "ratio": _range("ratio", self.ratio),
            "cat_max_ratio": _checks.number("cat_max_ratio", self.cat_max_ratio, maximum=1),
            "hflip": _checks.number("hflip", self.hflip, maximum=1),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)


PIPELINES = ("resize", "multi_scale_crop", "large_scale_jitter")
"""How train images for detection are resized and cropped; see `DetectionAugmentation`."""
SHORT_SIDES = tuple(range(480, 801, 32))
"""Shorter sides of published multi-scale training, in pixels (Carion et al. 2020, DETR)."""


@dataclass(frozen=True)
class DetectionAugmentation:
    """Augmentation of a train split for object detection, with OpenMMLab's semantics and defaults.

    Every pipeline begins with a random flip. Images keep their aspect ratio.

    - ``"resize"``: fit the image into ``scale``. With ``short_sides`` or ``short_range`` the rectangle's shorter side
      is drawn for each image: multi-scale training.
    - ``"multi_scale_crop"``: the pipeline of 3x schedules (DETR, Sparse R-CNN, Swin, ConvNeXt). One of two, at random:
      a multi-scale resize; or a resize to a shorter side of 400, 500 or 600, a crop with sides from 384 to 600, and a
      multi-scale resize. ``short_sides`` are 480, 512, ..., 800 unless they are given.
    - ``"large_scale_jitter"`` (Ghiasi et al. 2021): fit the image into a square of ``size``, times a factor from
      ``ratio``, and cut a random part of at most ``size``. Boxes are then those of the masks, if there are any.

    Args:
        pipeline: one of these names.
        scale: (longer side, shorter side) in pixels of the rectangle that images are fitted into; None means the size
            of each image.
        short_sides: shorter sides in pixels, one of which replaces that of ``scale``.
        short_range: smallest and largest shorter side in pixels, with equal probability in between; replaces
            ``short_sides``.
        size: side of the square of ``"large_scale_jitter"``, in pixels.
        ratio: range of the random factor of ``"large_scale_jitter"``.
        copy_paste: probability that objects of another image are pasted over an image; for ``"large_scale_jitter"``,
            and sets with masks. Images are then padded to ``size``.
        hflip: probability of a horizontal flip.
        photometric: distort brightness, contrast, saturation and hue; see `widefield.data.joint`.
        min_size: leave out objects, except crowd regions, unless both sides of their box are above this, in pixels of
            the result.
        antialias: smooth images before they are shrunk. Published results come from OpenCV's bilinear resize, which
            does not. Applies to both splits.

    Raises:
        ValueError, TypeError: an option is out of range, of the wrong type, or has no effect in this pipeline.
    """

    pipeline: str = "resize"
    scale: Sequence[int] | None = (1333, 800)
    short_sides: Sequence[int] | None = None
    short_range: Sequence[int] | None = None
    size: int = 1024
    ratio: Sequence[float] = (0.1, 2.0)
    copy_paste: float = 0.0
    hflip: float = 0.5
    photometric: bool = False
    min_size: float = 0.0
    antialias: bool = False

    def __post_init__(self) -> None:
        for name in ("photometric", "antialias"):
            _checks.boolean(name, getattr(self, name))
        checked = {
            "pipeline": _checks.choice("pipeline", self.pipeline, PIPELINES),
            "scale": rectangle("scale", self.scale),
            "short_sides": _sides("short_sides", self.short_sides),
            "short_range": _sides("short_range", self.short_range, 2),
            "size": _checks.integer("size", self.size),
            "ratio": _range("ratio", self.ratio),
            "copy_paste": _checks.number("copy_paste", self.copy_paste, maximum=1),
            "hflip": _checks.number("hflip", self.hflip, maximum=1),
            "min_size": _checks.number("min_size", self.min_size),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        self._check_combinations()

    def _check_combinations(self) -> None:
        drawn = [name for name in ("short_sides", "short_range") if getattr(self, name) is not None]
        if len(drawn) > 1:
            raise ValueError("short_sides and short_range replace each other: leave out one of them.")
        if self.short_range is not None and self.short_range[0] > self.short_range[1]:
            raise ValueError(f"short_range must be (smallest, largest); got {tuple(self.short_range)!r}.")
        jitter = self.pipeline == "large_scale_jitter"
        if self.copy_paste and not jitter:
            raise ValueError(f"copy_paste needs pipeline: large_scale_jitter; the pipeline is {self.pipeline}.")
        if drawn and jitter:
            raise ValueError(f"{drawn[0]} has no effect in pipeline: large_scale_jitter; set size and ratio.")
        if self.scale is None and (drawn or self.pipeline == "multi_scale_crop"):
            raise ValueError("scale must be a rectangle such as (1333, 800) for multi-scale training; got None.")


@dataclass(frozen=True)
class PoseAugmentation:
    """Augmentation of the crops of a train split for pose estimation, with mmpose's semantics and defaults.

    "A normal number" below is drawn from a normal distribution with standard deviation 1, cut off at -1 and 1.

    Args:
        hflip: probability of a horizontal flip.
        half_body_prob: probability that the crop shows one half of the body, where the skeleton has an upper body.
        min_total_keypoints: people with fewer labeled key points keep their whole body.
        min_upper_keypoints, min_lower_keypoints: a half with fewer labeled key points is not shown alone.
        half_body_padding: factor on the sides of the rectangle around a half's key points.
        upper_prob: probability of the upper body if either half can be shown.
        shift_factor: the crop moves by a normal number times this, in units of its sides.
        shift_prob: probability that it moves.
        scale_factor: range of the factor on the crop's sides: a normal number is stretched to it.
        scale_prob: probability that the size changes.
        rotate_factor: the crop turns by a normal number times this, in degrees.
        rotate_prob: probability that it turns.

    Raises:
        ValueError, TypeError: an option is out of range or of the wrong type.
    """

    hflip: float = 0.5
    half_body_prob: float = 0.3
    min_total_keypoints: int = 9
    min_upper_keypoints: int = 2
    min_lower_keypoints: int = 3
    half_body_padding: float = 1.5
    upper_prob: float = 0.7
    shift_factor: float = 0.16
    shift_prob: float = 0.3
    scale_factor: Sequence[float] = (0.5, 1.5)
    scale_prob: float = 1.0
    rotate_factor: float = 80.0
    rotate_prob: float = 0.6

    def __post_init__(self) -> None:
        probabilities = ("hflip", "half_body_prob", "upper_prob", "shift_prob", "scale_prob", "rotate_prob")
        counts = ("min_total_keypoints", "min_upper_keypoints", "min_lower_keypoints")
        checked = {
            **{name: _checks.number(name, getattr(self, name), maximum=1) for name in probabilities},
            **{name: _checks.integer(name, getattr(self, name)) for name in counts},
            "half_body_padding": _checks.number("half_body_padding", self.half_body_padding, minimum=1),
            "shift_factor": _checks.number("shift_factor", self.shift_factor, maximum=1),
            "scale_factor": _range("scale_factor", self.scale_factor),
            "rotate_factor": _checks.number("rotate_factor", self.rotate_factor, maximum=180),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)


def training(
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    augmentation: Augmentation,
    crop: Sequence[Callable[[Image.Image], Image.Image]] | None = None,
) -> Transform:
    """Return the transform of a train split.

    Args:
        size: side of the result in pixels.
        mean, std: of ``statistics``.
        augmentation: of the train split.
        crop: replaces the crop by ``scale`` and ``ratio``; it must return images of ``size``.

    Raises:
        ValueError: timm does not know the policy of ``auto_augment``.
    """
    from timm.data import create_transform
    from torchvision.transforms import Compose

    options = {**asdict(augmentation), "color_jitter": augmentation.color_jitter or None}
    trivial = augmentation.auto_augment == TRIVIAL
    if trivial:
        options["auto_augment"] = "original"  # any policy of timm that is one step, which is then replaced
    try:
        built = create_transform(size, is_training=True, mean=tuple(mean), std=tuple(std), **options)
    except (AssertionError, ValueError) as error:  # timm asserts that the policy is known
        raise ValueError(
            f"timm cannot build auto_augment={augmentation.auto_augment!r}: {error}. Write a policy such as "
            f"'rand-m9-mstd0.5-inc1', or None."
        ) from error
    if trivial:
        _make_trivial(built.transforms, augmentation.interpolation)
    _mend_posterize(built.transforms)
    # The crop is the first of timm's transforms. Recipes for small images that build on timm replace it, too.
    made: Transform = built if crop is None else Compose([*crop, *built.transforms[1:]])
    return made


def _make_trivial(steps: list[Any], interpolation: str) -> None:
    """Put TrivialAugment in the place of timm's policy."""
    from timm.data.auto_augment import AutoAugment
    from torchvision.transforms import InterpolationMode, TrivialAugmentWide

    (place,) = (index for index, step in enumerate(steps) if isinstance(step, AutoAugment))
    mode = InterpolationMode("bicubic" if interpolation == "random" else interpolation)
    steps[place] = TrivialAugmentWide(interpolation=mode)


def _mend_posterize(steps: Iterable[Any]) -> None:
    """Make timm's posterize return a black image for 0 bits, the value at the largest magnitude of its policies.

    Pillow 12 did so. Pillow 13 raises ValueError, for one image in 650 under ``"rand-m9-mstd0.5-inc1"``, the policy of
    most recipes.
    """
    from timm.data import auto_augment

    for step in steps:
        policies = getattr(step, "policy", None) or [getattr(step, "ops", ())]  # AutoAugment's, or the others'
        for operation in chain.from_iterable(policies):
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    from timm.data.auto_augment import posterize

    if bits_to_keep <= 0:
        return Image.new(image.mode, image.size)
    made: Image.Image = posterize(image, bits_to_keep, **options)
    return made


def evaluation(
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    interpolation: str = "bicubic",
    crop_pct: float | None = None,
    crop_mode: str = "center",
) -> Transform:
    """Return the transform of a val split: a resize and a center crop.

    Args:
        size: side of the result in pixels.
        mean, std: of ``statistics``.
        interpolation, crop_pct, crop_mode: see `ImageFiles`.

    Raises:
        ValueError, TypeError: an option is out of range or of the wrong type.
    """
    from timm.data import create_transform

    if crop_pct is not None and _checks.number("crop_pct", crop_pct, maximum=1) == 0:
        raise ValueError(f"crop_pct must be above 0; got {crop_pct!r}.")
    made: Transform = create_transform(
        size,
        is_training=False,
        mean=tuple(mean),
        std=tuple(std),
        interpolation="bicubic" if interpolation == "random" else interpolation,
        crop_pct=crop_pct,
        crop_mode=_checks.choice("crop_mode", crop_mode, ("center", "squash", "border")),
    )
    return made


def statistics(mean: object, std: object) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of three channels as tuples; raises TypeError or ValueError."""
    mean, std = _floats("mean", mean, 3), _floats("std", std, 3)
    if min(std) == 0:
        raise ValueError(f"std must be positive in every channel; got {std}.")
    return mean, std


def rectangle(name: str, value: object) -> tuple[int, int] | None:
    """Return two sides in pixels, or None; an integer stands for a square. Raises TypeError or ValueError."""
    return None if value is None else _checks.pair(name, value)


def _sides(name: str, value: object, count: int | None = None) -> tuple[int, ...] | None:
    """Return a sequence of sides in pixels as a tuple, or None; raises TypeError or ValueError."""
    if value is None:
        return None
    if not isinstance(value, (tuple, list)) or not value or count not in (None, len(value)):
        raise TypeError(f"{name} must be {count or 'a sequence of'} sides in pixels, or None; got {value!r}.")
    return tuple(_checks.integer(f"every entry of {name}", side) for side in value)


def _range(name: str, values: object) -> tuple[float, ...]:
    low, high = _floats(name, values, 2)
    if not 0 < low <= high:
        raise ValueError(f"{name} must be a range (smallest, largest) of positive numbers; got {values!r}.")
    return low, high


def _floats(name: str, values: object, length: int) -> tuple[float, ...]:
    """Return ``values`` as a tuple of ``length`` non-negative floats; raises TypeError or ValueError."""
    if not isinstance(values, (tuple, list)) or len(values) != length:
        raise TypeError(f"{name} must be a sequence of {length} numbers; got {values!r}.")
    return tuple(_checks.number(f"every entry of {name}", value) for value in values)
