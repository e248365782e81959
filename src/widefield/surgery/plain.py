"""Turn layers of :mod:`widefield.nn` into modules of torch, so that reparameterized models load without widefield."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from widefield import _checks
from widefield.nn import DCNv3, DepthwiseConv2d, SameAligned
from widefield.nn.gmconv import DynamicGMConv2d
from widefield.nn.morf import FusedMoRFConv2d, MoRFConv2d
from widefield.surgery.walk import computed, hooked, replace

ROUTED = (MoRFConv2d, FusedMoRFConv2d, DynamicGMConv2d)
"""Layers whose kernel depends on the image. torch has no such layers."""

_LAYERS, _NETWORKS = "widefield.nn.", "widefield.models."


class Changed(NamedTuple):
    """A layer that became a module of torch."""

    name: str
    before: str
    after: str


class Kept(NamedTuple):
    """A layer of :mod:`widefield.nn` that stays."""

    name: str
    kind: str
    reason: str


def plain(root: nn.Module, x: Tensor) -> tuple[nn.Module, list[Changed], list[Kept]]:
    """Replace layers of :mod:`widefield.nn` in place with modules of torch that compute the same.

    A :class:`DepthwiseConv2d` becomes a ``torch.nn.Conv2d``. A composite layer becomes a ``torch.fx.GraphModule`` with
    the same submodules, parameters and keys; deformable layers use ``F.grid_sample``. Layers with routing stay. So do
    composite layers in the networks of :mod:`widefield.models`, which need widefield to load in any case.

    Args:
        root: reparameterized, in evaluation mode.
        x: an input of the root. A layer that is not called is not replaced, because other code may use its methods.

    Returns:
        The root, which may be a new module; the layers that changed; the layers that stay, with reasons.
    """
    layers = dict(_outermost(root))
    called = _called(root, [module for module in layers.values() if not isinstance(module, DepthwiseConv2d)], x)
    replacements: dict[nn.Module, nn.Module] = {}
    changed: list[Changed] = []
    kept: list[Kept] = []
    for name, module in layers.items():
        kind = type(module).__name__
        try:
            replacements[module] = as_torch(module, called=module in called)
        except _NotPlainError as error:
            kept.append(Kept(name or kind, kind, str(error)))
            continue
        changed.append(Changed(name or kind, kind, type(replacements[module]).__name__))
    return replace(root, replacements), changed, kept


def _called(root: nn.Module, modules: Iterable[nn.Module], x: Tensor) -> set[nn.Module]:
    """Return which of these modules ``root(x)`` calls."""
    called: set[nn.Module] = set()
    handles = [module.register_forward_pre_hook(lambda module, _: called.add(module)) for module in modules]
    if handles:
        with torch.no_grad():
            root(x)
    for handle in handles:
        handle.remove()
    return called


class _NotPlainError(ValueError):
    """A layer without an equivalent module in torch."""


def is_layer(module: nn.Module) -> bool:
    """Return whether the module's class belongs to :mod:`widefield.nn`."""
    return type(module).__module__.startswith(_LAYERS)


def _outermost(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost of our layers without routing inside; see :func:`plain`."""
    done: list[str] = []
    networks: list[str] = []
    for name, module in root.named_modules():
        if any(name.startswith(prefix) for prefix in done):
            continue
        if type(module).__module__.startswith(_NETWORKS):
            networks.append(f"{name}." if name else "")
        if not isinstance(module, DepthwiseConv2d) and any(name.startswith(prefix) for prefix in networks):
            continue
        routes = isinstance(module, ROUTED)
        if routes or (is_layer(module) and not any(isinstance(part, ROUTED) for part in module.modules())):
            done.append(f"{name}." if name else "")
            if not routes:
                yield name, module


def as_torch(module: nn.Module, *, called: bool) -> nn.Module:
    """Return one of our layers as a module of torch; raises ValueError if there is none. See :func:`plain`."""
    reason = computed(module)
    if reason is not None:
        raise _NotPlainError(reason)
    lost = next((part for part in module.modules() if is_layer(part) and hooked(part)), None)
    if lost is not None:
        raise _NotPlainError(f"its {type(lost).__name__} has hooks, which would be lost: remove them first")
    if isinstance(module, DepthwiseConv2d):
        return with_numbers(module.fuse())
    if not called:
        raise _NotPlainError("the model does not call it on the example input, or uses its other methods")
    if isinstance(module, SameAligned) and is_layer(module.layer):
        module = SameAligned(as_torch(module.layer, called=called), module.stride)
    tracer = _Tracer()
    if isinstance(module, DCNv3):
        tracer.traced_func_name = "plain_forward"
    try:
        graph = tracer.trace(module)
    except Exception as error:  # a forward that branches on values may raise anything
        raise _NotPlainError(f"its forward is not a fixed graph of torch functions ({type(error).__name__})") from error
    for node in reversed(graph.nodes):
        node.type = None  # torch.jit.script cannot resolve string annotations
        if getattr(node.target, "__module__", None) == _checks.__name__:  # shape checks, whose result is not used
            graph.erase_node(node)
    bare = fx.Graph()  # without the tracer's class, which pickles would need
    bare.output(bare.graph_copy(graph, {}))
    twin = fx.GraphModule(tracer.root, bare, class_name=type(module).__name__)
    twin.graph.eliminate_dead_code()  # the shapes that were checked
    twin.recompile()
    for name, part in twin.named_modules():
        if isinstance(part, DepthwiseConv2d):
            twin.set_submodule(name, with_numbers(part.fuse()))
    return twin.train(module.training)


def with_numbers(conv: nn.Module) -> nn.Module:
    """Replace symmetric "same" padding with numbers, in place, as torch's quantized convolutions require."""
    if isinstance(conv, nn.Conv2d) and conv.padding == "same":
        left, right, top, bottom = conv._reversed_padding_repeated_twice
        if (left, top) == (right, bottom):
            conv.padding = (top, left)
    return conv


class _Tracer(fx.Tracer):
    """Traces through our layers; all other modules become leaves of the graph."""

    enters_widefield_layers = True

    def __init__(self) -> None:
        super().__init__(autowrap_modules=(math, _checks))  # type: ignore[arg-type]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not is_layer(m) or isinstance(m, DepthwiseConv2d)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Unpack the results of ``split`` and ``chunk``, whose arguments give their number."""
        node = obj.node
        if node.op == "call_method" and node.target in ("split", "chunk"):
            sizes = node.args[1]
            count = sizes if isinstance(sizes, int) else len(sizes)  # type: ignore[arg-type]
            return iter([obj[index] for index in range(count)])  # type: ignore[index]
        return super().iter(obj)
