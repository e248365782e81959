"""Load, evaluate, compare and report finished runs and other trained models."""

from widefield.runs.accuracy import Evaluation, evaluate_model
from widefield.runs.compare import comparison, draw_runs, filter_runs, pick_runs, sort_runs
from widefield.runs.labels import MappedClassification, output_places
from widefield.runs.predict import Predicted, Predictions, Unreadable, predict, predict_each, predict_files
from widefield.runs.records import RunRecord, find_runs, read_run
from widefield.runs.report import write_report
from widefield.runs.subjects import MissingDataError, Subject, load
from widefield.runs.trained import load_trained, read_run_data
from widefield.runs.weights import Weights

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
    "read_run",
    "read_run_data",
    "sort_runs",
    "write_report",
]
