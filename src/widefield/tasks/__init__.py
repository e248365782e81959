"""Provide tasks, which define the trained model, its batches, its loss and its metrics."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from widefield import _checks
from widefield._lazy import Registry, load_on_demand
from widefield.tasks.metric_names import HEADLINES

if TYPE_CHECKING:
    from widefield.tasks.base import Batch, Labeled, Task
    from widefield.tasks.class_scores import ClassificationScores
    from widefield.tasks.classification import Classification
    from widefield.tasks.coco_metric import CocoMetric, TrueObjects
    from widefield.tasks.confusion import SegmentationScores
    from widefield.tasks.detection import Detection
    from widefield.tasks.detection_errors import DetectionErrors
    from widefield.tasks.detection_scores import DetectionScores
    from widefield.tasks.image_classes import count_outputs
    from widefield.tasks.masked_image import MaskedImage
    from widefield.tasks.multilabel import MultiLabelClassification
    from widefield.tasks.multilabel_scores import MultiLabelScores
    from widefield.tasks.nearest import NearestNeighbors
    from widefield.tasks.pose import PoseEstimation
    from widefield.tasks.pose_errors import PoseErrors
    from widefield.tasks.pose_metric import FoundPoses, People, PoseMetric, TruePoses
    from widefield.tasks.pose_scores import KeypointScores, PoseScores
    from widefield.tasks.predictions import (
        BoxPrediction,
        ClassPrediction,
        LabelPrediction,
        MaskPrediction,
        PosePrediction,
        Prediction,
        ReconstructionPrediction,
    )
    from widefield.tasks.segmentation import Segmentation

load_on_demand(
    __name__,
    {
        "base": "Batch Labeled Task",
        "class_scores": "ClassificationScores",
        "classification": "Classification",
        "coco_metric": "CocoMetric TrueObjects",
        "confusion": "SegmentationScores",
        "detection": "Detection",
        "detection_errors": "DetectionErrors",
        "detection_scores": "DetectionScores",
        "image_classes": "count_outputs",
        "masked_image": "MaskedImage",
        "multilabel": "MultiLabelClassification",
        "multilabel_scores": "MultiLabelScores",
        "nearest": "NearestNeighbors",
        "pose": "PoseEstimation",
        "pose_errors": "PoseErrors",
        "pose_metric": "FoundPoses People PoseMetric TruePoses",
        "pose_scores": "KeypointScores PoseScores",
        "predictions": "BoxPrediction ClassPrediction LabelPrediction MaskPrediction PosePrediction Prediction "
        "ReconstructionPrediction",
        "segmentation": "Segmentation",
    },
)

__all__ = [
    "HEADLINES",
    "TASKS",
    "Batch",
    "BoxPrediction",
    "ClassPrediction",
    "Classification",
    "ClassificationScores",
    "CocoMetric",
    "Detection",
    "DetectionErrors",
    "DetectionScores",
    "FoundPoses",
    "KeypointScores",
    "LabelPrediction",
    "Labeled",
    "MaskPrediction",
    "MaskedImage",
    "MultiLabelClassification",
    "MultiLabelScores",
    "NearestNeighbors",
    "People",
    "PoseErrors",
    "PoseEstimation",
    "PoseMetric",
    "PosePrediction",
    "PoseScores",
    "Prediction",
    "ReconstructionPrediction",
    "Segmentation",
    "SegmentationScores",
    "Task",
    "TrueObjects",
    "TruePoses",
    "count_outputs",
    "create",
]

TASKS: Registry[type[Task]] = Registry(
    {
        "classification": "widefield.tasks.classification:Classification",
        "multilabel": "widefield.tasks.multilabel:MultiLabelClassification",
        "segmentation": "widefield.tasks.segmentation:Segmentation",
        "detection": "widefield.tasks.detection:Detection",
        "pose": "widefield.tasks.pose:PoseEstimation",
        "masked_image": "widefield.tasks.masked_image:MaskedImage",
    }
)
"""Tasks by the name that recipes use. Add a class of your own to train it from a recipe."""


def create(name: str, dataset: Labeled, **options: Any) -> Task:
    """Build the task called ``name`` for a data set.

    Args:
        name: a key of ``TASKS``, such as ``"classification"``.
        dataset: what the task is trained on, or a run's record of it; the tasks here read its ``classes``.
        options: the other arguments of the task's constructor.

    Raises:
        ValueError: the name is unknown, or an option is out of range.
        TypeError: the task has no such option, or it is of the wrong type.
    """
    kind = TASKS[_checks.choice("the task", name, tuple(TASKS))]
    known = [p.name for p in inspect.signature(kind).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise TypeError(
                f"the task {name!r} has no option {option!r}.{_checks.did_you_mean(option, known)} "
                f"It takes {', '.join(known)}."
            )
    return kind.for_data(dataset, **options)
