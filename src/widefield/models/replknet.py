"""RepLKNet: depthwise kernels of up to 31x31, each with a parallel 5x5 kernel that is merged after training.

Paper: Ding, Zhang, Han, Ding, "Scaling Up Your Kernels to 31x31: Revisiting Large Kernel Design in CNNs", CVPR 2022,
section 4, figure 4 and tables 5 and 6. State-dict keys are those of the authors' code (MIT license,
github.com/DingXiaoH/RepLKNet-pytorch), whose weights load, reparameterized or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import DropPath, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from widefield import _checks
from widefield.models._backbone import Backbone
from widefield.models._registry import Stated, build, cfg
from widefield.nn import ConvNorm, DepthwiseConv2d, LargeKernelConv2d
from widefield.nn.reparam import ReparamConv2d

__all__ = ["RepLKNet"]

STATED = {
    "replknet_31b": Stated("79.3M", "15.3G", "table 5, of the merged network to 0.1"),
    "replknet_31l": Stated("172M", "96.0G at 384x384", "table 6"),
    "replknet_xl": Stated("335M", "128.7G at 320x320", "table 6"),
}


class RepLKBlock(nn.Module):
    """Norm, 1x1, large kernel, 1x1, each convolution with its own norm, in a residual connection; figure 4."""

    def __init__(self, width: int, inner: int, kernel_size: int, small: int | None, drop_path: float) -> None:
        super().__init__()
        self.pw1 = ConvNorm(nn.Conv2d(width, inner, 1, bias=False), nn.ReLU())
        self.pw2 = ConvNorm(nn.Conv2d(inner, width, 1, bias=False))
        self.large_kernel = LargeKernelConv2d(inner, inner, kernel_size, small=small)
        self.lk_nonlinear = nn.ReLU()
        self.prelkb_bn = nn.BatchNorm2d(width)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        y = self.large_kernel(self.pw1(self.prelkb_bn(x)))
        out: Tensor = x + self.drop_path(self.pw2(self.lk_nonlinear(y)))
        return out


class ConvFFN(nn.Module):
    """The channel mixer: a norm and two 1x1 convolutions; figure 4."""

    def __init__(self, width: int, inner: int, drop_path: float) -> None:
        super().__init__()
        self.drop_path = DropPath(drop_path)
        self.preffn_bn = nn.BatchNorm2d(width)
        self.pw1 = ConvNorm(nn.Conv2d(width, inner, 1, bias=False))
        self.pw2 = ConvNorm(nn.Conv2d(inner, width, 1, bias=False))
        self.nonlinear = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        y = self.nonlinear(self.pw1(self.preffn_bn(x)))
        out: Tensor = x + self.drop_path(self.pw2(y))
        return out


class RepLKNet(Backbone):
    """Four stages in which RepLK blocks and ConvFFN blocks alternate.

    Input (N, in_chans, H, W) of any size; features at strides 4, 8, 16 and 32 (sides round up).

    Args:
        in_chans, num_classes, global_pool, drop_rate: as in timm.
        drop_path_rate: of the last pair of blocks; it grows linearly from 0, and both blocks of a pair share it. The
            authors train 31B with 0.5 (ImageNet-1K, 224x224) and 0.1 (ImageNet-22K), 31L with 0.1.
        depths: pairs of a RepLK block and a ConvFFN block in each stage.
        widths: channels of each stage.
        kernel_sizes: of each stage.
        small_kernel: size of the parallel kernel, or 0 for none, as in XL (timm drops None). Kernels smaller than that
            have no parallel kernel.
        depthwise_ratio: channels of the large kernels per channel of the stage; 1.5 in XL.
        ffn_ratio: hidden channels of a ConvFFN block per channel of the stage.

    Raises:
        TypeError, ValueError: arguments out of range, or sequences of different lengths.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        depths: Sequence[int] = (2, 2, 18, 2),
        widths: Sequence[int] = (128, 256, 512, 1024),
        kernel_sizes: Sequence[int] = (31, 29, 27, 13),
        small_kernel: int = 5,
        depthwise_ratio: float = 1.0,
        ffn_ratio: float = 4.0,
    ) -> None:
        if not len(depths) == len(widths) == len(kernel_sizes) >= 1:
            raise ValueError(
                "depths, widths and kernel_sizes need one entry for each stage; "
                f"got {tuple(depths)}, {tuple(widths)} and {tuple(kernel_sizes)}."
            )
        super().__init__(
            widths, in_chans=in_chans, num_classes=num_classes, global_pool=global_pool, drop_rate=drop_rate
        )
        kernel_sizes = [_checks.integer("every entry of kernel_sizes", size) for size in kernel_sizes]
        _checks.integer("small_kernel", small_kernel, minimum=0)
        _checks.number("drop_path_rate", drop_path_rate, maximum=1.0)
        rates = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))

        def blocks(depth: int, width: int, size: int) -> Iterator[nn.Module]:
            small = small_kernel if 0 < small_kernel <= size else None
            for _ in range(depth):
                rate = next(rates)
                yield RepLKBlock(width, int(width * depthwise_ratio), size, small, rate)
                yield ConvFFN(width, int(width * ffn_ratio), rate)

        first = widths[0]
        self.stem = nn.Sequential(
            ConvNorm(nn.Conv2d(in_chans, first, 3, 2, 1, bias=False), nn.ReLU()),
            ConvNorm(DepthwiseConv2d(first, first, 3, padding=1, bias=False), nn.ReLU()),
            ConvNorm(nn.Conv2d(first, first, 1, bias=False), nn.ReLU()),
            ConvNorm(DepthwiseConv2d(first, first, 3, 2, 1, bias=False), nn.ReLU()),
        )
        self.stages = nn.ModuleList(
            nn.ModuleDict({"blocks": nn.Sequential(*blocks(*stage))})
            for stage in zip(depths, widths, kernel_sizes, strict=True)
        )
        self.transitions = nn.ModuleList(
            nn.Sequential(
                ConvNorm(nn.Conv2d(before, width, 1, bias=False), nn.ReLU()),
                ConvNorm(DepthwiseConv2d(width, width, 3, 2, 1, bias=False), nn.ReLU()),
            )
            for before, width in pairwise(widths)
        )
        self.norm: nn.Module = nn.BatchNorm2d(widths[-1])
        self.head = self.classifier()

    def enter(self, index: int, x: Tensor) -> Tensor:
        """Return the input of a stage."""
        y: Tensor = self.transitions[index - 1](x) if index else self.stem(x)
        return y

    def stage(self, index: int, x: Tensor) -> Tensor:
        """Return the feature of a stage."""
        return self.run(self.get_submodule(f"stages.{index}.blocks"), x)  # type: ignore[arg-type]

    def parts(self, index: int) -> tuple[str, ...]:
        """Return the names of a stage's blocks and of the stem or transition before them."""
        blocks = f"stages.{index}.blocks"
        return (blocks, f"transitions.{index - 1}") if index else (blocks, "stem")

    def finish(self, x: Tensor) -> Tensor:
        """Normalize the last feature."""
        y: Tensor = self.norm(x)
        return y

    def unfinish(self) -> None:
        """Remove the last norm."""
        self.norm = nn.Identity()

    def structural_reparam(self) -> None:
        """Merge only the large kernels, in place, under the name used in the authors' code.

        The keys become those of the authors' merged weights. :func:`widefield.reparameterize` merges and folds
        everything it can, and verifies the result.

        Raises:
            RuntimeError: in training mode.
        """
        from widefield.surgery.walk import fuse_layers

        fuse_layers(self, select=lambda module: isinstance(module, ReparamConv2d))

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's groups of parameters in the order of the network: blocks, or with ``coarse`` stages."""
        stages = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.blocks\.(\d+)"
        after = (9999,)  # sorts a transition after the blocks of the previous stage
        return {"stem": r"^stem", "blocks": [(stages, None), (r"^transitions\.(\d+)", after), (r"^norm", (99999,))]}


def _cfg(size: int = 224, **kwargs: Any) -> dict[str, Any]:
    source = {"license": "mit", "origin_url": "https://github.com/DingXiaoH/RepLKNet-pytorch"}
    pool = size // 32, size // 32
    return cfg("stem.0.conv", **{"input_size": (3, size, size), "pool_size": pool, **source, **kwargs})


# At 384 pixels the authors' code resizes images to a square; at smaller sizes it crops them, which is the default.
_384 = _cfg(384, crop_pct=1.0, crop_mode="squash")

default_cfgs = generate_default_cfgs(
    {
        "replknet_31b.in1k": _cfg(),
        "replknet_31b.in1k_384": _384,
        "replknet_31b.in22k": _cfg(num_classes=21841),
        "replknet_31b.in22k_ft_in1k": _cfg(),
        "replknet_31b.in22k_ft_in1k_384": _384,
        "replknet_31l.in22k_ft_in1k_384": _384,
        "replknet_31l.in22k": _cfg(num_classes=21841),
        "replknet_xl.megdata73m_ft_in1k": _cfg(320, mean=IMAGENET_INCEPTION_MEAN, std=IMAGENET_INCEPTION_STD),
    }
)


@register_model
def replknet_31b(pretrained: bool = False, **kwargs: Any) -> RepLKNet:
    """RepLKNet-31B; with other ``kernel_sizes``, the networks of table 5."""
    return build(RepLKNet, "replknet_31b", pretrained, **kwargs)  # type: ignore[no-any-return]


@register_model
def replknet_31l(pretrained: bool = False, **kwargs: Any) -> RepLKNet:
    """RepLKNet-31L (section 4.2)."""
    model_args = {"widths": (192, 384, 768, 1536), **kwargs}
    return build(RepLKNet, "replknet_31l", pretrained, **model_args)  # type: ignore[no-any-return]


@register_model
def replknet_xl(pretrained: bool = False, **kwargs: Any) -> RepLKNet:
    """RepLKNet-XL: no parallel kernels (remark 3); its kernels are 27-27-27-13 in the authors' code."""
    model_args = {
        "widths": (256, 512, 1024, 2048),
        "kernel_sizes": (27, 27, 27, 13),
        "small_kernel": 0,
        "depthwise_ratio": 1.5,
        **kwargs,
    }
    return build(RepLKNet, "replknet_xl", pretrained, **model_args)  # type: ignore[no-any-return]
