"""Find and read the small files of a run: what lists of runs need, without torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from widefield.train.recipe_io import DATA_FILE


class RunFiles:
    """``runs/NAME`` with ``config.yaml``, ``metrics.jsonl``, ``checkpoints/`` and ``tensorboard/``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.failed = path / "failed.yaml"
        self.data = path / DATA_FILE
        self.log = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"
        self.mlflow = path / "mlflow_run"


def log_entries(log: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the lines of ``metrics.jsonl`` and their entries, up to one that a killed run left unfinished."""
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            yield line, json.loads(line)
        except json.JSONDecodeError:  # the last line of a run that was killed while writing it
            return


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested keys joined by dots, such as ``optimizer.lr``, with their values."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found
