"""Treat Ctrl-C and SIGTERM as a request to stop at the next step."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Store the first SIGINT or SIGTERM of a ``with`` block in ``received``; a second one acts at once, as usual.

    Outside the main thread, where Python delivers no signals, it is a no-op. The previous handlers are restored after
    the block.
    """

    received: signal.Signals | None = None

    def __enter__(self) -> Self:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
        else:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            # None stands for a handler that was not installed from Python and cannot be put back from it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def ignore_signals(worker: int = 0) -> None:
    """Ignore signals in a loader worker: terminals and schedulers signal workers, too."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
