"""The outcome of a run."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from widefield.report import Report


@dataclass(frozen=True)
class RunResult(Report):
    """The outcome of a run.

    Attributes:
        folder: the run's folder.
        metrics: metrics of the last evaluation on the val split, and ``train_loss``. Names of the moving average's
            metrics start with ``ema_``. Empty before the first evaluation.
        best: metrics of the best evaluation by the task's headline, of the moving average if there is one.
        epochs: number of finished passes over the data.
        steps: number of finished steps.
        interrupted: the signal that stopped the run, or None. The process should then exit with 128 + the signal.
        model: the trained model without wrappers, in evaluation mode; the moving average if there is one.
    """

    folder: Path
    metrics: dict[str, float]
    best: dict[str, float]
    epochs: int
    steps: int
    interrupted: signal.Signals | None
    model: nn.Module

    def summary(self) -> str:
        """Return how far the run went, and its folder."""
        early = f", stopped by {self.interrupted.name}" if self.interrupted else ""
        return f"{self.folder.name}: {self.epochs} epochs, {self.steps:,} steps{early}\nfolder: {self.folder}"

    def rows(self) -> list[dict[str, str]]:
        """Return the metrics of the last and of the best evaluation."""
        shown = {"last": self.metrics, "best": self.best}
        names = dict.fromkeys(name for metrics in shown.values() for name in metrics)
        return [
            {
                "metric": name,
                **{which: f"{found[name]:.4g}" if name in found else "-" for which, found in shown.items()},
            }
            for name in names
        ]
