"""Find the batch norms that can be folded into the layer before them, by watching one forward pass."""

from __future__ import annotations

import gc
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, Linear
from timm.layers.conv2d_same import Conv2dSame, Conv2dSameExport
from timm.layers.norm_act import FrozenBatchNorm2d, SyncBatchNormAct
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from widefield.nn.depthwise import DepthwiseConv2d
from widefield.surgery.compare import Difference, NothingToCompareError, difference
from widefield.surgery.walk import computed, hooked

Fold = Callable[[nn.Module, nn.Module], nn.Module]
"""(layer, the norm after it) -> the folded layer."""

_CONVOLUTIONS: tuple[type[nn.Module], ...] = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear,
    DepthwiseConv2d, Conv2dSame, Conv2dSameExport, Linear,
)  # fmt: skip
_NORMS: tuple[type[nn.Module], ...] = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
    BatchNormAct2d, SyncBatchNormAct, FrozenBatchNorm2d, FrozenBatchNormAct2d,
)  # fmt: skip

_LOOKS = frozenset({
    "shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad", "size", "dim", "numel", "stride",
    "nelement", "is_floating_point", "is_complex", "is_contiguous", "get_device", "element_size", "__len__",
})  # fmt: skip
"""Attributes and methods that do not read the values of a tensor."""


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a batch norm of any kind, frozen ones included."""
    return isinstance(module, (_BatchNorm, FrozenBatchNorm2d, FrozenBatchNormAct2d))


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a convolution, a transposed convolution or a linear layer, of any kind."""
    return isinstance(module, (_ConvNd, nn.Linear))


def without_norm(norm: nn.Module) -> nn.Module:
    """Return what remains of a folded batch norm: an identity, or timm's dropout and activation."""
    parts = [part for part in (getattr(norm, name, None) for name in ("drop", "act")) if isinstance(part, nn.Module)]
    return (nn.Sequential(*parts) if parts else nn.Identity()).eval()


@dataclass(frozen=True)
class Pair:
    """A layer and the norm that can be folded into it."""

    layer: nn.Module
    norm: nn.Module
    folded: nn.Module
    """The layer with the norm folded in, without the norm's activation."""
    difference: Difference | None
    """Between layer plus norm and the folded layer, on the layer's input; None if that input was changed in place."""


@dataclass
class _Output:
    """The output of a layer, until it is freed."""

    layer: nn.Module
    alive: weakref.ref[Tensor]  # keeps no activation alive, and marks when an id is free
    x: Tensor | None
    version: int


@dataclass
class _Call:
    module: nn.Module
    x: Any
    version: int
    read: _Output | None


class Watch(TorchFunctionMode):
    """Context manager that finds which norms alone read a layer's output, and compares each pair with its fold.

    Any torch function outside a norm that takes a layer's output counts as another reader. So do the caller of the
    model and anything that keeps the output. A parameter that is read outside its layer must stay as it is. Layers are
    compared at once, before an in-place activation can change their output.

    The hooks on layers and norms are torch's global hooks, because hooks of a layer would be copied with it.

    Args:
        root: the model that is called within the context.
        layers: the layers that norms may be folded into, with their names.
        norms: the norms that may be folded.
        fold: called once for each norm that reads a layer's output.
        merged: module -> its replacement, to compare their outputs.
    """

    def __init__(
        self,
        root: nn.Module,
        layers: Mapping[nn.Module, str],
        norms: Iterable[nn.Module],
        fold: Fold,
        merged: Mapping[nn.Module, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.own: dict[nn.Module, Difference] = {}
        """Differences between the outputs of modules and of their replacements, where they could be compared."""
        self._layers, self._fold, self._merged = layers, fold, merged or {}
        self._norms = set(norms)
        self._fixed = _fixed(root, [*layers, *self._norms])
        self._owners: dict[int, nn.Module] = {}
        for module in (*layers, *self._norms):
            tensors = (*module._parameters.values(), *module._buffers.values())
            self._owners |= {id(tensor): module for tensor in tensors if tensor is not None}
        self._calls: Counter[nn.Module] = Counter()
        self._stack: list[_Call] = []
        self._outputs: dict[int, _Output] = {}
        self._read: dict[nn.Module, list[nn.Module]] = defaultdict(list)
        self._readers: Counter[nn.Module] = Counter()
        self._needed: dict[nn.Module, str] = {}
        self._pairs: dict[nn.Module, Pair] = {}
        self._paused = False
        self._untouched = True
        self._handles: list[Any] = []

    def __enter__(self) -> Watch:
        self._handles = [register_module_forward_pre_hook(self._enter), register_module_forward_hook(self._leave)]
        self._handles += [m.register_forward_hook(self._compare, with_kwargs=True) for m in self._merged]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        self._stack.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._paused:
            name = _name(func)
            if name not in _LOOKS:
                self._note(tree_leaves((args, kwargs or {})), name)
        return func(*args, **(kwargs or {}))

    def pairs(self, result: Any) -> list[Pair]:
        """Return the norms that can be folded, with their layers; ``result`` is the output of the model."""
        for output in list(self._outputs.values()):  # inputs may be outputs of other layers, which are freed here
            output.x = None
        leaves = {id(leaf) for leaf in tree_leaves(result)}
        if self._outputs.keys() - leaves:
            gc.collect()
        for key, output in self._outputs.items():
            where = "is returned by the model" if key in leaves else "is kept by other code"
            self._needed.setdefault(output.layer, f"its output {where}")
        self._outputs.clear()
        return [pair for norm, pair in self._pairs.items() if self.why_not(norm) is None]

    def why_not(self, norm: nn.Module) -> str | None:
        """Return why a norm cannot be folded, or None if it can; call :meth:`pairs` first."""
        reason = self._why_not(norm)
        if reason is None and not self._read[norm]:
            return "what it reads is not the output of a convolution"
        if reason is not None:
            return f"it {reason}" if not reason.startswith("its ") else reason
        layer = self._read[norm][0]
        reason = self._why_not(layer)
        if reason is None and self._readers[layer] > 1:
            reason = "its output is also read by another norm"
        return None if reason is None else f"{self._layers[layer]}: {reason}"

    def read_by(self, norm: nn.Module) -> bool:
        """Return whether a norm read the output of a layer."""
        return bool(self._read.get(norm))

    def _why_not(self, module: nn.Module) -> str | None:
        if module in self._fixed:
            return self._fixed[module]
        if not self._calls[module]:
            return "is not reached by the example input"
        if self._calls[module] > 1:
            return f"is called {self._calls[module]} times"
        return self._needed.get(module)

    def _note(self, leaves: list[Any], reader: str) -> None:
        inside = {call.module for call in self._stack}
        in_norm = bool(self._stack) and self._stack[-1].module in self._norms
        for leaf in leaves:
            output = self._outputs.get(id(leaf))
            if output is not None and not in_norm:
                self._needed.setdefault(output.layer, f"its output is also read by {reader}")
            owner = self._owners.get(id(leaf))
            if owner is not None and owner not in inside:
                self._needed.setdefault(owner, f"its parameters are also read by {reader}")

    def _enter(self, module: nn.Module, args: Any) -> None:
        if self._paused or not (module in self._layers or module in self._norms or module in self._merged):
            return
        self._calls[module] += 1
        x = args[0] if args and isinstance(args[0], Tensor) else None
        read = self._outputs.get(id(x)) if module in self._norms and x is not None else None
        self._paused = True  # reading the version does not count
        self._stack.append(_Call(module, x, _version(x), read))
        self._paused = False

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._paused or not self._stack or self._stack[-1].module is not module:
            return
        call = self._stack.pop()
        self._paused = True
        if module in self._layers and isinstance(output, Tensor):
            self._produced(call, output)
        elif call.read is not None:
            self._folded(module, call.read, output)
        self._untouched = _version(call.x) == call.version
        self._paused = False

    def _compare(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Run the replacement of a module; called right after :meth:`_leave`."""
        if self._untouched and self._calls[module] == 1:
            self._paused = True
            apart = _difference(output, self._merged[module](*args, **kwargs))
            if apart is not None:
                self.own[module] = apart
            self._paused = False

    def _produced(self, call: _Call, output: Tensor) -> None:
        sizes = getattr(call.module, "kernel_size", (0, 0) if not isinstance(call.module, nn.Linear) else ())
        if is_linear(call.module) and output.ndim != len(sizes) + 2:
            self._needed[call.module] = f"its output has {output.ndim} dimensions"
        key = id(output)
        alive = weakref.ref(output, lambda _: self._outputs.pop(key, None))
        self._outputs[key] = _Output(call.module, alive, call.x, call.version)

    def _folded(self, norm: nn.Module, read: _Output, output: Any) -> None:
        layer, x = read.layer, read.x
        read.x = None
        self._read[norm].append(layer)
        self._readers[layer] += 1
        if self._why_not(norm) or self._why_not(layer) or self._readers[layer] > 1:
            return
        folded, apart = self._fold(layer, norm), None
        if x is not None and _version(x) == read.version:
            apart = _difference(output, without_norm(norm)(folded(x)))
        self._pairs[norm] = Pair(layer, norm, folded, apart)


def _difference(first: Any, second: Any) -> Difference | None:
    """Return how far outputs are apart; None if they hold no number, as without any detection."""
    try:
        return difference(first, second)
    except NothingToCompareError:
        return None


def _fixed(root: nn.Module, modules: Iterable[nn.Module]) -> dict[nn.Module, str]:
    """Return the modules that can never be folded, with the reasons."""
    places = Counter(module for _, module in root.named_modules(remove_duplicate=False))
    holders = Counter(id(p) for module in root.modules() for p in module._parameters.values() if p is not None)
    found = {}
    for module in modules:
        kinds = _NORMS if is_norm(module) else _CONVOLUTIONS
        weight = module._parameters.get("weight")
        if (reason := computed(module)) is not None:
            found[module] = reason
        elif (is_norm(module) or is_linear(module)) and not _computes_as(module, kinds):
            what = "normalize" if is_norm(module) else "convolve"
            found[module] = f"is a {type(module).__name__}, which may not {what} as torch's layer does"
        elif is_norm(module) and getattr(module, "running_mean", None) is None:
            found[module] = "has no running statistics"
        elif hooked(module):
            found[module] = "has hooks"
        elif places[module] > 1:
            found[module] = "is used in several places"
        elif is_linear(module) and holders[id(weight)] > 1:
            found[module] = "shares its weight with another layer"
    return found


def _computes_as(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Return whether a layer has one of these classes, or a subclass that computes the same way."""
    made = type(module)
    if any(hasattr(made, name) for name in ("weight", "bias")):  # computed from others: a parametrization
        return False
    names = ("__call__", "forward", "_conv_forward", "_output_padding", "_check_input_dim")
    return "forward" not in vars(module) and any(
        isinstance(module, kind) and all(getattr(made, name, None) is getattr(kind, name, None) for name in names)
        for kind in kinds
    )


def _version(x: Any) -> int:
    """Return how often a tensor was changed in place, as counted by torch."""
    return x._version if isinstance(x, Tensor) and not x.is_inference() else 0


def _name(func: Any) -> str:
    name = str(getattr(func, "__name__", func))
    return str(getattr(func.__self__, "__name__", name)) if name == "__get__" else name
