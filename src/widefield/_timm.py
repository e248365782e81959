"""Build timm's networks without losing arguments that are None."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
from timm.layers import set_layer_config
from timm.models import load_checkpoint, model_entrypoint, split_model_name_tag
from torch import nn

_LAYER_CONFIG = ("scriptable", "exportable", "no_jit")
FACTORY = ("pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", *_LAYER_CONFIG)
"""Arguments of ``timm.create_model`` itself, which are None by default."""


def create_model(name: str, args: Mapping[str, Any]) -> nn.Module:
    """Do what ``timm.create_model(name, **args)`` does, and also pass the arguments that are None, which it drops.

    ``ls_init_value=None`` builds a ConvNeXt without layer scale; timm's function keeps the default of 1e-6.

    Args:
        name: a network of timm's registry, perhaps with the tag of its weights, or of another source of timm.
        args: arguments of ``timm.create_model`` and of the network.

    Raises:
        ValueError: an argument is None, and the network comes from another source, for which timm drops it.
    """
    dropped = [key for key, value in args.items() if value is None and key not in FACTORY]
    if not dropped:
        model: nn.Module = timm.create_model(name, **args)
        return model
    if ":" in name:
        raise ValueError(
            f"{dropped[0]}=None does not reach {name!r}: timm drops it for networks from another source. Leave it out, "
            "or name a network of timm's registry."
        )
    own = {key: args.get(key) for key in FACTORY}
    rest = {key: value for key, value in args.items() if key not in FACTORY}
    architecture, tag = split_model_name_tag(name)
    with set_layer_config(**{key: own[key] for key in _LAYER_CONFIG}):
        made: Any = model_entrypoint(architecture)(
            pretrained_cfg=own["pretrained_cfg"] or tag or None,
            pretrained_cfg_overlay=own["pretrained_cfg_overlay"],
            cache_dir=own["cache_dir"],
            **rest,
        )
    made._model_args = rest  # as timm's function does, for files of the model
    if own["checkpoint_path"]:
        load_checkpoint(made, own["checkpoint_path"])
    built: nn.Module = made
    return built
