"""List how each kind of prediction is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from widefield.drawing.annotating import Color
from widefield.drawing.boxes import BoxDrawing
from widefield.drawing.classes import ClassDrawing
from widefield.drawing.labels import LabelDrawing
from widefield.drawing.masks import MaskDrawing
from widefield.drawing.parts import Drawing
from widefield.drawing.poses import PoseDrawing
from widefield.drawing.reconstructions import ReconstructionDrawing
from widefield.tasks import (
    BoxPrediction,
    ClassPrediction,
    LabelPrediction,
    MaskPrediction,
    PosePrediction,
    Prediction,
    ReconstructionPrediction,
)

DRAWINGS: Mapping[type, type[Drawing]] = {
    ClassPrediction: ClassDrawing,
    LabelPrediction: LabelDrawing,
    MaskPrediction: MaskDrawing,
    BoxPrediction: BoxDrawing,
    PosePrediction: PoseDrawing,
    ReconstructionPrediction: ReconstructionDrawing,
}
"""Kind of prediction -> how it is drawn."""


def drawing_of(prediction: Prediction, classes: Sequence[str], palette: Sequence[Color], **shown: Any) -> Drawing:
    """Return how predictions of this kind are drawn; ``shown`` are ``top`` and ``min_score`` of `Drawing`."""
    return DRAWINGS[type(prediction)](tuple(classes), tuple(palette), **shown)
