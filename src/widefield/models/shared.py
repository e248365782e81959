"""Let timm build networks that were converted: ``timm.create_model("hf-hub:USER/NAME", pretrained=True)``.

``config.json`` of a folder that `widefield.save` writes names this network if timm's own one was changed since it was
built. Its argument is the model's history.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models import load_pretrained, register_model
from torch import nn

from widefield import _history, _timm

__all__ = ["widefield_shared"]

default_cfgs: dict[str, Any] = {}


@register_model
def widefield_shared(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    cache_dir: Any = None,
    *,
    history: Mapping[str, Any] | None = None,
    pretrained_model_args: Any = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a converted network from its history; for folders and files of :func:`widefield.save`.

    Args:
        pretrained: load the weights of the folder.
        pretrained_cfg, pretrained_cfg_overlay, cache_dir, pretrained_model_args: given by timm.
        history: origin and steps, from ``config.json``.
        kwargs: arguments of the network that replace those of the file, such as ``num_classes``.

    Raises:
        ValueError: no history: timm cannot build the model, or it was asked for by name.
    """
    if history is None or history["origin"]["kind"] != _history.TIMM:
        raise ValueError(
            "widefield_shared is the network of a folder that widefield.save wrote, and timm builds classifiers alone: "
            "load other models with widefield.load('local-dir:FOLDER') or widefield.load('hf-hub:USER/NAME')."
        )
    from widefield.surgery.replay import replay

    origin = history["origin"]
    args = {**origin["args"], **kwargs}
    model: Any = replay(_timm.create_model(origin["name"], args), history["steps"])
    given = pretrained_cfg if isinstance(pretrained_cfg, Mapping) else pretrained_cfg.to_dict()
    config = {**getattr(model, "pretrained_cfg", {}), **given, **(pretrained_cfg_overlay or {})}
    config["architecture"] = origin["name"]
    model.pretrained_cfg = model.default_cfg = config
    if pretrained:
        classes, channels = getattr(model, "num_classes", 0), args.get("in_chans", 3)
        load_pretrained(model, config, num_classes=classes, in_chans=channels, cache_dir=cache_dir)
    return _history.restore(model, {"origin": {**origin, "args": args}, "steps": history["steps"]})
