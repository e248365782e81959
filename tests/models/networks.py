"""Small versions of every registered network, with weights and statistics like those of a trained one."""

import timm
import torch
from timm.models import is_model_in_modules
from torch import nn

from widefield import models

NAMES = [name for name in timm.list_models() if is_model_in_modules(name, models.MODULES)]
DISTINCT = [
    "hornet_tiny_7x7", "hornet_tiny_gf", "hornet_base_gf_img384",
    "internimage_t", "internimage_s", "internimage_l", "internimage_h", "internimage_g",
    "metaformer_tiny", "mobilenetv2_lk", "moganet_xtiny",
    "morf_convnext_tiny", "morf_resnet18", "morf_resnet50",
    "replknet_31b", "replknet_xl", "resnet18_cifar", "resnet20_cifar", "resnet56_cifar",
    "slak_tiny", "slak_tiny_31", "slak_tiny_61", "unireplknet_a", "van_b0",
]  # fmt: skip
"""The names whose small versions differ: most variants of a family have other depths and widths only."""
WIDTHS = (16, 24, 32, 40)
SMALL = {
    "internimage_h": {
        "depths": (1, 1, 3, 1),
        "widths": (16, 32, 48, 64),
        "groups": (1, 2, 3, 4),
        "norms_after": (1,),
        "head_width": 12,
        "heads": 3,
        "hidden": 10,
    },
    "internimage": {"depths": (1, 1, 2, 1), "widths": (16, 32, 48, 64), "groups": (1, 2, 3, 4)},
    "hornet": {"depths": (1, 1, 2, 1), "widths": (16, 32, 64, 128)},
    "metaformer": {"depths": (1, 1, 2, 1), "widths": WIDTHS},
    "moganet": {"depths": (1, 1, 2, 1), "widths": WIDTHS},
    "van": {"depths": (1, 1, 2, 1), "widths": WIDTHS},
    "morf_convnext": {"depths": (1, 1, 2, 1), "dims": WIDTHS},
    "morf_resnet": {"layers": (1, 1, 1, 1)},
    "replknet": {"depths": (1, 1, 2, 1), "widths": WIDTHS},
    "slak": {"depths": (1, 1, 2, 1), "widths": WIDTHS},
    "unireplknet": {"depths": (1, 1, 2, 1), "widths": WIDTHS},
}
BACKBONES = [
    "hornet_tiny_7x7",
    "hornet_tiny_gf",
    "internimage_t",
    "internimage_s",
    "internimage_h",
    "metaformer_tiny",
    "moganet_xtiny",
    "replknet_31b",
    "resnet20_cifar",
    "slak_tiny",
    "unireplknet_a",
    "van_b0",
]
"""Networks of every family built here, not converted from timm's; several where variants have other layers."""
ONE_A_FAMILY = [
    "hornet_tiny_gf", "metaformer_tiny", "moganet_xtiny", "van_b0",
    "internimage_t", "mobilenetv2_lk", "morf_convnext_tiny", "replknet_31b", "resnet20_cifar", "slak_tiny",
    "unireplknet_a",
]  # fmt: skip


def small(name, **arguments):
    given = next((given for prefix, given in SMALL.items() if name.startswith(prefix)), {})
    return timm.create_model(name, **{"num_classes": 7, **given, **arguments})


def settled(model):
    """Give norms statistics like after training, and make every layer matter: some start with scales of 0 or 1e-6."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_scale" in name:  # products of branches grow with the square of these
                nn.init.uniform_(parameter, 0.05, 0.15)
            elif name.endswith((".offset.weight", ".mask.weight", "center_feature_scale_proj_weight")):
                nn.init.normal_(parameter, 0, 0.1)  # zeros would block the gradients before them
            elif "gamma" in name or "beta" in name or "scale" in name:
                nn.init.uniform_(parameter, 0.3, 0.6)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.1)
                nn.init.uniform_(module.running_var, 0.8, 1.2)
                nn.init.uniform_(module.weight, 0.8, 1.2)
    return model.eval()
