"""Measure how far key points are from true ones: PCK, AUC and end-point error, as mmpose defines them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from widefield._coco.curves import Bools, Floats

STRICT, LOOSE = 0.05, 0.2
"""Distances up to which a key point is right, in units of the longer side of the person's box."""
AUC_PIXELS = 30.0
"""Largest distance of the AUC in pixels."""
_STEPS = 20


class Distances(NamedTuple):
    """Distances of key points of N poses.

    Attributes:
        pixels: (N, K) in pixels of the file.
        sides: (N,), the longer side of each person's box in pixels.
        labeled: (N, K), key points that have a label.
    """

    pixels: Floats
    sides: Floats
    labeled: Bools

    @classmethod
    def of(cls, points: Floats, truth: Floats, boxes: Floats) -> Distances:
        """Measure points (N, K, 2) against truth (N, K, 3) of people in boxes (N, 4)."""
        gaps = points - truth[..., :2]
        sides = (boxes[:, 2:] - boxes[:, :2]).max(1, initial=0.0)
        return cls(np.hypot(gaps[..., 0], gaps[..., 1]), sides, (truth[..., 2] > 0) & (sides > 0)[:, None])

    def some(self, rows: Bools) -> Distances:
        """Return the distances of some poses, (N,)."""
        return Distances(self.pixels[rows], self.sides[rows], self.labeled[rows])

    def error(self) -> Floats:
        """Return the mean distance of each key point in pixels, (K,); NaN without a label."""
        return _mean(self.pixels, self.labeled)

    def pck(self, limit: float) -> Floats:
        """Return the fraction of right key points, (K,); NaN without a label.

        Args:
            limit: the distance below which a key point is right, in units of the longer side of the box.
        """
        sides = np.where(self.sides > 0, self.sides, np.inf)
        return _mean(self.pixels / sides[:, None] < limit, self.labeled)

    def epe(self) -> float:
        """Return the mean distance over all labeled key points, in pixels; NaN without any."""
        return float(np.mean(self.pixels[self.labeled])) if self.labeled.any() else float("nan")

    def auc(self) -> float:
        """Return the mean fraction of right key points over 20 limits from 0 to 28.5 pixels; NaN without a label."""
        limits = [AUC_PIXELS * step / _STEPS for step in range(_STEPS)]
        return float(np.mean([average(_mean(self.pixels < limit, self.labeled)) for limit in limits]))


def average(values: Floats) -> float:
    """Return the mean of the values that are numbers; NaN if none is."""
    known = values[~np.isnan(values)]
    return float(np.mean(known)) if known.size else float("nan")


def _mean(values: Floats | Bools, chosen: Bools) -> Floats:
    """Return the mean of the chosen values of each column, NaN without any."""
    counts = chosen.sum(0)
    total = np.where(chosen, values, 0.0).sum(0)
    means: Floats = np.divide(total, counts, out=np.full(len(counts), np.nan), where=counts > 0)
    return means
