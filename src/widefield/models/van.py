"""VAN: stages of large kernel attention and convolutional MLPs.

Paper: Guo, Lu, Liu, Cheng, Hu, "Visual Attention Network", Computational Visual Media 2023, section 3. Keys,
initialization and variants are those of the official code (github.com/Visual-Attention-Network/VAN-Classification,
Apache 2.0), whose weights load.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, cast

import torch
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import DropPath, LayerNorm2d, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from widefield import _checks
from widefield.models._backbone import Backbone, initialize_fan_out
from widefield.models._registry import Stated, build, cfg
from widefield.nn.depthwise import DepthwiseConv2d, bare
from widefield.nn.fusing import fold_norm, norm_affine, refuse_training
from widefield.nn.lka import LKAAttention

__all__ = ["VAN"]

STATED: dict[str, Stated] = {
    "van_b0": Stated("4.1M", "0.9G", "the official repository's README"),
    "van_b1": Stated("13.9M", "2.5G", "the official repository's README"),
    "van_b2": Stated("26.6M", "5.0G", "the official repository's README"),
    "van_b3": Stated("44.8M", "9.0G", "the official repository's README"),
    "van_b4": Stated("60.3M", "12.2G", "the paper"),
    "van_b5": Stated("90.0M", "17.2G", "the paper"),
    "van_b6": Stated("200M", "38.4G", "the paper"),
}
"""Counts stated for each network."""


class PatchEmbed(nn.Sequential):
    """An overlapping patch embedding: a convolution of stride 2 or 4, ``proj``, and batch norm, ``norm``.

    Args:
        channels: input channels.
        width: output channels.
        kernel_size: odd.
        stride: of the convolution.
    """

    proj: nn.Conv2d
    norm: nn.BatchNorm2d

    def __init__(self, channels: int, width: int, kernel_size: int, stride: int) -> None:
        conv = nn.Conv2d(channels, width, kernel_size, stride, kernel_size // 2)
        super().__init__(OrderedDict(proj=conv, norm=nn.BatchNorm2d(width)))

    def fuse(self) -> nn.Sequential:
        """Return ``proj`` with the norm folded in. Exact in evaluation mode.

        Raises:
            RuntimeError: in training mode.
        """
        refuse_training(self)
        return nn.Sequential(OrderedDict(proj=fold_norm(self.proj, self.norm))).eval()


class Block(nn.Module):
    """Large kernel attention, then an MLP with a 3x3 depthwise convolution inside.

    (N, C, H, W) -> the same. Each of the two computes ``x + layer_scale * branch(batch_norm(x))``.

    Args:
        width: C.
        mlp_ratio: channels inside the MLP, in units of C; rounded down.
        kernel_size, dilation: of :class:`widefield.nn.lka.LKA`.
        drop_path: probability that a sample skips a branch in training.
        layer_scale_init: initial value of the factors of both branches.
    """

    def __init__(
        self,
        width: int,
        mlp_ratio: float = 4.0,
        *,
        kernel_size: int = 21,
        dilation: int = 3,
        drop_path: float = 0.0,
        layer_scale_init: float = 0.01,
    ) -> None:
        super().__init__()
        self.layer_scale_1 = nn.Parameter(torch.full((width,), layer_scale_init))
        self.layer_scale_2 = nn.Parameter(torch.full((width,), layer_scale_init))
        self.norm1 = nn.BatchNorm2d(width)
        self.attn = LKAAttention(width, kernel_size, dilation)
        self.norm2 = nn.BatchNorm2d(width)
        hidden = int(width * mlp_ratio)
        self.mlp = nn.Sequential(
            OrderedDict(
                fc1=nn.Conv2d(width, hidden, 1),
                dwconv=nn.Sequential(OrderedDict(dwconv=DepthwiseConv2d(hidden, hidden, 3, padding="same"))),
                act=nn.GELU(),
                fc2=nn.Conv2d(hidden, width, 1),
            )
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        x = x + self.drop_path(self.layer_scale_1[:, None, None] * self.attn(self.norm1(x)))
        y: Tensor = x + self.drop_path(self.layer_scale_2[:, None, None] * self.mlp(self.norm2(x)))
        return y

    @torch.no_grad()
    def fuse(self) -> FusedBlock:
        """Return the block with its norms and layer scales folded into the adjacent 1x1 convolutions.

        The attention adds its own input, the normalized x, which is ``gain * x + shift`` per channel. Together with the
        block's shortcut this is a factor ``1 + layer_scale_1 * gain`` of x, kept as ``scale``, and a bias. Exact in
        evaluation mode, as a 1x1 convolution pads nothing and the depthwise ones come after it. The parameters are new.

        Raises:
            RuntimeError: in training mode.
            ValueError: a norm has no running statistics.
        """
        refuse_training(self)
        gain, shift = norm_affine(self.norm1)
        attn, mlp = copy.deepcopy(self.attn), copy.deepcopy(self.mlp)
        attn.proj_1 = _after_affine(attn.proj_1, gain, shift)
        attn.proj_2 = _then_affine(attn.proj_2, self.layer_scale_1, self.layer_scale_1 * shift)
        mlp.fc1 = _after_affine(cast(nn.Conv2d, mlp.fc1), *norm_affine(self.norm2))
        mlp.fc2 = _then_affine(cast(nn.Conv2d, mlp.fc2), self.layer_scale_2, torch.zeros_like(self.layer_scale_2))
        scale = nn.Parameter(1 + self.layer_scale_1 * gain, self.layer_scale_1.requires_grad)
        return FusedBlock(scale, nn.Sequential(OrderedDict(attn.named_children())), mlp).eval()


class FusedBlock(nn.Module):
    """A merged :class:`Block`: ``x = scale * x + attn(x)``, then ``x + mlp(x)``. Made by ``fuse()``.

    It has no drop path, and can be trained further.

    Args:
        scale: (C,).
        attn, mlp: the branches, without norms and without the shortcut inside the attention.
    """

    def __init__(self, scale: nn.Parameter, attn: nn.Sequential, mlp: nn.Sequential) -> None:
        super().__init__()
        self.scale = scale
        self.attn = attn
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        x = self.scale[:, None, None] * x + self.attn(x)
        y: Tensor = x + self.mlp(x)
        return y


class VAN(Backbone):
    """Stages of :class:`Block`, each after an overlapping patch embedding and followed by LayerNorm.

    The default arguments give VAN-B2. The norm after a stage belongs to its feature and feeds the next stage.

    Args:
        in_chans, num_classes, global_pool, drop_rate: see :class:`widefield.models._backbone.Backbone`.
        drop_path_rate: of the last block; it grows linearly from 0 at the first.
        depths: blocks of each stage.
        widths: channels of each stage.
        mlp_ratios: channels inside the MLPs of each stage, in units of its width.
        kernel_size, dilation: of every :class:`widefield.nn.lka.LKA`.
        layer_scale_init: initial value of the layer scales.

    Raises:
        TypeError, ValueError: arguments of the wrong type or length.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        depths: Sequence[int] = (3, 3, 12, 3),
        widths: Sequence[int] = (64, 128, 320, 512),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        kernel_size: int = 21,
        dilation: int = 3,
        layer_scale_init: float = 0.01,
    ) -> None:
        depths = [_checks.integer("every entry of depths", depth) for depth in depths]
        widths = [_checks.integer("every entry of widths", width) for width in widths]
        mlp_ratios = [_checks.number("every entry of mlp_ratios", ratio, minimum=1.0) for ratio in mlp_ratios]
        if not len(depths) == len(widths) == len(mlp_ratios):
            raise ValueError(
                f"depths, widths and mlp_ratios must have one entry a stage each; got {depths}, {widths} and "
                f"{mlp_ratios}."
            )
        drop_path_rate = _checks.number("drop_path_rate", drop_path_rate, maximum=1.0)
        layer_scale_init = _checks.number("layer_scale_init", layer_scale_init)
        super().__init__(
            widths, in_chans=in_chans, num_classes=num_classes, global_pool=global_pool, drop_rate=drop_rate
        )
        rates = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        for i, (width, depth, ratio) in enumerate(zip(widths, depths, mlp_ratios, strict=True)):
            embed = PatchEmbed(widths[i - 1], width, 3, 2) if i else PatchEmbed(self.in_chans, width, 7, 4)
            blocks = [
                Block(
                    width,
                    ratio,
                    kernel_size=kernel_size,
                    dilation=dilation,
                    drop_path=next(rates),
                    layer_scale_init=layer_scale_init,
                )
                for _ in range(depth)
            ]
            self.add_module(f"patch_embed{i + 1}", embed)
            self.add_module(f"block{i + 1}", nn.Sequential(*blocks))
            self.add_module(f"norm{i + 1}", LayerNorm2d(width, eps=1e-6))
        self.apply(initialize_fan_out)
        self.head = self.classifier()

    def enter(self, index: int, x: Tensor) -> Tensor:
        """Downsample the image by 4 and later maps by 2."""
        y: Tensor = self.get_submodule(f"patch_embed{index + 1}")(x)
        return y

    def stage(self, index: int, x: Tensor) -> Tensor:
        """Run the blocks of a stage and the norm after them."""
        x = self.run(cast(nn.Sequential, self.get_submodule(f"block{index + 1}")), x)
        y: Tensor = self.get_submodule(f"norm{index + 1}")(x)
        return y

    def parts(self, index: int) -> tuple[str, ...]:
        """Return the names of a stage's norm, of its blocks and of its patch embedding."""
        return f"norm{index + 1}", f"block{index + 1}", f"patch_embed{index + 1}"

    def classifier(self) -> nn.Module:
        """Return a new head, initialized as the official code does."""
        return super().classifier().apply(initialize_fan_out)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's groups of parameters in the order of the network.

        A patch embedding is grouped with the first block of its stage, the norm with the last.
        """
        blocks = [
            (r"^patch_embed(\d+)", (0,)),
            (r"^block(\d+)\.(\d+)", None),
            (r"^norm(\d+)", (99999,)),  # to timm this number means: group with the previous layer
        ]
        whole = r"^(?:patch_embed|block|norm)(\d+)"
        return {"stem": r"^patch_embed1", "blocks": whole if coarse else blocks}


def _after_affine(conv: nn.Conv2d, gain: Tensor, shift: Tensor) -> nn.Conv2d:
    """Return the 1x1 convolution equal to ``conv(gain * x + shift)``."""
    return _pointwise(conv, conv.weight * gain[:, None, None], conv.weight[..., 0, 0] @ shift + _bias(conv))


def _then_affine(conv: nn.Conv2d, gain: Tensor, shift: Tensor) -> nn.Conv2d:
    """Return the convolution equal to ``gain * conv(x) + shift``."""
    return _pointwise(conv, conv.weight * gain[:, None, None, None], _bias(conv) * gain + shift)


def _bias(conv: nn.Conv2d) -> Tensor:
    return cast(Tensor, conv.bias)


def _pointwise(like: nn.Conv2d, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    conv, learns = bare(like, bias=True), like.weight.requires_grad
    conv.weight, conv.bias = nn.Parameter(weight, learns), nn.Parameter(bias, learns)
    return conv


def _cfg(**kwargs: Any) -> dict[str, Any]:
    """Return the configuration of the official evaluation on ImageNet-1K; ``kwargs`` take precedence."""
    inputs: dict[str, Any] = {"mean": IMAGENET_INCEPTION_MEAN, "std": IMAGENET_INCEPTION_STD, "crop_pct": 0.9}
    return cfg("patch_embed1.proj", **{**inputs, "license": "apache-2.0", **kwargs})


def _cfg_22k(side: int = 224, **kwargs: Any) -> dict[str, Any]:
    """Return the configuration of the ImageNet-22K scripts, which follow ConvNeXt: no cropping from 384 pixels on."""
    warped: dict[str, Any] = {"crop_pct": 1.0, "crop_mode": "squash"} if side >= 384 else {}
    size: dict[str, Any] = {"input_size": (3, side, side), "pool_size": (side // 32, side // 32)}
    return cfg("patch_embed1.proj", **size, **warped, license="apache-2.0", **kwargs)


default_cfgs = generate_default_cfgs(
    {
        **{name: _cfg() for name in ("van_b0", "van_b1", "van_b2", "van_b3", "van_b4")},
        **{
            f"{name}.{tag}": _cfg_22k(**arguments)
            for name in ("van_b4", "van_b5", "van_b6")
            for tag, arguments in (
                ("in22k_ft_in1k", {}),
                ("in22k_ft_in1k_384", {"side": 384}),
                ("in22k", {"num_classes": 21841}),
            )
        },
    }
)


@register_model
def van_b0(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B0, first published as VAN-Tiny."""
    arguments = {"depths": (3, 3, 5, 2), "widths": (32, 64, 160, 256), **kwargs}
    return build(VAN, "van_b0", pretrained, **arguments)  # type: ignore[no-any-return]


@register_model
def van_b1(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B1, first published as VAN-Small."""
    arguments = {"depths": (2, 2, 4, 2), **kwargs}
    return build(VAN, "van_b1", pretrained, **arguments)  # type: ignore[no-any-return]


@register_model
def van_b2(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B2, first published as VAN-Base."""
    return build(VAN, "van_b2", pretrained, **kwargs)  # type: ignore[no-any-return]


@register_model
def van_b3(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B3, first published as VAN-Large."""
    arguments = {"depths": (3, 5, 27, 3), **kwargs}
    return build(VAN, "van_b3", pretrained, **arguments)  # type: ignore[no-any-return]


@register_model
def van_b4(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B4."""
    arguments = {"depths": (3, 6, 40, 3), **kwargs}
    return build(VAN, "van_b4", pretrained, **arguments)  # type: ignore[no-any-return]


@register_model
def van_b5(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B5."""
    arguments = {"depths": (3, 3, 24, 3), "widths": (96, 192, 480, 768), **kwargs}
    return build(VAN, "van_b5", pretrained, **arguments)  # type: ignore[no-any-return]


@register_model
def van_b6(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B6: its third stage is narrower than in B5 and has 90 blocks."""
    arguments = {"depths": (6, 6, 90, 6), "widths": (96, 192, 384, 768), **kwargs}
    return build(VAN, "van_b6", pretrained, **arguments)  # type: ignore[no-any-return]
