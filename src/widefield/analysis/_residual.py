"""Find the residual blocks of any model from one forward pass, and switch them off."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from widefield import _checks
from widefield.analysis._model import running, visited

_SUMS = {"AddBackward0": None, "AddcmulBackward0": 1}
"""Operations of autograd that add -> how many of their inputs are terms; None: all of them."""

_SAME = frozenset({"CloneBackward0", "AliasBackward0", "ViewBackward0", "UnsafeViewBackward0"})
"""Operations that keep all values in their order."""

_ACTIVATIONS = frozenset(
    f"{name}Backward0" for name in ("Relu", "Hardtanh", "LeakyRelu", "Elu", "Gelu", "Silu", "Mish", "Hardswish")
)
"""Activations that may follow the sum, as in ResNet."""


@dataclass(frozen=True)
class FixedBlock:
    """A block that cannot be switched off.

    Attributes:
        name: of the module.
        kind: name of its class.
        reason: why, such as "24x56x56 -> 48x28x28".
    """

    name: str
    kind: str
    reason: str


@dataclass
class _Seen:
    """The calls of one module."""

    module: nn.Module
    residual: bool = True
    reason: str = ""
    outputs: list[Tensor] = field(default_factory=list)


def residual_blocks(model: nn.Module, images: Tensor) -> tuple[dict[str, nn.Module], tuple[FixedBlock, ...]]:
    """Return the residual blocks of a model, by name and in the order of the calls, and the blocks that are none.

    A residual block is a module that returns its input plus something else, perhaps followed by an activation. In the
    graph of autograd, the sum is reached from the output, and the input from the sum, without any other operation. The
    outermost such modules are taken, but not those that only call one after the other, such as stages.

    The second result has the other modules of the same classes, and the siblings of residual blocks in a sequence that
    are more than one layer: a first block with a stride, for example.

    Args:
        model: is left unchanged.
        images: (N, C, H, W), on the model's device and in its dtype; one is enough.
    """
    seen: dict[str, _Seen] = {}
    names = {module: name for name, module in model.named_modules()}
    starts: list[Any] = []

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        # The node must be read before the module runs, which may change its input in place.
        starts.append(args[0].grad_fn if args and isinstance(args[0], Tensor) else None)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        start = starts.pop()
        entry = seen.setdefault(names[module], _Seen(module))
        if not args or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
            entry.residual, entry.reason = False, "not one tensor -> one tensor"
        elif args[0].shape != output.shape:
            entry.residual, entry.reason = False, f"{_shape(args[0])} -> {_shape(output)}"
        else:
            entry.outputs.append(output)
            if start is None or not _adds_to(start, output.grad_fn):
                entry.residual, entry.reason = False, "its shortcut is not the identity"

    with ExitStack() as stack:
        stack.enter_context(running(model, images))
        stack.enter_context(visited(model))
        stack.enter_context(torch.enable_grad())
        for module in names:
            stack.callback(module.register_forward_pre_hook(before).remove)
            stack.callback(module.register_forward_hook(after).remove)
        model(images.detach().clone().requires_grad_() * 1)  # a leaf has no node
    return _chosen(seen)


_SHUT = 1e-4
"""Factors up to this size shut a branch: networks initialize them to 0 or 1e-6, and trained ones are far above."""


@_checks.guided
def shut_branches(model: nn.Module) -> list[str]:
    """Return the names of the vectors that shut residual branches: scales of norms or layers that are nearly zero.

    So networks are often initialized (Goyal et al. 2017, section 5.1; Touvron et al. 2021, CaiT): until they are
    trained, their blocks return their input.
    """
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point()
        and 1 < parameter.numel() == parameter.shape[0]
        and not name.endswith("bias")
        and float(parameter.detach().abs().max()) <= _SHUT
    ]


@contextmanager
def switched_off(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Let modules return their first argument, and restore them at the end."""
    before: list[tuple[nn.Module, list[Any]]] = []  # a module's own forward, if it has one besides that of its class
    before += [(module, [vars(module)["forward"]] if "forward" in vars(module) else []) for module in blocks]
    try:
        for module, _ in before:
            module.forward = _first
        yield
    finally:
        for module, own in before:
            vars(module).pop("forward", None)
            if own:
                module.forward = own[0]


def _first(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x


def _adds_to(start: Any, end: Any) -> bool:
    """Return whether the tensor of node ``end`` is that of ``start`` plus something, perhaps with an activation."""
    waiting, met = [(end, False)], set()
    while waiting:
        node, summed = waiting.pop()
        if node is None or (node, summed) in met:
            continue
        met.add((node, summed))
        if node is start:
            if summed:
                return True
            continue
        kind = node.name()
        inputs = [source for source, _ in node.next_functions]
        if kind in _SUMS:
            waiting += [(source, True) for source in inputs[: _SUMS[kind]]]
        elif kind in _SAME or (kind in _ACTIVATIONS and not summed):
            waiting += [(source, summed) for source in inputs]
    return False


def _chosen(seen: dict[str, _Seen]) -> tuple[dict[str, nn.Module], tuple[FixedBlock, ...]]:
    """Return the residual blocks among the modules that ran, and the fixed ones; see :func:`residual_blocks`."""
    candidates = {name: entry for name, entry in seen.items() if entry.residual}
    chains = {
        name
        for name, entry in candidates.items()
        if any(_inside(other, name) and inner.outputs[-1] is entry.outputs[-1] for other, inner in candidates.items())
    }
    kept = [name for name in candidates if name not in chains]
    blocks = {name: candidates[name].module for name in kept if not any(_inside(name, other) for other in kept)}
    kinds = {type(module) for module in blocks.values()}
    sequences = {name.rpartition(".")[0] for name in blocks}
    sequences = {name for name in sequences if name in seen and isinstance(seen[name].module, nn.Sequential)}
    fixed = [
        FixedBlock(name, type(entry.module).__name__, entry.reason)
        for name, entry in seen.items()
        if not entry.residual
        and not any(_inside(name, other) for other in blocks)
        and (
            type(entry.module) in kinds
            or (name.rpartition(".")[0] in sequences and any(True for _ in entry.module.children()))
        )
    ]
    return blocks, tuple(fixed)


def _inside(name: str, other: str) -> bool:
    """Return whether a module lies inside another one."""
    return name != other and (not other or name.startswith(f"{other}."))


def _shape(x: Tensor) -> str:
    return "x".join(map(str, x.shape[1:]))
