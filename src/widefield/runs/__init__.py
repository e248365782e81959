"""Load, evaluate, compare and report finished runs and other trained models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from widefield._lazy import load_on_demand

if TYPE_CHECKING:
    from widefield.runs.accuracy import Evaluation, evaluate_model
    from widefield.runs.averaging import average
    from widefield.runs.compare import comparison, draw_runs, filter_runs, pick_runs, sort_runs
    from widefield.runs.labels import MappedClassification, output_places
    from widefield.runs.loading import load
    from widefield.runs.predict import predict, predict_each, predict_files
    from widefield.runs.predicted import Predicted, Predictions, Unreadable
    from widefield.runs.records import RunRecord, find_runs, read_run
    from widefield.runs.report import write_report
    from widefield.runs.sharing import push_to_hub, save
    from widefield.runs.subjects import MissingDataError, Subject
    from widefield.runs.trained import load_trained, read_run_data
    from widefield.runs.weights import Weights

load_on_demand(
    __name__,
    {
        "accuracy": "Evaluation evaluate_model",
        "averaging": "average",
        "compare": "comparison draw_runs filter_runs pick_runs sort_runs",
        "labels": "MappedClassification output_places",
        "loading": "load",
        "predict": "predict predict_each predict_files",
        "predicted": "Predicted Predictions Unreadable",
        "records": "RunRecord find_runs read_run",
        "report": "write_report",
        "sharing": "push_to_hub save",
        "subjects": "MissingDataError Subject",
        "trained": "load_trained read_run_data",
        "weights": "Weights",
    },
)

__all__ = [
    "Evaluation",
    "MappedClassification",
    "MissingDataError",
    "Predicted",
    "Predictions",
    "RunRecord",
    "Subject",
    "Unreadable",
    "Weights",
    "average",
    "comparison",
    "draw_runs",
    "evaluate_model",
    "filter_runs",
    "find_runs",
    "load",
    "load_trained",
    "output_places",
    "pick_runs",
    "predict",
    "predict_each",
    "predict_files",
    "push_to_hub",
    "read_run",
    "read_run_data",
    "save",
    "sort_runs",
    "write_report",
]
