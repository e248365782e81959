"""The head that predicts a mask inside each box, its targets, and masks at the size of the image.

Paper: He, Gkioxari, Dollár, Girshick, "Mask R-CNN", ICCV 2017, section 3. Structure and names are those of OpenMMLab's
``FCNMaskHead``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from widefield import _checks
from widefield.dense.boxes import Size, clip
from widefield.dense.detection_losses import mean_over_processes
from widefield.dense.detector import Targets
from widefield.dense.layers import ConvModule, observed, widened
from widefield.dense.roi import RoISample, of_labels

_PIXELS_AT_ONCE = 2**24
"""Pixels of masks that are computed at once outside of the CPU."""


class FCNMaskHead(nn.Module):
    """Convolutions, one of stride 1/2, and a mask per class.

    Weights start as Kaiming normal with the fan-out, biases as 0.

    Args:
        in_channels: channels of the RoIs' features.
        num_classes: number of classes.
        channels: channels inside.
        num_convs: convolutions before the enlargement.
        roi_size: height and width of the features; masks are twice as large.
        class_agnostic: whether one mask is predicted for all classes.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        channels: int = 256,
        num_convs: int = 4,
        roi_size: int = 14,
        class_agnostic: bool = False,
    ) -> None:
        super().__init__()
        self.num_classes = _checks.integer("num_classes", num_classes)
        self.class_agnostic = bool(class_agnostic)
        self.roi_size = _checks.integer("roi_size", roi_size)
        widths = (in_channels, *(channels for _ in range(_checks.integer("num_convs", num_convs, minimum=0))))
        self.convs = nn.ModuleList(
            ConvModule(before, after, 3, padding=1, norm=None) for before, after in itertools.pairwise(widths)
        )
        self.upsample = nn.ConvTranspose2d(widths[-1], channels, 2, stride=2)
        self.conv_logits = nn.Conv2d(channels, 1 if self.class_agnostic else self.num_classes, 1)
        for layer in (self.upsample, self.conv_logits):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    @property
    def mask_size(self) -> int:
        """Return the height and width of the masks."""
        return 2 * self.roi_size

    def forward(self, features: Tensor) -> Tensor:
        """Features (R, C, S, S) -> logits (R, num_classes or 1, 2 * S, 2 * S)."""
        y: Tensor = self.conv_logits(self._enlarged(features))
        return y

    def probabilities(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the masks of the labels only, (R, 2 * S, 2 * S), in float32 or wider.

        Args:
            features: (R, C, S, S).
            labels: int64 (R,).
        """
        if type(self.conv_logits) is not nn.Conv2d or observed(self.conv_logits):  # it may compute something else
            return self.of_labels(self(features), labels).sigmoid()
        x = self._enlarged(features)
        rows = torch.zeros_like(labels) if self.class_agnostic else labels
        weight, bias = self.conv_logits.weight.flatten(1), self.conv_logits.bias
        logits = torch.baddbmm(bias[rows, None, None], weight[rows, None], x.flatten(2))  # type: ignore[index]
        return widened(logits.unflatten(2, x.shape[2:])[:, 0]).sigmoid()

    def _enlarged(self, features: Tensor) -> Tensor:
        x = features
        for conv in self.convs:
            x = conv(x)
        return F.relu(self.upsample(x), inplace=not observed(self.upsample))  # the largest tensor of inference

    def of_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the logits of each RoI for its label, (R, 2 * S, 2 * S), in float32 or wider."""
        return widened(logits[:, 0] if self.class_agnostic else of_labels(logits, labels))

    def loss(self, logits: Tensor, samples: Sequence[RoISample], targets: Sequence[Targets]) -> Tensor:
        """Return the mean binary cross-entropy over the masks of the labels; 0 without objects.

        The number of masks is the mean over the processes of distributed training.

        Args:
            logits: of the RoIs that stand for objects, in the order of the samples.
            samples, targets: one for each image.
        """
        pairs = list(zip(samples, targets, strict=True))
        chosen = self.of_labels(logits, torch.cat([sample.labels[: len(sample.objects)] for sample in samples]))
        wanted = torch.cat([mask_targets(sample, target, self.mask_size) for sample, target in pairs])
        total = F.binary_cross_entropy_with_logits(chosen, wanted.to(chosen), reduction="sum")
        return total / mean_over_processes(chosen.new_tensor(chosen.numel())).clamp(min=1)


@torch.no_grad()
def mask_targets(sample: RoISample, target: Targets, size: int) -> Tensor:
    """Return the objects' masks inside the RoIs that stand for them, bool (P, size, size).

    RoIs are clipped to the image. A cell is set where at least half of its samples are.

    Args:
        sample: the RoIs of an image.
        target: its objects.
        size: height and width of the result.
    """
    known = (~target.crowd).nonzero()[:, 0]  # type: ignore[operator]
    masks: Tensor = target.masks  # type: ignore[assignment]
    boxes, owners = clip(sample.positive, (masks.shape[1], masks.shape[2])), known[sample.objects]
    if masks.device.type != "cpu":
        used, places = owners.unique(return_inverse=True)
        return _covered(masks[used], places, boxes, size) >= 0.5
    # Whole masks as numbers are large: here only the part of each that its boxes reach.
    inside = torch.zeros(len(boxes), size, size, dtype=torch.bool)
    for mask, own in _by_owner(owners):
        rows, columns = _reached(boxes[own], (masks.shape[1], masks.shape[2]))
        moved = boxes[own] - boxes.new_tensor([columns.start, rows.start] * 2)
        part = masks[mask, None, rows, columns]
        inside[own] = _covered(part, torch.zeros_like(own), moved, size) >= 0.5
    return inside


def _covered(masks: Tensor, places: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Return which part of each cell of boxes (P, 4) is covered by the mask at its place: (P, size, size)."""
    rois = torch.cat((places[:, None].to(boxes), boxes), 1)
    covered: Tensor = roi_align(masks[:, None].to(boxes), rois, size, 1.0, 0, aligned=True)
    return covered[:, 0]


def _by_owner(owners: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield each of the integers (P,) once, and where it stands."""
    order = owners.argsort()
    used, counts = owners[order].unique_consecutive(return_counts=True)
    yield from zip(used.tolist(), order.split(counts.tolist()), strict=True)


def _reached(boxes: Tensor, size: Size) -> tuple[slice, slice]:
    """Return the rows and columns that RoIAlign reads for boxes inside an image, and one more on each side."""
    left, top = (boxes[:, :2].amin(0).floor() - 1).clamp(min=0).long().tolist()
    right, bottom = (boxes[:, 2:].amax(0).ceil() + 2).long().tolist()
    return slice(top, max(min(bottom, size[0]), top + 1)), slice(left, max(min(right, size[1]), left + 1))


def paste_masks(masks: Tensor, boxes: Tensor, size: Size, threshold: float = 0.5) -> Tensor:
    """Return masks inside boxes as masks of the whole image, bool (D, H, W).

    Probabilities are interpolated bilinearly at the centers of the pixels and are 0 outside of the box. Boxes without
    area give empty masks. Besides the result, memory does not grow with the number of masks.

    Args:
        masks: (D, S, S), probabilities.
        boxes: (D, 4), x1, y1, x2, y2 in pixels of the result.
        size: (H, W).
        threshold: least probability of a pixel of the object, above 0.

    Raises:
        ValueError: there are not as many boxes as masks, or the threshold is out of range.
    """
    if masks.ndim != 3 or boxes.shape != (len(masks), 4):
        raise ValueError(
            f"masks must be (D, S, S) and boxes (D, 4); got {tuple(masks.shape)} and {tuple(boxes.shape)}."
        )
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be above 0 and at most 1; got {threshold!r}.")
    height, width = (int(side) for side in size)
    pasted = torch.zeros(len(masks), height, width, dtype=torch.bool, device=masks.device)
    masks, boxes = widened(masks), widened(boxes)
    # On the CPU each mask is computed around its box only; elsewhere fewer and larger steps are faster.
    step = 1 if masks.device.type == "cpu" else max(1, _PIXELS_AT_ONCE // max(1, height * width))
    for start in range(0, len(masks), step):
        part = slice(start, start + step)
        rows, columns = _around(boxes[part], masks.shape[-1], (height, width))
        pasted[part, rows, columns] = _interpolated(masks[part], boxes[part], rows, columns) >= threshold
    return pasted


def _around(boxes: Tensor, cells: int, size: Size) -> tuple[slice, slice]:
    """Return the rows and columns that boxes reach, with the half cell around them where probabilities fall to 0."""
    margin = (boxes[:, 2:] - boxes[:, :2]).abs() / (2 * cells) + 1
    left, top = (boxes[:, :2] - margin).floor().amin(0).clamp(min=0).tolist()
    right, bottom = (boxes[:, 2:] + margin).ceil().amax(0).clamp(min=0).tolist()
    return slice(int(top), int(min(bottom, size[0]))), slice(int(left), int(min(right, size[1])))


def _interpolated(masks: Tensor, boxes: Tensor, rows: slice, columns: slice) -> Tensor:
    """Return probabilities at the centers of pixels, (D, rows, columns)."""
    x1, y1, x2, y2 = boxes.to(masks)[:, :, None].unbind(1)
    row, column = (
        torch.arange(part.start, max(part.start, part.stop), device=masks.device).to(masks) for part in (rows, columns)
    )
    y, x = (row + 0.5 - y1) / (y2 - y1) * 2 - 1, (column + 0.5 - x1) / (x2 - x1) * 2 - 1
    grid = torch.stack((x[:, None, :].expand(-1, y.shape[1], -1), y[:, :, None].expand(-1, -1, x.shape[1])), 3)
    found = F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]
    inside = (x2 > x1) & (y2 > y1)
    return found * inside[:, :, None]
