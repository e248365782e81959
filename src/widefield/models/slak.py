"""SLaK: ConvNeXt with kernels of up to 61x61, each split into two crossed bands, and widened for sparse training.

Paper: Liu et al., "More ConvNets in the 2020s: Scaling up Kernels Beyond 51x51 using Sparsity", ICLR 2023, sections 3
and 4. Keys are those of its code (github.com/VITA-Group/SLaK). The paper counts networks with 40 % of their weights
removed in training, for which use :class:`widefield.surgery.sparsity.DynamicSparsity`; the networks here are dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm, LayerNorm2d, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from widefield import _checks
from widefield.models._backbone import NormedBackbone, initialize_truncated
from widefield.models._registry import Stated, build, cfg
from widefield.nn.large_kernel import DecomposedConv2d, LargeKernelConv2d
from widefield.nn.reparam import ReparamConv2d

__all__ = ["SLaK"]

_SPARSE = "the paper's repository, of networks with 40 % of the weights removed"

STATED: dict[str, Stated] = {
    "slak_tiny": Stated("30M", "5.0G", _SPARSE),
    "slak_tiny_31": Stated("30M", "4.8G", _SPARSE),
    "slak_tiny_61": Stated("31M", "5.2G", _SPARSE),
    "slak_small": Stated("55M", "9.8G", _SPARSE),
    "slak_base": Stated("95M", "17.1G", _SPARSE),
}
"""Counts stated for each network."""

_EPS = 1e-6


class Block(nn.Module):
    """A large kernel, LayerNorm and an MLP of four times the width, in one residual connection.

    Args:
        width: channels.
        kernel_size, small_kernel, decomposed: see :class:`SLaK`.
        drop_path: probability that a sample skips the block in training.
        layer_scale_init: initial value of the branch's factors; 0 for none.
    """

    def __init__(
        self,
        width: int,
        kernel_size: int,
        small_kernel: int,
        *,
        decomposed: bool = True,
        drop_path: float = 0.0,
        layer_scale_init: float = 1e-6,
    ) -> None:
        super().__init__()
        self.large_kernel = _large_kernel(width, kernel_size, small_kernel, decomposed)
        self.norm = LayerNorm(width, eps=_EPS)
        self.pwconv1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), layer_scale_init)) if layer_scale_init > 0 else None
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        y = self.norm(self.large_kernel(x).permute(0, 2, 3, 1))
        y = self.pwconv2(self.act(self.pwconv1(y)))
        if self.gamma is not None:
            y = y * self.gamma
        out: Tensor = x + self.drop_path(y.permute(0, 3, 1, 2))
        return out


class SLaK(NormedBackbone):
    """SLaK-T with the default arguments, dense.

    Args:
        in_chans, num_classes, global_pool, drop_rate: see :class:`widefield.models._backbone.Backbone`.
        drop_path_rate: of the last block; it grows linearly from 0 at the first. The paper uses 0.1, 0.4 and 0.5 for
            tiny, small and base.
        depths: blocks of each stage.
        widths: channels of each stage before widening.
        width_factor: factor of the widths, which are rounded down.
        kernel_sizes: of each stage, odd.
        small_kernel: width of the bands, and size of the square kernel next to them; odd.
        decomposed: two crossed bands, :class:`widefield.nn.DecomposedConv2d`; otherwise one square kernel,
            :class:`widefield.nn.LargeKernelConv2d`. The small square is left out if it would not be smaller than the
            kernel.
        layer_scale_init: initial value of the branch's factors; 0 for none.

    Raises:
        TypeError, ValueError: depths, widths and kernel sizes differ in number; a size is not an odd integer.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        depths: Sequence[int] = (3, 3, 9, 3),
        widths: Sequence[int] = (96, 192, 384, 768),
        width_factor: float = 1.3,
        kernel_sizes: Sequence[int] = (51, 49, 47, 13),
        small_kernel: int = 5,
        decomposed: bool = True,
        layer_scale_init: float = 1e-6,
    ) -> None:
        if not len(depths) == len(widths) == len(kernel_sizes):
            raise ValueError(
                f"depths, widths and kernel_sizes must have one entry a stage each; got {tuple(depths)}, "
                f"{tuple(widths)} and {tuple(kernel_sizes)}."
            )
        factor = _checks.number("width_factor", width_factor)
        widths = [_checks.integer("every width times width_factor", int(width * factor)) for width in widths]
        super().__init__(
            widths, in_chans=in_chans, num_classes=num_classes, global_pool=global_pool, drop_rate=drop_rate
        )
        layer_scale_init = _checks.number("layer_scale_init", layer_scale_init)
        drop_path_rate = _checks.number("drop_path_rate", drop_path_rate, maximum=1.0)
        rates = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))

        self.downsample_layers = nn.ModuleList()
        for i, width in enumerate(widths):
            if i == 0:
                parts = [nn.Conv2d(self.in_chans, width, 4, stride=4), LayerNorm2d(width, eps=_EPS)]
            else:
                parts = [LayerNorm2d(widths[i - 1], eps=_EPS), nn.Conv2d(widths[i - 1], width, 2, stride=2)]
            self.downsample_layers.append(nn.Sequential(*parts))
        self.stages = nn.ModuleList()
        for width, depth, size in zip(widths, depths, kernel_sizes, strict=True):
            blocks = [
                Block(
                    width,
                    size,
                    small_kernel,
                    decomposed=decomposed,
                    drop_path=next(rates),
                    layer_scale_init=layer_scale_init,
                )
                for _ in range(depth)
            ]
            self.stages.append(nn.Sequential(*blocks))
        self.norm: nn.Module = LayerNorm(widths[-1], eps=_EPS)
        self.apply(initialize_truncated)
        self.head = self.classifier()

    def enter(self, index: int, x: Tensor) -> Tensor:
        """Downsample: 4x4 patches of the image, 2x2 patches of later maps."""
        y: Tensor = self.downsample_layers[index](x)
        return y

    def stage(self, index: int, x: Tensor) -> Tensor:
        """Run the blocks of a stage."""
        return self.run(self.stages[index], x)  # type: ignore[arg-type]

    def parts(self, index: int) -> tuple[str, ...]:
        """Return the names of a stage and of the downsampling before it."""
        return f"stages.{index}", f"downsample_layers.{index}"

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's groups of parameters, by stages or by blocks, for layer-wise learning rates."""
        if coarse:
            return {"stem": r"^downsample_layers\.0", "blocks": r"^(?:downsample_layers|stages)\.(\d+)"}
        blocks = [
            (r"^downsample_layers\.(\d+)", (0,)),
            (r"^stages\.(\d+)\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^downsample_layers\.0", "blocks": blocks}


def _large_kernel(width: int, kernel_size: int, small_kernel: int, decomposed: bool) -> ReparamConv2d:
    if decomposed:
        return DecomposedConv2d(width, width, kernel_size, small=small_kernel)
    return LargeKernelConv2d(width, width, kernel_size, small=small_kernel if small_kernel < kernel_size else None)


default_cfgs = generate_default_cfgs({name: cfg("downsample_layers.0.0") for name in STATED})


@register_model
def slak_tiny(pretrained: bool = False, **kwargs: Any) -> SLaK:
    """SLaK-T (table 2)."""
    return build(SLaK, "slak_tiny", pretrained, **kwargs)  # type: ignore[no-any-return]


@register_model
def slak_tiny_31(pretrained: bool = False, **kwargs: Any) -> SLaK:
    """SLaK-T with kernels of up to 31x31."""
    model_args = {"kernel_sizes": (31, 29, 27, 13), **kwargs}
    return build(SLaK, "slak_tiny_31", pretrained, **model_args)  # type: ignore[no-any-return]


@register_model
def slak_tiny_61(pretrained: bool = False, **kwargs: Any) -> SLaK:
    """SLaK-T with kernels of up to 61x61."""
    model_args = {"kernel_sizes": (61, 59, 57, 13), **kwargs}
    return build(SLaK, "slak_tiny_61", pretrained, **model_args)  # type: ignore[no-any-return]


@register_model
def slak_small(pretrained: bool = False, **kwargs: Any) -> SLaK:
    """SLaK-S (table 2)."""
    model_args = {"depths": (3, 3, 27, 3), **kwargs}
    return build(SLaK, "slak_small", pretrained, **model_args)  # type: ignore[no-any-return]


@register_model
def slak_base(pretrained: bool = False, **kwargs: Any) -> SLaK:
    """SLaK-B (table 2)."""
    model_args = {"depths": (3, 3, 27, 3), "widths": (128, 256, 512, 1024), **kwargs}
    return build(SLaK, "slak_base", pretrained, **model_args)  # type: ignore[no-any-return]
