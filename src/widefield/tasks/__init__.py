"""Tasks: how a batch becomes a loss, and how a model is judged. The training loop knows nothing else of the work."""

from __future__ import annotations

import inspect
from typing import Any

from widefield import _checks
from widefield.tasks.base import Batch, Labelled, Task
from widefield.tasks.classification import Classification

__all__ = ["Batch", "Classification", "Labelled", "Task", "create"]

_TASKS: dict[str, type[Task]] = {"classification": Classification}


def create(name: str, dataset: Labelled, **options: Any) -> Task:
    """Build the task called ``name`` for a data set.

    Args:
        name: ``"classification"``.
        dataset: what the task is trained on; classification reads its ``classes``.
        options: the other arguments of the task's constructor.

    Raises:
        ValueError: the name is unknown, or an option out of range.
        TypeError: the task has no such option, or it is of the wrong kind.
    """
    kind = _TASKS[_checks.choice("the task", name, tuple(_TASKS))]
    known = [p.name for p in inspect.signature(kind).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise TypeError(
                f"the task {name!r} has no option {option!r}.{_checks.did_you_mean(option, known)} "
                f"It takes {', '.join(known)}."
            )
    return kind.for_data(dataset, **options)
