"""MobileNetV2 with large depthwise kernels, from RepLKNet's guidelines 2 to 5.

Paper: Ding, Zhang, Han, Ding, "Scaling Up Your Kernels to 31x31: Revisiting Large Kernel Design in CNNs", CVPR 2022,
section 3, guidelines 2 to 5 and tables 2 to 4. The network is timm's ``mobilenetv2_100`` (Sandler et al. 2018) with
other depthwise convolutions. No weights have been published.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from typing import Any

from timm.layers import BatchNormAct2d
from timm.models import build_model_with_cfg, generate_default_cfgs, model_entrypoint, register_model
from timm.models.efficientnet import EfficientNet, efficientnet_init_weights
from torch import nn

from widefield import _checks
from widefield.models._registry import Stated, cfg
from widefield.nn import DepthwiseConv2d, LargeKernelConv2d, reparam
from widefield.nn.recompute import Blocks

__all__ = ["MobileNetV2", "mobilenetv2_lk"]

STATED = {"mobilenetv2_lk": Stated("not stated", "not stated", "tables 2 to 4, accuracies only")}

default_cfgs = generate_default_cfgs({"mobilenetv2_lk": cfg("conv_stem", "classifier")})


class MobileNetV2(EfficientNet):
    """timm's MobileNetV2, whose batch norms see every batch once also if blocks are recomputed."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable checkpointing: training keeps only the inputs of blocks and recomputes the rest in backward passes."""
        for stage in self.blocks:
            stage.grad_checkpointing = enable


@register_model
def mobilenetv2_lk(pretrained: bool = False, **kwargs: Any) -> EfficientNet:
    """MobileNetV2 with large depthwise kernels; by default the best network of table 3.

    Args:
        pretrained: as in timm.
        kernel_sizes: of all depthwise convolutions (tables 2 and 3), or one for each of the five stages of timm's
            features, at strides 2, 4, 8, 16 and 32. ``(3, 3, 3, 3, 13)`` is table 4's network. Default: 13.
        small_kernel: size of the kernel next to every larger one, each with a batch norm, merged by
            ``widefield.reparameterize``; 0 for none. Default: 3.
        shortcut: False removes all shortcuts (table 2). Default: True.
        kwargs: timm's; the norm must be a batch norm. An ``output_stride`` of 8 or 16 dilates both kernels like timm's
            3x3 kernels.

    Raises:
        TypeError, ValueError: sizes are not odd integers, or not five; a convolution does not support a large kernel.
    """
    features = {"feature_cls": "getter", "out_indices": (0, 1, 2, 3, 4)}
    return build_model_with_cfg(_build, "mobilenetv2_lk", pretrained, feature_cfg=features, **kwargs)


def _build(
    *, kernel_sizes: int | Sequence[int] = 13, small_kernel: int = 3, shortcut: bool = True, **kwargs: Any
) -> EfficientNet:
    from widefield.surgery.walk import replace

    model: EfficientNet = model_entrypoint("mobilenetv2_100")(**kwargs)  # create_model would drop None values
    model.__class__ = MobileNetV2  # timm's function makes an EfficientNet, from arguments that only it knows
    model.blocks = nn.Sequential(*(Blocks(*stage) for stage in model.blocks))
    sizes = [kernel_sizes] * len(model.stage_ends) if isinstance(kernel_sizes, int) else list(kernel_sizes)
    if len(sizes) != len(model.stage_ends):
        raise ValueError(
            f"kernel_sizes must be one size, or one for each of {len(model.stage_ends)} stages; got {tuple(sizes)}."
        )
    even = [size for size in sizes if _checks.integer("every entry of kernel_sizes", size) % 2 == 0]
    if even:
        raise ValueError(f"kernel_sizes must be odd, so that kernels are centered on a pixel; got {even[0]}.")
    small = _checks.integer("small_kernel", small_kernel, minimum=0)
    exchanged: dict[nn.Module, nn.Module] = {}
    for index, blocks in enumerate(model.blocks):
        for block in blocks:
            block.has_skip = block.has_skip and shortcut
            exchanged |= _enlarged(block, sizes[bisect(model.stage_ends, index)], small)
    return replace(model, exchanged)


def _enlarged(block: nn.Module, size: int, small: int) -> dict[nn.Module, nn.Module]:
    """Return the replacements of a block's depthwise convolution and of the norm after it.

    With a small kernel next to the large one, each has its own norm, and the block's norm is reduced to its activation.
    """
    parts = list(block.children())
    conv: Any = block.conv_dw
    norm: Any = parts[parts.index(conv) + 1]
    dilation = _undilate(conv)
    reason = reparam.why_not(conv)
    if reason is None and not isinstance(norm, BatchNormAct2d):
        reason = f"a {type(norm).__name__} follows it, not a batch norm"
    if reason is not None:
        raise ValueError(f"mobilenetv2_lk cannot put a large kernel in the place of {conv}: {reason}.")
    layer: nn.Module
    if 0 < small < size:
        layer = LargeKernelConv2d.from_conv2d(conv, size, small=small, init="random")
        for own in layer.modules():
            if isinstance(own, nn.BatchNorm2d):
                own.eps, own.momentum = norm.eps, norm.momentum
        exchanged = {conv: layer, norm: norm.act}
    else:
        layer = DepthwiseConv2d(conv.in_channels, conv.in_channels, size, conv.stride, size // 2, bias=False).to(
            conv.weight
        )
        exchanged = {conv: layer}
    efficientnet_init_weights(layer)
    for part in layer.modules():
        if isinstance(part, nn.Conv2d):
            part.dilation = dilation
            part.padding = tuple(d * (k // 2) for d, k in zip(dilation, part.kernel_size, strict=True))
    return exchanged


def _undilate(conv: nn.Conv2d) -> tuple[int, ...]:
    """Remove the dilation of a centered convolution that is about to be replaced, and return it."""
    dilation = conv.dilation
    spread = tuple(d * (k // 2) for d, k in zip(dilation, conv.kernel_size, strict=True))
    if conv.padding == spread:
        conv.dilation, conv.padding = (1, 1), tuple(k // 2 for k in conv.kernel_size)
    return dilation
