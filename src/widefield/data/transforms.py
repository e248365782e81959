"""From a picture to a normalised tensor: timm's transforms, with checked options, for every set that decodes images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from PIL import Image

from widefield import _checks

Transform = Callable[[Image.Image], torch.Tensor]
"""An RGB image of any size -> float32 (3, size, size), normalised."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def training(
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    interpolation: str = "bicubic",
    scale: Sequence[float] = (0.08, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    auto_augment: str | None = None,
    color_jitter: float = 0.4,
    re_prob: float = 0.0,
    re_mode: str = "pixel",
    re_count: int = 1,
    crop: Sequence[Callable[[Image.Image], Image.Image]] | None = None,
) -> Transform:
    """Return a random crop, flip, ``auto_augment`` or ``color_jitter``, and random erasing.

    Args:
        size: side of the result in pixels.
        mean, std: of ``statistics``.
        crop: what stands in for the crop by ``scale`` and ``ratio``; it gives images of ``size``.
        interpolation, scale, ratio, hflip, auto_augment, color_jitter, re_prob, re_mode, re_count: as of `Folder`.

    Raises:
        ValueError, TypeError: an option is out of range or of the wrong kind.
    """
    from timm.data import create_transform
    from torchvision.transforms import Compose

    if not isinstance(auto_augment, str | None):
        raise TypeError(f"auto_augment must be the name of a policy or None; got {auto_augment!r}.")
    options = {
        "interpolation": _checks.choice("interpolation", interpolation, ("bilinear", "bicubic", "random")),
        "scale": _range("scale", scale),
        "ratio": _range("ratio", ratio),
        "hflip": _checks.number("hflip", hflip, maximum=1),
        "auto_augment": auto_augment,
        "color_jitter": _checks.number("color_jitter", color_jitter) or None,
        "re_prob": _checks.number("re_prob", re_prob, maximum=1),
        "re_mode": _checks.choice("re_mode", re_mode, ("const", "rand", "pixel")),
        "re_count": _checks.integer("re_count", re_count),
    }
    try:
        built = create_transform(size, is_training=True, mean=tuple(mean), std=tuple(std), **options)
    except (AssertionError, ValueError) as error:  # timm asserts that it knows the policy
        raise ValueError(
            f"timm cannot build auto_augment={auto_augment!r}: {error}. Write a policy such as "
            f"'rand-m9-mstd0.5-inc1', or None."
        ) from error
    _mend_posterize(built.transforms)
    # The crop is the first of timm's transforms; the recipes for small images that build on timm exchange it so, too.
    made: Transform = built if crop is None else Compose([*crop, *built.transforms[1:]])
    return made


def _mend_posterize(steps: Iterable[Any]) -> None:
    """Let timm's policies ask for an image of no bits, as they do at their largest magnitude: it is black.

    Pillow 12 made it so, Pillow 13 raises ValueError: for one image in 650 under ``"rand-m9-mstd0.5-inc1"``, the policy
    of most recipes.
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
    """Return a resize and a crop of its centre.

    Args:
        size: side of the result in pixels.
        mean, std: of ``statistics``.
        interpolation, crop_pct, crop_mode: as of `Folder`.

    Raises:
        ValueError, TypeError: an option is out of range or of the wrong kind.
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
    """Return mean and standard deviation of the three channels; raises TypeError or ValueError."""
    mean, std = _floats("mean", mean, 3), _floats("std", std, 3)
    if min(std) == 0:
        raise ValueError(f"std must be positive in every channel; got {std}.")
    return mean, std


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
