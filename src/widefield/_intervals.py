"""Intervals of shares, of means and of paired differences, and a test of whether several means differ at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
"""Level of all intervals and tests here."""
_Z = 1.959964
"""Quantile of the normal distribution for this level."""
_DRAWS = 2000
_CHUNK = 2**22
"""Most resampled values held at once."""

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean over images and its bootstrap interval."""

    mean: float
    low: float
    high: float
    images: int
    """Number of images that it was computed from."""

    @property
    def excludes_zero(self) -> bool:
        """Return whether the mean differs from zero at the level of the interval."""
        return self.low > 0 or self.high < 0

    def scaled(self, factor: float) -> Interval:
        """Return the interval in another unit."""
        ends = sorted((self.low * factor, self.high * factor))
        return Interval(self.mean * factor, ends[0], ends[1], self.images)


def bootstrap_means(values: Values, seed: int = 0, draws: int = _DRAWS) -> Values:
    """Return the means of resampled images.

    Args:
        values: (..., N), the images along the last axis. All rows are resampled alike, so that they stay paired.
        seed: of the resampling.
        draws: number of resamples.

    Returns:
        (..., draws).
    """
    count = values.shape[-1]
    generator = np.random.default_rng(seed)
    rows = max(1, values.size // max(count, 1))
    step = max(1, _CHUNK // (count * rows))
    parts = []
    for start in range(0, draws, step):
        chosen = generator.integers(0, count, (min(step, draws - start), count))
        parts.append(values[..., chosen].mean(-1))
    return np.concatenate(parts, -1)


def interval(values: Sequence[float] | Values, seed: int = 0, level: float = LEVEL) -> Interval:
    """Return the mean of values of N images and its percentile interval (Efron 1979); NaN are left out.

    Raises ValueError if no value is left.
    """
    kept = np.asarray(values, np.float64)
    kept = kept[np.isfinite(kept)]
    if not kept.size:
        raise ValueError("an interval needs at least one finite value; got none.")
    means = bootstrap_means(kept, seed)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(kept.mean()), float(low), float(high), len(kept))


def wilson(hits: NDArray[Any], count: NDArray[Any]) -> Values:
    """Return the intervals of shares of independent cases: Wilson's score interval (1927).

    Args:
        hits, count: number of successes and of cases, of any one shape.

    Returns:
        float64 (..., 2): lower and upper ends; NaN without cases.
    """
    count = np.asarray(count, np.float64)
    share = np.divide(hits, count, out=np.full(count.shape, np.nan), where=count > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        middle = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
        half = _Z / (1 + _Z**2 / count) * np.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    return np.stack([middle - half, middle + half], -1).clip(0, 1)


def paired(first: Sequence[float] | Values, second: Sequence[float] | Values, seed: int = 0) -> Interval:
    """Return the interval of the mean of ``first - second``, two values of each image."""
    return interval(np.asarray(first, np.float64) - np.asarray(second, np.float64), seed)


def equality(values: Values, seed: int = 0) -> float:
    """Return the p-value of the hypothesis that all rows have the same mean.

    The statistic is the range of the rows' means. Its distribution under the hypothesis comes from resampled images
    after each row's mean was subtracted.

    Args:
        values: (rows, N), the same images in all rows.
        seed: of the resampling.
    """
    if len(values) < 2:
        return 1.0
    means = values.mean(-1)
    resampled = bootstrap_means(values - means[:, None], seed)
    spread = np.ptp(resampled, axis=0)
    return float((1 + (spread >= np.ptp(means)).sum()) / (1 + len(spread)))
