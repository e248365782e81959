"""Read the records of runs on disk: recipe, state and metrics, from logs and recipes without reading weights."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from widefield.report import Listing, Report
from widefield.tasks import HEADLINES, TASKS
from widefield.tasks.metric_names import lower_is_better, shown
from widefield.train.patience import Patience
from widefield.train.recipe_io import load_recipe
from widefield.train.run_files import RunFiles, flat, log_entries

STATES = ("finished", "running?", "interrupted", "failed", "broken")
"""States of a run; see :class:`RunRecord`."""

_STILL_WRITING = 600.0
"""Seconds. A run whose files changed since then is probably running: it logs every few steps and after each epoch."""

_HEADLINE = "top1"
"""The headline of a run that names none and has none of the tasks' headlines in its log."""


@dataclass(frozen=True)
class RunRecord(Report):
    """The record of a run, read from its folder.

    Attributes:
        folder: the run's folder.
        state: ``"finished"``; ``"running?"``, not finished and changed within ten minutes; ``"interrupted"``, not
            finished and unchanged for longer; ``"failed"`` before the first checkpoint; ``"broken"``, its files cannot
            be read.
        updated: time of the last change of its recipe or its log.
        problem: what is wrong with it; empty if nothing is.
        recipe: keys with dots, such as ``optimizer.lr``, to their values. Empty if it cannot be read.
        log: entries of ``metrics.jsonl`` about evaluations, in order. A value that was not finite is None.
        headline: the metric that ranks its checkpoints.
    """

    folder: Path
    state: str
    updated: datetime.datetime
    problem: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    log: Sequence[Mapping[str, Any]] = ()
    headline: str = _HEADLINE

    @property
    def name(self) -> str:
        """Return the folder's name, which is the run's."""
        return self.folder.name

    @property
    def model(self) -> str:
        """Return the model's name and its conversion."""
        name, conversion = self.recipe.get("model.name", "?"), self.recipe.get("conversion.kind")
        return f"{name} + {conversion}" if conversion else str(name)

    @property
    def data(self) -> str:
        """Return the name of the data set."""
        return str(self.recipe.get("data.name", "?"))

    @property
    def unit(self) -> str:
        """Return what the run's length counts in: "epoch" or "step"."""
        return "step" if self.recipe.get("max_steps") else "epoch"

    @property
    def length(self) -> int | None:
        """Return the recipe's number of epochs or steps."""
        length: int | None = self.recipe.get("max_steps") or self.recipe.get("epochs")
        return length

    @property
    def done(self) -> int:
        """Return the number of epochs or steps that are trained and evaluated."""
        return self.at(self.log[-1]) if self.log else 0

    def at(self, entry: Mapping[str, Any]) -> int:
        """Return after how many epochs or steps an entry of the log was written."""
        return int(entry["step"]) if self.unit == "step" else int(entry["epoch"]) + 1

    @property
    def seconds(self) -> float:
        """Return the wall-clock time of training and evaluation."""
        return sum(float(entry.get("seconds") or 0) for entry in self.log)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Return the names of the numbers in the log."""
        numbers = ((name, value) for entry in self.log for name, value in entry.items())
        known = dict.fromkeys(name for name, value in numbers if isinstance(value, (int, float)))
        return tuple(name for name in known if name not in ("kind", "step", "epoch", "seconds"))

    def last(self, metric: str | None = None) -> float | None:
        """Return a metric (default: the headline) of the last evaluation."""
        return self.log[-1].get(metric or self.headline) if self.log else None

    def best(self, metric: str | None = None) -> float | None:
        """Return the best value of a metric (default: the headline) over the evaluations."""
        name = metric or self.headline
        values = [entry[name] for entry in self.log if entry.get(name) is not None]
        return (min(values) if lower_is_better(name) else max(values)) if values else None

    def summary(self) -> str:
        """Return the folder, and the problem if there is one."""
        return f"{self.folder}: {self.problem}" if self.problem else str(self.folder)

    def rows(self) -> list[dict[str, str]]:
        """Return the row of :meth:`row`."""
        return [self.row()]

    def row(self, metric: str | None = None) -> dict[str, str]:
        """Return the row of a table of runs, as text."""
        name = metric or self.headline
        return {
            "name": self.name,
            "model": self.model,
            "data": self.data,
            "state": self.state,
            "trained": f"{self.done}/{'?' if self.length is None else self.length} {self.unit}s",
            "metric": name,
            "best": shown(name, self.best(name)),
            "last": shown(name, self.last(name)),
            "train loss": shown("train_loss", self.last("train_loss")),
            "time": duration(self.seconds),
            "updated": f"{self.updated.astimezone():%Y-%m-%d %H:%M}",
        }

    def to_dict(self) -> dict[str, Any]:
        """Return everything in JSON types, including the log."""
        return {
            "folder": str(self.folder),
            "name": self.name,
            "state": self.state,
            "problem": self.problem,
            "unit": self.unit,
            "done": self.done,
            "length": self.length,
            "headline": self.headline,
            "best": self.best(),
            "last": self.last(),
            "seconds": self.seconds,
            "updated": self.updated.isoformat(timespec="seconds"),
            "recipe": dict(self.recipe),
            "log": [dict(entry) for entry in self.log],
        }


def find_runs(*folders: str | Path) -> Listing[RunRecord]:
    """Return the runs in and below folders as a list that displays itself, sorted by their last change, newest last.

    A folder with ``config.yaml``, ``failed.yaml`` or checkpoints is a run; folders inside it are not searched. A run
    that cannot be read is listed as broken.

    Raises FileNotFoundError for a folder that is not there.
    """
    found: dict[Path, RunRecord] = {}
    for folder in map(Path, folders):
        if not folder.expanduser().is_dir():
            raise FileNotFoundError(f"there is no folder {str(folder)!r} to look for runs in.")
        for path in run_folders(folder.expanduser()):
            found.setdefault(path.resolve(), read_run(path))
    return Listing(sorted(found.values(), key=lambda run: run.updated))


def run_folders(root: Path) -> Iterator[Path]:
    """Yield the folders of runs in and below a folder."""
    seen: set[Path] = set()
    # Links are followed, because runs are often kept on other disks. A link to a folder above must not loop forever.
    for place, below, files in os.walk(root, followlinks=True):
        path = Path(place)
        run = RunFiles(path)
        if path.resolve() in seen:
            below.clear()
        elif {run.config.name, run.failed.name} & set(files) or any(run.checkpoints.glob("step-*")):
            below.clear()
            yield path
        seen.add(path.resolve())
        below[:] = sorted(name for name in below if not name.startswith("."))


def read_run(folder: str | Path) -> RunRecord:
    """Return the record of a run; a folder that cannot be read gives a broken run, not an error."""
    run = RunFiles(Path(folder))
    updated = datetime.datetime.fromtimestamp(_written(run), datetime.UTC)
    try:
        recipe, problem = _recipe(run)
        log = _log(run)
        headline = _headline(run, log)
    except (OSError, ValueError) as error:
        return RunRecord(run.path, "broken", updated, _line(error))
    record = RunRecord(run.path, "finished", updated, problem, recipe, log, headline)
    if not run.config.is_file():
        return dataclasses.replace(record, state="failed")
    if (record.length is not None and record.done >= record.length) or _ended_early(record):
        return record
    if time.time() - updated.timestamp() < _STILL_WRITING:
        return dataclasses.replace(record, state="running?")
    if not problem and not any(run.checkpoints.glob("step-*")):
        problem = "it has no checkpoint to resume from"
    return dataclasses.replace(record, state="interrupted", problem=problem)


def _ended_early(run: RunRecord) -> bool:
    """Return whether the evaluations of a run have used up its recipe's patience."""
    patience = Patience(run.recipe.get("patience"), higher_is_better=not lower_is_better(run.headline))
    for entry in run.log:
        value = entry.get(run.headline)
        patience.see(math.nan if value is None else value)
    return patience.is_over


def _written(run: RunFiles) -> float:
    files = (run.config, run.failed, run.log, run.path)
    return max((file.stat().st_mtime for file in files[:-1] if file.is_file()), default=run.path.stat().st_mtime)


def _recipe(run: RunFiles) -> tuple[dict[str, Any], str]:
    """Return the recipe's keys with dots, and a problem if there is one; raises ValueError if nothing can be read."""
    source = next((file for file in (run.config, run.failed) if file.is_file()), None)
    if source is None:
        raise ValueError("it has checkpoints and no config.yaml")
    try:
        return flat(dataclasses.asdict(load_recipe(source))), ""
    except (OSError, ValueError, TypeError) as error:
        problem = f"its recipe does not fit this version: {_line(error)}"
        with _reading(source):
            content = flat(yaml.safe_load(source.read_text(encoding="utf-8")))
        if "model.name" not in content or "data.name" not in content:
            raise ValueError(problem) from error
        return content, problem  # perhaps another version's keys: the name and the metrics can still be shown


def _log(run: RunFiles) -> list[dict[str, Any]]:
    if not run.log.is_file():
        return []
    with _reading(run.log):
        entries = [entry for _, entry in log_entries(run.log) if entry["kind"] in ("epoch", "evaluation")]
        for entry in entries:
            _ = entry["epoch"] + 1, entry["step"] + 1
    return entries


def _headline(run: RunFiles, log: Sequence[Mapping[str, Any]]) -> str:
    newest = max(run.checkpoints.glob("step-*"), default=None)
    if newest is None:
        own = [task for task in TASKS if task not in HEADLINES]
        names = [*HEADLINES.values(), *(TASKS[task].headline for task in own)]
        return next(
            (name for name in (*(f"ema_{name}" for name in names), *names) if log and name in log[-1]), _HEADLINE
        )
    file = newest / "meta.json"
    with _reading(file):
        return str(json.loads(file.read_text(encoding="utf-8"))["headline"])


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Raise ValueError with the file's name for errors in the block that its content causes."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(f"{file.name} is malformed: {type(error).__name__}: {_line(error)}") from error


def _line(error: BaseException) -> str:
    """Return the first sentence of an error."""
    return re.split(r"(?<=\.)\s|\n", str(error))[0] or type(error).__name__


def duration(seconds: float) -> str:
    """Return a time as text, such as ``3h07m`` or ``42s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def value_text(value: Any) -> str:
    """Return a value as YAML writes it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
