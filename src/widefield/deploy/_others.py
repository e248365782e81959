"""Silence exporters and runtimes, and shorten their error messages."""

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
    """Silence the warnings, logs and prints of exporters, none of which a caller can act on.

    A lock admits one thread at a time, since this state and that of torch.export are process-wide.
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
