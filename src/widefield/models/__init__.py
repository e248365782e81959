"""Provide the backbones; importing this package registers them in timm.

Its modules import surgery inside functions, because ``import widefield`` imports them all.
"""

from widefield.models import mobilenetv2_lk as mobilenetv2_lk
from widefield.models import packaged as packaged
from widefield.models import shared as shared
from widefield.models._registry import Stated as Stated
from widefield.models.hornet import HorNet as HorNet
from widefield.models.internimage import InternImage as InternImage
from widefield.models.internimage import InternImageH as InternImageH
from widefield.models.metaformers import MetaFormer as MetaFormer
from widefield.models.moganet import MogaNet as MogaNet
from widefield.models.morf import MoRFConvNeXt as MoRFConvNeXt
from widefield.models.morf import MoRFResNet as MoRFResNet
from widefield.models.replknet import RepLKNet as RepLKNet
from widefield.models.resnet_cifar import CifarResNet as CifarResNet
from widefield.models.slak import SLaK as SLaK
from widefield.models.unireplknet import UniRepLKNet as UniRepLKNet
from widefield.models.van import VAN as VAN

_FAMILIES = {name: module for name, module in sorted(globals().items()) if hasattr(module, "STATED")}

MODULES = tuple(_FAMILIES)
"""Names of the modules that register networks, one per family; timm groups networks by module."""

STATED: dict[str, Stated] = {name: stated for module in _FAMILIES.values() for name, stated in module.STATED.items()}
"""Name of a network -> what its paper or repository states about it."""
