"""Measure how well nearest neighbors share a class: a check of features that needs no training."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from widefield import _checks

TEMPERATURE = 0.07
_ROWS = 1024


class NearestNeighbors(Metric):
    """Share of images whose class is that of their nearest neighbors among the other images.

    Neighbors vote with ``exp(cosine / 0.07)``, as in Wu et al., "Unsupervised Feature Learning via Non-Parametric
    Instance Discrimination", CVPR 2018, section 3.4. Ties go to the class with the smaller number.

    Args:
        num_classes: number of classes.
        neighbors: number of neighbors that vote; fewer if there are fewer images.
        options: of torchmetrics' Metric.
    """

    full_state_update = False
    features: Any  # a list of tensors, and one tensor after synchronization
    target: Any

    def __init__(self, num_classes: int, neighbors: int = 20, **options: Any) -> None:
        super().__init__(**options)
        self.num_classes = _checks.integer("num_classes", num_classes)
        self.neighbors = _checks.integer("neighbors", neighbors)
        self.add_state("features", [], dist_reduce_fx="cat")
        self.add_state("target", [], dist_reduce_fx="cat")

    def update(self, features: Tensor, target: Tensor) -> None:
        """Add N images: features (N, C), and classes int64 (N,)."""
        self.features.append(F.normalize(features.float(), dim=1))
        self.target.append(target)

    def compute(self) -> Tensor:
        """Return the share, a float32 scalar; NaN with fewer than two images."""
        if not len(self.features):
            return torch.tensor(torch.nan, device=self.device)
        features, target = (x if isinstance(x, Tensor) else torch.cat(x) for x in (self.features, self.target))
        if len(features) < 2:
            return features.new_tensor(torch.nan)
        count = min(self.neighbors, len(features) - 1)
        right = 0
        for start in range(0, len(features), _ROWS):
            rows = features[start : start + _ROWS]
            likeness = rows @ features.t()
            own = torch.arange(len(rows), device=rows.device)
            likeness[own, own + start] = -torch.inf
            nearest, places = likeness.topk(count, 1)
            votes = likeness.new_zeros(len(rows), self.num_classes)
            votes.scatter_add_(1, target[places], (nearest / TEMPERATURE).exp())
            right += int((votes.argmax(1) == target[start : start + _ROWS]).sum())
        return features.new_tensor(right / len(features))
