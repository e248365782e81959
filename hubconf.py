"""Entries of ``torch.hub``: ``torch.hub.load("OWNER/widefield", "load", "hf-hub:USER/NAME")``."""

import sys
from pathlib import Path
from typing import Any

dependencies = ["torch", "torchvision", "timm", "safetensors"]

sys.path.append(str(Path(__file__).parent / "src"))  # an installed widefield comes first


def load(source: str, device: str = "cpu") -> Any:
    """Load a model that ``widefield.save`` wrote: a file, a folder, or ``hf-hub:USER/NAME``; see ``widefield.load``."""
    import widefield

    return widefield.load(source, device=device)


def network(name: str, pretrained: bool = False, **options: Any) -> Any:
    """Build a network of timm or widefield by name, such as ``morf_convnext_tiny``; see ``timm.create_model``."""
    import timm

    import widefield  # noqa: F401 (registers its networks in timm)

    return timm.create_model(name, pretrained=pretrained, **options)
