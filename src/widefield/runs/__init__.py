"""Read, list, compare, average, evaluate and report finished runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from widefield._lazy import load_on_demand

if TYPE_CHECKING:
    from widefield.runs.accuracy import Evaluation, evaluate_model
    from widefield.runs.averaging import average
    from widefield.runs.compare import comparison, draw_runs, filter_runs, pick_runs, sort_runs
    from widefield.runs.records import RunRecord, find_runs, read_run
    from widefield.runs.report import write_report

load_on_demand(
    __name__,
    {
        "accuracy": "Evaluation evaluate_model",
        "averaging": "average",
        "compare": "comparison draw_runs filter_runs pick_runs sort_runs",
        "records": "RunRecord find_runs read_run",
        "report": "write_report",
    },
)

__all__ = [
    "Evaluation",
    "RunRecord",
    "average",
    "comparison",
    "draw_runs",
    "evaluate_model",
    "filter_runs",
    "find_runs",
    "pick_runs",
    "read_run",
    "sort_runs",
    "write_report",
]
