"""Find, merge, copy and replace modules; no other module has a loop that replaces them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from types import FunctionType
from typing import ParamSpec, TypeVar

import torch
from timm.layers import freeze_batch_norm_2d, unfreeze_batch_norm_2d
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _Orthogonal, _WeightNorm
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from widefield import _history
from widefield.nn.fusing import FROZEN_NORMS
from widefield.nn.same import SameAligned
from widefield.ops._autocast import without_autocast

P = ParamSpec("P")
R = TypeVar("R")
_Module = TypeVar("_Module", bound=nn.Module)

_WITHOUT_MODE = (*FROZEN_NORMS, nn.Identity, nn.ModuleDict, nn.ModuleList, _WeightNorm, _Orthogonal)
"""Modules that compute the same in training and evaluation mode, so their mode does not matter."""

_COMPUTING_HOOKS = {
    WeightNorm: "remove_weight_norm",
    SpectralNorm: "remove_spectral_norm",
    BasePruningMethod: "prune.remove",
}
"""Forward hooks of ``torch.nn.utils`` that compute a weight -> the function that removes them."""

MERGE_METHODS = ("fuse", "reparameterize", "switch_to_deploy", "merge_kernel", "merge_dilated_branches")
"""``fuse()`` returns the merged module. The others work in place: they are methods of timm's blocks and of the official
code of MobileOne, RepVGG, RepLKNet, SLaK and UniRepLKNet.
"""

COLLECTIVE = ("structural_reparam", "reparameterize_unireplknet")
"""Methods of whole networks in official code (RepLKNet, UniRepLKNet), which call the methods above on the layers.
``reparameterize`` walks the layers itself, to report each by name. It calls these only if no layer inside has one of
the methods above. Our networks have them for users of the official code.
"""

_MADE = ("reparam_conv", "rbr_reparam", "lkb_reparam")
"""Attributes in which in-place methods leave the merged convolution."""


def merge_method(module: nn.Module) -> str | None:
    """Return the name of the method with which a module merges itself, or None.

    The method must work without arguments, because a ``fuse(a, b)`` of other code means something else. An in-place
    method that was called before does not count.
    """
    if isinstance(module, SameAligned) and not module.merges():
        return None
    for name in MERGE_METHODS:
        method = getattr(module, name, None)
        if callable(method):
            parameters = inspect.signature(method).parameters.values()
            if all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
                return None if name != "fuse" and _is_merged(module) else name
    return None


def _is_merged(module: nn.Module) -> bool:
    layers = [  # frozen norms hold buffers alone
        inner
        for inner in module.modules()
        if isinstance(inner, FROZEN_NORMS) or any(p is not None for p in inner._parameters.values())
    ]
    return len(layers) < 2 or any(isinstance(getattr(module, made, None), nn.Module) for made in _MADE)


def refuse_training(model: nn.Module, what: str) -> None:
    """Raise RuntimeError if a part of a model is in training mode.

    Frozen batch norms and weight norm do not count: timm's ``freeze_batch_norm_2d`` and torch's ``weight_norm`` add
    them in training mode to models in evaluation mode.

    Args:
        model: any module.
        what: the first clause of the message.
    """
    training = [
        name or type(model).__name__
        for name, module in model.named_modules()
        if module.training and not isinstance(module, _WITHOUT_MODE)
    ]
    if training:
        raise RuntimeError(f"{what}, but {training[0]} is in training mode: call model.eval() first.")


def check_report(report: object) -> None:
    """Raise TypeError unless a report is None or a callable."""
    if report is not None and not callable(report):
        raise TypeError(f"report must be callable, such as print or the append of a list; got {report!r}.")


def begin(model: nn.Module, what: str, report: object) -> None:
    """Check the arguments that ``reparameterize``, ``specialize`` and ``trim`` share.

    Args:
        model: the model to work on.
        what: the first clause of the message about training mode.
        report: None or a callable.

    Raises:
        TypeError: a report that is not callable.
        RuntimeError: a part of the model is in training mode.
        ValueError: a parameter or buffer on the meta device.
    """
    check_report(report)
    refuse_training(model, what)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device and holds no numbers: load the model's weights first.")


def copied(model: nn.Module, *, share: bool = False) -> nn.Module:
    """Return a copy of a model, in evaluation mode. Copies of torchvision's feature extractors start in training mode.

    Args:
        model: any module.
        share: keep the model's own parameters, which the copy must not change in place.

    Raises:
        ValueError: as :func:`refuse_replaced` does.
    """
    refuse_replaced(model)
    return duplicate(model, share=share).eval()


def refuse_replaced(model: nn.Module) -> None:
    """Raise ValueError for a module whose ``forward`` was replaced with a function, which a copy would still call.

    ``torch.compile``'s wrapper (``_orig_mod``) is fine: it creates its ``forward`` again.
    """
    for name, module in model.named_modules():
        if isinstance(vars(module).get("forward"), FunctionType) and "_orig_mod" not in module._modules:
            where = name or type(module).__name__
            raise ValueError(
                f"the forward of {where} was replaced with a function, so a copy of {where} would still run the "
                "original: restore the forward of its class (del module.forward), and wrap or compile the result "
                "instead."
            )


def duplicate(module: _Module, *, share: bool = False) -> _Module:
    """Return a deep copy, also of modules that keep tensors with a gradient function.

    ``copy.deepcopy`` refuses such tensors, for example weights that weight norm and pruning compute in hooks, and the
    attention biases that timm caches (LeViT, EfficientViT, TinyViT). The copy holds their values until it computes them
    again. ``share`` is that of :func:`copied`.
    """
    held = [tensor for part in module.modules() for tensor in _tensors(vars(part))]
    stand_ins = {id(tensor): tensor.detach().clone() for tensor in held if not tensor.is_leaf}
    if share:
        stand_ins |= {id(parameter): parameter for parameter in module.parameters()}
    return copy.deepcopy(module, stand_ins)  # memo: id -> what to use


def _tensors(value: object) -> Iterator[Tensor]:
    """Yield the tensors in dicts, lists and tuples of any depth."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def hooked(module: nn.Module) -> bool:
    """Return whether a module has forward or backward hooks, which replacing it would lose.

    ``torch.nn.utils.weight_norm`` and pruning are such hooks.
    """
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def computed(module: nn.Module) -> str | None:
    """Return why the weights in a module cannot be merged or replaced, or None if they are plain parameters.

    The reason names the submodule whose weight is computed in every call, and the function that undoes it.
    """
    for name, part in module.named_modules():
        whose = f"the weight of {name}" if name else "its weight"
        if parametrize.is_parametrized(part):
            return f"{whose} is parametrized: call torch.nn.utils.parametrize.remove_parametrizations first"
        for hook in part._forward_pre_hooks.values():
            for kind, remover in _COMPUTING_HOOKS.items():
                if isinstance(hook, kind):
                    return f"{whose} is computed by a hook: call torch.nn.utils.{remover} first"
    return None


def in_own_types(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function of a model so that autocast does not change its dtypes; the model is the first argument."""

    @wraps(function)
    def exact(*args: P.args, **kwargs: P.kwargs) -> R:
        given: object = args[0] if args else kwargs.get("model")
        if not isinstance(given, nn.Module):
            return function(*args, **kwargs)
        with without_autocast(torch.empty(0, device=next((p.device for p in given.parameters()), None))):
            return function(*args, **kwargs)

    return exact


def replace(root: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Replace modules in ``root`` in place, and return the root.

    A module that is used in several places is replaced in all of them by one object. If the root itself is replaced,
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
    """Return whether ``module.fuse(norm)`` can fold in a batch norm that follows the module."""
    if isinstance(module, SameAligned):
        return takes_norm(module.layer)
    return merge_method(module) == "fuse" and "norm" in inspect.signature(module.fuse).parameters  # type: ignore[arg-type]


def outermost(
    root: nn.Module, select: Callable[[nn.Module], bool] = lambda module: True
) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield (name, module, merge method) of the outermost selected modules that merge themselves.

    A block of other code that holds a layer with ``fuse(norm)`` is skipped, because its method expects a convolution
    there; the layer itself is not. A module with a :func:`computed` weight is skipped, too; modules in it are not.
    """
    done: list[str] = []
    for name, module in root.named_modules():
        method = merge_method(module)
        if method is None or any(name.startswith(prefix) for prefix in done) or computed(module) or not select(module):
            continue
        if method != "fuse" and any(takes_norm(inner) for inner in module.modules()):
            continue
        done.append(f"{name}." if name else "")
        yield name, module, method


def is_ours(module: nn.Module) -> bool:
    """Return whether the module's class belongs to this package."""
    return type(module).__module__.partition(".")[0] == __name__.partition(".")[0]


def merge(module: nn.Module, method: str) -> nn.Module:
    """Call a :func:`merge_method`, and return the merged module: the same object if the method works in place.

    Methods of other libraries create trainable layers with torch's default dtype and device. The result gets dtype,
    device and mode of ``module``, and requires gradients only if ``module`` did. Types narrower than float32 are merged
    in float32 and rounded once. Frozen norms, which such methods do not know, are unfrozen meanwhile.
    """
    flags = [(p, p.requires_grad) for p in module.parameters()]
    learns, frozen = any(flag for _, flag in flags), _has_frozen_norm(module)
    if frozen and not is_ours(module):
        unfreeze_batch_norm_2d(module)
    held = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()]
    if is_ours(module) or not held:
        return _called(module, method)
    kernel = next((tensor for tensor in held if tensor.ndim > 1), held[0])  # norms next to it may be wider
    dtype, wide = kernel.dtype, torch.promote_types(kernel.dtype, torch.float32)
    types, training = [tensor.dtype for tensor in held], module.training
    try:
        for tensor in held:
            tensor.data = tensor.data.to(wide)
        with _factory(kernel.device, wide):
            merged = _called(module, method)
    finally:
        for tensor, kind in zip(held, types, strict=True):
            tensor.data = tensor.data.to(kind)
    known = {id(tensor) for tensor in held}
    for tensor in (*merged.parameters(), *merged.buffers()):
        if id(tensor) not in known and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
            tensor.requires_grad_(learns and isinstance(tensor, nn.Parameter))
    for parameter, flag in flags:  # timm's methods detach all that they leave in a block
        parameter.requires_grad_(flag)
    if frozen:
        freeze_batch_norm_2d(merged)
    return merged.to(kernel.device).train(training)


def _has_frozen_norm(module: nn.Module) -> bool:
    return any(isinstance(part, FROZEN_NORMS) for part in module.modules())


def _called(module: nn.Module, method: str) -> nn.Module:
    result = getattr(module, method)()
    return result if isinstance(result, nn.Module) else module


@contextmanager
def _factory(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Set the default dtype and device of new layers."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(usual)


def fuse_layers(
    root: nn.Module, *, select: Callable[[nn.Module], bool] = lambda module: True
) -> tuple[nn.Module, list[str]]:
    """Fuse the :func:`outermost` mergeable modules of ``root`` in place; return the root and their names.

    Args:
        root: in evaluation mode.
        select: whether a module may be fused.
    """
    replacements: dict[nn.Module, nn.Module] = {}
    names: list[str] = []
    layers: list[tuple[str, str]] = []
    for name, module, method in list(outermost(root, select)):
        replacements[module] = merge(module, method)
        names.append(name or type(module).__name__)
        layers.append((name, method))
    fused = _history.carry(root, replace(root, replacements))
    if layers:
        _history.note(fused, "fuse_layers", layers=layers)
    return fused, names


def unmerged(model: nn.Module) -> list[str]:
    """Return the names of the modules that still need reparameterizing: merging would change their parameters.

    Raises ValueError if one of them cannot be merged, or as :func:`copied` does.
    """
    refuse_replaced(model)
    if not any(map(merge_method, model.modules())):
        return []
    twin = copied(model)

    def works(module: nn.Module) -> bool:
        if is_ours(module):
            return True
        try:
            merge(duplicate(module), merge_method(module) or "")
        except Exception:  # reparameterize keeps it and reports the reason
            return False
        return True

    try:
        with torch.random.fork_rng([]):  # merging builds layers
            merged, names = fuse_layers(twin, select=works)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{type(model).__name__} must be reparameterized first, which fails: {error}") from error
    before, after = dict(model.named_modules()), dict(merged.named_modules())
    places = [name if name in before else "" for name in names]  # the root is named by its class
    return [name for name, place in zip(names, places, strict=True) if _stored(before[place]) != _stored(after[place])]


def _stored(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict(keep_vars=True).items()}
