"""The outcome of a run."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

from torch import nn


@dataclass(frozen=True)
class RunResult:
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
