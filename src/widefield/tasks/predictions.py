"""Describe what a model predicts for one image, in the form in which it is drawn and saved."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class ClassPrediction:
    """The classes of an image.

    Attributes:
        probabilities: float32 (K,), on the CPU, with a sum of 1.
    """

    probabilities: Tensor


@dataclass(frozen=True, eq=False)
class MaskPrediction:
    """The class of each pixel of an image.

    Attributes:
        mask: uint8 (H, W), int32 above 256 classes, on the CPU: indices of classes, at the size of the image's file.
    """

    mask: Tensor


@dataclass(frozen=True, eq=False)
class BoxPrediction:
    """The objects of an image.

    Attributes:
        boxes: float32 (D, 4), on the CPU: the edges (left, top, right, bottom) in pixels of the image's file.
        labels: int64 (D,): indices of classes.
        scores: float32 (D,), in descending order; None for true objects.
        masks: bool (D, H, W): the pixels of each object, at the size of the file; None without masks.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor | None = None
    masks: Tensor | None = None


Prediction = ClassPrediction | MaskPrediction | BoxPrediction
"""What a task predicts for one image. A new kind also needs its drawing, in `widefield.runs.drawing`."""
