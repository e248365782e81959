"""Pose models as graphs: heatmaps, or the key points that are decoded from them, with outputs of fixed shapes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from widefield import _checks
from widefield.dense.backbone import FeatureMaps
from widefield.dense.heatmap import HeatmapHead, HeatmapPose
from widefield.dense.heatmap_codec import DecodedKeypoints, decoded

DECODING = ("inside", "outside")
"""Where heatmaps become key points: see :class:`ServedPose`."""


class ServedPose(nn.Module):
    """A pose model whose outputs have names; parts and weights are those of the model.

    - ``decoding="inside"``: ``keypoints`` (N, K, 2), x and y in pixels of the images, and ``scores`` (N, K).
    - ``decoding="outside"``: ``heatmaps`` (N, K, H, W), which a flip test needs.

    Args:
        model: a pose model of this package.
        decoding: "inside" or "outside".
        measured: return ``heatmaps`` after the key points, too.

    Raises:
        ValueError: an unknown ``decoding``.
    """

    backbone: FeatureMaps
    head: HeatmapHead

    def __init__(self, model: HeatmapPose, decoding: str = "inside", *, measured: bool = False) -> None:
        super().__init__()
        self.decoding, self.measured = _checks.choice("decoding", decoding, DECODING), measured
        for name, child in model.named_children():
            self.add_module(name, child)
        self.decoder = _Decoder(model.kind, model.blur)
        self.train(model.training)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the outputs above for images (N, C, H, W)."""
        heatmaps = self.head(self.backbone(images)[0])
        if self.decoding == "outside":
            return {"heatmaps": heatmaps}
        found = self.decoder(heatmaps, images)
        named = {"keypoints": found.points, "scores": found.scores}
        return {**named, "heatmaps": heatmaps} if self.measured else named

    @property
    def largest_stride(self) -> int:
        """Return the stride of the coarsest map."""
        return max(self.backbone.strides)

    @property
    def rules(self) -> dict[str, Any]:
        """Return where and how heatmaps are decoded."""
        return {"decoding": self.decoding, "kind": self.decoder.kind, "blur": self.decoder.blur}


class _Decoder(nn.Module):
    """Decoding as a module, by which graphs name its operators."""

    def __init__(self, kind: str, blur: int) -> None:
        super().__init__()
        self.kind, self.blur = kind, blur

    def forward(self, heatmaps: Tensor, images: Tensor) -> DecodedKeypoints:
        """Return the key points of heatmaps, in pixels of the images."""
        return decoded(heatmaps, images.shape[2:], self.kind, self.blur)
