"""Backbones, registered in timm by importing this package."""

from widefield.models.morf import MoRFConvNeXt, MoRFResNet

__all__ = ["MoRFConvNeXt", "MoRFResNet"]

MODULES = ("morf",)
"""The files here, by which timm knows whose models are whose."""
