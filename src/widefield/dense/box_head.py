"""The head that classifies RoIs and moves their boxes.

Papers: Girshick, "Fast R-CNN", ICCV 2015, section 2; Lin et al., "Feature Pyramid Networks", CVPR 2017, section 4.2
(two fully connected layers); Wu and He, "Group Normalization", ECCV 2018, section 4.2 (four convolutions and one fully
connected layer); Rezatofighi et al., "Generalized Intersection over Union", CVPR 2019. Structure and names are those of
OpenMMLab's ``ConvFCBBoxHead``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widefield import _checks
from widefield.dense import detection_losses
from widefield.dense.boxes import BoxCoder
from widefield.dense.detector import Size
from widefield.dense.layers import ConvModule, widened
from widefield.dense.roi import RoISample, of_labels

BOX_HEADS = {"shared2fc": (0, 2), "4conv1fc": (4, 1)}
"""Name -> number of convolutions and of fully connected layers."""

BOX_LOSSES = ("l1", "smooth_l1", "iou", "giou")
"""Losses of boxes: see :class:`BoxHead`."""

IOU_WEIGHT = 10.0
"""Factor of the losses of overlaps in published models."""


class BoxHead(nn.Module):
    """Scores of the classes and of the background (last), and differences between RoIs and boxes.

    Fully connected layers start as Xavier uniform, ``fc_cls`` as N(0, 0.01), ``fc_reg`` as N(0, 0.001), biases as 0.

    Args:
        in_channels: channels of the RoIs' features.
        num_classes: number of classes, without the background.
        kind: "shared2fc" or "4conv1fc", the convolutions and fully connected layers.
        class_agnostic: whether one box is predicted for all classes.
        box_loss: "l1" or "smooth_l1" of the differences, or "iou" or "giou" of the boxes.
        stds: the predicted differences are multiplied by these.
        roi_size: height and width of the features.
        channels: outputs of the fully connected layers.
        conv_channels: outputs of the convolutions; None: ``in_channels``.
        norm: of the convolutions: "batch", "group" or None.
        beta: of "smooth_l1".
        box_weight: factor of the loss of boxes; None: 10 for "iou" and "giou", 1 for the others, as published.

    Raises:
        ValueError: an unknown ``kind`` or ``box_loss``.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        kind: str = "shared2fc",
        class_agnostic: bool = False,
        box_loss: str = "l1",
        stds: Sequence[float] = (0.1, 0.1, 0.2, 0.2),
        roi_size: int = 7,
        channels: int = 1024,
        conv_channels: int | None = None,
        norm: str | None = "batch",
        beta: float = 1.0,
        box_weight: float | None = None,
    ) -> None:
        super().__init__()
        convs, fcs = BOX_HEADS[_checks.choice("box_head", kind, tuple(BOX_HEADS))]
        self.num_classes = _checks.integer("num_classes", num_classes)
        self.class_agnostic = bool(class_agnostic)
        self.box_loss = _checks.choice("box_loss", box_loss, BOX_LOSSES)
        self.beta = _checks.number("beta", beta)
        published = IOU_WEIGHT if self.compares_boxes else 1.0
        self.box_weight = published if box_weight is None else _checks.number("box_weight", box_weight)
        self.roi_size = _checks.integer("roi_size", roi_size)
        self.coder = BoxCoder((stds[0], stds[1], stds[2], stds[3]))
        width = _checks.integer("in_channels", in_channels)
        self.fc_cls = nn.Linear(channels, self.num_classes + 1)
        self.fc_reg = nn.Linear(channels, 4 if self.class_agnostic else 4 * self.num_classes)
        self.shared_convs = nn.ModuleList()
        for _ in range(convs):
            self.shared_convs.append(ConvModule(width, conv_channels or width, 3, padding=1, norm=norm))
            width = conv_channels or width
        width *= self.roi_size**2
        self.shared_fcs = nn.ModuleList()
        for _ in range(fcs):
            self.shared_fcs.append(nn.Linear(width, channels))
            width = channels
        self._start()

    def _start(self) -> None:
        fcs: list[nn.Linear] = list(self.shared_fcs)  # type: ignore[arg-type]
        for layer in fcs:
            nn.init.xavier_uniform_(layer.weight)
        nn.init.normal_(self.fc_cls.weight, std=0.01)
        nn.init.normal_(self.fc_reg.weight, std=0.001)
        for layer in (*fcs, self.fc_cls, self.fc_reg):
            nn.init.zeros_(layer.bias)

    @property
    def compares_boxes(self) -> bool:
        """Return whether the loss compares boxes, not differences to the RoI."""
        return self.box_loss in ("iou", "giou")

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features (R, C, S, S) -> logits (R, num_classes + 1) and differences (R, 4 or 4 * num_classes)."""
        x = features
        for conv in self.shared_convs:
            x = conv(x)
        x = x.flatten(1)
        for layer in self.shared_fcs:
            x = F.relu(layer(x), inplace=True)
        return self.fc_cls(x), self.fc_reg(x)

    def losses(self, logits: Tensor, deltas: Tensor, samples: Sequence[RoISample]) -> dict[str, Tensor]:
        """Return ``loss_cls`` and ``loss_bbox``, both divided by the number of RoIs, the mean over processes.

        Args:
            logits, deltas: of all images, in the order of the samples.
            samples: one for each image.
        """
        labels = torch.cat([sample.labels for sample in samples])
        positive = (labels < self.num_classes).nonzero().flatten()
        chosen = self._of_labels(deltas[positive], labels[positive])
        boxes = torch.cat([sample.positive for sample in samples])
        truth = torch.cat([sample.truth for sample in samples])
        count = detection_losses.mean_over_processes(boxes.new_tensor(max(len(labels), 1)))
        if self.compares_boxes:
            measure = detection_losses.iou_loss if self.box_loss == "iou" else detection_losses.giou_loss
            loss = measure(self.coder.decode(boxes, chosen), truth, count)
        elif self.box_loss == "l1":
            loss = detection_losses.l1(chosen, self.coder.encode(boxes, truth), count)
        else:
            loss = detection_losses.smooth_l1(chosen, self.coder.encode(boxes, truth), count, beta=self.beta)
        classes = detection_losses.cross_entropy(logits, labels, count)
        return {"loss_cls": classes, "loss_bbox": self.box_weight * loss}

    def decode(self, boxes: Tensor, deltas: Tensor, size: Size) -> Tensor:
        """Return the moved boxes of one image: (R, num_classes, 4), or (R, 4) if they are class-agnostic.

        Args:
            boxes: (R, 4).
            deltas: (R, 4 or 4 * num_classes).
            size: (height, width), to which boxes are clipped.
        """
        if self.class_agnostic:
            return self.coder.decode(boxes, deltas, size)
        return self.coder.decode(boxes[:, None], deltas.unflatten(1, (-1, 4)), size)

    @torch.no_grad()
    def refined(
        self, boxes: Tensor, logits: Tensor, deltas: Tensor, size: Size, labels: Tensor | None = None
    ) -> Tensor:
        """Return the boxes of one image, each moved as for its label, (R, 4).

        Args:
            boxes: (R, 4).
            logits: (R, num_classes + 1).
            deltas: (R, 4 or 4 * num_classes).
            size: (height, width), to which boxes are clipped.
            labels: (R,). Where they say background, and if there are none, the best class takes their place.
        """
        best = logits[:, :-1].argmax(1)
        labels = best if labels is None else torch.where(labels == self.num_classes, best, labels)
        return self.coder.decode(boxes, self._of_labels(deltas, labels), size)

    def _of_labels(self, deltas: Tensor, labels: Tensor) -> Tensor:
        """Return the differences of each RoI for its label, (R, 4)."""
        if self.class_agnostic:
            return deltas
        return of_labels(deltas.unflatten(1, (-1, 4)), labels)


def probabilities(logits: Tensor) -> Tensor:
    """Return the probabilities of the classes without the background, (R, num_classes), in float32 or wider."""
    return widened(logits).softmax(1)[:, :-1]
