"""The only loop that replaces modules, and which modules merge what is inside them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

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


def takes_norm(module: nn.Module) -> bool:
    """Say whether a batch norm that follows ``module`` can be folded in as it is fused: ``fuse(norm)``."""
    return merge_method(module) == "fuse" and "norm" in inspect.signature(module.fuse).parameters  # type: ignore[arg-type]


def fuse_layers(
    root: nn.Module,
    *,
    norms: Mapping[nn.Module, _BatchNorm] | None = None,
    select: Callable[[nn.Module], bool] = lambda module: True,
) -> tuple[nn.Module, list[str]]:
    """Fuse the outermost mergeable modules of ``root``, in place; return the root and the names of what was fused.

    Somebody else's block that merges itself and holds a layer with ``fuse(norm)`` is left unmerged, as it would look
    for a convolution there; the layer is fused.

    Args:
        root: in evaluation mode.
        norms: layer -> the batch norm to fold into it.
        select: which modules may be fused.
    """
    norms = norms or {}
    replacements: dict[nn.Module, nn.Module] = {}
    names: list[str] = []
    done: list[str] = []
    for name, module in root.named_modules():
        method = merge_method(module)
        if method is None or not select(module) or any(name.startswith(prefix) for prefix in done):
            continue
        if method != "fuse" and any(takes_norm(inner) for inner in module.modules()):
            continue
        norm = norms.get(module)
        merged = getattr(module, method)(*(() if norm is None else (norm,)))
        if isinstance(merged, nn.Module):
            replacements[module] = merged
        if norm is not None:
            replacements[norm] = _without_norm(norm)
        names.append(name or type(module).__name__)
        done.append(f"{name}." if name else "")
    return replace(root, replacements), names


def _without_norm(norm: _BatchNorm) -> nn.Module:
    """Return what a batch norm does besides normalising: nothing, or timm's drop and activation."""
    if isinstance(norm, BatchNormAct2d):
        return nn.Sequential(norm.drop, norm.act).eval()
    return nn.Identity().eval()
