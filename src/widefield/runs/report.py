"""One page about training runs: how they went, and all that the analyses have to say about what they trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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
    """Write one page about one run, or about several side by side, and its numbers beside it; return its path.

    Args:
        runs: folders of runs of ``widefield train``.
        out: the page, ``.html``; a ``.json`` of the same name goes beside it. None: ``report.html`` in the run's
            folder, which needs a single run.
        count: images to look at, of the run's validation data; routing is looked at over four times as many.
        device: where to compute.
        title, lead: of the page.
        first: sections to begin with.
        say: told what is being done.

    Raises:
        FileNotFoundError: a folder holds no run, or no checkpoint.
        ValueError: no runs, or several without ``out``, or an ``out`` of another suffix; a device that is not at hand.
        OSError: the page cannot be written.
    """
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
    words = [str(folder) for folder in folders]
    subjects = [load(word, device=device, beside=words) for word in words]
    found: dict[str, dict[str, analysis.Result]] = {}
    sections = [*first, *training(folders)]
    told = _once(say)
    for subject in subjects:
        told(_found(subject, count, told))
    for entry in ANALYSES.values():
        if entry.reported is None:
            continue
        heading = entry.heading
        say(heading.lower())
        results, reasons = {}, {}
        for subject in subjects:
            if not entry.applies(subject.model):
                continue
            try:
                results[subject.name] = _look(entry, subject, entry.reported(count))
            except (ValueError, MissingDataError) as error:  # the model does not allow it, or its images are missing
                reasons[subject.name] = str(error)
                told(f"{subject.name}: {error}")
        if results:
            sections.append(analysis.section(results, heading))
            found[heading] = dict(results)
        if reasons:
            why = "".join(report.paragraph(f"Not of {name}: {reason}") for name, reason in reasons.items())
            sections.append((f"{heading}: left out", why))
    environment = bench.environment(device)
    names = ", ".join(subject.name for subject in subjects)
    numbers = {heading: {n: r.to_dict() for n, r in results.items()} for heading, results in found.items()}
    page.parent.mkdir(parents=True, exist_ok=True)
    document = json.dumps({"environment": environment, "results": numbers}, allow_nan=False) + "\n"
    write_whole(page.with_suffix(".json"), document.encode())
    write_whole(page, report.page(title or f"What became of {names}", lead, sections, environment).encode())
    return page


def _once(say: Callable[[str], None]) -> Callable[[str], None]:
    """Return what passes each text on to ``say`` once."""
    before: set[str] = set()

    def told(text: str) -> None:
        if text not in before:
            before.add(text)
            say(text)

    return told


def _found(subject: Subject, count: int, say: Callable[[str], None]) -> str:
    """Return one line about the images that are looked at."""
    try:
        return f"{subject.name}: {subject.any_pictures(count=count, say=say).found()}"
    except ValueError as error:
        return f"{subject.name}: {error}"


def training(folders: Sequence[Path]) -> list[Section]:
    """Return the sections on how runs went: their recipes' differences, their numbers, their curves."""
    found = [read_run(folder) for folder in folders]
    rows = comparison(found) if len(found) > 1 else [found[0].row()]
    figure: Figure = draw_runs(found)
    return [("Runs", report.table(rows)), ("Training", report.picture(figure, "Metrics after each epoch."))]


def _look(entry: Analysis, subject: Subject, count: int) -> analysis.Result:
    """Run one analysis as reports do, on so many of the run's images."""
    pictures = None
    if entry.reads_images(subject.model):
        choose = subject.any_pictures if entry.stand_in else subject.pictures
        pictures = choose(count=count, size=subject.size + entry.margin(entry.report_options))
    return entry.run(subject.view(pictures), **entry.report_options)
