"""Ask a pose model about one key point: the height of its heatmap's peak, with gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from widefield import _checks
from widefield.analysis._model import running
from widefield.surgery.answers import described
from widefield.surgery.poses import is_pose_model

__all__ = ["KeypointPeak", "Peaks", "check_pose_model", "is_pose_model", "peaks"]


@dataclass(frozen=True)
class KeypointPeak:
    """The value of one key point's heatmap at its peak, which is the key point's score.

    The place of the peak is held fixed, so that the gradient is that of a single value of the heatmap.

    Attributes:
        keypoint: index of the key point. None: for each image the one with the highest peak.
    """

    keypoint: int | None = None

    def __post_init__(self) -> None:
        if self.keypoint is not None:
            object.__setattr__(self, "keypoint", _checks.integer("keypoint", self.keypoint, minimum=0))

    @property
    def label(self) -> int | None:
        """The index of the key point, by the name that other targets have."""
        return self.keypoint

    def place(self, size: Sequence[int]) -> str:
        """Return the place as text."""
        return "its peak"


class Peaks(NamedTuple):
    """The peaks of the heatmaps of N images."""

    values: Tensor
    """(N, K): heights; gradients flow through."""
    points: Tensor
    """(N, K, 2): the decoded key points, x and y in pixels of the images."""
    pixels: Tensor
    """int64 (N, K, 2): row and column in the heatmaps."""
    size: tuple[int, int]
    """Height and width of the heatmaps."""


def check_pose_model(model: nn.Module, what: str) -> None:
    """Raise ValueError unless a model gives heatmaps that it can decode."""
    if not is_pose_model(model):
        raise ValueError(
            f"{what} needs a pose model such as widefield.dense.HeatmapPose, which gives a heatmap for each key point; "
            f"got {type(model).__name__}."
        )


def peaks(model: nn.Module, images: Tensor, weights: Mapping[str, Tensor] | None = None) -> Peaks:
    """Return the peaks of a pose model's heatmaps for images (N, C, H, W).

    ``weights`` replace parameters of the model, by name.

    Raises ValueError for other models, outputs of another form, or heatmaps that are not finite.
    """
    check_pose_model(model, "a key point")
    pose: Any = model
    with running(model, images):
        heatmaps = torch.func.functional_call(model, dict(weights), (images,)) if weights else pose(images)
    if not isinstance(heatmaps, Tensor) or heatmaps.shape[:2] != (len(images), pose.num_keypoints):
        raise ValueError(
            f"{type(model).__name__} must return heatmaps (N, {pose.num_keypoints}, h, w); got {described(heatmaps)}."
        )
    if not heatmaps.isfinite().all():
        raise ValueError(f"{type(model).__name__} returned heatmaps that are not finite.")
    values, places = heatmaps.flatten(2).max(2)
    with torch.no_grad():
        points = pose.decode(heatmaps.detach(), images.shape[-2:]).points
    height, width = heatmaps.shape[2:]
    return Peaks(values, points, torch.stack((places // width, places % width), 2), (height, width))
