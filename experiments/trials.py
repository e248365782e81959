"""Designs compared at equal budgets: their runs, a row for each, learning rates of their own, and what is written."""

from __future__ import annotations

import json
import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from scipy.stats import t as student

from widefield.benchmarks.record import publish
from widefield.train import OptimizerSpec, Recipe, RunResult, ScheduleSpec, train

QUIET = Console(quiet=True)
TUNING = 100
"""Seed of the runs that choose a learning rate. They are not reported."""
Row = dict[str, Any]


def short_recipe(name: str, *, lr: float, steps: int, warmup: int, runs: Path, seed: int, **parts: Any) -> Recipe:
    """Return a recipe of a short run: AdamW, cosine, evaluated once at its end, without a tracker.

    Args:
        name: of the run; its folder in ``runs``.
        lr: learning rate.
        steps, warmup: number of steps, and how many of them warm up.
        seed: of weights and order.
        parts: further fields of :class:`widefield.train.Recipe`.
    """
    return Recipe(
        name=name, output=str(runs), optimizer=OptimizerSpec("adamw", lr=lr, weight_decay=0.05),
        schedule=ScheduleSpec("cosine", warmup_steps=warmup), max_steps=steps, workers=0, clip_grad=5.0, seed=seed,
        trackers=[], evaluate_every=steps, log_every=200, **parts,
    )  # fmt: skip


def started(plan: Recipe) -> bool:
    """Return whether a run of this recipe has checkpoints."""
    return any(plan.folder.glob("checkpoints/step-*"))


def trained(plan: Recipe) -> RunResult:
    """Train a recipe, or continue its run; leave the script if it is interrupted."""
    result = train(plan, resume=plan.folder if started(plan) else None, console=QUIET)
    if result.interrupted:
        raise SystemExit(128 + result.interrupted)
    return result


def slug(name: str, lr: float, seed: int) -> str:
    """Return the name of a run's folder."""
    return f"{''.join(letter if letter.isalnum() else '-' for letter in name)}-{lr:g}-{seed}"


def spread(values: Sequence[float]) -> str:
    """Return mean and 95 % interval (Student's t) in percent."""
    mean = 100 * statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.1f}"
    half = 100 * student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.1f} ± {half:.1f}"


class Trials(ABC):
    """The rows of an experiment, one for each design, learning rate and seed, in the files ``stem`` .json and .md.

    The files are written after every run. Runs whose rows they hold are not repeated.

    Attributes:
        score: key of a row: what a learning rate is chosen by, and what is compared; higher is better.
        rates: learning rates that each design tries.
        command: that makes the files.
    """

    score: str
    rates: Sequence[float]
    command: str

    def __init__(self, stem: Path, **notes: Any) -> None:
        stored = stem.with_suffix(".json")
        content = json.loads(stored.read_text()) if stored.exists() else {}
        self.stem, self.rows = stem, list[Row](content.get("rows", []))
        self.notes: dict[str, Any] = {key: content.get(key) or value for key, value in notes.items()}

    @abstractmethod
    def measured(self, name: str, lr: float, seed: int) -> Row:
        """Train one network; return what its row says beyond design, learning rate and seed."""

    @abstractmethod
    def tables(self) -> str:
        """Return the rows as Markdown."""

    def tuned_as(self, name: str) -> str:
        """Return the design whose learning rate this one takes: itself unless a subclass says otherwise."""
        return name

    def of(self, name: str, seed: int | None = None, lr: float | None = None) -> list[Row]:
        """Return the rows of a design; without a seed, those that are reported."""
        return [
            row for row in self.rows
            if row["design"] == name and (row["seed"] != TUNING if seed is None else row["seed"] == seed)
            and lr in (None, row["lr"])
        ]  # fmt: skip

    def run(self, name: str, lr: float, seed: int) -> Row:
        """Return a row, from a new run if there is none yet."""
        found = self.of(name, seed, lr)
        if found:
            return found[0]
        row = {"design": name, "lr": lr, "seed": seed, **self.measured(name, lr, seed)}
        print(json.dumps(row), flush=True)
        self.rows.append(row)
        self.write()
        return row

    def best_rate(self, name: str) -> float:
        """Return the learning rate with the best score of the tuning seed, from new runs if need be.

        While the best is at an edge, a further factor of 2 is tried.
        """
        name = self.tuned_as(name)
        scores = {lr: self.run(name, lr, TUNING)[self.score] for lr in self.rates}
        while True:
            best = max(scores, key=scores.__getitem__)
            further = best * 2 if best == max(scores) else best / 2 if best == min(scores) else None
            if further is None:
                return float(best)
            scores[further] = self.run(name, further, TUNING)[self.score]

    def run_all(self, names: Sequence[str], seeds: Sequence[int]) -> None:
        """Run designs at their best learning rates with all seeds, seed by seed."""
        rates = {name: self.best_rate(name) for name in names}
        for seed in seeds:
            for name in names:
                self.run(name, rates[name], seed)

    def write(self) -> None:
        """Write the files."""
        publish(self.stem, self.command, {"rows": self.rows, **self.notes}, self.tables())

    def scores(self, name: str) -> dict[int, float]:
        """Return seed -> score of the runs that are reported."""
        return {row["seed"]: row[self.score] for row in self.of(name)}

    def compared(self, name: str, base: str) -> Mapping[str, str]:
        """Return seeds, learning rate, score, and its difference to another design, paired by seed."""
        own, other = self.scores(name), self.scores(base)
        paired = [value - other[seed] for seed, value in own.items() if seed in other]
        return {
            "seeds": str(len(own)), "lr": f"{self.of(name)[0]['lr']:g}", "score": spread(list(own.values())),
            "minus": spread(paired) if paired and name != base else "-",
        }  # fmt: skip

    def tuning(self) -> list[dict[str, str]]:
        """Return a row per design: the score at each learning rate that was tried, in percent."""
        rows = [row for row in self.rows if row["seed"] == TUNING]
        rates, lines = sorted({row["lr"] for row in rows}), []
        for name in dict.fromkeys(row["design"] for row in rows):
            own = {row["lr"]: row[self.score] for row in rows if row["design"] == name}
            lines.append({"design": name, **{f"{lr:g}": f"{100 * own[lr]:.1f}" if lr in own else "" for lr in rates}})
        return lines
