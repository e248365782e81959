"""Write a page about training runs: their metrics, and every analysis that applies to their models."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from widefield import _checks, analysis, bench, report
from widefield._files import check_place, write_whole
from widefield.analysis import ClassAt
from widefield.analysis.registry import ANALYSES, Analysis
from widefield.loading.inputs import CLASSIFIERS, Selection
from widefield.loading.load import load
from widefield.loading.subjects import MissingDataError, Subject
from widefield.loading.trained import examined
from widefield.report import Plot, Section, Table
from widefield.runs.accuracy import evaluate_model
from widefield.runs.compare import comparison, draw_runs, labels
from widefield.runs.evaluation_page import evaluation_sections, together
from widefield.runs.headline import Found, evaluated_words, logged_words
from widefield.runs.records import RunRecord, read_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_EXAMPLES = 3
"""Number of best and of worst images of an evaluation."""
_EVALUATED = dict.fromkeys(CLASSIFIERS, 32)
"""Work of a run -> evaluated images for each one that is analyzed; others take four, as they cost more."""
_CURVES = "How the validation results developed: a flat end means that longer training would hardly help."


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
        count: images to analyze, from the run's validation data. Routing and evaluations use four times as many,
            evaluations of classifiers 32 times.
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
    records = [read_run(folder) for folder in folders]
    sections = [*first, *training(records)]
    told = _once(say)
    for subject in subjects:
        told(_found(subject, count, told))
    numbers: dict[str, dict[str, Any]] = {}
    evaluations: dict[str, Found] = {}
    shown: dict[str, list[Section]] = {}
    for name, subject in zip(labels(records), subjects, strict=True):
        say("evaluation")
        shown[name], found = _evaluated(subject, _EVALUATED.get(subject.work, 4) * count, device)
        if found is not None:
            evaluations[name] = found
            numbers.setdefault("Evaluation", {})[subject.name] = found.evaluation.to_dict()
    sections += [together(shown)] if len(shown) > 1 else next(iter(shown.values()))
    sections += _analyzed([replace(one, model=examined(one.model)) for one in subjects], count, numbers, say, told)
    environment = bench.environment(device)
    names = ", ".join(subject.name for subject in subjects)
    page.parent.mkdir(parents=True, exist_ok=True)
    document = json.dumps({"environment": environment, "results": numbers}, allow_nan=False) + "\n"
    write_whole(page.with_suffix(".json"), document.encode())
    words = evaluated_words(evaluations) if len(evaluations) == len(records) else logged_words(records)
    write_whole(page, report.page(title or f"Report on {names}", lead, sections, environment, words).encode())
    return page


def _analyzed(
    subjects: Sequence[Subject],
    count: int,
    numbers: dict[str, dict[str, Any]],
    say: Callable[[str], None],
    told: Callable[[str], None],
) -> list[Section]:
    """Return the sections on every analysis that applies, and add their numbers to ``numbers``."""
    sections = []
    for entry, heading, options in _entries(subjects):
        say(heading.lower())
        chosen = [subject for subject in subjects if "targets" not in options or subject.work == "segmentation"]
        results, reasons = _results(entry, chosen, count, options)
        for name, reason in reasons.items():
            told(f"{name}: {reason}")
        if results:
            sections.append(analysis.section(results, heading))
            numbers[heading] = {name: result.to_dict() for name, result in results.items()}
        if reasons:
            why = [f"Not of {name}: {reason}" for name, reason in reasons.items()]
            sections.append(Section(f"{heading}: left out", why))
    return sections


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


def _entries(subjects: Sequence[Subject]) -> Iterator[tuple[Analysis, str, dict[str, Any]]]:
    """Yield the analyses of a report, with their headings and options."""
    for entry in ANALYSES.values():
        if entry.reported is not None:
            yield entry, entry.heading, dict(entry.report_options)
        if entry.name == "erf" and any(subject.work == "segmentation" for subject in subjects):
            yield entry, f"{entry.heading} of the class logit in the center", {"targets": ClassAt()}


def _evaluated(subject: Subject, count: int, device: str) -> tuple[list[Section], Found | None]:
    """Return the sections on ``count`` images of the run's validation data, and the evaluation, if there are any."""
    try:
        whole = subject.own_data()
        task = subject.task(whole)
    except (MissingDataError, ValueError) as error:  # the data are missing, or have changed
        return [Section("Evaluation: left out", [f"Not of {subject.name}: {error}"])], None
    some = Selection(whole, count, complete=True)
    recipe = subject.recipe
    settings: dict[str, Any] = {}
    if recipe:
        settings = {"batch_size": recipe.batch_size, "mixed_precision": recipe.mixed_precision}
    found = evaluate_model(subject.model, some, task, workers=0, device=device, examples=_EXAMPLES, **settings)
    source = recipe.data.name if recipe else ""
    note = "" if len(some) == len(whole) else f"A seeded choice of {len(whole):,}; widefield eval takes all."
    return evaluation_sections(found, subject, source, note), Found(found, source, task.headline)


def _results(
    entry: Analysis, subjects: Sequence[Subject], count: int, options: Mapping[str, Any]
) -> tuple[dict[str, analysis.Result], dict[str, str]]:
    """Return the results of an analysis by model, and why there is none for the others."""
    results, reasons = {}, {}
    for subject in subjects:
        if not entry.applies(subject.model):
            continue
        try:
            results[subject.name] = _look(entry, subject, entry.reported(count) if entry.reported else count, options)
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


def training(found: Sequence[RunRecord]) -> list[Section]:
    """Return the sections on the training: differences of the recipes, numbers and curves."""
    alone = [{"": key, found[0].name: value} for key, value in found[0].row().items() if key != "name"]
    rows = comparison(found) if len(found) > 1 else alone
    figure: Figure = draw_runs(found, _drawn(found))
    return [Section("Runs", [Table(rows)]), Section("Training", [Plot(figure, _CURVES)])]


def _drawn(runs: Sequence[RunRecord]) -> list[str]:
    """Return which metrics are drawn: of masked pre-training the loss and nearest neighbors; [] for the headlines."""
    headline = runs[0].headline
    neighbors = f"{headline.removesuffix('loss')}knn_top1"
    same = all(run.headline == headline and neighbors in run.metrics for run in runs)
    return [headline, neighbors] if same else []


def _look(entry: Analysis, subject: Subject, count: int, options: Mapping[str, Any]) -> analysis.Result:
    """Run one analysis on ``count`` of the run's images."""
    if entry.reads_objects:
        return entry.run(subject.object_view(count), **options)
    pictures = None
    if entry.reads_images(subject.model):
        choose = subject.any_pictures if entry.stand_in else subject.pictures
        pictures = choose(count=count, size=subject.size + entry.margin(options, subject.size))
    return entry.run(subject.view(pictures), **options)
