"""Backbones, registered in timm by importing this package."""

from widefield.models import internimage, mobilenetv2_lk, morf, replknet, resnet_cifar, slak, unireplknet
from widefield.models._registry import Stated
from widefield.models.internimage import InternImage
from widefield.models.morf import MoRFConvNeXt, MoRFResNet
from widefield.models.replknet import RepLKNet
from widefield.models.slak import SLaK
from widefield.models.unireplknet import UniRepLKNet

__all__ = ["InternImage", "MoRFConvNeXt", "MoRFResNet", "RepLKNet", "SLaK", "Stated", "UniRepLKNet"]

_FILES = (internimage, mobilenetv2_lk, morf, replknet, resnet_cifar, slak, unireplknet)

MODULES = tuple(file.__name__.rpartition(".")[2] for file in _FILES)
"""The files here, by which timm knows whose models are whose."""

STATED: dict[str, Stated] = {name: stated for file in _FILES for name, stated in file.STATED.items()}
"""Name of a model -> what its paper or repository says of it."""
