"""Define segmenters, models that give a logit per class and pixel, and the base class of their heads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from widefield import _checks, _history
from widefield.dense.backbone import FeatureMaps
from widefield.dense.layers import resize, widened


class SegmentationLogits(NamedTuple):
    """Logits of a segmenter's two heads.

    Attributes:
        out: of the decode head, (N, num_classes, H, W).
        aux: of the auxiliary head, (N, num_classes, H', W'); None if there is none.
    """

    out: Tensor
    aux: Tensor | None


class DecodeHead(nn.Module, ABC):
    """Base of the heads: features, dropout of whole channels, and a 1x1 classifier ``conv_seg``.

    A head defines :meth:`features`. The classifier starts as N(0, 0.01), as in OpenMMLab's code.

    Args:
        channels: channels of the features.
        num_classes: number of classes.
        dropout: probability that a channel is dropped in training.
        align_corners: of every resizing.
    """

    def __init__(self, channels: int, num_classes: int, *, dropout: float, align_corners: bool) -> None:
        super().__init__()
        self.channels = _checks.integer("channels", channels)
        self.num_classes = _checks.integer("num_classes", num_classes)
        self.align_corners = bool(align_corners)
        self.conv_seg = nn.Conv2d(self.channels, self.num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)  # type: ignore[arg-type]
        rate = _checks.number("dropout", dropout, maximum=1.0)
        self.dropout = nn.Dropout2d(rate) if rate else None

    @abstractmethod
    def features(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the input of dropout and classifier, (N, channels, H, W), from the backbone's or neck's maps."""

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps, finest first, each (N, C_i, H_i, W_i) -> logits (N, num_classes, H, W)."""
        x = self.features(maps)
        y: Tensor = self.conv_seg(x if self.dropout is None else self.dropout(x))
        return y

    def resize(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """Resize maps bilinearly, with the corners aligned or not as this head has it."""
        return resize(x, size, self.align_corners)


class Segmenter(nn.Module):
    """A segmentation model: backbone, perhaps a neck, a decode head, and perhaps an auxiliary head for training.

    Images may have any height and width. Neck and heads move to the device and dtype of the backbone.

    Args:
        backbone: the maps of a network.
        decode_head: from the maps to logits.
        neck: from the backbone's maps to those of the decode head. The auxiliary head gets them too.
        auxiliary_head: a second head whose loss helps training. Evaluation skips it.
    """

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Note the arguments, for files of the model (:func:`widefield.save`)."""
        model = super().__new__(cls)
        _history.constructed(model, cls, args, options)
        return model

    def __init__(
        self,
        backbone: FeatureMaps,
        decode_head: DecodeHead,
        *,
        neck: nn.Module | None = None,
        auxiliary_head: DecodeHead | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        if neck is not None:
            self.neck = neck
        self.decode_head = decode_head
        self.auxiliary_head = auxiliary_head
        like = next((p for p in backbone.parameters() if p.is_floating_point()), torch.empty(0))
        for part in (neck, decode_head, auxiliary_head):
            if part is not None:
                part.to(like)

    @property
    def num_classes(self) -> int:
        """Return the number of classes."""
        return self.decode_head.num_classes

    @property
    def align_corners(self) -> bool:
        """Return whether logits are resized with aligned corners."""
        return self.decode_head.align_corners

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the maps that the heads get, finest first, from images (N, C, H, W)."""
        if images.ndim != 4:
            raise ValueError(
                f"images must be (N, C, H, W); got shape {tuple(images.shape)}. Add the batch dimension to a single "
                "image with images[None]."
            )
        found: list[Tensor] = self.backbone(images)
        if "neck" in self._modules:
            found = self.neck(found)
        return found

    def forward_heads(self, images: Tensor) -> SegmentationLogits:
        """Return the logits of both heads, each at its own resolution, in training and evaluation mode.

        Args:
            images: (N, C, H, W).
        """
        maps = self.maps(images)
        aux = None if self.auxiliary_head is None else self.auxiliary_head(maps)
        return SegmentationLogits(self.decode_head(maps), aux)

    def forward(self, images: Tensor) -> Tensor | SegmentationLogits:
        """Return logits at the size of the images.

        Args:
            images: (N, C, H, W).

        Returns:
            (N, num_classes, H, W), float32 or wider; in training mode with an auxiliary head, such logits of both
            heads.
        """
        size = images.shape[2:]
        maps = self.maps(images)
        out = resize(widened(self.decode_head(maps)), size, self.align_corners)
        if not self.training or self.auxiliary_head is None:
            return out
        return SegmentationLogits(out, resize(widened(self.auxiliary_head(maps)), size, self.align_corners))
