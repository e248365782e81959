"""Backbones, registered in timm by importing this package."""

from importlib import import_module

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

MODULES = (
    "hornet",
    "internimage",
    "metaformers",
    "mobilenetv2_lk",
    "moganet",
    "morf",
    "replknet",
    "resnet_cifar",
    "slak",
    "unireplknet",
    "van",
)
"""The files here, by which timm knows whose models are whose."""

STATED: dict[str, Stated] = {
    name: stated for file in MODULES for name, stated in import_module(f"{__name__}.{file}").STATED.items()
}
"""Name of a model -> what its paper or repository says of it."""
