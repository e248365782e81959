"""UniRepLKNet: a few large kernels, each trained as a sum of dilated ones, among many small kernels.

Paper: Ding et al., "UniRepLKNet: A Universal Perception Large-Kernel ConvNet for Audio, Video, Point Cloud, Time-Series
and Image Recognition", CVPR 2024, section 3. Keys, initialization and variants are those of the official code
(github.com/AILab-CVC/UniRepLKNet, Apache 2.0), whose weights load in both of their forms.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from timm.layers import DropPath, LayerNorm, LayerNorm2d, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from widefield import _checks
from widefield.models._backbone import NormedBackbone, initialize_truncated
from widefield.models._registry import Stated, build, cfg
from widefield.nn.depthwise import DepthwiseConv2d
from widefield.nn.fusing import fold_norm, refuse_training
from widefield.nn.grn import GRN
from widefield.nn.large_kernel import DILATED_BRANCHES, DilatedReparamConv2d
from widefield.nn.reparam import merged

__all__ = ["UniRepLKNet"]

STATED = {
    f"unireplknet_{size}": Stated(parameters, macs, "the official repository's README")
    for size, parameters, macs in (
        ("a", "4.4M", "0.6G"),
        ("f", "6.2M", "0.9G"),
        ("p", "10.7M", "1.6G"),
        ("n", "18.3M", "2.8G"),
        ("t", "31M", "4.9G"),
        ("s", "56M", "9.1G"),
        ("b", "98M", "47.2G at 384"),
        ("l", "218M", "105.4G at 384"),
        ("xl", "386M", "187G at 384"),
    )
}
"""Counts of the reparameterized form."""

LARGE = 13
"""The kernel size of every large kernel in the published networks."""

DILATED_FROM = 7
"""Kernels from this size on have dilated branches; smaller ones are plain."""


class Permute(nn.Module):
    """``x.permute(dims)`` as a layer, for use in a ``Sequential``."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        """Return a view."""
        return x.permute(self.dims)

    def extra_repr(self) -> str:
        """Show the order."""
        return ", ".join(map(str, self.dims))


class SqueezeExcite(nn.Module):
    """Gate the channels by a function of their means (Hu et al. 2018): (N, C, H, W) -> the same. Keys ``down``, ``up``.

    Args:
        channels: C, at least 4; the gates are computed in C // 4 dimensions.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, channels // 4, 1)
        self.up = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        gates: Tensor = self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()
        return x * gates


class UniRepLKNetBlock(nn.Module):
    """Depthwise convolution, gates, and two pointwise layers with a global response norm between (section 3.1).

    (N, C, H, W) -> the same. From 7x7 on, the depthwise convolution has parallel dilated branches.

    Args:
        channels: C.
        kernel_size: of the depthwise convolution: 3 or a key of :data:`widefield.nn.large_kernel.DILATED_BRANCHES`.
        drop_path: probability that a sample skips the block in training.
        layer_scale_init: initial value of the layer scale ``gamma``; 0 or None for none.
    """

    gamma: nn.Parameter | None

    def __init__(
        self, channels: int, kernel_size: int, drop_path: float = 0.0, layer_scale_init: float | None = 1e-6
    ) -> None:
        super().__init__()
        self.register_parameter(
            "gamma", nn.Parameter(torch.full((channels,), layer_scale_init)) if layer_scale_init else None
        )
        self.dwconv = (
            DilatedReparamConv2d(channels, channels, kernel_size)
            if kernel_size >= DILATED_FROM
            else DepthwiseConv2d(channels, channels, kernel_size, padding="same", bias=False)
        )
        self.norm = nn.BatchNorm2d(channels)
        self.se = SqueezeExcite(channels)
        self.pwconv1 = nn.Sequential(Permute(0, 2, 3, 1), nn.Linear(channels, 4 * channels))
        self.act = nn.Sequential(nn.GELU(), GRN(4 * channels))
        self.pwconv2 = nn.Sequential(
            nn.Linear(4 * channels, channels, bias=False), Permute(0, 3, 1, 2), nn.BatchNorm2d(channels)
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        y = self.se(self.norm(self.dwconv(x)))
        y = self.pwconv2(self.act(self.pwconv1(y)))
        if self.gamma is not None:
            y = self.gamma[:, None, None] * y
        out: Tensor = x + self.drop_path(y)
        return out

    def fuse(self) -> FusedBlock:
        """Return the block with its branches, norms, layer scale and the bias of its GRN folded in.

        The first norm is folded into the depthwise convolution, and everything linear after the GRN into ``pwconv2.0``.
        Exact in evaluation mode. The parameters are new.

        Raises:
            RuntimeError: in training mode.
        """
        refuse_training(self)
        large: Any = self.dwconv
        if isinstance(large, (DilatedReparamConv2d, nn.Sequential)):  # a Sequential after an in-place merge
            conv = merged(large) if isinstance(large, DilatedReparamConv2d) else cast(nn.Conv2d, large.lk_origin)
            dwconv: nn.Module = nn.Sequential(OrderedDict(lk_origin=fold_norm(conv, self.norm)))
        else:
            dwconv = fold_norm(large, self.norm)
        act = copy.deepcopy(self.act)
        cast(GRN, act[1]).beta = None
        parts = OrderedDict(
            dwconv=dwconv,
            se=copy.deepcopy(self.se),
            pwconv1=copy.deepcopy(self.pwconv1),
            act=act,
            pwconv2=nn.Sequential(self._projection(), copy.deepcopy(self.pwconv2[1])),
        )
        return FusedBlock(parts).eval()

    @torch.no_grad()
    def _projection(self) -> nn.Linear:
        """Return ``pwconv2`` as one layer, with the GRN's bias, the norm and the layer scale folded in."""
        linear, norm = cast(nn.Linear, self.pwconv2[0]), cast(nn.BatchNorm2d, self.pwconv2[2])
        beta, learns = cast(Tensor, self.act[1].beta), linear.weight.requires_grad
        pointwise = nn.Conv2d(linear.in_features, linear.out_features, 1, device="meta").eval()
        pointwise.weight = nn.Parameter(linear.weight[..., None, None])
        pointwise.bias = nn.Parameter(linear.weight @ beta.flatten())
        conv = fold_norm(pointwise, norm)
        scale = torch.ones_like(norm.weight) if self.gamma is None else self.gamma
        projection = nn.Linear(linear.in_features, linear.out_features, device="meta")
        projection.weight = nn.Parameter(conv.weight[..., 0, 0] * scale[:, None], learns)
        projection.bias = nn.Parameter(cast(Tensor, conv.bias) * scale, learns)
        return projection


class FusedBlock(nn.Sequential):
    """A merged :class:`UniRepLKNetBlock`: its layers in sequence, with a residual connection. Made by ``fuse()``.

    It has no drop path, and can be trained further.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        y: Tensor = x + super().forward(x)  # type: ignore[no-untyped-call]
        return y


class UniRepLKNet(NormedBackbone):
    """Stages of :class:`UniRepLKNetBlock`, each after a 3x3 convolution of stride 2 (the first after two).

    Args:
        in_chans, num_classes, global_pool, drop_rate: see :class:`widefield.models._backbone.Backbone`.
        drop_path_rate: of the last block; it grows linearly from 0 at the first.
        depths: blocks of each stage.
        widths: channels of each stage, at least 4.
        kernel_sizes: one size per stage, or one per block of a stage. Default: :func:`default_kernel_sizes`.
        layer_scale_init: initial value of the layer scales; 0 or None for none. ``timm.create_model`` drops None.
        head_init_scale: factor of the classifier's initial weights.

    Raises:
        TypeError, ValueError: arguments of the wrong type or length; a kernel size without branches.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        depths: Sequence[int] = (3, 3, 27, 3),
        widths: Sequence[int] = (96, 192, 384, 768),
        kernel_sizes: Sequence[int | Sequence[int]] | None = None,
        layer_scale_init: float | None = 1e-6,
        head_init_scale: float = 1.0,
    ) -> None:
        depths = [_checks.integer("every entry of depths", depth) for depth in depths]
        widths = [_checks.integer("every entry of widths", width, minimum=4) for width in widths]
        if len(depths) != len(widths):
            raise ValueError(f"depths and widths must have one entry a stage; got {depths} and {widths}.")
        sizes = _sizes(default_kernel_sizes(depths) if kernel_sizes is None else kernel_sizes, depths)
        drop_path_rate = _checks.number("drop_path_rate", drop_path_rate, maximum=1.0)
        scale = None if layer_scale_init is None else _checks.number("layer_scale_init", layer_scale_init)
        super().__init__(
            widths, in_chans=in_chans, num_classes=num_classes, global_pool=global_pool, drop_rate=drop_rate
        )
        self.head_init_scale = _checks.number("head_init_scale", head_init_scale)
        stem = nn.Sequential(*_halve(self.in_chans, widths[0] // 2), nn.GELU(), *_halve(widths[0] // 2, widths[0]))
        self.downsample_layers = nn.ModuleList([stem, *(nn.Sequential(*_halve(*step)) for step in pairwise(widths))])
        rates = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        self.stages = nn.ModuleList(
            nn.Sequential(*(UniRepLKNetBlock(width, size, next(rates), scale) for size in stage))
            for width, stage in zip(widths, sizes, strict=True)
        )
        self.norm = LayerNorm(widths[-1], eps=1e-6)
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

    def reparameterize_unireplknet(self) -> None:
        """Merge all blocks in place, under the name used in the authors' code.

        The keys become those of the authors' merged weights. :func:`widefield.reparameterize` merges and folds
        everything it can, and verifies the result.

        Raises:
            RuntimeError: in training mode.
        """
        from widefield.surgery.walk import fuse_layers

        fuse_layers(self, select=lambda module: isinstance(module, UniRepLKNetBlock))

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's groups of parameters in network order; downsampling is grouped with the next block."""
        blocks = [(r"^downsample_layers\.(\d+)", (0,)), (r"^stages\.(\d+)\.(\d+)", None)]
        whole = r"^(?:downsample_layers|stages)\.(\d+)"
        return {"stem": r"^downsample_layers\.0", "blocks": whole if coarse else blocks}


def default_kernel_sizes(depths: Sequence[int]) -> list[list[int]]:
    """Return the official kernel size of every block, stage by stage.

    3 in the first stage, 13 in the others. In the third stage, from 18 blocks on only every second kernel is large,
    from 27 on every third. The official code defines these sizes only for its own depths.
    """
    sizes = [[LARGE if index else 3] * depth for index, depth in enumerate(depths)]
    for stage in sizes[2:3]:
        step = 1 if len(stage) < 18 else 2 if len(stage) < 27 else 3
        stage[:] = [3 if index % step else LARGE for index in range(len(stage))]
    return sizes


def _sizes(kernel_sizes: Sequence[int | Sequence[int]], depths: Sequence[int]) -> list[list[int]]:
    if not isinstance(kernel_sizes, Sequence) or len(kernel_sizes) != len(depths):
        raise ValueError(f"kernel_sizes must have one entry for each of {len(depths)} stages; got {kernel_sizes!r}.")
    stages = []
    for index, (entry, depth) in enumerate(zip(kernel_sizes, depths, strict=True)):
        stage = list(entry) if isinstance(entry, Sequence) else [entry] * depth
        if len(stage) != depth:
            raise ValueError(
                f"stage {index} has {depth} blocks and kernel_sizes has {len(stage)} sizes for it: "
                "give one size for all, or one for each."
            )
        stages.append([_size(size) for size in stage])
    return stages


def _size(value: object) -> int:
    size = _checks.integer("every entry of kernel_sizes", value)
    known = (3, *DILATED_BRANCHES)
    if size not in known:
        raise ValueError(f"every entry of kernel_sizes must be one of {', '.join(map(str, known))}; got {size}.")
    return size


def _halve(channels: int, width: int) -> tuple[nn.Conv2d, LayerNorm2d]:
    return nn.Conv2d(channels, width, 3, stride=2, padding=1), LayerNorm2d(width, eps=1e-6)


def _cfg(side: int = 224, **kwargs: Any) -> dict[str, Any]:
    """Return the configuration of the official evaluation: from 384 pixels on, images are resized without cropping."""
    warped: dict[str, Any] = {"crop_pct": 1.0, "crop_mode": "squash"} if side >= 384 else {}
    size: dict[str, Any] = {"input_size": (3, side, side), "pool_size": (side // 32, side // 32)}
    return cfg("downsample_layers.0.0", **size, **warped, license="apache-2.0", **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "unireplknet_a": _cfg(),
        "unireplknet_f": _cfg(),
        "unireplknet_p": _cfg(),
        "unireplknet_n": _cfg(),
        "unireplknet_t": _cfg(),
        "unireplknet_s": _cfg(),
        "unireplknet_s.in22k_ft_in1k_384": _cfg(384),
        "unireplknet_s.in22k": _cfg(num_classes=21841),
        "unireplknet_b": _cfg(384),
        "unireplknet_b.in22k": _cfg(num_classes=21841),
        "unireplknet_l": _cfg(384),
        "unireplknet_l.in22k": _cfg(192, num_classes=21841),
        "unireplknet_xl": _cfg(384),
        "unireplknet_xl.in22k": _cfg(192, num_classes=21841),
    }
)


@register_model
def unireplknet_a(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-A."""
    arguments = {"depths": (2, 2, 6, 2), "widths": (40, 80, 160, 320), **kwargs}
    return build(UniRepLKNet, "unireplknet_a", pretrained, **arguments)  # type: ignore[no-any-return]


@register_model
def unireplknet_f(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-F."""
    arguments = {"depths": (2, 2, 6, 2), "widths": (48, 96, 192, 384), **kwargs}
    return build(UniRepLKNet, "unireplknet_f", pretrained, **arguments)  # type: ignore[no-any-return]


@register_model
def unireplknet_p(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-P."""
    arguments = {"depths": (2, 2, 6, 2), "widths": (64, 128, 256, 512), **kwargs}
    return build(UniRepLKNet, "unireplknet_p", pretrained, **arguments)  # type: ignore[no-any-return]


@register_model
def unireplknet_n(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-N."""
    arguments = {"depths": (2, 2, 8, 2), "widths": (80, 160, 320, 640), **kwargs}
    return build(UniRepLKNet, "unireplknet_n", pretrained, **arguments)  # type: ignore[no-any-return]


@register_model
def unireplknet_t(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-T: every second block of the third stage has a large kernel."""
    arguments = {"depths": (3, 3, 18, 3), "widths": (80, 160, 320, 640), **kwargs}
    return build(UniRepLKNet, "unireplknet_t", pretrained, **arguments)  # type: ignore[no-any-return]


@register_model
def unireplknet_s(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-S: every third block of the third stage has a large kernel, as in B, L and XL."""
    arguments = {"depths": (3, 3, 27, 3), "widths": (96, 192, 384, 768), **kwargs}
    return build(UniRepLKNet, "unireplknet_s", pretrained, **arguments)  # type: ignore[no-any-return]


@register_model
def unireplknet_b(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-B."""
    arguments = {"depths": (3, 3, 27, 3), "widths": (128, 256, 512, 1024), **kwargs}
    return build(UniRepLKNet, "unireplknet_b", pretrained, **arguments)  # type: ignore[no-any-return]


@register_model
def unireplknet_l(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-L."""
    arguments = {"depths": (3, 3, 27, 3), "widths": (192, 384, 768, 1536), **kwargs}
    return build(UniRepLKNet, "unireplknet_l", pretrained, **arguments)  # type: ignore[no-any-return]


@register_model
def unireplknet_xl(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-XL."""
    arguments = {"depths": (3, 3, 27, 3), "widths": (256, 512, 1024, 2048), **kwargs}
    return build(UniRepLKNet, "unireplknet_xl", pretrained, **arguments)  # type: ignore[no-any-return]
