"""Draw the crops of people for training: flips, halves of the body, shifts, sizes and rotations, as published.

The steps and their order are those of mmpose 1.x.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from widefield.data import crops
from widefield.data.skeleton import Skeleton
from widefield.data.transforms import PoseAugmentation

Floats = NDArray[np.float64]

_NORMAL = NormalDist()
_LOWEST, _HIGHEST = _NORMAL.cdf(-1), _NORMAL.cdf(1)


class CropSampler:
    """Draws the matrices of train crops.

    Args:
        augmentation: the probabilities and ranges.
        skeleton: whose key points change places, and where the body has halves.
        size: (height, width) of the crops in pixels.
        padding: factor on the sides of a box.
        udp: see `widefield.data.crops.crop_matrix`.
    """

    def __init__(
        self, augmentation: PoseAugmentation, skeleton: Skeleton, size: Sequence[int], padding: float, *, udp: bool
    ) -> None:
        self.augmentation, self.skeleton = augmentation, skeleton
        self.size, self.padding, self.udp = size, padding, udp

    def draw(self, generator: np.random.Generator, box: Floats, keypoints: Floats, width: int) -> tuple[Tensor, bool]:
        """Return the matrix from pixels of the file to pixels of the crop, (2, 3) float64, and whether it mirrors.

        Args:
            generator: of the sample.
            box: (4,), the edges (left, top, right, bottom) in pixels of the file.
            keypoints: (K, 3), x, y and visibility in pixels of the file.
            width: of the file in pixels.
        """
        options = self.augmentation
        flipped = bool(generator.random() < options.hflip)
        corners = box.reshape(2, 2)
        center, scale = corners.mean(0), (corners[1] - corners[0]) * self.padding
        if flipped:
            center = np.array([width - 1 - center[0], center[1]])
            keypoints = keypoints[list(self.skeleton.swapped)] * (-1, 1, 1) + (width - 1, 0, 0)
        half = self._half(generator, keypoints[:, 2] > 0)
        if half:
            points = keypoints[half, :2]
            sides = (points.max(0) - points.min(0)) * options.half_body_padding
            if sides.max() >= 1:  # of a pixel; points at one place have no surroundings
                center, scale = points.mean(0), sides
        offset = np.array([_normal(generator), _normal(generator)]) * options.shift_factor
        if generator.random() < options.shift_prob:
            center = center + offset * scale
        low, high = options.scale_factor
        factor = (low + high) / 2 + _normal(generator) * (high - low) / 2
        if generator.random() < options.scale_prob:
            scale = scale * factor
        angle = _normal(generator) * options.rotate_factor
        rotation = angle if generator.random() < options.rotate_prob else 0.0
        sides_of_crop = crops.with_aspect(torch.from_numpy(scale), self.size)
        matrix = crops.crop_matrix(torch.from_numpy(center), sides_of_crop, self.size, rotation, udp=self.udp)
        return (crops.mirrored(matrix, width) if flipped else matrix), flipped

    def _half(self, generator: np.random.Generator, visible: NDArray[np.bool_]) -> list[int]:
        """Return the labeled key points of the half of the body to show; empty: all of it."""
        options = self.augmentation
        if not self.skeleton.upper or visible.sum() < options.min_total_keypoints:
            return []
        if generator.random() >= options.half_body_prob:
            return []
        upper, lower = ([k for k in part if visible[k]] for part in (self.skeleton.upper, self.skeleton.lower))
        prefers_upper = generator.random() < options.upper_prob
        has_upper, has_lower = len(upper) >= options.min_upper_keypoints, len(lower) >= options.min_lower_keypoints
        if has_upper and has_lower:
            return upper if prefers_upper else lower
        # Published code shows the other half if one lacks key points.
        return upper if has_upper else lower if has_lower else []


def _normal(generator: np.random.Generator) -> float:
    """Draw from the standard normal distribution, cut off at -1 and 1."""
    return _NORMAL.inv_cdf(_LOWEST + (_HIGHEST - _LOWEST) * float(generator.random()))
