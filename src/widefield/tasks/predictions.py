"""Describe what a model predicts for one image, in the form in which it is drawn and saved."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from widefield.data.skeleton import Skeleton


@dataclass(frozen=True, eq=False)
class ClassPrediction:
    """The classes of an image.

    Attributes:
        probabilities: float32 (K,), on the CPU, with a sum of 1.
    """

    probabilities: Tensor

    @property
    def size(self) -> None:
        """Return None: the classes are of the image as a whole."""


@dataclass(frozen=True, eq=False)
class MaskPrediction:
    """The class of each pixel of an image.

    Attributes:
        mask: uint8 (H, W), int32 above 256 classes, on the CPU: indices of classes, at the size of the image's file.
    """

    mask: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """Return (height, width) of the file."""
        return self.mask.shape[0], self.mask.shape[1]


@dataclass(frozen=True, eq=False)
class BoxPrediction:
    """The objects of an image, all on the CPU.

    Attributes:
        boxes: float32 (D, 4): the edges (left, top, right, bottom) in continuous pixels of the image's file.
        labels: int64 (D,): indices of classes.
        scores: float32 (D,), in descending order; None for true objects.
        masks: bool (D, H, W): the pixels of each object, at the size of the file; None without masks.
        size: (height, width) of the file.
        crowd: bool (D,): which true objects are crowds of objects; None: no object is.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor | None = None
    masks: Tensor | None = None
    size: tuple[int, int] = field(kw_only=True)
    crowd: Tensor | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def at_least(self, score: float) -> BoxPrediction:
        """Return the objects of at least this score; all true objects."""
        if self.scores is None:
            return self
        kept = slice(int((self.scores >= score).sum()))  # scores are in descending order; a slice copies no mask
        masks = None if self.masks is None else self.masks[kept]
        return replace(self, boxes=self.boxes[kept], labels=self.labels[kept], scores=self.scores[kept], masks=masks)


@dataclass(frozen=True, eq=False)
class PosePrediction:
    """The poses of people or things in an image, all on the CPU.

    Attributes:
        keypoints: float32 (D, K, 2): x and y in pixels of the image's file. As in COCO, the center of the top left
            pixel is (0, 0).
        scores: float32 (D, K), of the key points; None for true poses.
        pose_scores: float32 (D,), in descending order; None for true poses.
        visible: (D, K), of true poses: 0 without a label, 1 covered, 2 visible; None for others.
        boxes: float32 (D, 4): the boxes that the poses are in, as in `BoxPrediction`.
        labels: int64 (D,): indices of classes of the boxes.
        skeleton: names and links of the key points.
        size: (height, width) of the file.
        threshold: key points with a lower score are unsure. They are not drawn.
    """

    keypoints: Tensor
    scores: Tensor | None = None
    pose_scores: Tensor | None = None
    visible: Tensor | None = None
    boxes: Tensor = field(kw_only=True)
    labels: Tensor = field(kw_only=True)
    skeleton: Skeleton = field(kw_only=True)
    size: tuple[int, int] = field(kw_only=True)
    threshold: float = 0.2

    def __len__(self) -> int:
        return len(self.keypoints)

    @property
    def shown(self) -> Tensor:
        """Return which key points are drawn, bool (D, K): sure ones, or those with a label."""
        if self.scores is not None:
            return self.scores >= self.threshold
        return self.keypoints.isfinite().all(-1) if self.visible is None else self.visible > 0


Prediction = ClassPrediction | MaskPrediction | BoxPrediction | PosePrediction
"""What a task predicts for one image. A new kind also needs its drawing, in `widefield.runs.drawing`."""
