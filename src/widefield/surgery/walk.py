"""The only loop that replaces modules."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


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
