"""Describe what a model predicts for one image, in the form in which it is drawn and saved."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
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
class LabelPrediction:
    """The classes of an image that may show several, or none.

    Attributes:
        probabilities: float32 (K,), on the CPU, each from 0 to 1.
        threshold: probability from which the image is given a class.
    """

    probabilities: Tensor
    threshold: float = 0.5

    @property
    def size(self) -> None:
        """Return None: the classes are of the image as a whole."""

    @property
    def labels(self) -> list[int]:
        """Return the classes that the image is given, the likeliest first."""
        order = self.probabilities.argsort(descending=True, stable=True)
        return [label for label in order.tolist() if self.probabilities[label] >= self.threshold]


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
        keypoints: float32 (D, K, 2): x and y in pixels of the image's file. As in COCO, (0, 0) is the center of the top
            left pixel.
        scores: float32 (D, K), of the key points; 1 for true poses.
        pose_scores: float32 (D,), in descending order; None for true poses.
        boxes: float32 (D, 4): the edges (left, top, right, bottom) in continuous pixels of the file.
        visible: (D, K), of true poses: 0 without a label, 1 hidden, 2 visible. None: all key points are there.
        labels: int64 (D,): classes of the boxes; None: there is one class, or it is not known which.
        size: (height, width) of the file.
        skeleton: the K key points.
        threshold: key points with a lower score are unsure: they are not drawn.
    """

    keypoints: Tensor
    scores: Tensor
    pose_scores: Tensor | None
    boxes: Tensor
    visible: Tensor | None = None
    labels: Tensor | None = None
    size: tuple[int, int] = field(kw_only=True)
    skeleton: Skeleton = field(kw_only=True)
    threshold: float = field(default=0.2, kw_only=True)

    def __len__(self) -> int:
        return len(self.keypoints)

    @property
    def shown(self) -> Tensor:
        """Return which key points are drawn, bool (D, K): those with a label, or the sure ones."""
        return self.scores >= self.threshold if self.visible is None else self.visible > 0

    def at_least(self, score: float) -> PosePrediction:
        """Return the poses of at least this score; all true poses."""
        if self.pose_scores is None:
            return self
        kept = slice(int((self.pose_scores >= score).sum()))
        return replace(
            self,
            keypoints=self.keypoints[kept],
            scores=self.scores[kept],
            pose_scores=self.pose_scores[kept],
            boxes=self.boxes[kept],
            visible=None if self.visible is None else self.visible[kept],
            labels=None if self.labels is None else self.labels[kept],
        )


@dataclass(frozen=True, eq=False)
class ReconstructionPrediction:
    """An image of which a part was hidden, and what a model predicts there, all on the CPU.

    Attributes:
        image: uint8 (3, H, W), at the size that the model sees.
        masked: bool (H, W): the hidden pixels.
        reconstruction: uint8 (3, H, W): the prediction of all pixels; None if the model predicts other features.
    """

    image: Tensor
    masked: Tensor
    reconstruction: Tensor | None

    @property
    def size(self) -> tuple[int, int]:
        """Return (height, width) of the image."""
        return self.image.shape[1], self.image.shape[2]

    @property
    def views(self) -> dict[str, Tensor]:
        """Return pictures by caption, uint8 (3, H, W).

        The image, its visible part and, if pixels are predicted, the visible part with the prediction at hidden pixels.
        """
        found = {"image": self.image, "visible": torch.where(self.masked, self.image.new_tensor(_HIDDEN), self.image)}
        if self.reconstruction is not None:
            found["prediction"] = torch.where(self.masked, self.reconstruction, self.image)
        return found

    def panel(self, gap: int = 4) -> Tensor:
        """Return the views side by side on white, uint8 (3, H, W)."""
        views = list(self.views.values())
        white = views[0].new_full((3, self.size[0], gap), 255)
        return torch.cat([part for view in views for part in (view, white)][:-1], 2)


_HIDDEN = 128
"""Gray value of hidden pixels."""

Prediction = (
    ClassPrediction | LabelPrediction | MaskPrediction | BoxPrediction | PosePrediction | ReconstructionPrediction
)
"""What a task predicts for one image. A new kind also needs its drawing, in `widefield.drawing.kinds`."""
