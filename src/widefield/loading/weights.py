"""Describe where the weights of a model come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Weights:
    """Where a model's weights come from."""

    origin: str
    """``"random"``, ``"pretrained"`` (published by timm or torchvision), ``"file"`` or ``"run"``."""
    detail: str = ""
    """The file's path, or which weights of the run."""

    def __str__(self) -> str:
        return self.detail if self.origin == "run" else f"{self.origin} {self.detail}".rstrip()


def weights_of_timm(model: nn.Module, checkpoint: object, pretrained: bool) -> Weights:
    """Return where timm got a model's weights: from a checkpoint, which it loads last, or from its configuration.

    Args:
        model: built by timm.
        checkpoint: the argument ``checkpoint_path`` of ``timm.create_model``, if there is one.
        pretrained: its argument of that name.
    """
    config: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    file = checkpoint or (config.get("file") if pretrained else None)
    return Weights("file", str(file)) if file else Weights("pretrained" if pretrained else "random")
