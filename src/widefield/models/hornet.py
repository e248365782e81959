"""HorNet: transformer blocks with a recursive gated convolution in place of attention.

Paper: Rao et al., "HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions", NeurIPS 2022,
section 3.3. Keys, initialization and variants are those of the official code (github.com/raoyongming/HorNet, MIT),
whose weights load.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from timm.layers import DropPath, LayerNorm, LayerNorm2d, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from widefield import _checks
from widefield._checks import Pair
from widefield.models._backbone import NormedBackbone, initialize_truncated
from widefield.models._registry import Stated, build, cfg
from widefield.nn.fusing import refuse_training
from widefield.nn.gnconv import GlobalLocalFilter, GnConv

__all__ = ["HorNet"]

_README, _PAPER = "the official repository's README", "the paper"

STATED = {
    "hornet_tiny_7x7": Stated("22M", "4.0G", _README),
    "hornet_tiny_gf": Stated("23M", "3.9G", _README),
    "hornet_small_7x7": Stated("50M", "8.8G", _README),
    "hornet_small_gf": Stated("50M", "8.7G", _README),
    "hornet_base_7x7": Stated("87M", "15.6G", _README),
    "hornet_base_gf": Stated("88M", "15.5G", _README),
    "hornet_base_gf_img384": Stated("not stated", "not stated", "the official code"),
    "hornet_large_7x7": Stated("195M", "34.8G", _PAPER),
    "hornet_large_gf": Stated("196M", "34.6G", _PAPER),
    "hornet_large_gf_img384": Stated("202M", "101.8G at 384", "InternImage's table 2, and the official README"),
}
"""Counts stated for each network. The authors include Fourier transforms."""

WIDTHS = {"tiny": 64, "small": 96, "base": 128, "large": 192}
"""Channels of the first stage; each later stage has twice as many."""

FILTERS = {224: (None, None, (14, 8), (7, 4)), 384: (None, None, (24, 13), (12, 7))}
"""Image size in pixels -> (height, width) of the global filters of each stage."""

CLASSES_22K = 10450
"""Number of classes of the official ImageNet-22K weights; it matches the README's 209M, 211M and 216M parameters."""


class Branches(nn.Module):
    """A spatial and a channel mixer, each a normalized residual branch; the merged form of :class:`Block`.

    (N, C, H, W) -> the same. Made by ``fuse()``.

    Args:
        parts: ``norm1``, ``gnconv``, ``norm2``, ``pwconv1``, ``act`` and ``pwconv2``.
    """

    norm1: nn.Module
    gnconv: nn.Module
    norm2: nn.Module
    pwconv1: nn.Module
    act: nn.Module
    pwconv2: nn.Module

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def spatial(self, x: Tensor) -> Tensor:
        """Return the output of the spatial branch."""
        y: Tensor = self.gnconv(self.norm1(x))
        return y

    def pointwise(self, x: Tensor) -> Tensor:
        """Return the output of the channel branch."""
        y: Tensor = self.pwconv2(self.act(self.pwconv1(self.norm2(x.permute(0, 2, 3, 1)))))
        return y.permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        x = x + self.spatial(x)
        return x + self.pointwise(x)


class Block(Branches):
    """A recursive gated convolution, then an MLP, each with a layer scale in a residual connection (figure 2).

    Args:
        width: C.
        order: of the convolution.
        drop_path: probability that a sample skips a branch in training.
        layer_scale_init: initial value of the layer scales ``gamma1`` and ``gamma2``; 0 or None for none.
        options: further arguments of :class:`widefield.nn.gnconv.GnConv`.
    """

    gamma1: nn.Parameter | None
    gamma2: nn.Parameter | None

    def __init__(
        self, width: int, order: int, drop_path: float = 0.0, layer_scale_init: float | None = 1e-6, **options: Any
    ) -> None:
        parts = OrderedDict(
            norm1=LayerNorm2d(width, eps=1e-6),
            gnconv=GnConv(width, order, **options),
            norm2=LayerNorm(width, eps=1e-6),
            pwconv1=nn.Linear(width, 4 * width),
            act=nn.GELU(),
            pwconv2=nn.Linear(4 * width, width),
        )
        super().__init__(parts)
        for name in ("gamma1", "gamma2"):
            scale = nn.Parameter(torch.full((width,), layer_scale_init)) if layer_scale_init else None
            self.register_parameter(name, scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        x = x + self.drop_path(_scaled(self.spatial(x), self.gamma1))
        out: Tensor = x + self.drop_path(_scaled(self.pointwise(x), self.gamma2))
        return out

    @torch.no_grad()
    def fuse(self) -> Branches:
        """Return the block with its layer scales, and the scale of the gates, folded into the weights before them.

        ``gamma1`` is folded into the convolution's ``proj_out`` and ``gamma2`` into ``pwconv2``. Exact in evaluation
        mode. The parameters are new.

        Raises:
            RuntimeError: in training mode.
        """
        refuse_training(self)
        parts = {
            name: part.fuse() if isinstance(part, GnConv) else copy.deepcopy(part)
            for name, part in self.named_children()
            if name != "drop_path"
        }
        for layer, scale in ((parts["gnconv"].proj_out, self.gamma1), (parts["pwconv2"], self.gamma2)):
            if scale is not None:
                for parameter in cast(nn.Module, layer).parameters():
                    parameter.mul_(scale.view(-1, *(1,) * (parameter.ndim - 1)))
        return Branches(parts).eval()


def _scaled(y: Tensor, scale: Tensor | None) -> Tensor:
    return y if scale is None else scale[:, None, None] * y


class HorNet(NormedBackbone):
    """Stages of :class:`Block`, each after patches of 4x4 pixels, later of 2x2; HorNet-T (7x7) by default.

    Args:
        in_chans, num_classes, global_pool, drop_rate: see :class:`widefield.models._backbone.Backbone`.
        drop_path_rate: of the last block; it grows linearly from 0 at the first. The official values are 0.2, 0.4 and
            0.5 for T, S and B; 0.2 for L on ImageNet-22K, 0.4 for its fine-tuning.
        depths, widths: blocks and channels of each stage. Channels are divisible by 2^(order-1), with a global filter
            by 2^order.
        orders: of the convolutions of each stage.
        kernel_sizes: of the depthwise convolutions of each stage, odd.
        global_filters: for each stage None, or (height, width) of the filters that replace the depthwise convolutions
            (:class:`widefield.nn.gnconv.GlobalLocalFilter`).
        scale: factor of the gates.
        layer_scale_init: initial value of the layer scales; 0 or None for none. ``timm.create_model`` drops None.
        head_init_scale: factor of the classifier's initial weights.

    Raises:
        TypeError, ValueError: arguments of the wrong type or length, or rejected by the layers.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        depths: Sequence[int] = (2, 3, 18, 2),
        widths: Sequence[int] = (64, 128, 256, 512),
        orders: Sequence[int] = (2, 3, 4, 5),
        kernel_sizes: Sequence[int] = (7, 7, 7, 7),
        global_filters: Sequence[Pair | None] = (None, None, None, None),
        scale: float = 1 / 3,
        layer_scale_init: float | None = 1e-6,
        head_init_scale: float = 1.0,
    ) -> None:
        stages = {
            "depths": depths, "widths": widths, "orders": orders, "kernel_sizes": kernel_sizes,
            "global_filters": global_filters,
        }  # fmt: skip
        if len({len(entries) for entries in stages.values()}) != 1 or not depths:
            given = ", ".join(f"{name}={tuple(entries)}" for name, entries in stages.items())
            raise ValueError(f"these need one entry for each stage: {given}.")
        depths = [_checks.integer("every entry of depths", depth) for depth in depths]
        drop_path_rate = _checks.number("drop_path_rate", drop_path_rate, maximum=1.0)
        layer_scale = None if layer_scale_init is None else _checks.number("layer_scale_init", layer_scale_init)
        super().__init__(
            widths, in_chans=in_chans, num_classes=num_classes, global_pool=global_pool, drop_rate=drop_rate
        )
        self.head_init_scale = _checks.number("head_init_scale", head_init_scale)
        stem = nn.Sequential(nn.Conv2d(self.in_chans, widths[0], 4, stride=4), LayerNorm2d(widths[0], eps=1e-6))
        self.downsample_layers = nn.ModuleList([stem])
        for width, following in pairwise(widths):
            halve = nn.Sequential(LayerNorm2d(width, eps=1e-6), nn.Conv2d(width, following, 2, stride=2))
            self.downsample_layers.append(halve)
        rates = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        self.stages = nn.ModuleList()
        for depth, width, order, size, filters in zip(*stages.values(), strict=True):
            options = {"kernel_size": size, "scale": scale, "global_filter": filters}
            blocks = [Block(width, order, next(rates), layer_scale, **options) for _ in range(depth)]
            self.stages.append(nn.Sequential(*blocks))
        self.norm: nn.Module = LayerNorm(widths[-1], eps=1e-6)
        self.apply(initialize_truncated)
        self.head = self.classifier()

    def enter(self, index: int, x: Tensor) -> Tensor:
        """Downsample the image by 4 and later maps by 2."""
        y: Tensor = self.downsample_layers[index](x)
        return y

    def stage(self, index: int, x: Tensor) -> Tensor:
        """Run the blocks of a stage."""
        return self.run(cast(nn.Sequential, self.stages[index]), x)

    def parts(self, index: int) -> tuple[str, ...]:
        """Return the names of a stage and of the downsampling before it."""
        return f"stages.{index}", f"downsample_layers.{index}"

    def set_input_size(self, img_size: int | Pair) -> None:
        """Resize the global filters for images of this size; the network computes the same function on them.

        The official code does this to fine-tune at 384 pixels. The filters' parameters are new, so call it before
        creating the optimizer.
        """
        height, width = _checks.pair("img_size", img_size, minimum=4 << (len(self.stages) - 1))
        for index, blocks in enumerate(self.stages):
            for layer in blocks.modules():
                if isinstance(layer, GlobalLocalFilter):
                    layer.resize(height // (4 << index), width // (4 << index))

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's groups of parameters in network order; downsampling is grouped with the next block."""
        blocks = [(r"^downsample_layers\.(\d+)", (0,)), (r"^stages\.(\d+)\.(\d+)", None)]
        whole = r"^(?:downsample_layers|stages)\.(\d+)"
        return {"stem": r"^downsample_layers\.0", "blocks": whole if coarse else blocks}


def _cfg(side: int = 224, **kwargs: Any) -> dict[str, Any]:
    """Return the configuration of the official evaluation: from 384 pixels on, images are resized without cropping."""
    warped: dict[str, Any] = {"crop_pct": 1.0, "crop_mode": "squash"} if side >= 384 else {}
    size: dict[str, Any] = {"input_size": (3, side, side), "pool_size": (side // 32, side // 32)}
    source = {"license": "mit", "origin_url": "https://github.com/raoyongming/HorNet"}
    return cfg("downsample_layers.0.0", **size, **warped, **source, **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "hornet_tiny_7x7": _cfg(),
        "hornet_tiny_gf": _cfg(),
        "hornet_small_7x7": _cfg(),
        "hornet_small_gf": _cfg(),
        "hornet_base_7x7": _cfg(),
        "hornet_base_gf": _cfg(),
        "hornet_base_gf_img384": _cfg(384),
        "hornet_large_7x7": _cfg(),
        "hornet_large_7x7.in22k": _cfg(num_classes=CLASSES_22K),
        "hornet_large_gf": _cfg(),
        "hornet_large_gf.in22k": _cfg(num_classes=CLASSES_22K),
        "hornet_large_gf_img384": _cfg(384),
        "hornet_large_gf_img384.in22k": _cfg(384, num_classes=CLASSES_22K),
    }
)


def _hornet(name: str, pretrained: bool, side: int | None, **kwargs: Any) -> HorNet:
    first = WIDTHS[name.split("_")[1]]
    arguments: dict[str, Any] = {"widths": tuple(first << i for i in range(4))}
    if side is not None:
        arguments["global_filters"] = FILTERS[side]
    return build(HorNet, name, pretrained, **{**arguments, **kwargs})  # type: ignore[no-any-return]


@register_model
def hornet_tiny_7x7(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-T with 7x7 kernels."""
    return _hornet("hornet_tiny_7x7", pretrained, None, **kwargs)


@register_model
def hornet_tiny_gf(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-T with global filters in the last two stages."""
    return _hornet("hornet_tiny_gf", pretrained, 224, **kwargs)


@register_model
def hornet_small_7x7(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-S with 7x7 kernels."""
    return _hornet("hornet_small_7x7", pretrained, None, **kwargs)


@register_model
def hornet_small_gf(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-S with global filters in the last two stages."""
    return _hornet("hornet_small_gf", pretrained, 224, **kwargs)


@register_model
def hornet_base_7x7(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-B with 7x7 kernels."""
    return _hornet("hornet_base_7x7", pretrained, None, **kwargs)


@register_model
def hornet_base_gf(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-B with global filters in the last two stages."""
    return _hornet("hornet_base_gf", pretrained, 224, **kwargs)


@register_model
def hornet_base_gf_img384(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-B with global filters for images of 384 pixels."""
    return _hornet("hornet_base_gf_img384", pretrained, 384, **kwargs)


@register_model
def hornet_large_7x7(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-L with 7x7 kernels."""
    return _hornet("hornet_large_7x7", pretrained, None, **kwargs)


@register_model
def hornet_large_gf(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-L with global filters in the last two stages."""
    return _hornet("hornet_large_gf", pretrained, 224, **kwargs)


@register_model
def hornet_large_gf_img384(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-L with global filters for images of 384 pixels."""
    return _hornet("hornet_large_gf_img384", pretrained, 384, **kwargs)
