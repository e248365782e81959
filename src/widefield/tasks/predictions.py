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


Prediction = ClassPrediction | MaskPrediction
"""What a task predicts for one image. A new kind also needs its drawing, in `widefield.runs.drawing`."""
