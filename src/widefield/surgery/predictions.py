"""Decide what a model's outputs predict, and count how often two models agree with each other and with labels.

(N, classes) are logits per image, (N, classes, H, W) are logits per pixel. Other outputs predict no class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from widefield._pixels import IGNORED, best_class, intersection_over_union


class Shares(NamedTuple):
    """How often two models predict the same and the right class; None where it is unknown."""

    agreement: float | None = None
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    miou_before: float | None = None
    miou_after: float | None = None
    pixels: int | None = None


def counts_for(logits: Tensor | None, images: int) -> type[ImageCounts] | type[PixelCounts] | None:
    """Return which counts apply to a model's main output for this number of images; None if it predicts no class."""
    if logits is None or logits.ndim not in (2, 4) or len(logits) != images or logits.shape[1] < 2:
        return None
    return ImageCounts if logits.ndim == 2 else PixelCounts


class ImageCounts:
    """Counts of images; the labels are one class each, and -1 stands for none."""

    def __init__(self) -> None:
        self._images = self._same = self._labeled = self._right = self._right_after = 0

    def add(self, first: Tensor, second: Tensor, labels: Any) -> None:
        """Add logits (N, classes) and labels (N,) or (N, 1); anything else is not a label."""
        before, after = first.argmax(1), second.argmax(1).to(first.device)
        self._images += len(before)
        self._same += int((before == after).sum())
        classes = _classes(labels, len(before))
        if classes is not None:
            classes = classes.to(before.device)
            self._labeled += int((classes >= 0).sum())  # data sets use -1 for "no class"
            self._right += int((before == classes).sum())
            self._right_after += int((after == classes).sum())

    def shares(self) -> Shares:
        """Return agreement and accuracies."""
        return Shares(
            _share(self._same, self._images),
            _share(self._right, self._labeled),
            _share(self._right_after, self._labeled),
        )


class PixelCounts:
    """Counts of pixels; the labels are masks, in which 255 and negative values stand for no class.

    Args:
        align_corners: of the bilinear resizing of logits to masks of another size.
    """

    def __init__(self, align_corners: bool = False) -> None:
        self._align_corners = align_corners
        self._pixels = self._same = 0
        self._areas: Tensor | None = None
        """Pixels by class: labeled; then predicted, and predicted rightly, by the first and by the second model."""

    def add(self, first: Tensor, second: Tensor, labels: Any) -> None:
        """Add logits (N, classes, H, W) and masks (N, H, W) or (N, 1, H, W), or one (H, W) for each image.

        Where a mask has another size than the logits, these are resized to it (bilinear).
        """
        masks = _masks(labels, len(first))
        for index, (one, other) in enumerate(zip(first.split(1), second.split(1), strict=True)):  # bounds the memory
            before, after = one.argmax(1), other.argmax(1).to(one.device)
            self._pixels += before.numel()
            self._same += int((before == after).sum())
            if masks is None:
                continue
            mask = masks[index].to(one.device)
            if mask.shape != before.shape[1:]:
                before, after = (best_class(self._resized(y, mask)).to(one.device) for y in (one, other))
            self._add_areas(before[0], after[0], mask, first.shape[1])

    def _resized(self, logits: Tensor, mask: Tensor) -> Tensor:
        if logits.dtype in (torch.float16, torch.bfloat16):  # classes would tie at many pixels
            logits = logits.float()
        return F.interpolate(logits, tuple(mask.shape), mode="bilinear", align_corners=self._align_corners)

    def _add_areas(self, before: Tensor, after: Tensor, mask: Tensor, classes: int) -> None:
        known = (mask != IGNORED) & (mask >= 0)
        label = mask[known].long()
        if label.numel() and int(label.max()) >= classes:
            raise ValueError(
                f"masks must hold classes below {classes}, the model's number of classes, or {IGNORED} for pixels to "
                f"ignore; got {int(label.max())}."
            )
        parts = [label]
        for predicted in (before[known], after[known]):
            parts += [predicted, predicted[predicted == label]]
        areas = torch.stack([part.bincount(minlength=classes) for part in parts]).cpu()
        self._areas = areas if self._areas is None else self._areas + areas

    def shares(self) -> Shares:
        """Return agreement, pixel accuracies and mean IoUs."""
        agreement = _share(self._same, self._pixels)
        if self._areas is None or not self._areas[0].sum():
            return Shares(agreement, pixels=self._pixels)
        labeled, before, right_before, after, right_after = self._areas.double()
        return Shares(
            agreement,
            float(right_before.sum() / labeled.sum()),
            float(right_after.sum() / labeled.sum()),
            float(intersection_over_union(labeled, before, right_before).nanmean()),
            float(intersection_over_union(labeled, after, right_after).nanmean()),
            self._pixels,
        )


def _share(part: int, total: int) -> float | None:
    return part / total if total else None


def _integers(labels: Any) -> Tensor | None:
    """Return labels as a tensor of integers, or None."""
    try:
        found = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):  # None, names and boxes each raise another one
        return None
    return None if found.is_floating_point() or found.is_complex() else found


def _classes(labels: Any, count: int) -> Tensor | None:
    """Return labels as (N,) int64, or None if they are not one class per image; ValueError for another number."""
    found = _integers(labels)
    if found is not None and found.ndim == 2 and found.shape[1] == 1:
        found = found[:, 0]
    if found is None or found.ndim != 1:
        return None
    _check_count(found, count)
    return found.long()


def _masks(labels: Any, count: int) -> Sequence[Tensor] | None:
    """Return one mask (H, W) for each image, or None if the labels are no masks; ValueError for another number."""
    if isinstance(labels, (list, tuple)):
        masks = [_integers(label) for label in labels]
    else:
        found = _integers(labels)
        masks = [] if found is None or found.ndim < 3 else list(found)
    flat = [mask[0] if mask is not None and mask.ndim == 3 and len(mask) == 1 else mask for mask in masks]
    known = [mask for mask in flat if mask is not None and mask.ndim == 2 and mask.dtype != torch.bool]
    if not known or len(known) != len(flat):
        return None
    _check_count(known, count)
    return known


def _check_count(labels: Sequence[Any] | Tensor, count: int) -> None:
    if len(labels) != count:
        raise ValueError(f"there must be one label for each image; got {len(labels)} labels for {count} images.")
