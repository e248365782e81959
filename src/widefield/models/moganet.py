"""MogaNet: gated depthwise kernels of three sizes, and an MLP with channel aggregation.

Paper: Li et al., "MogaNet: Multi-order Gated Aggregation Network", ICLR 2024, section 4. Keys, initialization and
variants are those of the official code (github.com/Westlake-AI/MogaNet, Apache 2.0), whose weights load.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, cast

import torch
from timm.layers import DropPath, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from widefield import _checks
from widefield.models._backbone import Backbone, initialize_fan_out
from widefield.models._registry import Stated, build, cfg
from widefield.nn.fusing import fold_norm, norm_affine, refuse_training
from widefield.nn.moga import DILATIONS, SPLIT, ChannelAggregationFFN, MultiOrderGatedAggregation

__all__ = ["MogaNet"]

_README = "the official repository's README"

STATED: dict[str, Stated] = {
    "moganet_xtiny": Stated("2.97M", "0.80G", _README),
    "moganet_tiny": Stated("5.20M", "1.10G", _README),
    "moganet_small": Stated("25.3M", "4.97G", _README),
    "moganet_base": Stated("43.9M", "9.93G", _README),
    "moganet_large": Stated("82.5M", "15.9G", _README),
    "moganet_xlarge": Stated("180.8M", "34.5G", _README),
}
"""Counts stated for each network."""


class Convs(nn.Sequential):
    """Convolutions, each followed by a batch norm, and other layers between them; mergeable."""

    def fuse(self) -> nn.Sequential:
        """Return the convolutions with the norms folded in, under their names. Exact in evaluation mode.

        Raises:
            RuntimeError: in training mode.
        """
        refuse_training(self)
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        for name, part in self.named_children():
            if isinstance(part, _BatchNorm):
                before, conv = parts.popitem()
                parts[before] = fold_norm(cast(nn.Conv2d, conv), part)
            else:
                parts[name] = part
        return nn.Sequential(parts).eval()


class MogaBlock(nn.Module):
    """Spatial aggregation, then channel aggregation, each after a batch norm and in a residual connection.

    Args:
        width: channels.
        hidden: channels inside the channel aggregation.
        drop_path: probability that a sample skips a branch in training.
        layer_scale_init: initial value of the factors of each branch.
        dilations, split: of :class:`widefield.nn.moga.MultiOrderGatedAggregation`.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        drop_path: float = 0.0,
        layer_scale_init: float = 1e-5,
        dilations: Sequence[int] = DILATIONS,
        split: Sequence[int] = SPLIT,
    ) -> None:
        super().__init__()
        self.layer_scale_1 = nn.Parameter(torch.full((1, width, 1, 1), layer_scale_init))
        self.layer_scale_2 = nn.Parameter(torch.full((1, width, 1, 1), layer_scale_init))
        self.norm1 = nn.BatchNorm2d(width)
        self.attn = MultiOrderGatedAggregation(width, dilations, split)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.BatchNorm2d(width)
        self.mlp = ChannelAggregationFFN(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        x = x + self.drop_path(self.layer_scale_1 * self.attn(self.norm1(x)))
        y: Tensor = x + self.drop_path(self.layer_scale_2 * self.mlp(self.norm2(x)))
        return y

    @torch.no_grad()
    def fuse(self) -> FusedBlock:
        """Return the block with its norms and layer scales folded into the adjacent 1x1 convolutions.

        The spatial aggregation adds its own normalized input, so the block's input is multiplied by
        ``1 + layer_scale_1 * (scale of norm1)``. The channel aggregation is merged too. Exact in evaluation mode. The
        parameters are new.

        Raises:
            RuntimeError: in training mode.
            ValueError: a norm has no running statistics.
        """
        refuse_training(self)
        attn, mlp = copy.deepcopy(self.attn), copy.deepcopy(self.mlp)
        scale, shift = norm_affine(self.norm1)
        factor = self.layer_scale_1.flatten()
        _read_scaled(attn.proj_1, scale, shift)
        _write_scaled(attn.proj_2, factor, factor * shift)
        _read_scaled(mlp.fc1, *norm_affine(self.norm2))
        _write_scaled(mlp.fc2, self.layer_scale_2.flatten())
        shortcut = nn.Parameter((1 + factor * scale).view(1, -1, 1, 1), self.layer_scale_1.requires_grad)
        return FusedBlock(shortcut, attn, mlp.fuse())


class FusedBlock(nn.Module):
    """A merged :class:`MogaBlock`, made by ``fuse()``. It has no drop path, and can be trained further."""

    def __init__(self, shortcut: nn.Parameter, attn: MultiOrderGatedAggregation, mlp: nn.Module) -> None:
        super().__init__()
        self.shortcut, self.attn, self.mlp = shortcut, attn, mlp
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        x = self.shortcut * x + self.attn.aggregate(x)
        y: Tensor = x + self.mlp(x)
        return y


class MogaNet(Backbone):
    """MogaNet-T with the default arguments.

    Every stage ends in a batch norm, which is part of its feature and feeds the next stage. Dropout (``drop_rate``)
    acts before the classifier; the official code has it inside the channel aggregation, where no configuration uses it.

    Args:
        in_chans, num_classes, global_pool, drop_rate: see :class:`widefield.models._backbone.Backbone`.
        drop_path_rate: of the last block; it grows linearly from 0 at the first. The authors use 0.05 for XT, 0.1 for T
            and S, 0.2, 0.3 and 0.4 for B, L and XL.
        depths, widths: blocks and channels of each stage.
        ffn_ratios: hidden channels of the channel aggregation of each stage, in units of its width.
        dilations, split: of :class:`widefield.nn.moga.MultiOrderDWConv`.
        layer_scale_init: initial value of the factors of each branch.

    Raises:
        TypeError, ValueError: arguments of the wrong type or length; a width too small for the split.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        depths: Sequence[int] = (3, 3, 12, 2),
        widths: Sequence[int] = (32, 64, 128, 256),
        ffn_ratios: Sequence[float] = (8, 8, 4, 4),
        dilations: Sequence[int] = DILATIONS,
        split: Sequence[int] = SPLIT,
        layer_scale_init: float = 1e-5,
    ) -> None:
        if not len(depths) == len(widths) == len(ffn_ratios):
            raise ValueError(
                f"depths, widths and ffn_ratios must have one entry a stage each; got {tuple(depths)}, {tuple(widths)} "
                f"and {tuple(ffn_ratios)}."
            )
        depths = [_checks.integer("every entry of depths", depth) for depth in depths]
        widths = [_checks.integer("every entry of widths", width, minimum=2) for width in widths]
        ratios = [_checks.number("every entry of ffn_ratios", ratio) for ratio in ffn_ratios]
        scale = _checks.number("layer_scale_init", layer_scale_init)
        rates = iter(
            calculate_drop_path_rates(_checks.number("drop_path_rate", drop_path_rate, maximum=1.0), sum(depths))
        )
        super().__init__(
            widths, in_chans=in_chans, num_classes=num_classes, global_pool=global_pool, drop_rate=drop_rate
        )
        for i, (depth, width, ratio) in enumerate(zip(depths, widths, ratios, strict=True)):
            blocks = [
                MogaBlock(
                    width,
                    int(width * ratio),
                    drop_path=next(rates),
                    layer_scale_init=scale,
                    dilations=dilations,
                    split=split,
                )
                for _ in range(depth)
            ]
            entry = _downsample(widths[i - 1], width) if i else _stem(self.in_chans, width)
            self.add_module(f"patch_embed{i + 1}", entry)
            self.add_module(f"blocks{i + 1}", nn.Sequential(*blocks))
            self.add_module(f"norm{i + 1}", nn.BatchNorm2d(width))
        self.apply(initialize_fan_out)
        self.head = self.classifier()

    def enter(self, index: int, x: Tensor) -> Tensor:
        """Downsample the image by 4 and later maps by 2."""
        y: Tensor = self.get_submodule(f"patch_embed{index + 1}")(x)
        return y

    def stage(self, index: int, x: Tensor) -> Tensor:
        """Run the blocks of a stage, then its norm."""
        blocks = cast(nn.Sequential, self.get_submodule(f"blocks{index + 1}"))
        y: Tensor = self.get_submodule(f"norm{index + 1}")(self.run(blocks, x))
        return y

    def parts(self, index: int) -> tuple[str, ...]:
        """Return the names of a stage's norm, of its blocks and of its patch embedding."""
        return f"norm{index + 1}", f"blocks{index + 1}", f"patch_embed{index + 1}"

    def classifier(self) -> nn.Module:
        """Return a new head, initialized as the official code does."""
        return super().classifier().apply(initialize_fan_out)

    def no_weight_decay(self) -> set[str]:
        """Return the names of per-channel weights, which timm would decay and the official code does not."""
        return {name for name, parameter in self.named_parameters() if parameter.squeeze().ndim <= 1 < parameter.ndim}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's groups of parameters in the order of the network.

        Downsampling is grouped with the first block of its stage, the norm with the last.
        """
        if coarse:
            return {"stem": r"^patch_embed1", "blocks": r"^(?:patch_embed|blocks|norm)(\d+)"}
        blocks = [
            (r"^patch_embed(\d+)", (0,)),
            (r"^blocks(\d+)\.(\d+)", None),
            (r"^norm(\d+)", (99999,)),
        ]
        return {"stem": r"^patch_embed1", "blocks": blocks}


def _stem(channels: int, width: int) -> nn.Sequential:
    inner = width // 2
    first, second = _halve(channels, inner), _halve(inner, width)
    return nn.Sequential(OrderedDict(projection=Convs(*first, nn.GELU(), *second)))


def _downsample(channels: int, width: int) -> Convs:
    projection, norm = _halve(channels, width)
    return Convs(OrderedDict(projection=projection, norm=norm))


def _halve(channels: int, width: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    return nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.BatchNorm2d(width)


def _read_scaled(conv: nn.Conv2d, scale: Tensor, shift: Tensor) -> None:
    """Fold the scale and shift of its input into a 1x1 convolution: it then returns ``conv(scale * x + shift)``."""
    cast(Tensor, conv.bias).add_(conv.weight.flatten(1) @ shift)
    conv.weight.mul_(scale.view(1, -1, 1, 1))


def _write_scaled(conv: nn.Conv2d, scale: Tensor, shift: Tensor | float = 0.0) -> None:
    """Fold a scale and shift of its output into a convolution: it then returns ``scale * conv(x) + shift``."""
    conv.weight.mul_(scale.view(-1, 1, 1, 1))
    cast(Tensor, conv.bias).mul_(scale).add_(shift)


def _cfg(side: int = 224) -> dict[str, Any]:
    return cfg(
        "patch_embed1.projection.0",
        input_size=(3, side, side),
        pool_size=(side // 32, side // 32),
        crop_pct=0.9,
        license="apache-2.0",
        origin_url="https://github.com/Westlake-AI/MogaNet",
    )


default_cfgs = generate_default_cfgs(
    {
        "moganet_xtiny.in1k": _cfg(),
        "moganet_xtiny.in1k_256": _cfg(256),
        "moganet_tiny.in1k": _cfg(),
        "moganet_tiny.in1k_256": _cfg(256),
        "moganet_small.in1k": _cfg(),
        "moganet_base.in1k": _cfg(),
        "moganet_large.in1k": _cfg(),
        "moganet_xlarge.in1k": _cfg(),
    }
)


@register_model
def moganet_xtiny(pretrained: bool = False, **kwargs: Any) -> MogaNet:
    """MogaNet-XT."""
    model_args = {"depths": (3, 3, 10, 2), "widths": (32, 64, 96, 192), **kwargs}
    return build(MogaNet, "moganet_xtiny", pretrained, **model_args)  # type: ignore[no-any-return]


@register_model
def moganet_tiny(pretrained: bool = False, **kwargs: Any) -> MogaNet:
    """MogaNet-T."""
    return build(MogaNet, "moganet_tiny", pretrained, **kwargs)  # type: ignore[no-any-return]


@register_model
def moganet_small(pretrained: bool = False, **kwargs: Any) -> MogaNet:
    """MogaNet-S."""
    model_args = {"depths": (2, 3, 12, 2), "widths": (64, 128, 320, 512), **kwargs}
    return build(MogaNet, "moganet_small", pretrained, **model_args)  # type: ignore[no-any-return]


@register_model
def moganet_base(pretrained: bool = False, **kwargs: Any) -> MogaNet:
    """MogaNet-B."""
    model_args = {"depths": (4, 6, 22, 3), "widths": (64, 160, 320, 512), **kwargs}
    return build(MogaNet, "moganet_base", pretrained, **model_args)  # type: ignore[no-any-return]


@register_model
def moganet_large(pretrained: bool = False, **kwargs: Any) -> MogaNet:
    """MogaNet-L."""
    model_args = {"depths": (4, 6, 44, 4), "widths": (64, 160, 320, 640), **kwargs}
    return build(MogaNet, "moganet_large", pretrained, **model_args)  # type: ignore[no-any-return]


@register_model
def moganet_xlarge(pretrained: bool = False, **kwargs: Any) -> MogaNet:
    """MogaNet-XL."""
    model_args = {"depths": (6, 6, 44, 4), "widths": (96, 192, 480, 960), **kwargs}
    return build(MogaNet, "moganet_xlarge", pretrained, **model_args)  # type: ignore[no-any-return]
