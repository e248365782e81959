"""Define a pose model with heatmaps: a backbone, deconvolutions, and a heatmap for each key point.

Paper: Xiao, Wu, Wei, "Simple Baselines for Human Pose Estimation and Tracking", ECCV 2018, section 2. Names of the
head's modules are those of OpenMMLab's ``HeatmapHead`` (mmpose 1.x).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from widefield import _checks, _history
from widefield.dense.backbone import Backboned, FeatureMaps, StageNorms, feature_maps
from widefield.dense.heatmap_codec import DecodedKeypoints, HeatmapCodec, decoded


class HeatmapHead(nn.Module):
    """Deconvolutions, each of which doubles the map, and a 1x1 convolution with an output per key point.

    Weights start as N(0, 0.001), norms as 1 and 0.

    Args:
        in_channels: channels of the backbone's map.
        num_keypoints: number of key points, K.
        channels: of each deconvolution (4x4, stride 2, without bias, then batch norm and ReLU); may be empty.
    """

    def __init__(self, in_channels: int, num_keypoints: int, *, channels: Sequence[int] = (256, 256, 256)) -> None:
        super().__init__()
        widths = [_checks.integer("in_channels", in_channels)]
        widths += [_checks.integer("every entry of channels", width) for width in channels]
        self.num_keypoints = _checks.integer("num_keypoints", num_keypoints)
        layers: list[nn.Module] = []
        for before, width in itertools.pairwise(widths):
            layers += [
                nn.ConvTranspose2d(before, width, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
        self.deconv_layers = nn.Sequential(*layers)
        self.final_layer = nn.Conv2d(widths[-1], self.num_keypoints, 1)
        for module in self.modules():
            if isinstance(module, (nn.ConvTranspose2d, nn.Conv2d)):
                nn.init.normal_(module.weight, std=0.001)
        nn.init.zeros_(self.final_layer.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> heatmaps (N, K, 2^n * H, 2^n * W) after n deconvolutions."""
        y: Tensor = self.final_layer(self.deconv_layers(x))
        return y


class HeatmapPose(nn.Module):
    """A top-down pose model on any backbone: images of single people or things -> a heatmap for each key point.

    :meth:`decode` turns heatmaps into key points, and :meth:`codec` key points into targets.

    Args:
        backbone: a timm name, or a module that gives feature maps; see :func:`widefield.dense.feature_maps`. Its last
            map is used.
        num_keypoints: number of key points, K.
        channels: of each of the head's deconvolutions.
        stage_norms: a norm after the map; None follows the published code of the backbone's family.
        out_indices: one map of the backbone, in place of the last one.
        kind, sigma, blur: how heatmaps are written and read; see :class:`widefield.dense.HeatmapCodec`. They have no
            weights.
        backbone_args: further arguments of ``timm.create_model``, such as ``pretrained=True``.

    Raises:
        TypeError, ValueError: an argument is out of range, or the backbone does not fit.
    """

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Note the arguments, for files of the model (:func:`widefield.save`)."""
        model = super().__new__(cls)
        _history.constructed(model, cls, args, options)
        return model

    def __init__(
        self,
        backbone: Backboned | FeatureMaps,
        num_keypoints: int,
        *,
        channels: Sequence[int] = (256, 256, 256),
        stage_norms: StageNorms = None,
        out_indices: Sequence[int] | None = None,
        kind: str = "msra",
        sigma: float = 2.0,
        blur: int = 11,
        **backbone_args: Any,
    ) -> None:
        super().__init__()
        HeatmapCodec((2, 2), (2, 2), sigma, kind, blur)  # refuses what is out of range
        self.kind, self.sigma, self.blur = kind, sigma, blur
        maps = feature_maps(backbone, levels=1, out_indices=out_indices, stage_norms=stage_norms, **backbone_args)
        if len(maps.channels) != 1:
            raise ValueError(
                f"a pose model reads one map, and the backbone gives {len(maps.channels)}: choose one with "
                "out_indices, such as out_indices=(3,)."
            )
        self.backbone = maps
        like = next((p for p in maps.parameters() if p.is_floating_point()), torch.empty(0))
        self.head = HeatmapHead(maps.channels[0], num_keypoints, channels=channels).to(like)

    @property
    def num_keypoints(self) -> int:
        """Return the number of key points."""
        return self.head.num_keypoints

    @property
    def stride(self) -> float:
        """Return pixels of the image per pixel of the heatmap."""
        return self.backbone.strides[0] / self._doublings

    @property
    def _doublings(self) -> int:
        return 1 << (len(self.head.deconv_layers) // 3)

    def codec(self, image_size: Sequence[int]) -> HeatmapCodec:
        """Return how the heatmaps of images of a size are written and read.

        The backbone's map is taken to have the size of the image divided by its stride, rounded up.

        Args:
            image_size: (height, width) in pixels.

        Raises:
            TypeError, ValueError: a size, sigma or blur is of the wrong type or out of range.
        """
        height, width = image_size
        rows, columns = (math.ceil(side / self.backbone.strides[0]) * self._doublings for side in image_size)
        return HeatmapCodec((height, width), (rows, columns), self.sigma, self.kind, self.blur)

    def decode(self, heatmaps: Tensor, image_size: Sequence[int] | None = None) -> DecodedKeypoints:
        """Return the key points of heatmaps (N, K, H, W), in pixels of the images.

        They invert what :meth:`codec` encodes, for every ``kind``. :meth:`HeatmapCodec.decode` has the published
        numbers, which differ for "udp" and for flat heatmaps.

        Args:
            heatmaps: of this model.
            image_size: (height, width) of the images. Default: that of the heatmaps times :attr:`stride`.
        """
        if image_size is None:
            image_size = [round(side * self.stride) for side in heatmaps.shape[2:]]
        return decoded(heatmaps, image_size, self.kind, self.blur)

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> heatmaps (N, K, H / stride, W / stride)."""
        if images.ndim != 4:
            raise ValueError(
                f"images must be (N, C, H, W); got shape {tuple(images.shape)}. Add the batch dimension to a single "
                "image with images[None]."
            )
        heatmaps: Tensor = self.head(self.backbone(images)[0])
        return heatmaps
