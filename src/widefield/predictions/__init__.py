"""Predict image files, and show, list and save what is predicted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from widefield._lazy import load_on_demand

if TYPE_CHECKING:
    from widefield.predictions.predict import predict, predict_each, predict_files
    from widefield.predictions.predicted import Predicted, Predictions, Unreadable

load_on_demand(
    __name__,
    {
        "predict": "predict predict_each predict_files",
        "predicted": "Predicted Predictions Unreadable",
    },
)

__all__ = [
    "Predicted",
    "Predictions",
    "Unreadable",
    "predict",
    "predict_each",
    "predict_files",
]
