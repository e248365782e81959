"""Backbones, registered in timm by importing this package."""

from widefield.models.morf import MoRFConvNeXt, MoRFResNet

__all__ = ["MoRFConvNeXt", "MoRFResNet"]
