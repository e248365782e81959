"""End a run that no longer gets better (early stopping; Prechelt 1998)."""

from __future__ import annotations

import math


class Patience:
    """Counts the evaluations since the headline was best.

    Args:
        limit: number of evaluations without a better headline after which a run ends; None: it goes on.
        higher_is_better: whether a larger headline is better.
    """

    def __init__(self, limit: int | None, *, higher_is_better: bool) -> None:
        self._limit, self._sign = limit, 1.0 if higher_is_better else -1.0
        self.state: tuple[float | None, int] = (None, 0)
        """The best headline, and the number of evaluations since then; a checkpoint holds it."""

    def see(self, headline: float) -> None:
        """Count an evaluation. One that is NaN is never the best."""
        best, since = self.state
        better = best is None or self._sign * headline > self._sign * best
        self.state = (headline, 0) if better and not math.isnan(headline) else (best, since + 1)

    @property
    def is_over(self) -> bool:
        """Return whether the run should end."""
        return self._limit is not None and self.state[1] >= self._limit

    def __str__(self) -> str:
        best, since = self.state
        return f"none of the last {since} evaluations was better than {'any' if best is None else f'{best:.4g}'}"
