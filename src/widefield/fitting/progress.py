"""Log the phases of a fit, and estimate how long the rest takes."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

PHASES = ("plan", "probe", "read", "choose", "settle", "compare", "verify", "export")
"""In their order. "compare" trains the unchanged network."""
FILE = "log.jsonl"
_WORDS = {
    "plan": "finding layers and measuring costs",
    "probe": "training a network that learns all sizes",
    "read": "reading its losses",
    "choose": "choosing the sizes",
    "settle": "fine-tuning the plain network",
    "compare": "training the unchanged network",
    "verify": "comparing both on the report half",
    "export": "exporting",
}


class Phases:
    """The phases of a fit: which are finished, how long they took, how long the others will take.

    Args:
        folder: of the fit.
        work: phase -> work in epochs of training the unchanged network; phases that are missing take no time.
        console: where to show progress.
    """

    def __init__(self, folder: Path, work: Mapping[str, float], console: Console) -> None:
        self._log, self._work, self._console = folder / FILE, dict(work), console
        self.seconds = read_log(folder)
        self._shown = 0.0

    def finished(self, phase: str) -> bool:
        """Return whether a phase is finished."""
        return phase in self.seconds

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Announce and time a phase, and log it as finished after the block."""
        number = PHASES.index(name) + 1
        self.line(f"[{number}/{len(PHASES)}] {_WORDS[name]}{self._left(name)}")
        started = time.monotonic()
        yield
        seconds = time.monotonic() - started
        self.seconds[name] = seconds
        entry = {"phase": name, "seconds": seconds, "at": datetime.datetime.now(datetime.UTC).isoformat()}
        with self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        self.line(f"    {name} took {duration(seconds)}")

    def skipped(self, name: str) -> None:
        """Say that a phase was finished before."""
        self.line(f"[{PHASES.index(name) + 1}/{len(PHASES)}] {_WORDS[name]}: finished before")

    def count(self, done: int, total: int) -> None:
        """Show how far a phase is, every few seconds."""
        if time.monotonic() - self._shown > 5 or done == total:
            self._shown = time.monotonic()
            self.line(f"    {done} of {total}")

    def line(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _left(self, start: str) -> str:
        """Return the estimated time from a phase to the end as text; empty before any training."""
        pace = [
            (self.seconds[name], self._work.get(name, 0.0))
            for name in ("probe", "settle", "compare")
            if name in self.seconds
        ]
        work = sum(part for _, part in pace)
        if not work:
            return ""
        per_epoch = sum(seconds for seconds, _ in pace) / work
        rest = [name for name in PHASES[PHASES.index(start) :] if name not in self.seconds]
        return f"; about {duration(per_epoch * sum(self._work.get(name, 0.0) for name in rest))} left in all"


def read_log(folder: Path) -> dict[str, float]:
    """Return the finished phases of a fit and their seconds; an unfinished last line is ignored."""
    found: dict[str, float] = {}
    log = folder / FILE
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # the process was killed while writing it
            continue
        found[entry["phase"]] = entry["seconds"]
    return found


def duration(seconds: float) -> str:
    """Return a time as text, such as "3 min 20 s"."""
    whole = round(seconds)
    if whole < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"
