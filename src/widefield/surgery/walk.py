"""The only loop that replaces modules, and which modules merge what is inside them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from torch import nn

MERGE_METHODS = ("fuse", "reparameterize", "switch_to_deploy")
"""``fuse()`` returns the merged module; the others (timm's MobileOne and RepVGG blocks, official code) act in place."""


def merge_method(module: nn.Module) -> str | None:
    """Return the name of the method by which ``module`` merges itself, or None. It takes no arguments: a
    ``fuse(a, b)`` of somebody else's is another thing.
    """
    for name in MERGE_METHODS:
        method = getattr(module, name, None)
        if callable(method):
            parameters = inspect.signature(method).parameters.values()
            if all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
                return name
    return None


def replace(root: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put every value of ``replacements`` where its key stands in ``root``, in place, and return the root.

    A module that stands in several places is replaced in all of them by the same object. If the root itself is a key,
    its replacement is returned.
    """
    if root in replacements:
        return replacements[root]
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                setattr(parent, name, replacements[child])
    return root
