"""Provide the base class of metrics that keep a record of each prediction until the end."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric


class Measured(Protocol):
    """Results of a metric."""

    def metrics(self) -> dict[str, float]:
        """Return scalars by name."""


Scores = TypeVar("Scores", bound=Measured)
Records = NDArray[Any]
"""A structured array: one row for each record."""


class RecordMetric(Metric, Generic[Scores]):
    """A metric whose states include lists of records, which are gathered over processes byte by byte.

    Results are computed once and kept until the states change. A subclass defines :meth:`_scores`, calls
    :meth:`add_records` in its constructor, and in ``update`` :meth:`keep`.
    """

    full_state_update = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._formats: dict[str, np.dtype[Any]] = {}
        self._seen = 0
        self._found: Scores | None = None

    def add_records(self, name: str, form: np.dtype[Any]) -> None:
        """Add an empty state of records."""
        self._formats[name] = form
        self.add_state(name, [], dist_reduce_fx="cat")

    def keep(self, name: str, records: Records) -> None:
        """Add records to a state."""
        if len(records):
            content = torch.frombuffer(bytearray(records.tobytes()), dtype=torch.uint8)
            getattr(self, name).append(content.to(self.device))

    def kept(self, name: str) -> Records:
        """Return the records of a state: those of all processes, one after the other, if they are gathered."""
        parts = getattr(self, name)
        parts = [parts] if isinstance(parts, Tensor) else parts
        content = b"".join(part.cpu().numpy().tobytes() for part in parts)
        return np.frombuffer(content, self._formats[name])

    def places(self, count: int, index: Tensor | None) -> list[int]:
        """Return the places of the next ``count`` samples: ``index``, or the order in which they come."""
        self._found = None
        order = list(range(self._seen, self._seen + count)) if index is None else index.tolist()
        self._seen += count
        return order

    def scores(self) -> Scores:
        """Return all results of what was added so far."""
        if self._found is None:
            self._found = self._scores()
        return self._found

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics of the results as float64 scalars on the CPU."""
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in self.scores().metrics().items()}

    @abstractmethod
    def _scores(self) -> Scores: ...

    def sync(self, *args: Any, **options: Any) -> None:
        """Gather the states of all processes."""
        for name in self._formats:
            if not len(getattr(self, name)):  # torchmetrics would send an empty list as float32
                setattr(self, name, [torch.zeros(0, dtype=torch.uint8, device=self.device)])
        self._found = None
        super().sync(*args, **options)

    def unsync(self, *args: Any, **options: Any) -> None:
        """Return to the states of this process."""
        self._found = None
        super().unsync(*args, **options)

    def reset(self) -> None:
        """Forget everything."""
        self._found, self._seen = None, 0
        super().reset()
