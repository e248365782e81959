"""Measure the extent of a model's kernels: energy by radius, and the smallest crop that keeps a share of it.

A large kernel is worth its cost if its outer taps matter. :func:`crops` measures every centered crop of one kernel;
:func:`kernel_energy` does this for all kernels of a model as they compute.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from widefield import _checks, report
from widefield._checks import Pair
from widefield.analysis import _stages
from widefield.analysis._model import visited
from widefield.analysis._result import Result
from widefield.nn import DepthwiseConv2d, DynamicGMConv2d, FusedMoRFConv2d
from widefield.ops import fold
from widefield.ops.crop_table import CropTable, crop_table
from widefield.surgery import fuse_layers
from widefield.surgery.anatomy import anatomy
from widefield.surgery.inputs import place
from widefield.surgery.trim_kernels import by_outputs
from widefield.surgery.walk import merge_method

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STRIP = 0.55
"""Height of a model's smallest crops over depth, in inches."""


@dataclass(frozen=True)
class LayerKernel:
    """One kernel of a model, as it computes in evaluation mode.

    Attributes:
        name: of the module; experts of a mixture have their index in brackets.
        kind: "convolution", "transposed", "masked" (by a mask that depends on the image), "bank" (all experts of a
            mixture, padded and stacked) or "expert" (one of them).
        stage: from 0; see :meth:`widefield.surgery.Anatomy.count_stages`.
        size: (rows, columns) in taps.
        dilation, stride: (rows, columns).
        groups: of the convolution.
        span: (rows, columns) in pixels.
        magnitude: (rows, columns), float64: mean absolute value at each tap, over all channels.
        table: what each crop loses.
        smallest: for each requested share of energy, (rows, columns) of the smallest crop that keeps it, in taps.
        lost: share of the energy lost by the largest crop within the limit, 0 for kernels within it; None without a
            limit.
        lost_l1: the same for the L1 mass of the output channel that loses most.
    """

    name: str
    kind: str
    stage: int
    size: Pair
    dilation: Pair
    stride: Pair
    groups: int
    span: Pair
    magnitude: np.ndarray
    table: CropTable
    smallest: tuple[Pair, ...]
    lost: float | None
    lost_l1: float | None


@dataclass(frozen=True)
class KernelMaps(Result):
    """The kernels of a model: energy by radius, and the smallest crops.

    Attributes:
        layers: in the order of the modules.
        shares: of energy, ascending, that crops must keep.
        limit: side in pixels of the largest kernel that a target supports, or None.
    """

    title: ClassVar[str] = "Kernel energy"
    lead: ClassVar[str] = (
        "Left: share of the energy (sum of squares) kept by centered crops of the kernels; a curve that rises early "
        "means that the outer taps hardly matter. Right: smallest crop that keeps the stated share, for every layer; a "
        "pale bar extends to the whole kernel. Below: mean absolute values of the kernels, each scaled to a maximum of "
        "1. Left and below: means over the widest kernels of each stage."
    )

    name: str
    about: Mapping[str, Any]
    layers: tuple[LayerKernel, ...]
    shares: tuple[float, ...]
    limit: int | None

    def beyond(self) -> tuple[LayerKernel, ...]:
        """Return the kernels that span more than the limit; none without a limit."""
        return tuple(layer for layer in self.layers if self.limit is not None and max(layer.span) > self.limit)

    def rows(self) -> list[dict[str, str]]:
        """Return one row for the kernels of one size in a stage whose names differ only in numbers."""
        groups: dict[tuple[Any, ...], list[LayerKernel]] = {}
        for layer in self.layers:
            pattern = re.sub(r"\d+", "*", layer.name)
            groups.setdefault((layer.stage, pattern, layer.kind, layer.size, layer.dilation), []).append(layer)
        return [self._row(group) for group in groups.values()]

    def _row(self, group: Sequence[LayerKernel]) -> dict[str, str]:
        first, outer = group[0], max(self.shares)
        kind = "" if first.kind == "convolution" else f" {first.kind}"
        step = "" if set(first.dilation) == {1} else f", dilation {_by(first.dilation)}"
        row = {
            "model": self.name,
            "stage": str(first.stage + 1),
            "layers": _common([layer.name for layer in group]),
            "kernels": f"{len(group)}{kind} {first.size[0]}x{first.size[1]}{step}",
        }
        for index, share in enumerate(self.shares):
            row[f"{100 * share:.4g} %"] = _range([layer.smallest[index] for layer in group])
        lost = max(float(layer.table.l1[layer.table.keeping(outer)]) for layer in group)
        row[f"L1 lost at {100 * outer:.4g} %"] = _percent(lost)
        if self.limit is not None:
            cut = [layer for layer in group if max(layer.span) > self.limit]
            for word, values in (("energy", [x.lost for x in cut]), ("L1", [x.lost_l1 for x in cut])):
                most = max((value or 0.0 for value in values), default=None)
                row[f"{word} lost at {self.limit}"] = "-" if most is None else _percent(most)
        return row

    @classmethod
    def reading(cls, results: Mapping[str, Self]) -> str:
        """Return how many kernels keep their energy in a smaller crop."""
        share = max(next(iter(results.values())).shares)
        parts = []
        for name, result in results.items():
            whole = [layer for layer in result.layers if layer.kind != "expert" and max(layer.size) > 1]
            small = [layer for layer in whole if layer.smallest[-1] != layer.size]
            parts.append(f"{len(small)} of {len(whole)} in {name}")
        return f"Kernels that keep {100 * share:.4g} % of their energy in a smaller crop: {', '.join(parts)}."

    @classmethod
    @report.paper()
    def draw(cls, results: Mapping[str, Self], share: float | None = None) -> Figure:
        """Draw energy over the side of the crop, the smallest crop over depth, and mean kernels by stage.

        Args:
            results: by name. A single result has one line per stage, several have one line per model.
            share: of the energy that the smallest crop over depth keeps. Default: the largest requested.
        """
        first = next(iter(results.values()))
        share = max(first.shares) if share is None else _checks.number("share", share, maximum=1.0)
        whole = {name: [layer for layer in r.layers if layer.kind != "expert"] for name, r in results.items()}
        side = max(max(layer.span) for layers in whole.values() for layer in layers)
        tiles = {name: _tiles(_widest(layers), side) for name, layers in whole.items()}
        below = _stages.height(tiles)
        above = max(2.2, 0.8 + _STRIP * len(results))
        figure: Any = report.blank(report.PAGE, above + below)
        top, bottom = figure.subfigures(2, 1, height_ratios=[above, below])
        grid = top.add_gridspec(len(results), 2, width_ratios=[2, 3])
        curves, depths = top.add_subplot(grid[:, 0]), [top.add_subplot(grid[0, 1])]
        for row in range(1, len(results)):  # a strip for each model, as marks of several would hide one another
            depths.append(top.add_subplot(grid[row, 1], sharex=depths[0], sharey=depths[0]))
        lines: list[tuple[str, list[LayerKernel]]] = [(_stages.short(name), layers) for name, layers in whole.items()]
        colors: Sequence[Any] = report.COLORS
        if len(results) == 1:
            stages = sorted({layer.stage for layer in lines[0][1]})
            lines = [(f"stage {s + 1}", [layer for layer in lines[0][1] if layer.stage == s]) for s in stages]
            colors = _stages.stage_colors(len(stages))
        places = {id(layer): place for layers in whole.values() for place, layer in enumerate(layers, 1)}
        for index, (label, layers) in enumerate(lines):
            style = {"color": colors[index % len(colors)], "marker": report.MARKERS[index % len(report.MARKERS)]}
            x, y = _kept(_widest(layers))
            named = len(results) > 1 or len(lines) <= 8 or index % -(-len(lines) // 5) == 0
            curves.plot(x, y, label=label if named else None, markevery=max(1, len(x) // 8), **style)
            depth = depths[index if len(results) > 1 else 0]
            _over_depth(depth, [places[id(layer)] for layer in layers], layers, share, style)
        _finish(curves, depths, share, first.limit)
        _stages.draw(bottom, tiles, side, "mean |weight|")
        drawn: Figure = figure
        return drawn


@_checks.guided
def kernel_energy(
    model: nn.Module,
    *,
    shares: Sequence[float] = (0.5, 0.9, 0.99),
    limit: int | None = None,
    name: str | None = None,
    about: Mapping[str, Any] | None = None,
) -> KernelMaps:
    """Measure the extent of every spatial kernel of a model, as it computes in evaluation mode.

    - Mergeable layers (branches of large kernels, learned masks, blocks of timm's MobileOne or RepVGG) are merged
      first, in copies, one at a time. Kernels that cannot become one stay separate: SLaK's bands are two.
    - Convolutions that compute their kernel from their weight (timm's weight standardization, parametrizations) are
      represented by the computed kernel.
    - A mixture has a bank and experts. Its bound grows with the routing weights: for an image with weights a, it is the
      sum of |a_r| times the bounds of the experts.
    - A mask that depends on the image is that of an image which activates no hidden unit of its predictor.
    - A norm after a convolution is not included unless both are one layer. One-tap kernels are skipped, and so are
      layers whose taps move or whose kernel is as large as the map: deformable layers, attention, global filters.

    Only weights are read.

    Args:
        model: any module, on any device, in any mode.
        shares: shares of the energy that the smallest crops must keep, each above 0 and up to 1.
        limit: side in pixels of the largest kernel that a target supports; reports what cropping to it would lose.
        name: the model's name in tables and figures. Default: its class name.
        about: facts to store with the result.

    Returns:
        The kernels, in the order of the modules.

    Raises:
        TypeError, ValueError: shares or limit are out of range; the model has no spatial kernel, values that are not
            finite, or a layer that cannot be merged (the message says why).
    """
    wanted = tuple(sorted({_checks.number("every share of shares", share, maximum=1.0) for share in shares}))
    if not wanted or not wanted[0]:
        raise ValueError(f"shares must be shares of energy above 0, such as (0.5, 0.99); got {tuple(shares)}.")
    limit = None if limit is None else _checks.integer("limit", limit)
    device, _ = place(model)
    cards = [device] if device.type == "cuda" else []
    with visited(model), torch.no_grad(), torch.random.fork_rng(cards):  # merging creates layers
        found = [(anchor, _measured(kernel, wanted, limit)) for anchor, kernel in _kernels(model)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no convolution with more than one tap.")
    stages = anatomy(model).count_stages([anchor for anchor, _ in found])
    layers = tuple(LayerKernel(stage=stages[anchor], **facts) for anchor, facts in found)
    facts = {**(about or {}), "kernels": "as in evaluation mode, branches merged"}
    return KernelMaps(name or type(model).__name__, facts, layers, wanted, limit)


@dataclass(frozen=True)
class _Kernel:
    name: str
    kind: str
    weight: Tensor
    """(C_out, C_in/groups, rows, columns)."""
    dilation: Pair
    stride: Pair
    groups: int


def _measured(kernel: _Kernel, shares: Sequence[float], limit: int | None) -> dict[str, Any]:
    """Return the fields of a :class:`LayerKernel`, except the stage."""
    try:
        table = crop_table(kernel.weight, kernel.dilation)
    except ValueError as error:
        raise ValueError(f"{kernel.name or 'the model'}: {error}") from error
    lost = lost_l1 = None
    if limit is not None:
        index = table.fitting(limit)
        lost, lost_l1 = (1.0, 1.0) if index is None else (float(table.energy[index]), float(table.l1[index]))
    return {
        "name": kernel.name,
        "kind": kernel.kind,
        "size": table.sizes[-1],
        "dilation": kernel.dilation,
        "stride": kernel.stride,
        "groups": kernel.groups,
        "span": _stages.span(table.sizes[-1], kernel.dilation),
        "magnitude": kernel.weight.abs().mean((0, 1), dtype=torch.float64).cpu().numpy(),
        "table": table,
        "smallest": tuple(table.sizes[table.keeping(share)] for share in shares),
        "lost": lost,
        "lost_l1": lost_l1,
    }


def _kernels(model: nn.Module) -> Iterator[tuple[str, _Kernel]]:
    """Yield (name of a convolution of the model at the kernel's place, the kernel)."""
    modules = dict(model.named_modules())
    done: tuple[str, ...] = ()
    for name, module in modules.items():
        if name.startswith(done):
            continue
        if merge_method(module) is None:
            yield from ((name, kernel) for kernel in _of_layer(name, module))
            continue
        done += (f"{name}." if name else "",)
        for inner, part in _merged(name, module).named_modules(prefix=name):
            yield from ((_origin(inner, modules), kernel) for kernel in _of_layer(inner, part))


def _origin(name: str, modules: Mapping[str, nn.Module]) -> str:
    """Return the name of the first convolution in the module that was merged, or in what surrounds it."""
    while name not in modules:
        name = name.rpartition(".")[0]
    parts = modules[name].named_modules(prefix=name)
    return next((inner for inner, part in parts if hasattr(part, "in_channels")), name)


def _merged(name: str, module: nn.Module) -> nn.Module:
    try:
        return fuse_layers(copy.deepcopy(module).eval())[0]
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{name or 'the model'} ({type(module).__name__}) cannot be merged: {error} Fix that, or reparameterize "
            "the model first."
        ) from error


def _of_layer(name: str, module: nn.Module) -> Iterator[_Kernel]:
    """Yield the spatial kernels of one module that does not merge."""
    if isinstance(module, nn.ConvTranspose2d):
        yield from _spatial(name, "transposed", by_outputs(module), module)
    elif isinstance(module, nn.Conv2d):
        yield from _spatial(name, "convolution", _computed(module), module)
    elif isinstance(module, DynamicGMConv2d):
        yield from _spatial(name, "masked", module.weight * module.mask(), module)
    elif isinstance(module, FusedMoRFConv2d):
        bank, step = module.bank, fold.common_dilation(module.dilations)
        yield from _spatial(name, "bank", bank.flatten(0, 1), module, step)
        for index, (size, dilation) in enumerate(zip(module.kernel_sizes, module.dilations, strict=True)):
            weight = fold.expert(bank, index, size, dilation, step)
            yield from _spatial(f"{name}[{index}]", "expert", weight, module, dilation)


def _spatial(
    name: str, kind: str, weight: Tensor, module: Any, dilation: int | Pair | None = None
) -> Iterator[_Kernel]:
    if weight.shape[2:].numel() > 1:
        steps = _checks.pair("dilation", module.dilation if dilation is None else dilation)
        yield _Kernel(name, kind, weight.detach(), steps, _checks.pair("stride", module.stride), module.groups)


def _computed(conv: nn.Conv2d) -> Tensor:
    """Return the kernel that a convolution uses; its weight if that cannot be observed."""
    kind = type(conv)
    plain = kind.forward in (nn.Conv2d.forward, DepthwiseConv2d.forward) and kind._conv_forward is _AS_IT_IS
    if plain or conv.weight.is_meta:
        return conv.weight
    twin = copy.deepcopy(conv).eval()
    for hooks in (twin._forward_hooks, twin._forward_pre_hooks):
        hooks.clear()
    span = _stages.span(_checks.pair("kernel_size", conv.kernel_size), _checks.pair("dilation", conv.dilation))
    with _Kept() as kept, contextlib.suppress(TypeError, ValueError, RuntimeError):  # it may need more than one input
        twin(conv.weight.new_zeros(1, conv.in_channels, *span))
    return next((weight for weight in kept.weights if weight.shape == conv.weight.shape), conv.weight)


_AS_IT_IS = nn.Conv2d._conv_forward


class _Kept(TorchFunctionMode):
    """Records the kernels of all convolutions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.conv2d, torch.nn.functional.conv2d):
            self.weights.append(kwargs["weight"] if "weight" in kwargs else args[1])
        return func(*args, **kwargs)


# Texts and lines


def _by(pair: Pair) -> str:
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}x{pair[1]}"


def _range(sizes: Sequence[Pair]) -> str:
    ordered = sorted(sizes, key=lambda size: (max(size), size))
    return _by(ordered[0]) + (f" to {_by(ordered[-1])}" if ordered[0] != ordered[-1] else "")


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.0f} %"


def _common(names: Sequence[str]) -> str:
    """Return one name for names that differ only in numbers, with * for the numbers that differ."""
    parts = [set(column) for column in zip(*(re.split(r"(\d+)", name) for name in names), strict=True)]
    return "".join(next(iter(words)) if len(words) == 1 else "*" for words in parts) or "(the model itself)"


def _kept(layers: Sequence[LayerKernel]) -> tuple[list[int], list[float]]:
    """Return sides in pixels and the mean share of energy that crops within them keep."""
    sides = sorted({span for layer in layers for span in layer.table.spans})
    kept = np.zeros(len(sides))
    for layer in layers:
        index = np.searchsorted(layer.table.spans, sides, "right") - 1
        kept += np.where(index >= 0, 1 - layer.table.energy.numpy()[index], 0.0)
    return sides, list(kept / len(layers))


def _widest(layers: Sequence[LayerKernel]) -> list[LayerKernel]:
    """Return the widest kernels of each stage, which leaves out those between stages."""
    most: dict[int, int] = {}
    for layer in layers:
        most[layer.stage] = max(most.get(layer.stage, 0), *layer.span)
    return [layer for layer in layers if max(layer.span) == most[layer.stage]]


def _over_depth(axis: Any, x: Sequence[int], layers: Sequence[LayerKernel], share: float, style: Any) -> None:
    kept = [layer.table.spans[layer.table.keeping(share)] for layer in layers]
    axis.vlines(x, kept, [max(layer.span) for layer in layers], color=style["color"], alpha=0.3, linewidth=3)
    axis.plot(x, kept, linestyle="none", **style)


def _finish(curves: Any, depths: Sequence[Any], share: float, limit: int | None) -> None:
    curves.set_xlabel("side of the crop (pixels)")
    curves.locator_params(axis="x", integer=True)
    curves.set_ylabel("energy kept (share)")
    curves.set_ylim(0, 1.03)
    curves.legend(loc="best", handlelength=1.5)
    depths[-1].set_xlabel("layer")
    depths[len(depths) // 2].set_ylabel(f"smallest crop for {100 * share:.4g} %\n(pixels)")
    for depth in depths:
        depth.margins(y=0.08)
        depth.set_ylim(bottom=0)
        depth.locator_params(axis="x", integer=True)
        depth.tick_params(axis="x", labelbottom=depth is depths[-1])
        if limit is not None:
            where: Any = ("axes fraction", "data")
            depth.axhline(limit, color="black", linewidth=0.7, linestyle=":")
            depth.annotate(f"limit {limit}", (1.01, limit), xycoords=where, fontsize=7, va="center")
    for axis in (curves, *depths):
        axis.grid(alpha=0.25, linewidth=0.5)
        axis.spines[["top", "right"]].set_visible(False)


def _tiles(layers: Sequence[LayerKernel], side: int) -> list[tuple[str, np.ndarray]]:
    scaled = [(x.stage, x.magnitude / (x.magnitude.max() or 1.0), x.dilation) for x in layers]
    return _stages.tiles(scaled, side)
