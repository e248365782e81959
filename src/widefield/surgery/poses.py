"""Compare the key points that two pose models read from their heatmaps.

A pose model is a module with ``num_keypoints`` and a method ``decode``, such as ``widefield.dense.HeatmapPose``.
Rounding decides which of two equal peaks of a heatmap is the largest. A key point that moves to a place where the first
model's heatmap is as high as at its own is therefore called tied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from widefield.surgery.answers import described, tensors
from widefield.surgery.detections import NEAR, Gaps

CLOSE = 1.0
"""Distance in pixels of the image up to which two key points count as the same."""
PCK = 0.05
"""Distance up to which a key point counts as found, in units of the longer side of the image."""

LABELS = "keypoints"
"""Key of the true key points in batches that are mappings: (N, K, 3), x and y in pixels of the image, and 0 if a key
point has no label."""


class Keypoints(NamedTuple):
    """The key points of N images.

    Attributes:
        points: (N, K, 2), x and y in pixels of the image.
        scores: (N, K).
    """

    points: Tensor
    scores: Tensor


class PoseModel(Protocol):
    """What is needed of a model to compare its key points."""

    num_keypoints: int
    decode: Callable[[Tensor, Sequence[int] | None], Any]
    """Heatmaps (N, K, H, W), and the images' (height, width) or None -> ``points`` and ``scores``."""


def is_pose_model(model: object) -> bool:
    """Return whether a model gives heatmaps of key points, which it can decode."""
    return isinstance(getattr(model, "num_keypoints", None), int) and callable(getattr(model, "decode", None))


def keypoints(output: Any) -> Keypoints | None:
    """Return the key points in an output, or None if it holds something else.

    Args:
        output: a named tuple, mapping or dataclass with ``points`` or ``keypoints`` (N, K, 2), and ``scores`` (N, K);
            or a tuple of the two.
    """
    if type(output) is tuple and len(output) == 2:
        output = dict(zip(Keypoints._fields, output, strict=True))
    found = [_field(output, *names) for names in (("points", "keypoints"), ("scores",))]
    points, scores = (part if isinstance(part, Tensor) else None for part in found)
    if points is None or scores is None or points.ndim != 3 or points.shape != (*scores.shape, 2):
        return None
    return Keypoints(points, scores)


def _field(output: Any, *names: str) -> Any:
    found = [output.get(name) if isinstance(output, Mapping) else getattr(output, name, None) for name in names]
    return next((value for value in found if value is not None), None)


class KeypointCounts:
    """Distances between the key points of two models, and between them and labels.

    Args:
        model: the first one, which decodes the heatmaps of both.
    """

    def __init__(self, model: object) -> None:
        self._model = cast(PoseModel, model)
        self.counted = self.close = self.near = self.tied = 0
        """Key points; those within ``CLOSE``; those within ``PCK``; those farther than ``CLOSE`` that are tied."""
        self.distance = 0.0
        """Largest distance in pixels of the image, of key points that are not tied."""
        self.gaps = Gaps()
        """Of the heatmaps, or of the scores where the second model gives key points."""
        self._labeled = self._found = self._found_after = 0

    def reads(self, output: Any) -> bool:
        """Return whether an output holds the first model's heatmaps."""
        return isinstance(output, Tensor) and output.ndim == 4 and output.shape[1] == self._model.num_keypoints

    def add(self, first: Tensor, second: Any, labels: Any = None, size: Sequence[int] | None = None) -> None:
        """Add the outputs of both models for a batch.

        Args:
            first: heatmaps of the first model.
            second: heatmaps of the second one, or its key points; see :func:`keypoints`.
            labels: true key points, see :data:`LABELS`. Anything else is ignored.
            size: (height, width) of the images. None: what the model assumes for heatmaps of this size.

        Raises:
            ValueError: the second output is neither; heatmaps of the first model that are not finite; labels of another
                shape.
        """
        if not first.isfinite().all():
            raise ValueError(
                "the first model's heatmaps are not finite, so nothing can be compared: choose another input."
            )
        a, sides = self._decoded(first, size), self._sides(first, size)
        given = keypoints(second)
        if given is not None and given.scores.shape == a.scores.shape:
            b = Keypoints(given.points.to(a.points), given.scores.to(a.scores))
            peaks = _nearest(b.points, first.shape[2:], sides, getattr(self._model, "kind", None) == "udp")
            self.gaps.add(a.scores, b.scores)
        else:
            alike = [tensor for tensor in tensors(second) if tensor.shape == first.shape]
            if len(alike) != 1:
                raise ValueError(
                    f"the first model returns heatmaps {tuple(first.shape)}, and the second neither such heatmaps nor "
                    f"their key points: {described(second)}."
                )
            other = alike[0].to(first)
            self.gaps.add(first, other)
            b, peaks = self._decoded(other, size), other.flatten(2).argmax(2)
        apart = (a.points.double() - b.points.double()).norm(dim=2).nan_to_num(nan=torch.inf)
        tied = _as_high(first, peaks) & b.points.isfinite().all(2) & (apart > CLOSE)
        self.counted += apart.numel()
        self.close += int((apart <= CLOSE).sum())
        self.near += int((apart <= PCK * max(sides)).sum())
        self.tied += int(tied.sum())
        self.distance = max(self.distance, apart.masked_fill(tied, 0.0).max().item())
        self._score(a, b, labels, PCK * max(sides))

    @property
    def scores(self) -> tuple[float | None, float | None]:
        """PCK of the first and of the second model; None without labels."""
        if not self._labeled:
            return None, None
        return self._found / self._labeled, self._found_after / self._labeled

    def _decoded(self, heatmaps: Tensor, size: Sequence[int] | None) -> Keypoints:
        found = self._model.decode(heatmaps, size)
        return Keypoints(found.points, found.scores)

    def _sides(self, heatmaps: Tensor, size: Sequence[int] | None) -> Sequence[float]:
        """Return the height and width of the images."""
        if size is not None:
            return size
        stride = float(getattr(self._model, "stride", 1))
        return [side * stride for side in heatmaps.shape[2:]]

    def _score(self, a: Keypoints, b: Keypoints, labels: Any, reach: float) -> None:
        if not isinstance(labels, Tensor) or not labels.is_floating_point() or labels.ndim != 3:
            return
        if labels.shape != (*a.scores.shape, 3):
            raise ValueError(
                "key points must be x, y and whether they have a label, (N, K, 3) with N and K "
                f"{tuple(a.scores.shape)}; got {tuple(labels.shape)}."
            )
        labels = labels.to(a.points)
        known = labels[..., 2] > 0
        self._labeled += int(known.sum())
        for name, found in (("_found", a), ("_found_after", b)):
            hit = (found.points - labels[..., :2]).norm(dim=2) <= reach
            setattr(self, name, getattr(self, name) + int((hit & known).sum()))


def _nearest(points: Tensor, size: Sequence[int], sides: Sequence[float], aligned: bool) -> Tensor:
    """Return the index of the pixel of heatmaps of a size that is nearest to each point, int64 (N, K).

    Args:
        points: (N, K, 2), in pixels of the image.
        size: (height, width) of the heatmaps.
        sides: (height, width) of the images.
        aligned: whether the centers of the corner pixels of both meet.
    """
    height, width = size
    x = points[..., 0] * (width - aligned) / (sides[1] - aligned)
    y = points[..., 1] * (height - aligned) / (sides[0] - aligned)
    x, y = (axis.round().nan_to_num().long().clamp(0, side - 1) for axis, side in ((x, width), (y, height)))
    return y * width + x


def _as_high(heatmaps: Tensor, pixels: Tensor) -> Tensor:
    """Return whether heatmaps (N, K, H, W) are about as high at pixels (N, K) as at their peaks, bool (N, K)."""
    there = heatmaps.flatten(2).gather(2, pixels[..., None])[..., 0]
    low, peak = heatmaps.flatten(2).aminmax(dim=2)
    return peak - there <= NEAR * torch.maximum(peak.abs(), low.abs())
