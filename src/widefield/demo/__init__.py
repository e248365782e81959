"""Run a demonstration of a few minutes, and write a page about it.

``widefield demo`` shows what a pretrained network sees in photographs, and fits its kernel sizes to crops of them
(``photo_crops``). Then it trains mixtures of receptive fields on handwritten digits (``digits``), fuses, verifies and
measures them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from rich.console import Console

from widefield import _checks, bench, report
from widefield._files import check_place, write_whole
from widefield._tabular import print_table
from widefield.demo import fitted, photographs
from widefield.demo.chapter import Chapter
from widefield.demo.mixtures import Mixtures

PARTS = (fitted.NAME, "digits", "scales")
DEFAULT = PARTS[:2]
_TITLE = "What does a network see, and how far must it look?"
_LEAD = "Small experiments of a few minutes, on this machine, with the commands that you would use for your own data."


class _Part(Protocol):
    name: str

    def run(self, console: Console) -> Chapter: ...


def run(parts: Sequence[str] = DEFAULT, output: str | Path = "runs/demo", overrides: Sequence[str] = ()) -> Path:
    """Run parts of the demo and report; return the path of the page.

    Writes ``report.html``, ``results.json`` and a folder for each training into ``output``, and replaces those of an
    earlier demo.

    Args:
        parts: "photo_crops" needs the extras ``realweights`` and ``photographs``; without them it is left out, unless
            it is the only part. "digits" and "scales" train mixtures.
        output: folder.
        overrides: overrides of the recipe ``demo_<part>``, as in ``widefield train``, for a single part.

    Raises:
        OSError: ``output`` cannot be written; this is checked before training starts.
        ValueError, TypeError: an unknown part, or an override does not fit.
        ModuleNotFoundError: an extra is missing for the only part.
        SystemExit: Ctrl-C or SIGTERM, with 130 or 143.
    """
    folder = Path(output).expanduser()
    names = [_checks.choice("every part", part, PARTS) for part in dict.fromkeys(parts)]
    if overrides and len(names) != 1:
        key = overrides[0].partition("=")[0]
        raise ValueError(f"{key} is for one recipe: choose a part of the demo with --data {' or '.join(PARTS)}.")
    check_place(folder, folder=True)
    missing = photographs.missing() if fitted.NAME in names else ""
    if missing and len(names) == 1:
        raise ModuleNotFoundError(missing)
    todo: list[_Part] = [
        fitted.PhotoCrops(folder, overrides) if name == fitted.NAME else Mixtures(name, folder, overrides)
        for name in names
        if not (missing and name == fitted.NAME)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    if missing:
        console.print(f"The photographs are left out: {missing}", markup=False, highlight=False)
    chapters, seconds = {}, {}
    for part in todo:
        started = time.perf_counter(), time.process_time()
        chapters[part.name] = part.run(console)
        seconds[part.name] = {"wall": time.perf_counter() - started[0], "cpu": time.process_time() - started[1]}
    command = " ".join(["widefield demo --data", *names, *overrides])
    return _write(folder, chapters, missing, {"command": command, "seconds": seconds})


def _write(folder: Path, chapters: dict[str, Chapter], missing: str, facts: dict[str, object]) -> Path:
    """Write the results and the page; return its path."""
    environment = bench.environment()
    numbers = {name: chapter.numbers for name, chapter in chapters.items()}
    document = json.dumps({**facts, "environment": environment, **numbers}, indent=1) + "\n"
    write_whole(folder / "results.json", document.encode())
    sections = [section for chapter in chapters.values() for section in chapter.sections]
    if missing:
        sections.insert(0, report.Section("Left out: a pretrained network on photographs", [missing]))
    lead = " ".join(chapter.headline for chapter in chapters.values())
    page = folder / "report.html"
    headline = [chapter.headline for chapter in chapters.values()]
    write_whole(page, report.page(_TITLE, _LEAD, sections, environment, headline).encode())
    console = Console()
    for chapter in chapters.values():
        for title, rows in chapter.tables:
            print_table(rows, [column for column in rows[0] if column], title=title)
    console.print(f"{lead}\nThe report is in {page}", markup=False, highlight=False, soft_wrap=True)
    return page
