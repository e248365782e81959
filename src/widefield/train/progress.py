"""Show the progress of a run: a bar on a terminal and in a notebook, lines of text elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console

from widefield._progress import ProgressLine

_QUIET_SECONDS = 30.0


class Reporter(Protocol):
    """Shows a run; used as a ``with`` block around it."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def step(self, step: int, text: str) -> None:
        """Report that ``step`` steps are done; ``text`` describes the state of the run."""

    def line(self, text: str) -> None:
        """Print a line that stays on the screen."""


def reporter(console: Console, total: int) -> Reporter:
    """Return a bar for terminals and notebooks and lines for other consoles, for a run of ``total`` steps."""
    bar = Bar(console, total)
    return bar if bar.shown else Lines(console, total)


def numbers(values: Mapping[str, float]) -> str:
    """Return ``name value`` pairs with four digits."""
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


class Bar:
    """A progress bar over all steps of the run, with the time left and the current numbers."""

    def __init__(self, console: Console, total: int) -> None:
        self._progress = ProgressLine(console, transient=False)
        self._task = self._progress.add_task("training", total=total, text="")
        self.shown = self._progress.shown

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def step(self, step: int, text: str) -> None:
        """Move the bar to ``step``."""
        self._progress.update(self._task, completed=step, text=text)

    def line(self, text: str) -> None:
        """Print above the bar."""
        console = self._progress.console
        console.print(text, markup=False, highlight=False, soft_wrap=not console.is_terminal)


class Lines:
    """Plain lines for log files, with one about the steps every half minute."""

    def __init__(self, console: Console, total: int) -> None:
        self._console, self._total, self._last = console, total, time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def step(self, step: int, text: str) -> None:
        """Print the state of the run if nothing was printed for half a minute."""
        if time.monotonic() - self._last >= _QUIET_SECONDS:
            self.line(f"step {step} of {self._total}  {text}")

    def line(self, text: str) -> None:
        """Print one line."""
        self._last = time.monotonic()
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
