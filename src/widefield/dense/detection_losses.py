"""Compute the losses of detectors.

Each loss is a sum divided by ``count`` + 1.19e-7 (the float32 epsilon), as in OpenMMLab's code: the caller says what
it is averaged over. Each one is a scalar with a gradient, also if nothing is summed. Half precision is computed in
float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from widefield.dense.boxes import at_least_float32, paired_iou

EPS = torch.finfo(torch.float32).eps
"""Added to the counts in denominators."""

_LEAST_IOU = 1e-6


def mean_over(losses: Tensor, count: float | Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the sum of the losses, times weights of the same shape, divided by ``count`` + 1.19e-7."""
    return (losses if weights is None else losses * weights).sum() / (count + EPS)


def l1(predicted: Tensor, target: Tensor, count: float | Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the absolute difference."""
    return mean_over((at_least_float32(predicted) - target).abs(), count, weights)


def smooth_l1(
    predicted: Tensor, target: Tensor, count: float | Tensor, weights: Tensor | None = None, *, beta: float = 1.0
) -> Tensor:
    """Return the smooth L1 loss: d^2 / (2 beta) below d = beta, d - beta / 2 from there on (Girshick 2015, eq. 3)."""
    losses = F.smooth_l1_loss(at_least_float32(predicted), target, reduction="none", beta=beta)
    return mean_over(losses, count, weights)


def binary_cross_entropy(logits: Tensor, target: Tensor, count: float | Tensor) -> Tensor:
    """Return the cross-entropy of sigmoids of logits with probabilities of the same shape, in nats."""
    logits = at_least_float32(logits)
    return mean_over(F.binary_cross_entropy_with_logits(logits, target.to(logits), reduction="none"), count)


def cross_entropy(logits: Tensor, labels: Tensor, count: float | Tensor) -> Tensor:
    """Return the cross-entropy of softmaxes of logits (N, K) with labels int64 (N,), in nats."""
    return mean_over(F.cross_entropy(at_least_float32(logits), labels, reduction="none"), count)


def focal(logits: Tensor, labels: Tensor, count: float | Tensor, *, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Return the focal loss of sigmoids (Lin et al., ICCV 2017, section 3.2).

    Args:
        logits: (N, K).
        labels: int64 (N,): 0 to K - 1, or K for the background. Rows with a negative label have no loss.
        count: what the sum is divided by.
        alpha: weight of the class that is there; the others have 1 - alpha.
        gamma: focusing exponent.
    """
    logits = at_least_float32(logits)
    rows = ((1 - alpha) * _focal_terms(logits, gamma)).sum(1)  # as if no class were there
    found = ((labels >= 0) & (labels < logits.shape[1])).nonzero().flatten()
    there = logits[found, labels[found]]
    right = alpha * _focal_terms(-there, gamma) - (1 - alpha) * _focal_terms(there, gamma)
    return (rows.masked_fill(labels < 0, 0).sum() + right.sum()) / (count + EPS)


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
