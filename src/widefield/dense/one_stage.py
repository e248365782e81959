"""The base class of one-stage detectors: one dense head on all levels of a pyramid, without proposals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from widefield.dense.backbone import Backboned, FeatureMaps, feature_maps
from widefield.dense.boxes import Size
from widefield.dense.detector import Detections, Detector, Targets

_MAPS = 4
"""Maps of a backbone, of strides 4 to 32, from which the pyramids are built."""


class OneStageDetector(Detector):
    """A detector whose head gives scores and a box at every position of every level.

    Args:
        backbone: the maps of a network.
        neck: from the backbone's maps to those of the head.
        bbox_head: maps its levels to outputs, of which its methods ``losses`` and ``detections`` make the rest.
        options: of :class:`widefield.dense.Detector`.
    """

    bbox_head: Any

    def __init__(self, backbone: FeatureMaps, neck: nn.Module, bbox_head: nn.Module, **options: Any) -> None:
        super().__init__(backbone, neck, {"bbox_head": bbox_head}, **options)

    def losses(self, maps: Sequence[Tensor], targets: Sequence[Targets]) -> dict[str, Tensor]:
        """Return the losses of the head by name."""
        found: dict[str, Tensor] = self.bbox_head.losses(self.bbox_head(maps), targets)
        return found

    def detect(self, maps: Sequence[Tensor], sizes: Sequence[Size]) -> list[Detections]:
        """Return the detections of each image in pixels of the images that the model gets."""
        found: list[Detections] = self.bbox_head.detections(self.bbox_head(maps), sizes, self.rules)
        return found


def four_maps(backbone: Backboned | FeatureMaps, first: int, detector: str, **options: Any) -> FeatureMaps:
    """Return the four maps of a backbone; those before the first one that is read get no norm.

    Args:
        backbone: see :func:`widefield.dense.feature_maps`.
        first: position of the finest map that the pyramid reads, from 0.
        detector: name of the model, for the message.
        options: further arguments of :func:`widefield.dense.feature_maps`.

    Raises:
        ValueError: the backbone gives another number of maps.
    """
    maps = feature_maps(backbone, normed=tuple(range(first, _MAPS)), **options)
    if len(maps.strides) != _MAPS:
        raise ValueError(
            f"{detector} needs four maps of the backbone, as those of strides 4 to 32; got {len(maps.strides)} with "
            f"strides {tuple(maps.strides)}. Choose four with out_indices: the finest ones may remain unread."
        )
    return maps
