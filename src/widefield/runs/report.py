"""Write a page about training runs: their metrics, and every analysis that applies to their models."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from widefield import _checks, analysis, bench, report
from widefield._files import check_place, write_whole
from widefield.analysis.registry import ANALYSES, Analysis
from widefield.runs.compare import comparison, draw_runs
from widefield.runs.records import read_run
from widefield.runs.subjects import MissingDataError, Subject, load

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Section = tuple[str, str]
"""Heading, HTML."""


def write_report(
    runs: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    count: int = 32,
    device: str = "cpu",
    title: str | None = None,
    lead: str = "",
    first: Sequence[Section] = (),
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write one page about one run or several, and a JSON file with its numbers; return the page's path.

    Args:
        runs: folders of runs of ``widefield train``.
        out: the page, ``.html``; a ``.json`` of the same name is written next to it. None: ``report.html`` in the run's
            folder, for a single run only.
        count: images to analyze, from the run's validation data; routing uses four times as many.
        device: where to compute.
        title, lead: of the page.
        first: sections to begin with.
        say: called with a line of progress at each step.

    Raises:
        FileNotFoundError: a folder holds no run, or no checkpoint.
        ValueError: no runs, several without ``out``, another suffix of ``out``, or a device that is not available.
        OSError: the page cannot be written.
    """
    folders, page = _places(runs, out)
    words = [str(folder) for folder in folders]
    subjects = [load(word, device=device, together_with=words) for word in words]
    sections = [*first, *training(folders)]
    told = _once(say)
    for subject in subjects:
        told(_found(subject, count, told))
    numbers: dict[str, dict[str, Any]] = {}
    for entry in ANALYSES.values():
        if entry.reported is None:
            continue
        say(entry.heading.lower())
        results, reasons = _results(entry, subjects, entry.reported(count))
        for name, reason in reasons.items():
            told(f"{name}: {reason}")
        if results:
            sections.append(analysis.section(results, entry.heading))
            numbers[entry.heading] = {name: result.to_dict() for name, result in results.items()}
        if reasons:
            why = "".join(report.paragraph(f"Not of {name}: {reason}") for name, reason in reasons.items())
            sections.append((f"{entry.heading}: left out", why))
    environment = bench.environment(device)
    names = ", ".join(subject.name for subject in subjects)
    page.parent.mkdir(parents=True, exist_ok=True)
    document = json.dumps({"environment": environment, "results": numbers}, allow_nan=False) + "\n"
    write_whole(page.with_suffix(".json"), document.encode())
    write_whole(page, report.page(title or f"Report on {names}", lead, sections, environment).encode())
    return page


def _places(runs: Sequence[str | Path], out: str | Path | None) -> tuple[list[Path], Path]:
    """Return the runs' folders and the page's path, checked."""
    folders = [Path(run).expanduser() for run in runs]
    if not folders:
        raise ValueError("a report needs the folder of a run.")
    if out is None and len(folders) > 1:
        raise ValueError("a report on several runs needs a place of its own: give out, such as report.html.")
    for folder in folders:
        if not folder.is_dir():
            known = [str(path) for path in folder.parent.glob("*/") if path.is_dir()] if folder.parent.is_dir() else []
            raise FileNotFoundError(
                f"there is no folder {str(folder)!r}: a report is on a run of `widefield train`, runs/NAME."
                f"{_checks.did_you_mean(str(folder), known)}"
            )
    page = folders[0] / "report.html" if out is None else Path(out)
    _checks.choice("the suffix of out", page.suffix, (".html", ".htm"))
    check_place(page)
    return folders, page


def _results(
    entry: Analysis, subjects: Sequence[Subject], count: int
) -> tuple[dict[str, analysis.Result], dict[str, str]]:
    """Return the results of an analysis by model, and why there is none for the others."""
    results, reasons = {}, {}
    for subject in subjects:
        if not entry.applies(subject.model):
            continue
        try:
            results[subject.name] = _look(entry, subject, count)
        except (ValueError, MissingDataError) as error:  # the model does not allow it, or its images are missing
            reasons[subject.name] = str(error)
    return results, reasons


def _once(say: Callable[[str], None]) -> Callable[[str], None]:
    """Return a callable that passes each text to ``say`` only once."""
    before: set[str] = set()

    def told(text: str) -> None:
        if text not in before:
            before.add(text)
            say(text)

    return told


def _found(subject: Subject, count: int, say: Callable[[str], None]) -> str:
    """Return one line about the images that are analyzed."""
    try:
        return f"{subject.name}: {subject.any_pictures(count=count, say=say).found()}"
    except ValueError as error:
        return f"{subject.name}: {error}"


def training(folders: Sequence[Path]) -> list[Section]:
    """Return the sections on the training: differences of the recipes, numbers and curves."""
    found = [read_run(folder) for folder in folders]
    rows = comparison(found) if len(found) > 1 else [found[0].row()]
    figure: Figure = draw_runs(found)
    return [("Runs", report.table(rows)), ("Training", report.picture(figure, "Metrics after each epoch."))]


def _look(entry: Analysis, subject: Subject, count: int) -> analysis.Result:
    """Run one analysis on ``count`` of the run's images, with the options for reports."""
    pictures = None
    if entry.reads_images(subject.model):
        choose = subject.any_pictures if entry.stand_in else subject.pictures
        pictures = choose(count=count, size=subject.size + entry.margin(entry.report_options))
    return entry.run(subject.view(pictures), **entry.report_options)
