"""ResNet and ConvNeXt with mixtures of receptive fields.

Paper: Lian, Yu, Wang, "Receptive Fields As Experts in Convolutional Neural Architectures", ICML 2024, section 3.2,
appendix B and tables 1, 2 and 6. The networks are timm's own (ResNet: He et al. 2016; ConvNeXt: Liu et al. 2022) with
every depthwise 7x7 convolution (ConvNeXt) or 3x3 convolution (ResNet) replaced. No weights have been published.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.convnext import ConvNeXt
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from widefield import _checks, _history
from widefield.models._registry import Stated, cfg
from widefield.nn import MoRFConv2d
from widefield.nn.recompute import Blocks

__all__ = ["MoRFConvNeXt", "MoRFResNet"]

STAGES = (1, 2, 3, 4)


class MoRFConvNeXt(ConvNeXt):
    """timm's ConvNeXt with mixtures as depthwise convolutions; figure 5 of the paper with the default arguments.

    Args:
        in_chans, num_classes, global_pool, drop_rate, drop_path_rate, depths, dims: as in timm.
        kernel_sizes, routing, attention, top_k, router_width: see :class:`widefield.nn.MoRFConv2d`.
        stages: stages with mixtures, from 1 to 4 (table 6).
        kwargs: further arguments of timm's ConvNeXt, except ``kernel_sizes``.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        *,
        kernel_sizes: Sequence[int | tuple[int, int]] = (3, 5, 7, 9, 11),
        routing: str = "soft",
        attention: str = "none",
        top_k: int = 2,
        router_width: int | None = None,
        stages: Sequence[int] = STAGES,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            in_chans,
            num_classes,
            global_pool,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            depths=tuple(depths),
            dims=tuple(dims),
            **kwargs,
        )
        prefixes = [f"stages.{stage - 1}.blocks." for stage in _stages(stages)]
        settings = tuple(kernel_sizes), routing, attention, top_k, router_width
        for layer in _mix(self, settings, prefixes, size=7):
            for weight in layer.kernels():  # as ConvNeXt initializes its convolutions
                nn.init.trunc_normal_(weight, std=0.02)
            for bias in layer.biases() or ():
                nn.init.zeros_(bias)


class MoRFResNet(ResNet):
    """timm's ResNet with mixtures as 3x3 convolutions, each initialized like ResNet's convolutions.

    The paper does not state the sizes for ResNets. The default pair, a 3x3 and a 3x3 with dilation 2 (SKNet's), gives
    the paper's 37M parameters for ResNet-50, but 23M instead of 20M for ResNet-18 (docs/morf.md).

    Args:
        in_chans, num_classes, global_pool, drop_rate, drop_path_rate, layers, block: as in timm.
        kernel_sizes, routing, attention, top_k, router_width, stages: as in :class:`MoRFConvNeXt`.
        kwargs: further arguments of timm's ResNet.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        layers: Sequence[int] = (2, 2, 2, 2),
        *,
        block: type[BasicBlock] | type[Bottleneck] = BasicBlock,
        kernel_sizes: Sequence[int | tuple[int, int]] = (3, (3, 2)),
        routing: str = "soft",
        attention: str = "none",
        top_k: int = 2,
        router_width: int | None = None,
        stages: Sequence[int] = STAGES,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            block,
            tuple(layers),
            num_classes,
            in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            **kwargs,
        )
        for stage in STAGES:  # timm recomputes blocks, too, but then batch norms see every batch twice
            self.set_submodule(f"layer{stage}", Blocks(*self.get_submodule(f"layer{stage}").children()))
        prefixes = [f"layer{stage}." for stage in _stages(stages)]
        settings = tuple(kernel_sizes), routing, attention, top_k, router_width
        for layer in _mix(self, settings, prefixes, size=3):
            for weight in layer.kernels():
                nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable checkpointing: training keeps only the inputs of blocks and recomputes the rest in backward passes."""
        for module in self.children():
            if isinstance(module, Blocks):
                module.grad_checkpointing = enable


def _stages(stages: Sequence[int]) -> list[int]:
    chosen = sorted({_checks.integer("every entry of stages", stage, maximum=len(STAGES)) for stage in stages})
    if not chosen:
        raise ValueError(f"stages is empty: name at least one of {STAGES}, or use timm's model without mixtures.")
    return chosen


def _mix(
    model: nn.Module,
    settings: tuple[tuple[int | tuple[int, int], ...], str, str, int, int | None],
    prefixes: Sequence[str],
    size: int,
) -> list[MoRFConv2d]:
    """Replace convolutions of a size with mixtures, whose settings are the first five of :class:`MoRF`."""
    from widefield.surgery import MoRF, convert

    def where(module: nn.Module, name: str) -> bool:
        return name.startswith(tuple(prefixes)) and getattr(module, "kernel_size", None) == (size, size)

    convert(model, MoRF(*settings, init="random"), where, inplace=True)
    _history.forget(model)  # the constructor does it again
    return [module for module in model.modules() if isinstance(module, MoRFConv2d)]


STATED = {
    f"morf_{name}": Stated(parameters, "not stated", "table 1, after reparameterization: see docs/morf.md")
    for name, parameters in (
        ("resnet18", "20M"),
        ("resnet50", "37M"),
        ("convnext_tiny", "31M"),
        ("convnext_small", "52M"),
        ("convnext_base", "91M"),
    )
}

default_cfgs = generate_default_cfgs(
    {
        "morf_resnet18": cfg("conv1", "fc", crop_pct=0.95),
        "morf_resnet50": cfg("conv1", "fc", crop_pct=0.95),
        "morf_convnext_tiny": cfg("stem.0", "head.fc"),
        "morf_convnext_small": cfg("stem.0", "head.fc"),
        "morf_convnext_base": cfg("stem.0", "head.fc"),
    }
)


def _convnext(variant: str, pretrained: bool, **kwargs: Any) -> Any:
    feature_cfg = {"out_indices": (0, 1, 2, 3), "flatten_sequential": True}
    return build_model_with_cfg(MoRFConvNeXt, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


@register_model
def morf_resnet18(pretrained: bool = False, **kwargs: Any) -> MoRFResNet:
    """ResNet-18 with mixtures (table 1)."""
    model_args = {"block": BasicBlock, "layers": (2, 2, 2, 2), **kwargs}
    return build_model_with_cfg(MoRFResNet, "morf_resnet18", pretrained, **model_args)  # type: ignore[no-any-return]


@register_model
def morf_resnet50(pretrained: bool = False, **kwargs: Any) -> MoRFResNet:
    """ResNet-50 with mixtures (table 1)."""
    model_args = {"block": Bottleneck, "layers": (3, 4, 6, 3), **kwargs}
    return build_model_with_cfg(MoRFResNet, "morf_resnet50", pretrained, **model_args)  # type: ignore[no-any-return]


@register_model
def morf_convnext_tiny(pretrained: bool = False, **kwargs: Any) -> MoRFConvNeXt:
    """ConvNeXt-T with mixtures (table 1, figure 5)."""
    model_args = {"depths": (3, 3, 9, 3), "dims": (96, 192, 384, 768), **kwargs}
    return _convnext("morf_convnext_tiny", pretrained, **model_args)  # type: ignore[no-any-return]


@register_model
def morf_convnext_small(pretrained: bool = False, **kwargs: Any) -> MoRFConvNeXt:
    """ConvNeXt-S with mixtures (table 1)."""
    model_args = {"depths": (3, 3, 27, 3), "dims": (96, 192, 384, 768), **kwargs}
    return _convnext("morf_convnext_small", pretrained, **model_args)  # type: ignore[no-any-return]


@register_model
def morf_convnext_base(pretrained: bool = False, **kwargs: Any) -> MoRFConvNeXt:
    """ConvNeXt-B with mixtures (table 1)."""
    model_args = {"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024), **kwargs}
    return _convnext("morf_convnext_base", pretrained, **model_args)  # type: ignore[no-any-return]
