"""Backbones, registered in timm by importing this package."""

from widefield.models import (
    hornet,
    internimage,
    metaformers,
    mobilenetv2_lk,
    moganet,
    morf,
    replknet,
    resnet_cifar,
    slak,
    unireplknet,
    van,
)
from widefield.models._registry import Stated
from widefield.models.hornet import HorNet
from widefield.models.internimage import InternImage, InternImageH
from widefield.models.metaformers import MetaFormer
from widefield.models.moganet import MogaNet
from widefield.models.morf import MoRFConvNeXt, MoRFResNet
from widefield.models.replknet import RepLKNet
from widefield.models.slak import SLaK
from widefield.models.unireplknet import UniRepLKNet
from widefield.models.van import VAN

__all__ = [
    "VAN",
    "HorNet",
    "InternImage",
    "InternImageH",
    "MetaFormer",
    "MoRFConvNeXt",
    "MoRFResNet",
    "MogaNet",
    "RepLKNet",
    "SLaK",
    "Stated",
    "UniRepLKNet",
]

_FILES = (
    hornet,
    internimage,
    metaformers,
    mobilenetv2_lk,
    moganet,
    morf,
    replknet,
    resnet_cifar,
    slak,
    unireplknet,
    van,
)

MODULES = tuple(file.__name__.rpartition(".")[2] for file in _FILES)
"""The files here, by which timm knows whose models are whose."""

STATED: dict[str, Stated] = {name: stated for file in _FILES for name, stated in file.STATED.items()}
"""Name of a model -> what its paper or repository says of it."""
