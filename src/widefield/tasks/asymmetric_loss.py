"""Compute the asymmetric loss of multi-label classification (Ridnik et al. 2021)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def asymmetric_loss(logits: Tensor, present: Tensor, gamma_pos: float, gamma_neg: float, margin: float) -> Tensor:
    """Return the asymmetric loss of each class of each image (Ridnik et al. 2021, eqs. 4 to 6).

    With p the sigmoid of the logit, a class that is present adds ``-(1 - p) ** gamma_pos * log(p)``. One that is absent
    adds ``-q ** gamma_neg * log(1 - q)`` with ``q = max(p - margin, 0)``. With all three at 0 it is the binary
    cross-entropy. Gradients flow through the weights, too.

    Args:
        logits: (N, K).
        present: bool or 0 and 1, (N, K).
        gamma_pos: exponent for present classes, from 0.
        gamma_neg: exponent for absent classes, from 0.
        margin: shift of the probabilities of absent classes, from 0 to below 1.

    Returns:
        (N, K), of the type of ``logits``.
    """
    away = torch.sigmoid(-logits)
    found = -_power(away, gamma_pos) * F.logsigmoid(logits)
    if margin:
        shifted = (torch.sigmoid(logits) - margin).clamp(min=0)
        absent = -_power(shifted, gamma_neg) * torch.log1p(-shifted)
    else:
        absent = -_power(torch.sigmoid(logits), gamma_neg) * F.logsigmoid(-logits)
    return torch.where(present.bool(), found, absent)


def _power(base: Tensor, exponent: float) -> Tensor | float:
    """Return ``base ** exponent``; at 0 the gradient is 0 instead of infinite for exponents below 1."""
    if not exponent:
        return 1.0
    positive = base > 0
    return torch.where(positive, torch.where(positive, base, 1.0) ** exponent, 0.0)
