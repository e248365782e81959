"""Set up backbones as in the published segmentation code, where it differs from timm's or from classification code."""

from __future__ import annotations

import torch.nn.functional as F
from timm.models.focalnet import Downsample
from torch import Tensor, nn

from widefield.dense._trunk_keys import is_mobilenetv2, plain_keys
from widefield.surgery.walk import replace

VAN_EPS = 1e-5
"""The eps of the norms after VAN's stages: its segmentation code takes PyTorch's default, the other 1e-6."""


def follow_published_code(body: nn.Module) -> None:
    """Set up a network in place as the published segmentation code of its family has it. Weights and keys stay.

    - VAN: the norms after the stages have the eps :data:`VAN_EPS`.
    - FocalNet: maps are padded before each downsampling, so that sides round up.
    - MobileNetV2 with an output stride below 32: in dilated stages, only the first block is (mmsegmentation).
    """
    for module in body.modules():
        if type(module).__name__ == "VAN":
            for name, norm in module.named_children():
                if name.startswith("norm") and hasattr(norm, "eps"):
                    norm.eps = VAN_EPS  # type: ignore[assignment]
    convs = [module.proj for module in body.modules() if isinstance(module, Downsample)]
    patches = [conv for conv in convs if type(conv) is nn.Conv2d and conv.kernel_size == conv.stride]
    if patches:
        replace(body, {conv: CeilPatches.like(conv) for conv in patches})
    _, network = plain_keys(body)
    if is_mobilenetv2(network):
        _dilate_first_blocks(network)


class CeilPatches(nn.Conv2d):
    """A convolution of patches that do not overlap. Sides round up: the last patches are completed with zeros."""

    @classmethod
    def like(cls, conv: nn.Conv2d) -> CeilPatches:
        """Return such a layer with the parameters of ``conv``."""
        layer = cls(conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0], device="meta")
        layer.weight, layer.bias = conv.weight, conv.bias
        return layer.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        rest = self.stride[0] - 1  # of what is padded, whole patches of zeros are never read
        return super().forward(F.pad(x, (0, rest, 0, rest)))


def _dilate_first_blocks(network: nn.Module) -> None:
    """Leave the dilation of each stage of a MobileNetV2 to its first block. A layer may have several kernels."""
    stages = network._modules.get("blocks")
    for stage in stages.children() if stages is not None else ():
        layers = [layer for block in stage.children() if (layer := block._modules.get("conv_dw")) is not None]
        last = layers[-1].modules() if layers else ()
        dilation = max((conv.dilation[0] for conv in last if isinstance(conv, nn.Conv2d)), default=1)
        for index, layer in enumerate(layers if dilation > 1 else ()):
            own = 1 if index else dilation
            for conv in layer.modules():
                if isinstance(conv, nn.Conv2d):
                    conv.dilation, conv.padding = (own, own), (own * (conv.kernel_size[0] // 2),) * 2
