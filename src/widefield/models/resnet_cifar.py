"""ResNets for images of 32x32, as in table I of GMConv (Chen et al.; docs/gmconv.md).

Paper: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2: a 3x3 convolution,
three stages of 16, 32 and 64 channels at strides 1, 2 and 4, no parameters in the shortcuts.

The network of 18 layers is from DeVries, Taylor, "Improved Regularization of Convolutional Neural Networks with
Cutout", 2017, whose training GMConv adopts. It is the ImageNet network with a 3x3 convolution in place of the 7x7 and
the max pool, at strides 1 to 8. Blocks and keys are timm's; the classifier is ``head``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from timm.layers import DropPath, calculate_drop_path_rates
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock
from torch import Tensor, nn
from torch.nn import functional as F

from widefield import _checks
from widefield.models._backbone import Backbone
from widefield.models._registry import Stated, cfg, official_weights

__all__ = ["CifarResNet"]

SHORTCUTS = ("pad", "project")

STATED = {
    "resnet20_cifar": Stated("0.27M", "42M", "GMConv, table I; 32x32, four operations for each output of a batch norm"),
    "resnet56_cifar": Stated("0.85M", "128M", "GMConv, table I; likewise"),
    "resnet18_cifar": Stated("11.22M", "558M", "GMConv, table I; likewise, and 100 classes"),
}


class PaddedShortcut(nn.Module):
    """Every ``stride``-th pixel, padded with zero channels: option A of He et al.

    Args:
        channels: number of zero channels, which come last.
        stride: of rows and columns.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C + channels, ceil(H/stride), ceil(W/stride))."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.channels))

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"channels={self.channels}, stride={self.stride}"


class CifarResNet(Backbone):
    """A 3x3 convolution and stages ``layer1``, ``layer2``, ... of timm's BasicBlock.

    Input (N, in_chans, H, W) of any size; features at strides 1, 2, 4, ..., one per stage (sides round up).

    Args:
        in_chans, num_classes, global_pool, drop_rate: as in timm.
        drop_path_rate: of the last block; it grows linearly from 0.
        depths: blocks of each stage.
        widths: channels of each stage, not decreasing.
        shortcut: of the first block of a stage: "pad" (no parameters, option A of He et al.) or "project" (a 1x1
            convolution and batch norm, option B). resnet20 and resnet56 have 269,722 and 853,018 parameters with "pad",
            272,474 and 855,770 with "project".

    Raises:
        TypeError, ValueError: arguments out of range, sequences of different lengths, an unknown shortcut.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 10,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        depths: Sequence[int] = (3, 3, 3),
        widths: Sequence[int] = (16, 32, 64),
        shortcut: str = "pad",
    ) -> None:
        if not len(depths) == len(widths) >= 1:
            raise ValueError(
                f"depths and widths need one entry for each stage; got {tuple(depths)} and {tuple(widths)}."
            )
        if list(widths) != sorted(widths):
            raise ValueError(f"widths must not shrink from stage to stage; got {tuple(widths)}.")
        _checks.choice("shortcut", shortcut, SHORTCUTS)
        super().__init__(
            widths, in_chans=in_chans, num_classes=num_classes, global_pool=global_pool, drop_rate=drop_rate
        )
        for index, info in enumerate(self.feature_info):
            info["reduction"] = 1 << index
        _checks.number("drop_path_rate", drop_path_rate, maximum=1.0)
        rates = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))

        def blocks(depth: int, before: int, width: int, stride: int) -> Iterator[nn.Module]:
            for index in range(depth):
                shrinks = index == 0 and (stride, before) != (1, width)
                yield BasicBlock(
                    width if index else before,
                    width,
                    1 if index else stride,
                    _shortcut(shortcut, before, width, stride) if shrinks else None,
                    drop_path=DropPath(next(rates)),
                )

        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.act1 = nn.ReLU(inplace=True)
        for index, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            stage = blocks(depth, widths[max(index - 1, 0)], width, 2 if index else 1)
            self.add_module(f"layer{index + 1}", nn.Sequential(*stage))
        self.head = self.classifier()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def enter(self, index: int, x: Tensor) -> Tensor:
        """Run the stem before the first stage; other stages read the previous feature."""
        return x if index else self.act1(self.bn1(self.conv1(x)))

    def stage(self, index: int, x: Tensor) -> Tensor:
        """Return the feature (N, C, H, W) of a stage."""
        return self.run(self.get_submodule(f"layer{index + 1}"), x)  # type: ignore[arg-type]

    def parts(self, index: int) -> tuple[str, ...]:
        """Return the name of the stage."""
        return (f"layer{index + 1}",)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return timm's groups of parameters in the order of the network, for layer-wise learning rates."""
        return {"stem": r"^conv1|^bn1", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}


def _shortcut(kind: str, before: int, width: int, stride: int) -> nn.Module:
    if kind == "pad":
        return PaddedShortcut(width - before, stride)
    return nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))


def _build(variant: str, pretrained: bool, depths: Sequence[int], **kwargs: Any) -> Any:
    return build_model_with_cfg(
        CifarResNet,
        variant,
        pretrained,
        pretrained_filter_fn=official_weights,
        feature_cfg={"out_indices": tuple(range(len(depths))), "feature_cls": "getter"},
        depths=depths,
        **kwargs,
    )


def _cfg(pool_size: int) -> dict[str, Any]:
    return cfg(
        "conv1",
        num_classes=10,
        input_size=(3, 32, 32),
        pool_size=(pool_size, pool_size),
        crop_pct=1.0,
        mean=(0.4914, 0.4822, 0.4465),  # of CIFAR-10's training images
        std=(0.2470, 0.2435, 0.2616),
    )


default_cfgs = generate_default_cfgs(
    {"resnet20_cifar": _cfg(8), "resnet56_cifar": _cfg(8), "resnet18_cifar": _cfg(4)},
)


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20 for CIFAR: three blocks in each of three stages."""
    model: CifarResNet = _build("resnet20_cifar", pretrained, **{"depths": (3, 3, 3), **kwargs})
    return model


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-56 for CIFAR: nine blocks in each of three stages."""
    model: CifarResNet = _build("resnet56_cifar", pretrained, **{"depths": (9, 9, 9), **kwargs})
    return model


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-18 for CIFAR: two blocks in each of four stages, with projections."""
    arguments = {"depths": (2, 2, 2, 2), "widths": (64, 128, 256, 512), "shortcut": "project", **kwargs}
    model: CifarResNet = _build("resnet18_cifar", pretrained, **arguments)
    return model
