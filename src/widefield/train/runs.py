"""Runs on disk: what they are, how far they came and how they compare. Reads logs and recipes, never weights."""

from __future__ import annotations

import dataclasses
import datetime
import fnmatch
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from widefield import _checks, report
from widefield.train.recipe_io import load_recipe
from widefield.train.run_folder import RunFolder, _entries, _flat

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STATES = ("finished", "running?", "interrupted", "failed", "broken")
"""What can be said of a run from its folder; see :class:`RunRecord`."""

_STILL_WRITING = 600.0
"""Seconds. A run whose files changed since is likely alive: it logs every few steps and at the end of each epoch."""

_HEADLINES = ("ema_top1", "top1")
"""Where no checkpoint is left to name the headline metric."""


@dataclass(frozen=True)
class RunRecord:
    """What a run's folder says of it.

    Attributes:
        folder: where it is.
        state: ``"finished"``; ``"running?"``, not finished and changed within ten minutes; ``"interrupted"``, not
            finished and still; ``"failed"`` before the first checkpoint; ``"broken"``, its files cannot be read.
        updated: when its recipe or its log were last written.
        problem: what is wrong with it; empty if nothing is.
        recipe: its keys with dots, such as ``optimizer.lr``, to their values. Empty if it cannot be read.
        log: the entries of ``metrics.jsonl`` at the ends of epochs, in their order. A value that was not finite is
            None.
        headline: the metric by which its checkpoints are ranked.
    """

    folder: Path
    state: str
    updated: datetime.datetime
    problem: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    log: Sequence[Mapping[str, Any]] = ()
    headline: str = _HEADLINES[-1]

    @property
    def name(self) -> str:
        """Return the folder's name, which is the run's."""
        return self.folder.name

    @property
    def model(self) -> str:
        """Return the model's name, and what its layers were converted to."""
        name, conversion = self.recipe.get("model.name", "?"), self.recipe.get("conversion.kind")
        return f"{name} + {conversion}" if conversion else str(name)

    @property
    def data(self) -> str:
        """Return the name of the data set."""
        return str(self.recipe.get("data.name", "?"))

    @property
    def epochs(self) -> int | None:
        """Return how many epochs the recipe asks for."""
        epochs: int | None = self.recipe.get("epochs")
        return epochs

    @property
    def done(self) -> int:
        """Return how many epochs are trained and evaluated."""
        return int(self.log[-1]["epoch"]) + 1 if self.log else 0

    @property
    def seconds(self) -> float:
        """Return the wall-clock time of all epochs, evaluations included."""
        return sum(float(entry.get("seconds") or 0) for entry in self.log)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Return the names of the numbers in the log."""
        numbers = ((name, value) for entry in self.log for name, value in entry.items())
        known = dict.fromkeys(name for name, value in numbers if isinstance(value, (int, float)))
        return tuple(name for name in known if name not in ("kind", "step", "epoch", "seconds"))

    def last(self, metric: str | None = None) -> float | None:
        """Return a metric (default: the headline) after the last epoch."""
        return self.log[-1].get(metric or self.headline) if self.log else None

    def best(self, metric: str | None = None) -> float | None:
        """Return the best value of a metric (default: the headline) over the epochs."""
        name = metric or self.headline
        values = [entry[name] for entry in self.log if entry.get(name) is not None]
        return (min(values) if lower_is_better(name) else max(values)) if values else None

    def row(self, metric: str | None = None) -> dict[str, str]:
        """Return what a table of runs shows, as text."""
        name = metric or self.headline
        return {
            "name": self.name,
            "model": self.model,
            "data": self.data,
            "state": self.state,
            "epochs": f"{self.done}/{'?' if self.epochs is None else self.epochs}",
            "metric": name,
            "best": shown(name, self.best(name)),
            "last": shown(name, self.last(name)),
            "train loss": shown("train_loss", self.last("train_loss")),
            "time": duration(self.seconds),
            "updated": f"{self.updated.astimezone():%Y-%m-%d %H:%M}",
        }

    def to_dict(self) -> dict[str, Any]:
        """Return everything in types that JSON can hold, the log entry by entry."""
        return {
            "folder": str(self.folder),
            "name": self.name,
            "state": self.state,
            "problem": self.problem,
            "epochs_done": self.done,
            "headline": self.headline,
            "best": self.best(),
            "last": self.last(),
            "seconds": self.seconds,
            "updated": self.updated.isoformat(timespec="seconds"),
            "recipe": dict(self.recipe),
            "log": [dict(entry) for entry in self.log],
        }


def find_runs(*folders: str | Path) -> list[RunRecord]:
    """Return the runs in and below folders, by the time they were last written; the newest is last.

    A folder with ``config.yaml``, ``failed.yaml`` or checkpoints is a run, and nothing below it is looked at. One that
    cannot be read is listed as broken.

    Raises FileNotFoundError for a folder that is not there.
    """
    found: dict[Path, RunRecord] = {}
    for folder in map(Path, folders):
        if not folder.expanduser().is_dir():
            raise FileNotFoundError(f"there is no folder {str(folder)!r} to look for runs in.")
        for path in _run_folders(folder.expanduser()):
            found.setdefault(path.resolve(), read_run(path))
    return sorted(found.values(), key=lambda run: run.updated)


def _run_folders(root: Path) -> Iterator[Path]:
    seen: set[Path] = set()
    # Links are followed, as runs are often kept on other disks; a link to a folder above must not go round for ever.
    for place, below, files in os.walk(root, followlinks=True):
        path = Path(place)
        run = RunFolder(path)
        if path.resolve() in seen:
            below.clear()
        elif {run.config.name, run.failed.name} & set(files) or any(run.checkpoints.glob("step-*")):
            below.clear()
            yield path
        seen.add(path.resolve())
        below[:] = sorted(name for name in below if not name.startswith("."))


def read_run(folder: str | Path) -> RunRecord:
    """Return what a run's folder says of it; what cannot be read makes a broken run, not an error."""
    run = RunFolder(Path(folder))
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
    if record.epochs is not None and record.done >= record.epochs:
        return record
    if time.time() - updated.timestamp() < _STILL_WRITING:
        return dataclasses.replace(record, state="running?")
    if not problem and not any(run.checkpoints.glob("step-*")):
        problem = "it has no checkpoint to resume from"
    return dataclasses.replace(record, state="interrupted", problem=problem)


def _written(run: RunFolder) -> float:
    files = (run.config, run.failed, run.log, run.path)
    return max((file.stat().st_mtime for file in files[:-1] if file.is_file()), default=run.path.stat().st_mtime)


def _recipe(run: RunFolder) -> tuple[dict[str, Any], str]:
    """Return the recipe's keys with dots, and what is wrong with it; raises ValueError if there is nothing to read."""
    source = next((file for file in (run.config, run.failed) if file.is_file()), None)
    if source is None:
        raise ValueError("it has checkpoints and no config.yaml")
    try:
        return _flat(dataclasses.asdict(load_recipe(source))), ""
    except (ValueError, TypeError) as error:
        # Another version's keys, perhaps: its name and its numbers can be shown all the same.
        with _reading(source):
            content = yaml.safe_load(source.read_text(encoding="utf-8"))
            _ = content["model"]["name"], content["data"]["name"]
        return _flat(content), f"its recipe does not suit this version: {_line(error)}"


def _log(run: RunFolder) -> list[dict[str, Any]]:
    if not run.log.is_file():
        return []
    with _reading(run.log):
        entries = [entry for _, entry in _entries(run.log) if entry["kind"] == "epoch"]
        for entry in entries:
            _ = entry["epoch"] + 1
    return entries


def _headline(run: RunFolder, log: Sequence[Mapping[str, Any]]) -> str:
    newest = max(run.checkpoints.glob("step-*"), default=None)
    if newest is None:
        return next((name for name in _HEADLINES if log and name in log[-1]), _HEADLINES[-1])
    file = newest / "meta.json"
    with _reading(file):
        return str(json.loads(file.read_text(encoding="utf-8"))["headline"])


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Raise ValueError naming the file for whatever its content provokes in the block."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(f"{file.name} is not as it should be: {type(error).__name__}: {_line(error)}") from error


def _line(error: BaseException) -> str:
    """Return the first sentence of an error."""
    return re.split(r"(?<=\.)\s|\n", str(error))[0] or type(error).__name__


def lower_is_better(metric: str) -> bool:
    """Return whether smaller values of a metric are better ones: losses, and nothing else."""
    return metric.endswith("loss")


def shown(metric: str, value: float | None) -> str:
    """Return a metric's value as text: accuracies in percent, others in four digits, ``-`` for none."""
    if value is None:
        return "-"
    return f"{100 * value:.2f}%" if _is_share(metric) else f"{value:.4g}"


def _is_share(metric: str) -> bool:
    return re.search(r"top\d+$", metric) is not None


def duration(seconds: float) -> str:
    """Return a time as text, such as ``3h07m`` or ``42s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


_COLUMNS = {
    "name": lambda run: run.name,
    "model": lambda run: run.model,
    "data": lambda run: run.data,
    "state": lambda run: run.state,
    "epochs": lambda run: run.done,
    "time": lambda run: run.seconds,
    "updated": lambda run: run.updated,
}
"""What runs are sorted by, besides metrics."""


def sort_runs(runs: Sequence[RunRecord], key: str) -> list[RunRecord]:
    """Return runs in order of a column (name, model, data, state, epochs, time, updated) or a metric, best first.

    ``"best"`` is each run's own headline. Runs without the metric come last.

    Raises ValueError if no run has such a metric.
    """
    if key in _COLUMNS:
        return sorted(runs, key=_COLUMNS[key])
    metric = None if key == "best" else key
    known = [name for run in runs for name in run.metrics]
    if metric and metric not in known:
        raise ValueError(
            f"no run has the metric {key!r}; sort by {', '.join((*_COLUMNS, 'best'))}, or by "
            f"{', '.join(dict.fromkeys(known)) or 'a metric'}.{_checks.did_you_mean(key, [*_COLUMNS, 'best', *known])}"
        )

    def rank(run: RunRecord) -> tuple[bool, float]:
        value = run.best(metric)
        sign = 1 if lower_is_better(metric or run.headline) else -1
        return value is None, sign * (value or 0.0)

    return sorted(runs, key=rank)


def filter_runs(runs: Sequence[RunRecord], conditions: Sequence[str]) -> list[RunRecord]:
    """Return the runs that meet all conditions, ``KEY=GLOB``.

    Args:
        runs: those to choose from.
        conditions: the key is one of a recipe, with dots (``model.name=morf_*``, ``optimizer.lr=0.001``), or ``name``,
            ``model``, ``data`` or ``state``. A run without the key meets ``KEY=null`` alone.

    Raises ValueError for a condition without ``=``, and for a key that no run has.
    """
    kept = list(runs)
    for condition in conditions:
        key, equals, pattern = condition.partition("=")
        if not equals:
            raise ValueError(f"a condition is KEY=VALUE, such as state=finished; got {condition!r}.")
        known = [*_WORDS, *dict.fromkeys(name for run in runs for name in run.recipe)]
        if runs and key not in known:
            raise ValueError(f"no run has the key {key!r}.{_checks.did_you_mean(key, known)}")
        kept = [run for run in kept if _meets(run, key, pattern)]
    return kept


_WORDS = ("name", "model", "data", "state")


def _meets(run: RunRecord, key: str, pattern: str) -> bool:
    if key in _WORDS:
        return fnmatch.fnmatchcase(getattr(run, key), pattern)
    return fnmatch.fnmatchcase(_text(run.recipe[key]), pattern) if key in run.recipe else pattern == "null"


def pick_runs(runs: Sequence[RunRecord], words: Sequence[str]) -> list[RunRecord]:
    """Return the runs that words name, in their order: a run's name, or its folder.

    Raises ValueError for a word that names none of ``runs`` and no folder, or several of them.
    """
    return [_pick(runs, word) for word in words]


def _pick(runs: Sequence[RunRecord], word: str) -> RunRecord:
    named = [run for run in runs if run.name == word]
    if len(named) == 1:
        return named[0]
    if named:
        raise ValueError(f"{word!r} names {len(named)} runs: {', '.join(str(run.folder) for run in named)}.")
    path = Path(word).expanduser()
    if path.is_dir() and path.resolve() in _run_folders(path.resolve()):
        return read_run(path)
    names = [run.name for run in runs]
    raise ValueError(
        f"there is no run {word!r} among {len(names)}, nor in a folder of that name.{_checks.did_you_mean(word, names)}"
    )


def differences(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Return the keys in which the recipes of runs differ, with a value for each run; ``-``: it has no such key."""
    keys = dict.fromkeys(key for run in runs for key in run.recipe)
    values = {key: [_text(run.recipe[key]) if key in run.recipe else "-" for run in runs] for key in keys}
    # The name always differs and heads the column; where the runs are kept decides nothing; and that one run has no
    # section, null, is said by the keys that the others have in theirs.
    told = {"name", "output", *(key.rpartition(".")[0] for key in keys)}
    return {key: texts for key, texts in values.items() if len(set(texts)) > 1 and key not in told}


def comparison(runs: Sequence[RunRecord], metrics: Sequence[str] = ()) -> list[dict[str, str]]:
    """Return rows of what differs between runs, and of what they came to; a column a run.

    Args:
        runs: two or more.
        metrics: which ones; default: all that any of them has.

    Raises ValueError for fewer than two runs.
    """
    if len(runs) < 2:
        raise ValueError("give two runs or more to compare.")
    titles = labels(runs)
    rows = [{"": key, **dict(zip(titles, texts, strict=True))} for key, texts in differences(runs).items()]

    def row(heading: str, texts: Sequence[str]) -> None:
        rows.append({"": heading, **dict(zip(titles, texts, strict=True))})

    row("state", [run.state for run in runs])
    row("epochs done", [run.row()["epochs"] for run in runs])
    row("time", [duration(run.seconds) for run in runs])
    known = dict.fromkeys(name for run in runs for name in run.metrics if name != "lr")
    for name in metrics or known:
        row(f"last {name}", [shown(name, run.last(name)) for run in runs])
        if lower_is_better(name) or _is_share(name):  # of others nobody knows which values are good
            row(f"best {name}", [shown(name, run.best(name)) for run in runs])
    return rows


def labels(runs: Sequence[RunRecord]) -> list[str]:
    """Return what to call runs: their names, or where two are the same, their folders."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else str(run.folder) for name, run in zip(names, runs, strict=True)]


def _text(value: Any) -> str:
    """Return a value as YAML writes it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@report.paper()
def draw_runs(runs: Sequence[RunRecord], metrics: Sequence[str] = ()) -> Figure:
    """Draw metrics over epochs, a line a run and a panel a metric, at the width of a paper's column.

    Args:
        runs: those without the metric are left out of its panel.
        metrics: which ones; default: the headline, of the moving average where a run keeps one.

    Raises ValueError if there is nothing to draw; the message says what there is.
    """
    lines = {name: _lines(runs, name) for name in metrics} if metrics else {"": _lines(runs, None)}
    for name, found in lines.items():
        if not found:
            known = dict.fromkeys(known for run in runs for known in run.metrics)
            raise ValueError(
                f"no run has {f'the metric {name!r}' if name else 'a finished epoch'} to draw; there are "
                f"{', '.join(known) or 'no metrics'}.{_checks.did_you_mean(name, known) if name else ''}"
            )
    titles = labels(runs)
    averaged = [run.headline.startswith("ema_") for run in runs]
    if not metrics and len(set(averaged)) > 1:  # which the axis cannot say of all
        titles = [f"{title} (average)" if ema else title for title, ema in zip(titles, averaged, strict=True)]
    beside = 2 if max(map(len, titles)) <= 20 else 1
    figure = report.blank(report.COLUMN, 1.9 * len(lines) + 0.15 * -(-len(runs) // beside) + 0.2)
    axes = figure.subplots(len(lines), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (name, found) in zip(axes, lines.items(), strict=True):
        for index, (epochs, values) in found.items():
            turn, colour = divmod(index, len(report.COLORS))
            axis.plot(
                epochs,
                values,
                label=titles[index],
                color=report.COLORS[colour],
                linestyle=("-", "--", ":", "-.")[turn % 4],
                # Where lines are short enough, a second way to tell them apart; a lone point needs it to be seen.
                marker=report.MARKERS[colour] if len(epochs) <= 15 else None,
            )
        heading = name or ", ".join(dict.fromkeys(runs[index].headline.removeprefix("ema_") for index in found))
        axis.set_ylabel(f"{heading} (%)" if _is_share(heading) else heading)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[-1].set_xlabel("epoch")
    handles = {text: line for axis in axes for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower left", ncols=beside)
    return figure


def _lines(runs: Sequence[RunRecord], metric: str | None) -> dict[int, tuple[list[int], list[float]]]:
    """Return the epochs, from 1, and values of each run that has any, by its place."""
    found = {}
    for index, run in enumerate(runs):
        name = metric or run.headline
        points = [(entry["epoch"] + 1, entry[name]) for entry in run.log if entry.get(name) is not None]
        if points:
            scale = 100 if _is_share(name) else 1
            found[index] = [epoch for epoch, _ in points], [scale * value for _, value in points]
    return found
