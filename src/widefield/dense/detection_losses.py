"""Compute the losses of detectors.

Each loss is a sum divided by ``count`` + 1.19e-7 (the float32 epsilon), as in OpenMMLab's code: the caller says what
it is averaged over. Each one is a scalar with a gradient, also if nothing is summed. Half precision is computed in
float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from widefield.dense.boxes import paired_iou
from widefield.dense.layers import widened

EPS = torch.finfo(torch.float32).eps
"""Added to the counts in denominators."""

_LEAST_IOU = 1e-6


def mean_over(losses: Tensor, count: float | Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the sum of the losses, times weights of the same shape, divided by ``count`` + 1.19e-7."""
    return (losses if weights is None else losses * weights).sum() / (count + EPS)


def sums_by_level(losses: Tensor, places: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the sum of losses (P,) for each level of a pyramid.

    Args:
        losses: (P,).
        places: int64 (P,): positions counted over all levels.
        lengths: number of positions of each level.
    """
    ends = torch.tensor(lengths, device=places.device).cumsum(0)
    return losses.new_zeros(len(lengths)).index_add(0, torch.bucketize(places, ends, right=True), losses)


def mean_over_processes(count: Tensor) -> Tensor:
    """Return the mean over the processes of distributed training, so that their gradients add up to those of one."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(count)
        count = count / distributed.get_world_size()
    return count


def differences(predicted: Tensor, target: Tensor, beta: float | None = None) -> Tensor:
    """Return the absolute difference of each element, or the smooth L1 loss if there is a ``beta``.

    The smooth L1 loss is d^2 / (2 beta) below d = beta, and d - beta / 2 from there on (Girshick 2015, equation 3).
    """
    predicted = widened(predicted)
    if beta is None:
        return (predicted - target).abs()
    return F.smooth_l1_loss(predicted, target, reduction="none", beta=beta)


def l1(predicted: Tensor, target: Tensor, count: float | Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the absolute difference."""
    return mean_over(differences(predicted, target), count, weights)


def smooth_l1(
    predicted: Tensor, target: Tensor, count: float | Tensor, weights: Tensor | None = None, *, beta: float = 1.0
) -> Tensor:
    """Return the smooth L1 loss; see :func:`differences`."""
    return mean_over(differences(predicted, target, beta), count, weights)


def binary_cross_entropy(logits: Tensor, target: Tensor, count: float | Tensor) -> Tensor:
    """Return the cross-entropy of sigmoids of logits with probabilities of the same shape, in nats."""
    logits = widened(logits)
    return mean_over(F.binary_cross_entropy_with_logits(logits, target.to(logits), reduction="none"), count)


def cross_entropy(logits: Tensor, labels: Tensor, count: float | Tensor) -> Tensor:
    """Return the cross-entropy of softmaxes of logits (N, K) with labels int64 (N,), in nats."""
    return mean_over(F.cross_entropy(widened(logits), labels, reduction="none"), count)


def focal(logits: Tensor, labels: Tensor, count: float | Tensor, *, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Return the focal loss of sigmoids (Lin et al., ICCV 2017, section 3.2).

    Args:
        logits: (..., K), of any memory order.
        labels: int64 (...): 0 to K - 1, or K for the background. Places with a negative label have no loss.
        count: what the sum is divided by.
        alpha: weight of the class that is there; the others have 1 - alpha.
        gamma: focusing exponent.
    """
    logits = widened(logits)
    absent = ((1 - alpha) * _focal_terms(logits, gamma)).sum(-1)  # as if no class were there
    found = ((labels >= 0) & (labels < logits.shape[-1])).nonzero(as_tuple=True)
    there = logits[(*found, labels[found])]
    right = alpha * _focal_terms(-there, gamma) - (1 - alpha) * _focal_terms(there, gamma)
    return (absent.masked_fill(labels < 0, 0).sum() + right.sum()) / (count + EPS)


def _focal_terms(x: Tensor, gamma: float) -> Tensor:
    """Return p^gamma * -log(1 - p) for p = sigmoid(x)."""
    return x.sigmoid() ** gamma * F.softplus(x)


def iou_loss(predicted: Tensor, target: Tensor, count: float | Tensor, weights: Tensor | None = None) -> Tensor:
    """Return -log(IoU) of boxes (N, 4) with boxes (N, 4) xyxy (Yu et al. 2016, eq. 2); the IoU is at least 1e-6."""
    losses = -paired_iou(predicted, target).clamp(min=_LEAST_IOU).log()
    return mean_over(losses, count, weights)


def giou_loss(predicted: Tensor, target: Tensor, count: float | Tensor, weights: Tensor | None = None) -> Tensor:
    """Return 1 - GIoU of boxes (N, 4) with boxes (N, 4) xyxy (Rezatofighi et al., CVPR 2019, algorithm 1)."""
    return mean_over(1 - paired_iou(predicted, target, "giou"), count, weights)
