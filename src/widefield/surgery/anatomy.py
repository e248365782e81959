"""Where the parts of a model are: which of its modules is the backbone."""

from __future__ import annotations

from torch import nn

NAMES = ("backbone", "encoder", "trunk", "body", "image_encoder")
"""What people call the network inside theirs that turns images into maps; earlier names win."""

_BEFORE_THE_PYRAMID = (*NAMES, "features")
"""The same inside a backbone, whose neck may be its sibling: body and fpn of torchvision's detectors, features and
extra of its SSD."""


def backbone_name(model: nn.Module) -> str:
    """Return the name of a model's backbone, which turns images into maps; "" if it is the model itself.

    Necks, pyramids and heads are not part of it. A network with ``feature_info`` or ``forward_features``, as timm's
    have, is a backbone. In other models it is the module nearest to the root that is such a network, or else one that
    is called by one of :data:`NAMES`. The search goes on inside of what it finds. Where the nearest such modules are
    several, as the bodies of a network's blocks, none of them is the backbone.

    Args:
        model: any module. It is only read.
    """
    found = ""
    while (inner := _inside(model.get_submodule(found), _BEFORE_THE_PYRAMID if found else NAMES)) is not None:
        found = f"{found}.{inner}" if found else inner
    return found


def is_inside(name: str, part: str) -> bool:
    """Return whether a module's name is that of ``part``, or of something in it; everything is inside of ""."""
    return not part or name == part or name.startswith(f"{part}.")


def _inside(module: nn.Module, names: tuple[str, ...]) -> str | None:
    """Return the name of the nearest backbone in a module, None if there is none, or the module is one."""
    if _is_network(module):
        return None
    level = dict(module.named_children())
    while level:
        networks = [path for path, child in level.items() if _is_network(child)]
        called = [[path for path in level if path.rpartition(".")[2] == name] for name in names]
        nearest = next((paths for paths in (networks, *called) if paths), None)
        if nearest is not None:
            return nearest[0] if len(nearest) == 1 else None
        level = {f"{path}.{name}": inner for path, child in level.items() for name, inner in child.named_children()}
    return None


def _is_network(module: nn.Module) -> bool:
    return getattr(module, "feature_info", None) is not None or callable(getattr(module, "forward_features", None))
