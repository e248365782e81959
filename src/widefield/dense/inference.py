"""Segment images of any size: whole or in windows, at one or several scales, with or without their mirror images.

Windows and averages are those of mmsegmentation (``EncoderDecoder.slide_inference`` and its test-time augmentation),
which published results were measured with. The views at several scales differ, see :func:`segment`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widefield import _checks
from widefield._pixels import best_class
from widefield.dense.layers import widened
from widefield.surgery.answers import aligned_corners, described, evaluating, meant, wrapping

Size = tuple[int, int]
"""(height, width) in pixels."""


@_checks.guided
def segment(
    model: nn.Module,
    images: Tensor,
    *,
    window: int | Sequence[int] | None = None,
    stride: int | Sequence[int] | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    size: Sequence[int] | None = None,
) -> Tensor:
    """Return the logits of every pixel or, with several views, the mean of their probabilities.

    A view is one scale, mirrored or not. The logits of each view are resized to ``size``, mirrored back and, if there
    are several views, turned into probabilities by a softmax; these are averaged. Logits are resized bilinearly with
    the model's ``align_corners`` (False if it has none), images bilinearly without antialiasing. No gradients.

    Views are resampled from ``images``. mmsegmentation resizes the file for each view, so at scales other than 1 its
    views are slightly sharper and can differ by a pixel in size if the images were resized before.

    Memory, next to what the model needs for one view or window: the logits of the view and those at ``size``, each
    (N, K, height, width); with windows also the logits of one window; with several views two more maps of ``size``. A
    map of 19 classes at 2048 x 1024 takes 160 MB in float32.

    Args:
        model: maps images (N, C, h, w) to logits (N, K, h', w'), which are resized to (h, w). It runs in evaluation
            mode; its mode is restored.
        images: (N, C, H, W), normalized.
        window: (height, width) of the windows, or the side of square ones, in pixels of the view; None: whole images.
            Logits of overlapping windows are averaged. Windows larger than a view shrink to it; nothing is padded.
        stride: (rows, columns) from one window to the next, at most ``window``; None: two thirds of it, rounded down.
            The last window of a row or column moves back inside the view.
        scales: sizes of the views relative to the images.
        flip: also mirror every view, left to right.
        size: (height, width) of the result; None: that of the images.

    Returns:
        (N, K, \\*size), float32 or wider: logits for one view, probabilities for several.

    Raises:
        ValueError, TypeError: an argument is of the wrong type or out of range, or the model returns no logits.
    """
    tiles = check_views(window, stride, scales, flip)
    if images.ndim != 4:
        hint = " Add the batch dimension with images[None]." if images.ndim == 3 else ""
        raise ValueError(f"images must be (N, C, H, W); got shape {tuple(images.shape)}.{hint}")
    corners = aligned_corners(model)
    target = _pair("size", tuple(images.shape[2:] if size is None else size))

    def seen(scale: float, mirrored: bool) -> Tensor:
        """Return the logits of one view, (N, K, *target)."""
        view = _resized(images, _scaled(images, scale), False)
        view = view.flip(-1) if mirrored else view
        logits = _whole(model, view, corners) if tiles is None else _windowed(model, view, *tiles, corners)
        logits = _resized(logits, target, corners)
        return logits.flip(-1) if mirrored else logits

    first, *others = itertools.product(scales, (False, True) if flip else (False,))
    with evaluating(model), torch.no_grad():
        if not others:
            return seen(*first)
        total = seen(*first).softmax(1)
        for view in others:
            total += seen(*view).softmax(1)
    return total.div_(1 + len(others))


def check_views(
    window: int | Sequence[int] | None, stride: int | Sequence[int] | None, scales: Sequence[float], flip: bool
) -> tuple[Size, Size] | None:
    """Return window and stride as pairs, or None for whole images; arguments and errors as of :func:`segment`."""
    if not isinstance(scales, (tuple, list)) or not scales:
        raise TypeError(f"scales must be a tuple or list of numbers, such as (0.75, 1.0, 1.25); got {scales!r}.")
    if not all(_checks.number("every entry of scales", scale) for scale in scales):
        raise ValueError(f"every entry of scales must be above 0; got {scales!r}.")
    _checks.boolean("flip", flip)
    if window is None:
        if stride is not None:
            raise ValueError(f"stride is for windows, and window is None; got stride={stride!r}. Give window too.")
        return None
    height, width = _pair("window", window)
    steps = _pair("stride", (max(height * 2 // 3, 1), max(width * 2 // 3, 1)) if stride is None else stride)
    if steps[0] > height or steps[1] > width:
        raise ValueError(f"stride must not exceed window, or pixels are left out; got {stride} and {window}.")
    return (height, width), steps


def _whole(model: nn.Module, images: Tensor, corners: bool) -> Tensor:
    """Return logits (N, K, H, W) at the size of the images, in float32 or wider."""
    output = model(images)
    logits = meant(output)
    if logits is None or logits.ndim != 4 or len(logits) != len(images):
        raise ValueError(
            f"{type(model).__name__} returns no logits (N, classes, H, W) for images {tuple(images.shape)}; it returns "
            f"{described(output)}.{wrapping(output)}"
        )
    return _resized(widened(logits), (images.shape[2], images.shape[3]), corners)


def largest_at(logits: Tensor, size: Size, *, align_corners: bool = False, rows: int = 64) -> Tensor:
    """Return which class has the largest logit at each pixel after a bilinear resize, without the resized logits.

    Args:
        logits: (N, K, h, w).
        size: (height, width) of the result.
        align_corners: as of ``torch.nn.functional.interpolate``.
        rows: rows of the result that are computed at a time; memory grows with them.

    Returns:
        int64 (N, *size).
    """
    count, (height, width) = logits.shape[2], size
    if tuple(logits.shape[2:]) == size:
        return best_class(logits)
    places = torch.arange(height, device=logits.device, dtype=logits.dtype)
    if align_corners:
        places = places * ((count - 1) / max(height - 1, 1))
    else:
        places = ((places + 0.5) * (count / height) - 0.5).clamp(min=0)
    upper = places.floor().long().clamp(max=count - 1)
    lower, share = (upper + 1).clamp(max=count - 1), (places - upper)[:, None]
    found = logits.new_empty(len(logits), height, width, dtype=torch.long)
    for start in range(0, height, rows):
        band = slice(start, start + rows)
        values = torch.lerp(logits[:, :, upper[band]], logits[:, :, lower[band]], share[band])
        found[:, band] = best_class(_resized(values, (values.shape[2], width), align_corners))
    return found


def _windowed(model: nn.Module, images: Tensor, window: Size, stride: Size, corners: bool) -> Tensor:
    """Return the mean logits of all windows over each pixel, (N, K, H, W)."""
    total, count = torch.empty(0), images.new_zeros(images.shape[2:])
    spans = [list(_spans(*side)) for side in zip(images.shape[2:], window, stride, strict=True)]
    for rows, columns in itertools.product(*spans):
        logits = _whole(model, images[:, :, rows, columns], corners)
        if not total.numel():
            total = logits.new_zeros(*logits.shape[:2], *images.shape[2:])
        total[:, :, rows, columns] += logits
        count[rows, columns] += 1
    return total.div_(count.to(total.dtype))


def _spans(length: int, window: int, stride: int) -> Iterator[slice]:
    """Yield the windows along one side: ceil((length - window) / stride) + 1 of them, the last one moved inside."""
    for start in range(0, max(length - window + stride - 1, 0) // stride * stride + 1, stride):
        end = min(start + window, length)
        yield slice(max(end - window, 0), end)


def _resized(maps: Tensor, size: Size, corners: bool) -> Tensor:
    if tuple(maps.shape[2:]) == size:
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=corners)


def _scaled(images: Tensor, scale: float) -> Size:
    return max(int(images.shape[2] * scale + 0.5), 1), max(int(images.shape[3] * scale + 0.5), 1)


def _pair(name: str, value: Any) -> Size:
    """Return (height, width) of one integer or two; raises TypeError or ValueError."""
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"{name} must be an integer or two, (height, width); got {value!r}.")
        return _checks.integer(name, value[0]), _checks.integer(name, value[1])
    side = _checks.integer(name, value)
    return side, side
