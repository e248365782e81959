"""Output, logs and errors of exporters and runtimes, made readable."""

from __future__ import annotations

import contextlib
import io
import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_ALONE = threading.RLock()


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message as a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith("Exception from")] or lines  # OpenVINO lists files first
    line = told[0] if told else type(error).__name__
    return line.rstrip(".:") + "."


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what exporters warn, log and print, none of which a caller could act on.

    One thread at a time, as this is process-wide state, like that of torch.export.
    """
    with _ALONE:
        yield from _silenced()


def _silenced() -> Iterator[None]:
    before, nowhere = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
