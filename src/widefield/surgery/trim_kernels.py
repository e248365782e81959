"""Find the kernels of a model that can be cropped, measure how far, and crop them, for :mod:`widefield.surgery.trim`.

A crop removes as many taps at one end of an axis as at the other, with as many pixels of padding, so outputs keep their
size and position. A convolution can therefore be cropped only as far as its padding allows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.padding import pad_same_arg
from torch import Tensor, nn
from torch.nn.utils import parametrize

from widefield import _checks
from widefield._checks import Pair
from widefield.nn import DepthwiseConv2d, DepthwiseConv2dSame, DynamicGMConv2d, FusedMoRFConv2d
from widefield.nn.same import is_same, least_size
from widefield.ops import fold
from widefield.ops.crop_table import CropTable, crop_table
from widefield.surgery.walk import copied, hooked, replace

Sizes = tuple[Pair, ...]
"""(rows, columns) in taps for every kernel of a layer; a mixture has one kernel per expert."""

_KINDS = (nn.Conv2d, DepthwiseConv2d, nn.ConvTranspose2d, FusedMoRFConv2d, Conv2dSame, DepthwiseConv2dSame)


@dataclass(frozen=True)
class Call:
    """(H, W) of the input and the output in one call of a layer."""

    seen: Pair
    made: Pair


@dataclass(frozen=True)
class Kernel:
    """A kernel that can be cropped."""

    name: str
    """Name of the layer; an expert of a mixture has its index in brackets."""
    size: Pair
    """(rows, columns) in taps, before cropping."""
    dilation: Pair
    table: CropTable
    """What each crop loses, from the smallest crop that the padding allows to the smallest one that loses nothing. Taps
    outside the latter are zero or never meet the map."""


@dataclass(frozen=True)
class Layer:
    """A layer whose kernels can be cropped."""

    name: str
    module: nn.Module
    kernels: tuple[Kernel, ...]
    windows: CropTable
    """What is lost if all kernels are cropped to one window."""
    macs: int
    """Multiply-accumulates per tap of the window and image, over all calls; at least 1."""

    def whole(self) -> Sizes:
        """Return the sizes of the kernels before cropping."""
        return tuple(kernel.size for kernel in self.kernels)

    def inside(self, index: int) -> Sizes:
        """Return the sizes of all kernels within window ``index``."""
        if len(self.kernels) == 1 and self.windows is self.kernels[0].table:
            return (self.windows.sizes[index],)
        side = self.windows.spans[index]
        places = (kernel.table.fitting(side) for kernel in self.kernels)
        return tuple(k.table.sizes[place or 0] for k, place in zip(self.kernels, places, strict=True))


@dataclass(frozen=True)
class Left:
    """A layer with spatial kernels that cannot be cropped, and why."""

    name: str
    size: Pair
    dilation: Pair
    why: str


def by_outputs(module: nn.Module) -> Tensor:
    """Return the kernel of a convolution, transposed or not, as (C_out, C_in/groups, rows, columns)."""
    weight: Any = module.weight
    if isinstance(module, nn.ConvTranspose2d):
        return weight.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1)  # type: ignore[no-any-return]
    return weight  # type: ignore[no-any-return]


def watch(model: nn.Module, x: Tensor) -> dict[nn.Module, list[Call]]:
    """Run the model on ``x`` (N, C, H, W) without gradients; return the calls of all layers with spatial kernels."""
    calls: dict[nn.Module, list[Call]] = {module: [] for _, module in _spatial(model)}
    handles = [module.register_forward_hook(partial(_note, calls[module]), with_kwargs=True) for module in calls]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _note(
    calls: list[Call], module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor], output: Tensor
) -> None:
    seen, made = (args or tuple(kwargs.values()))[0].shape[-2:], output.shape[-2:]
    calls.append(Call((seen[0], seen[1]), (made[0], made[1])))


def _spatial(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers whose kernels have more than one tap."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, DynamicGMConv2d, FusedMoRFConv2d)):
            rows, columns = _size(module)
            if rows * columns > 1:
                yield name, module


def _size(module: Any) -> Pair:
    if isinstance(module, FusedMoRFConv2d):
        return module.bank.shape[-2], module.bank.shape[-1]
    return _checks.pair("kernel_size", module.kernel_size)


def _dilation(module: Any) -> Pair:
    steps = fold.common_dilation(module.dilations) if isinstance(module, FusedMoRFConv2d) else module.dilation
    return _checks.pair("dilation", steps)


def kernels_of(
    model: nn.Module, calls: Mapping[nn.Module, Sequence[Call]] | None, *, fixed: bool
) -> list[Layer | Left]:
    """Return the layers with spatial kernels, in the order of the model; measure those that can be cropped.

    Args:
        model: reparameterized. It is only read.
        calls: the result of :func:`watch`; None: unknown.
        fixed: whether all future inputs have these sizes, so that taps that never met the map count as zeros.

    Raises:
        ValueError: no such layer, or a kernel that is not finite.
    """
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    found: list[Layer | Left] = []
    for name, module in _spatial(model):
        seen = None if calls is None else calls[module]
        why = _why_not(module, owners) or (_UNSEEN if seen is not None and not seen else None)
        layer = Left(name, _size(module), _dilation(module), why) if why else _layer(name, module, seen or [], fixed)
        found.append(layer)
    if not found:
        raise ValueError(f"{type(model).__name__} has no convolution with more than one tap: nothing to trim.")
    return found


_UNSEEN = "the model was run and did not call it: it is not used, or another module reads its kernel"


def _why_not(module: Any, owners: Mapping[int, int]) -> str | None:
    if isinstance(module, DynamicGMConv2d):
        return "its mask depends on the image, so its kernel is unknown"
    if parametrize.is_parametrized(module):
        return "its kernel is computed by a parametrization: call remove_parametrizations first"
    if type(module) not in _KINDS:
        return f"it is a {type(module).__name__}, which may pad or compute its kernel differently"
    if hooked(module) or "forward" in vars(module):
        return "it has hooks, which would be lost, or which compute its kernel"
    if isinstance(module, FusedMoRFConv2d):
        return None
    if owners[id(module.weight)] > 1:
        return "its kernel is shared with another layer"
    if _least(module) == _size(module) and is_same(module):
        return f"a smaller kernel would not cover its stride of {module.stride}: 'SAME' padding would move its outputs"
    if _least(module) == _size(module):
        return f"its padding of {module.padding} has nothing to give up: a smaller kernel would move its outputs"
    return None


def _least(conv: Any) -> Pair:
    """Return the smallest size, in taps, that a convolution can be cropped to without moving its outputs."""
    size = _size(conv)
    if is_same(conv):
        rows, columns = (
            min(k, least_size(s, d, k % 2)) for k, s, d in zip(size, conv.stride, conv.dilation, strict=True)
        )
        return rows, columns
    spare = [(k - 1) // 2 for k in size]
    if conv.padding == "valid":
        spare = [0, 0]
    elif conv.padding != "same":  # "same" padding shrinks with the kernel
        spare = [min(p // d, s) for p, d, s in zip(conv.padding, _dilation(conv), spare, strict=True)]
    return size[0] - 2 * spare[0], size[1] - 2 * spare[1]


def _layer(name: str, module: Any, calls: Sequence[Call], fixed: bool) -> Layer:
    known = calls if fixed else []
    try:
        if isinstance(module, FusedMoRFConv2d):
            kernels, windows = _experts(name, module, known)
        else:
            weight = by_outputs(module).detach()
            if getattr(module, "padding_mode", "zeros") == "zeros":
                weight = _meeting(weight, known, module, partial(_padding, module), _dilation(module))
            kernels = (_kernel(name, weight, _least(module), _dilation(module)),)
            windows = kernels[0].table
    except ValueError as error:
        raise ValueError(f"{name or type(module).__name__}: {error}") from error
    channels = module.bank[0] if isinstance(module, FusedMoRFConv2d) else module.weight
    places = [call.seen if isinstance(module, nn.ConvTranspose2d) else call.made for call in calls]
    macs = channels.shape[:2].numel() * sum(rows * columns for rows, columns in places)
    return Layer(name, module, kernels, windows, max(macs, 1))


def _kernel(name: str, weight: Tensor, least: Pair, dilation: Pair, *, square: bool = False) -> Kernel:
    size = weight.shape[-2], weight.shape[-1]
    used = (weight != 0).any(1).any(0)
    box = _around(used.any(1), least[0]), _around(used.any(0), least[1])
    if square:
        box = max(box), max(box)
    return Kernel(name, size, dilation, crop_table(fold.crop(weight, box), dilation, least=least))


def _around(used: Tensor, least: int) -> int:
    """Return the smallest number of centered taps of an axis that covers all used ones."""
    taps = used.nonzero().flatten().tolist()
    spare = min(taps[0], len(used) - 1 - taps[-1]) if taps else len(used)
    return max(len(used) - 2 * spare, least)


def _experts(name: str, mixture: FusedMoRFConv2d, calls: Sequence[Call]) -> tuple[tuple[Kernel, ...], CropTable]:
    step = fold.common_dilation(mixture.dilations)
    kernels, weights = [], []
    for index, (size, dilation) in enumerate(zip(mixture.kernel_sizes, mixture.dilations, strict=True)):
        weight = fold.expert(mixture.bank.detach(), index, size, dilation, step)
        centered = dilation * (size // 2)
        weight = _meeting(weight, calls, mixture, partial(_constant, (centered, centered)), (dilation, dilation))
        kernels.append(_kernel(f"{name}[{index}]", weight, (1, 1), (dilation, dilation), square=True))
        weights.append(weight)
    bank = fold.kernel_bank(weights, mixture.dilations)
    return tuple(kernels), crop_table(bank.flatten(0, 1), step)


# Taps that meet the map


def _padding(conv: Any, seen: Pair) -> Pair:
    """Return the padding before the first row and column of a map of (H, W)."""
    if is_same(conv):
        left, _, top, _ = pad_same_arg(list(seen), _size(conv), conv.stride, conv.dilation)
        return top, left
    if not isinstance(conv.padding, str):
        return _checks.pair("padding", conv.padding, minimum=0)
    (rows, columns), (down, right) = _size(conv), _dilation(conv)
    return (down * (rows - 1) // 2, right * (columns - 1) // 2) if conv.padding == "same" else (0, 0)


def _constant(padding: Pair, seen: Pair) -> Pair:
    return padding


def _meeting(
    weight: Tensor, calls: Sequence[Call], module: Any, padding: Callable[[Pair], Pair], dilation: Pair
) -> Tensor:
    """Return the kernel with zeros for taps that meet only padding in all of these calls; unchanged without calls.

    ``padding`` maps the size of an input to the rows and columns of padding before it.
    """
    if not calls:
        return weight
    transposed = isinstance(module, nn.ConvTranspose2d)
    stride = _checks.pair("stride", module.stride)
    met = torch.zeros(weight.shape[-2:], dtype=torch.bool)
    for call in calls:
        # Tap k is at p = i * stride + k * dilation - padding, with i over outputs and p over inputs; in transposed
        # convolutions i is over inputs and p over outputs.
        walks, lands = (call.seen, call.made) if transposed else (call.made, call.seen)
        axes, before = [], padding(call.seen)
        for axis in (0, 1):
            at = torch.arange(weight.shape[axis - 2]) * dilation[axis] - before[axis]
            first = -(at.clamp(max=0) // stride[axis])  # the first i at or after the map's edge
            axes.append((first < walks[axis]) & (first * stride[axis] + at < lands[axis]))
        met |= axes[0][:, None] & axes[1]
    return weight * met.to(weight)


# Cropped layers


def crop_kernels(
    model: nn.Module, sizes: Mapping[str, Sizes], *, inplace: bool = False, share: bool = False
) -> nn.Module:
    """Return a copy of the model, or the model itself, with the kernels of these layers cropped.

    ``share``: the copy has the model's own parameters apart from the cropped ones, and must not change them in place.
    """
    twin = model if inplace else copied(model, share=share)
    modules = dict(twin.named_modules())
    return replace(twin, {modules[name]: _smaller(modules[name], given) for name, given in sizes.items()})


def zero_taps(model: nn.Module, sizes: Mapping[str, Sizes], *, share: bool = False) -> nn.Module:
    """Return a copy of the model with zeros in the taps that :func:`crop_kernels` removes; it computes the same."""
    twin = copied(model, share=share)
    modules: dict[str, Any] = dict(twin.named_modules())
    with torch.no_grad():
        for name, given in sizes.items():
            module = modules[name]
            if isinstance(module, FusedMoRFConv2d):
                kept = [fold.pad(w, k) for w, k in zip(_kept(module, given), module.kernel_sizes, strict=True)]
                module.bank = _like(module.bank, fold.kernel_bank(kept, module.dilations))
            else:
                module.weight = _like(module.weight, fold.pad(fold.crop(module.weight, given[0]), _size(module)))
    return twin


def _like(old: nn.Parameter, values: Tensor) -> nn.Parameter:
    """Return a parameter of these values in the memory format of another one of their shape."""
    return nn.Parameter(torch.empty_like(old).copy_(values), old.requires_grad)


def _smaller(module: Any, sizes: Sizes) -> nn.Module:
    """Return the layer with cropped kernels; all other parameters are the same objects as in ``module``."""
    if isinstance(module, FusedMoRFConv2d):
        bank = fold.kernel_bank(_kept(module, sizes), module.dilations)
        module.bank = nn.Parameter(bank.detach(), module.bank.requires_grad)
        module.kernel_sizes = tuple(rows for rows, _ in sizes)
        return module
    (size,) = sizes
    if is_same(module):
        return _with_weight(module, _same_of(module, size), size)
    padding = module.padding
    if not isinstance(padding, str):
        gone = [d * (k - s) // 2 for k, s, d in zip(_size(module), size, _dilation(module), strict=True)]
        padding = (padding[0] - gone[0], padding[1] - gone[1])
    layer: Any
    given = {"stride": module.stride, "padding": padding, "dilation": module.dilation, "bias": module.bias is not None}
    if isinstance(module, DepthwiseConv2d):
        given |= {"padding_mode": module.padding_mode, "backend": module.backend}
        layer = DepthwiseConv2d(module.in_channels, module.out_channels, size, **given, device="meta")
    else:
        if isinstance(module, nn.ConvTranspose2d):
            given["output_padding"] = module.output_padding
        else:
            given["padding_mode"] = module.padding_mode
        kind = type(module)
        layer = kind(module.in_channels, module.out_channels, size, groups=module.groups, **given, device="meta")
    return _with_weight(module, layer, size)


def _same_of(module: Any, size: Pair) -> nn.Module:
    bias = module.bias is not None
    if isinstance(module, DepthwiseConv2dSame):
        channels, stride, dilation = module.in_channels, module.stride, module.dilation
        given: Any = {"bias": bias, "backend": module.backend, "device": "meta"}
        return DepthwiseConv2dSame(channels, channels, size, stride, dilation=dilation, **given)  # type: ignore[arg-type]
    make: Any = Conv2dSame
    widths = module.in_channels, module.out_channels
    layer: nn.Module = make(*widths, size, module.stride, 0, module.dilation, module.groups, bias, device="meta")
    return layer


def _with_weight(module: Any, layer: Any, size: Pair) -> nn.Module:
    """Give ``layer`` the cropped kernel and the bias of ``module``."""
    old = module.weight
    wide = old.is_contiguous(memory_format=torch.channels_last) and not old.is_contiguous()
    weight = fold.crop(old.detach(), size).clone(memory_format=torch.channels_last if wide else torch.contiguous_format)
    layer.weight, layer.bias = nn.Parameter(weight, old.requires_grad), module.bias
    return layer.train(module.training)  # type: ignore[no-any-return]


def _kept(mixture: FusedMoRFConv2d, sizes: Sizes) -> list[Tensor]:
    """Return the experts' kernels of these sizes."""
    step = fold.common_dilation(mixture.dilations)
    whole = zip(mixture.kernel_sizes, mixture.dilations, strict=True)
    experts = [fold.expert(mixture.bank, index, size, dilation, step) for index, (size, dilation) in enumerate(whole)]
    return [fold.crop(weight, size) for weight, size in zip(experts, sizes, strict=True)]
