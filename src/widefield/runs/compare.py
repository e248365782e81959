"""Compare runs: sort, filter, make tables and curves."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from widefield import _checks, report
from widefield.report import Listing
from widefield.runs.records import RunRecord, duration, read_run, run_folders, value_text
from widefield.tasks.metric_names import is_share, lower_is_better, shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = {
    "name": lambda run: run.name,
    "model": lambda run: run.model,
    "data": lambda run: run.data,
    "state": lambda run: run.state,
    "trained": lambda run: run.done,
    "time": lambda run: run.seconds,
    "updated": lambda run: run.updated,
}
"""Columns to sort by, besides metrics."""


def sort_runs(runs: Sequence[RunRecord], key: str) -> Listing[RunRecord]:
    """Return runs in order of a column (name, model, data, state, trained, time, updated) or a metric, best first.

    ``"best"`` is each run's own headline. Runs without the metric come last.

    Raises ValueError if no run has such a metric.
    """
    if key in _COLUMNS:
        return Listing(sorted(runs, key=_COLUMNS[key]))
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

    return Listing(sorted(runs, key=rank))


def filter_runs(runs: Sequence[RunRecord], conditions: Sequence[str]) -> Listing[RunRecord]:
    """Return the runs that meet all conditions, ``KEY=GLOB``.

    Args:
        runs: the runs to filter.
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
    return Listing(kept)


_WORDS = ("name", "model", "data", "state")


def _meets(run: RunRecord, key: str, pattern: str) -> bool:
    if key in _WORDS:
        return fnmatch.fnmatchcase(getattr(run, key), pattern)
    return fnmatch.fnmatchcase(value_text(run.recipe[key]), pattern) if key in run.recipe else pattern == "null"


def pick_runs(runs: Sequence[RunRecord], words: Sequence[str]) -> Listing[RunRecord]:
    """Return the runs with these names or folders, in the order of the words.

    Raises ValueError for a word that names none of ``runs`` and no folder, or several of them.
    """
    return Listing(_pick(runs, word) for word in words)


def _pick(runs: Sequence[RunRecord], word: str) -> RunRecord:
    named = [run for run in runs if run.name == word]
    if len(named) == 1:
        return named[0]
    if named:
        raise ValueError(f"{word!r} names {len(named)} runs: {', '.join(str(run.folder) for run in named)}.")
    path = Path(word).expanduser()
    if path.is_dir() and path.resolve() in run_folders(path.resolve()):
        return read_run(path)
    names = [run.name for run in runs]
    raise ValueError(
        f"there is no run {word!r} among {len(names)}, nor in a folder of that name.{_checks.did_you_mean(word, names)}"
    )


def differences(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Return the keys in which the recipes of runs differ, with a value for each run; ``-`` if it has no such key."""
    keys = dict.fromkeys(key for run in runs for key in run.recipe)
    values = {key: [value_text(run.recipe[key]) if key in run.recipe else "-" for run in runs] for key in keys}
    # The name always differs and is the column's title, and the output folder has no influence. If one run has no
    # section, the keys of the others' sections show it.
    told = {"name", "output", *(key.rpartition(".")[0] for key in keys)}
    return {key: texts for key, texts in values.items() if len(set(texts)) > 1 and key not in told}


def comparison(runs: Sequence[RunRecord], metrics: Sequence[str] = ()) -> Listing[dict[str, str]]:
    """Return table rows with the differences and the results of runs, one column per run; they display themselves.

    Args:
        runs: two or more.
        metrics: names of metrics; default: all metrics of any run.

    Raises ValueError for fewer than two runs.
    """
    if len(runs) < 2:
        raise ValueError("give two runs or more to compare.")
    titles = labels(runs)
    rows = Listing({"": key, **dict(zip(titles, texts, strict=True))} for key, texts in differences(runs).items())

    def row(heading: str, texts: Sequence[str]) -> None:
        rows.append({"": heading, **dict(zip(titles, texts, strict=True))})

    row("state", [run.state for run in runs])
    row("trained", [run.row()["trained"] for run in runs])
    row("time", [duration(run.seconds) for run in runs])
    known = dict.fromkeys(name for run in runs for name in run.metrics if name != "lr")
    for name in metrics or known:
        row(f"last {name}", [shown(name, run.last(name)) for run in runs])
        if lower_is_better(name) or is_share(name):  # for other metrics it is unknown which values are better
            row(f"best {name}", [shown(name, run.best(name)) for run in runs])
    return rows


def labels(runs: Sequence[RunRecord]) -> list[str]:
    """Return labels for runs: their names, or their folders if names repeat."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else str(run.folder) for name, run in zip(names, runs, strict=True)]


@report.paper()
def draw_runs(runs: Sequence[RunRecord], metrics: Sequence[str] = ()) -> Figure:
    """Draw metrics over epochs or steps at the width of a paper's column, one line per run and one panel per metric.

    Args:
        runs: runs without the metric are left out of its panel.
        metrics: names of metrics; default: the headline, of the moving average if a run keeps one.

    Raises ValueError if there is nothing to draw; the message lists the metrics.
    """
    lines = {name: _lines(runs, name) for name in metrics} if metrics else {"": _lines(runs, None)}
    for name, found in lines.items():
        if not found:
            known = dict.fromkeys(known for run in runs for known in run.metrics)
            raise ValueError(
                f"no run has {f'the metric {name!r}' if name else 'an evaluation'} to draw; there are "
                f"{', '.join(known) or 'no metrics'}.{_checks.did_you_mean(name, known) if name else ''}"
            )
    titles = labels(runs)
    averaged = [run.headline.startswith("ema_") for run in runs]
    if not metrics and len(set(averaged)) > 1:  # the axis label cannot say it for all
        titles = [f"{title} (average)" if ema else title for title, ema in zip(titles, averaged, strict=True)]
    columns = 2 if max(map(len, titles)) <= 20 else 1
    figure = report.blank(report.COLUMN, 1.9 * len(lines) + 0.15 * -(-len(runs) // columns) + 0.2)
    axes = figure.subplots(len(lines), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (name, found) in zip(axes, lines.items(), strict=True):
        for index, (places, values) in found.items():
            turn, color = divmod(index, len(report.COLORS))
            axis.plot(
                places,
                values,
                label=titles[index],
                color=report.COLORS[color],
                linestyle=("-", "--", ":", "-.")[turn % 4],
                # Markers distinguish short lines; a single point is invisible without one.
                marker=report.MARKERS[color] if len(places) <= 15 else None,
            )
        heading = name or ", ".join(dict.fromkeys(runs[index].headline.removeprefix("ema_") for index in found))
        axis.set_ylabel(f"{heading} (%)" if is_share(heading) else heading)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[-1].set_xlabel(_unit(runs))
    handles = {text: line for axis in axes for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower left", ncols=columns)
    return figure


def _lines(runs: Sequence[RunRecord], metric: str | None) -> dict[int, tuple[list[int], list[float]]]:
    """Return epochs from 1, or steps, and values of each run that has any, by the run's index."""
    found, unit = {}, _unit(runs)
    for index, run in enumerate(runs):
        name = metric or run.headline
        kept = [entry for entry in run.log if entry.get(name) is not None]
        if kept:
            scale = 100 if is_share(name) else 1
            places = [entry["step"] if unit == "step" else run.at(entry) for entry in kept]
            found[index] = places, [scale * entry[name] for entry in kept]
    return found


def _unit(runs: Sequence[RunRecord]) -> str:
    """Return what to draw over: steps if the length of any run counts in steps, or else epochs."""
    return "step" if any(run.unit == "step" for run in runs) else "epoch"
