"""How a top-down pose model is used: its crops, how its heatmaps are read, and which poses are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from widefield import _checks
from widefield.data.crops import apply_matrix, inverse
from widefield.data.skeleton import Skeleton
from widefield.dense.heatmap import HeatmapPose
from widefield.dense.heatmap_codec import DecodedKeypoints, HeatmapCodec, decoded, flipped_heatmaps


@dataclass(frozen=True)
class PoseRules:
    """How a top-down pose model is used at test time.

    Args:
        crop_size: (height, width) of the crops in pixels.
        swapped: the key point that each one becomes in a mirrored image; left and right change places.
        sigmas: of each key point, as COCO defines them: how far apart annotators place it, relative to the size of the
            person. Needed to find duplicates.
        kind, sigma, blur: how heatmaps are read; see :class:`widefield.dense.HeatmapCodec`.
        flip_test: also run the mirrored crops, and average the heatmaps.
        shift_heatmaps: move the mirrored heatmaps by one pixel; None: unless kind is "udp", as published.
        padding: sides of the crop relative to the box.
        udp: whether centers of the crop's corner pixels lie on the box's edges; None: if kind is "udp".
        keypoint_threshold: key points with lower scores do not count in the score of a pose.
        nms_threshold: of two poses of one class that are more alike (OKS), the one with the lower score is dropped; 1
            keeps all.

    Raises:
        TypeError, ValueError: a rule is of the wrong type or out of range.
    """

    crop_size: tuple[int, int]
    swapped: tuple[int, ...]
    sigmas: tuple[float, ...]
    kind: str = "msra"
    sigma: float = 2.0
    blur: int = 11
    flip_test: bool = True
    shift_heatmaps: bool | None = None
    padding: float = 1.25
    udp: bool | None = None
    keypoint_threshold: float = 0.2
    nms_threshold: float = 0.9

    def __post_init__(self) -> None:
        HeatmapCodec(self.crop_size, (2, 2), self.sigma, self.kind, self.blur)  # checks them
        if sorted(self.swapped) != list(range(len(self.swapped))):
            raise ValueError(f"swapped must hold every index of a key point once; got {self.swapped}.")
        if len(self.sigmas) != len(self.swapped) or not all(value > 0 for value in self.sigmas):
            raise ValueError(
                f"sigmas must be {len(self.swapped)} numbers above 0, one for each key point; got {self.sigmas}."
            )
        if not _checks.number("padding", self.padding):
            raise ValueError("padding must be above 0, as the crop would be empty; got 0.")
        _checks.number("keypoint_threshold", self.keypoint_threshold)
        _checks.number("nms_threshold", self.nms_threshold, maximum=1.0)

    @classmethod
    def for_model(cls, model: HeatmapPose, skeleton: Skeleton, crop_size: tuple[int, int], **options: Any) -> PoseRules:
        """Return the rules of a model: it knows how its heatmaps are read, and the skeleton its key points.

        Args:
            model: gives ``kind``, ``sigma`` and ``blur``.
            skeleton: gives ``swapped`` and ``sigmas``.
            crop_size: (height, width) of the crops in pixels.
            options: other rules, such as ``flip_test=False``.

        Raises:
            TypeError, ValueError: a rule is of the wrong type or out of range, or the model has other key points.
        """
        if model.num_keypoints != len(skeleton.names):
            raise ValueError(
                f"the model has {model.num_keypoints} key points, and the skeleton {len(skeleton.names)}: give the "
                "skeleton that it was trained with."
            )
        read: dict[str, Any] = {name: getattr(model, name) for name in ("kind", "sigma", "blur")}
        return cls(crop_size, skeleton.swapped, skeleton.sigmas, **read, **options)

    def heatmaps(self, model: nn.Module, crops: Tensor) -> Tensor:
        """Return the heatmaps (N, K, H, W) of normalized crops (N, C, h, w), averaged over the flip test.

        The model runs in the mode that it is in.

        Raises:
            ValueError: the model gives no heatmap for each key point, or values that are not finite.
        """
        found = self._checked(model, crops)
        if not self.flip_test:
            return found
        shift = self.kind != "udp" if self.shift_heatmaps is None else self.shift_heatmaps
        return (found + flipped_heatmaps(self._checked(model, crops.flip(3)), self.swapped, shift=shift)) / 2

    def _checked(self, model: nn.Module, crops: Tensor) -> Tensor:
        found = model(crops)
        if not isinstance(found, Tensor) or found.ndim != 4 or found.shape[1] != len(self.swapped):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"the model must give {len(self.swapped)} heatmaps, (N, {len(self.swapped)}, H, W), one for each key "
                f"point of the rules; {type(model).__name__} gives {shape}."
            )
        if not found.isfinite().all():
            raise ValueError(
                f"the heatmaps of {type(model).__name__} are not finite, so they have no key points: weights or "
                "activations are NaN or have overflowed. Check the weights, or run the model in float32."
            )
        return found

    def decode(self, heatmaps: Tensor) -> DecodedKeypoints:
        """Return the key points of heatmaps (N, K, H, W) in pixels of the crops."""
        return decoded(heatmaps, self.crop_size, self.kind, self.blur)

    @property
    def aligned(self) -> bool:
        """Return whether crops are cut with ``udp``."""
        return self.kind == "udp" if self.udp is None else self.udp

    def to_file(self, points: Tensor, matrices: Tensor) -> Tensor:
        """Return decoded key points in pixels of the file.

        Args:
            points: (N, K, 2), from :meth:`decode`.
            matrices: (N, 2, 3), from pixels of the file to pixels of the crops.

        Returns:
            (N, K, 2) float64.
        """
        return apply_matrix(points.double(), inverse(matrices.double()))

    def pose_scores(self, scores: Tensor, box_scores: Tensor) -> Tensor:
        """Return the scores of poses, (D,): the mean score of the key points above the threshold times the box's.

        Args:
            scores: (D, K), of the key points. A pose without any above the threshold has score 0.
            box_scores: (D,).
        """
        counted = scores > self.keypoint_threshold
        total = torch.where(counted, scores, 0.0).sum(1)
        return total / counted.sum(1).clamp(min=1) * box_scores
