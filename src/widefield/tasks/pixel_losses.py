"""Compute losses and accuracy of logits at every pixel, with the denominators of the published results.

The numbers are those of mmsegmentation 1.2.2; a docstring says so where they are not. It averages the cross-entropy
over all pixels, including ignored ones, and adds the float32 epsilon to their number. A crop that is half ignored
therefore weighs half as much as a fully labeled one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from widefield._pixels import IGNORED

EPS = torch.finfo(torch.float32).eps
"""Added to the number of pixels in denominators (1.19e-7), as in mmsegmentation."""


def cross_entropy(
    logits: Tensor,
    mask: Tensor,
    *,
    ignore_index: int = IGNORED,
    class_weights: Sequence[float] | None = None,
    avg_non_ignore: bool = False,
    chosen: Tensor | None = None,
) -> Tensor:
    """Return the mean cross-entropy of the pixels in nats, a scalar.

    The sum over the pixels with a class is divided by the number of all pixels, or with ``avg_non_ignore`` by the
    number of pixels with a class. With class weights, it is divided by the sum of the weights of the pixels with a
    class in both cases. 1.19e-7 is added to each denominator. mmsegmentation 1.2.2 does the same, except that with
    class weights it fails at ignored pixels. mmsegmentation 0.x divides by numbers of pixels also with class weights.

    Args:
        logits: (N, K, H, W).
        mask: int64 (N, H, W), classes or ``ignore_index``.
        ignore_index: value of pixels without a class.
        class_weights: factor of each class.
        avg_non_ignore: leave pixels without a class out of the denominator. With class weights they always are.
        chosen: bool (N, H, W): pixels whose losses are summed, such as those of :func:`hard_pixels`. The denominator
            does not depend on it.
    """
    weights = None if class_weights is None else logits.new_tensor(class_weights)
    losses = F.cross_entropy(logits, mask, weight=weights, ignore_index=ignore_index, reduction="none")
    if chosen is not None:
        losses = losses * chosen
    valid = mask != ignore_index
    if weights is not None:
        return losses.sum() / (weights[mask[valid]].sum() + EPS)
    count = valid.sum().to(losses.dtype) if avg_non_ignore else mask.numel()
    return losses.sum() / (count + EPS)


@torch.no_grad()
def hard_pixels(
    logits: Tensor, mask: Tensor, *, threshold: float | None, min_kept: int, ignore_index: int = IGNORED
) -> Tensor:
    """Return which pixels are hard, bool (N, H, W): online hard example mining.

    It is OHEMPixelSampler of mmsegmentation 0.x and 1.2.2, with one difference: without a threshold, that sampler ranks
    by the losses times their class weights, and this function by the cross-entropy alone.

    Args:
        logits: (N, K, H, W).
        mask: int64 (N, H, W), classes or ``ignore_index``; pixels without a class are never hard.
        threshold: pixels whose own class has a lower probability are hard. If these are fewer than ``min_kept``, the
            threshold rises until about as many are. None: the pixels with the largest losses are hard.
        min_kept: number of pixels to keep per image; counted over the batch.
        ignore_index: value of pixels without a class.
    """
    valid = mask != ignore_index
    hard = torch.zeros_like(valid)
    losses = F.cross_entropy(logits, mask, ignore_index=ignore_index, reduction="none")[valid]
    count = min_kept * len(mask)
    if not len(losses):
        return hard
    if threshold is None:
        kept = torch.zeros_like(losses, dtype=torch.bool)
        kept[losses.argsort(descending=True)[:count]] = True
    else:
        shares = (-losses).exp()
        least = shares.sort().values[min(count, len(shares) - 1)]
        kept = shares < least.clamp(min=threshold)
    hard[valid] = kept
    return hard


def dice_loss(logits: Tensor, mask: Tensor, *, ignore_index: int = IGNORED) -> Tensor:
    """Return 1 - Dice, averaged over classes and images, a scalar (Milletari et al. 2016, V-Net).

    Of each image and class it is 1 - (2 sum(p t) + 1) / (sum(p^2) + sum(t^2) + 1), with probabilities p and targets t,
    as in mmsegmentation 0.x (``smooth`` 1, ``exponent`` 2), except that pixels without a class count in no sum (there
    they count in the denominator). mmsegmentation 1.x has another formula.

    Args:
        logits: (N, K, H, W).
        mask: int64 (N, H, W), classes or ``ignore_index``.
        ignore_index: value of pixels without a class.
    """
    valid = (mask != ignore_index).unsqueeze(1)
    target = torch.zeros_like(logits).scatter_(1, mask.masked_fill(mask == ignore_index, 0).unsqueeze(1), 1.0) * valid
    shares = logits.softmax(1) * valid
    both = (shares * target).sum((2, 3))
    each = (shares.square() + target).sum((2, 3))
    return 1 - ((2 * both + 1) / (each + 1)).mean()
