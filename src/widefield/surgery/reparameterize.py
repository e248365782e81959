"""From the structure that trains to the structure that serves, and the proof that they compute the same."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from dataclasses import replace as with_changes
from typing import Any

import torch
from torch import Tensor, nn

from widefield import _checks, bench
from widefield.nn import DepthwiseConv2d, MoRFConv2d, SameAligned
from widefield.nn.fusing import fold_norm
from widefield.nn.gmconv import DynamicGMConv2d, GMConv2d
from widefield.nn.reparam import ConvNorm, ReparamConv2d
from widefield.report import Report
from widefield.surgery import inputs
from widefield.surgery.compare import Difference, comparable, difference
from widefield.surgery.folding import Pair, Watch, is_linear, is_norm, without_norm
from widefield.surgery.inputs import Example, place
from widefield.surgery.plain import Changed, plain, with_numbers
from widefield.surgery.walk import (
    COLLECTIVE,
    MERGE_METHODS,
    begin,
    computed,
    copied,
    duplicate,
    hooked,
    in_own_types,
    is_ours,
    merge,
    merge_method,
    outermost,
    replace,
    takes_norm,
)

log = logging.getLogger(__name__)


class NothingToFuseError(ValueError):
    """A model in which there is nothing to re-parameterise: it is as it computes."""


@dataclass(frozen=True)
class FusedLayer:
    """A layer that became a simpler one."""

    name: str
    norm: str | None
    """Name of the batch norm that was folded in; it is now its activation, or an identity."""
    kind: str
    """"mixture", "mask", "branches", "convolution", or "block" for what merges itself otherwise; and the norm."""
    before: str
    """Its class."""
    after: str
    """The class that it became."""
    difference: Difference | None
    """Of its own output, and the norm's, on its own input; None where the example does not reach it, or where the
    input was changed in place before it could be tried."""


@dataclass(frozen=True)
class LeftLayer:
    """A batch norm, or a block that could merge, that is still there."""

    name: str
    kind: str
    """Its class."""
    reason: str


@dataclass(frozen=True)
class Reparameterization(Report):
    """What :func:`reparameterize` did, and how far the outputs moved."""

    model: str
    """Its class."""
    fused: tuple[FusedLayer, ...]
    left: tuple[LeftLayer, ...]
    before: bench.Cost
    """Parameters, and multiply-accumulates for one image of the example."""
    after: bench.Cost
    difference: Difference
    """Of the model's outputs on the example input."""
    tolerance: float

    @property
    def worst(self) -> FusedLayer | None:
        """The layer whose own output moved most; None where none was measured."""
        return _worst(self.fused)

    def counts(self) -> dict[str, int]:
        """Return kind -> how many layers of it were fused, the most frequent first."""
        return dict(Counter(layer.kind for layer in self.fused).most_common())

    def rows(self) -> list[dict[str, str]]:
        """Return a table with one row for each layer that was fused, and then for each that was left."""
        fused = [
            {
                "layer": layer.name,
                "what": layer.kind,
                "before": layer.before,
                "after": layer.after,
                "difference": "not measured" if layer.difference is None else f"{layer.difference.relative:.1e}",
                "left because": "",
            }
            for layer in self.fused
        ]
        left = [
            {
                "layer": layer.name,
                "what": "left",
                "before": layer.kind,
                "after": layer.kind,
                "difference": "",
                "left because": layer.reason,
            }
            for layer in self.left
        ]
        return fused + left

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON takes them."""
        return asdict(self)

    def summary(self) -> str:
        """Return what was fused, the costs, and how far the outputs moved, in four lines."""
        worst = self.worst
        at = "" if worst is None or worst.difference is None else (
            f", those of single layers by at most {worst.difference.relative:.1e} ({worst.name})"
        )  # fmt: skip
        return (
            f"{self.model}: {_counted(self.fused)}; {len(self.left)} left\n"
            f"parameters {self.before.parameters:,} -> {self.after.parameters:,}\n"
            f"MACs an image {self.before.macs:,} -> {self.after.macs:,}\n"
            f"outputs differ by {self.difference.relative:.1e} of their scale{at}; tolerance {self.tolerance:.0e}"
        )


@dataclass(frozen=True)
class _Merge:
    name: str
    module: nn.Module
    method: str
    twin: nn.Module
    """What a copy of the module became."""


@_checks.guided
@in_own_types
def reparameterize(
    model: nn.Module,
    example_input: Example | None = None,
    *,
    tolerance: float = 1e-4,
    inplace: bool = False,
    report: Callable[[Reparameterization], object] | None = None,
) -> nn.Module:
    """Return the model with every mergeable layer fused, the root included, and its outputs verified.

    First, whatever merges itself is merged: layers with ``fuse()``, and in place what timm and official code merge by
    ``reparameterize()``, ``switch_to_deploy()``, ``merge_kernel()`` or ``merge_dilated_branches()``, the outermost
    first. Then every batch norm that alone reads the output of a convolution, transposed convolution or linear layer is
    folded into it; so is one that alone reads a mixture's or masked convolution's. Who reads what is seen on the
    example input: of the model's ways, keep to those that the example takes. What is called more than once, shared,
    hooked, or computes its kernel from others, is left, as is a norm without running statistics.

    Depthwise layers of ours become ``torch.nn.Conv2d``, which is slow for large kernels: to serve them in PyTorch,
    convert the result by :class:`FastDepthwise`.

    Verified are the outputs of the model, and those of every such layer on its own input, as a network can hide its
    layers (timm starts the last norm of each residual branch at zero). What was fused is logged at INFO, by kinds.

    Args:
        model: in evaluation mode.
        example_input: what to verify on, (N, C, H, W). Default: noise of the input size in timm's configuration, or of
            64x64 with the channels of the first convolution.
        tolerance: largest difference allowed, in units of the output's largest absolute value. What float32 needs; in
            half precision every folded kernel is rounded anew, so re-parameterise before casting to it.
        inplace: fuse ``model`` itself instead of a copy.
        report: called once, at the end, with what was done: ``print``, or the ``append`` of a list. Costs are then
            counted, which takes two more forward passes.

    Raises:
        RuntimeError: the model is in training mode; or outputs differ by more than the tolerance, or it no longer runs
            (the model passed is then unchanged, unless ``inplace``).
        NothingToFuseError: a ValueError, there is nothing to fuse.
        ValueError: a layer that merges has hooks, which would be lost; a ``forward`` that was replaced on a module
            (unless ``inplace``); no example input could be made up; parameters on the meta device; or the outputs hold
            nothing that can be compared.
        TypeError: a report that is no function.
    """
    tolerance = _checks.number("tolerance", tolerance)
    begin(model, "re-parameterisation computes the evaluation-mode function", report)
    model = model.eval() if inplace else copied(model)  # frozen norms may still be in training mode
    x = inputs.example_input(model, example_input)
    merges, left = _merges(model)
    mixtures = {tried.module: tried.name for tried in merges if takes_norm(tried.module)}
    norms = [module for module in model.modules() if is_norm(module)]
    merged = {tried.module: tried.twin for tried in merges}
    with torch.no_grad(), Watch(model, mixtures, norms, _fuse_with, merged) as seen:
        before = _run(model, x, made_up=example_input is None)
        pairs = seen.pairs(before)
    cost = None if report is None else _cost(model, x)
    stays = {norm: reason for norm in norms if seen.read_by(norm) and (reason := seen.why_not(norm))}
    own, name = seen.own, type(model).__name__
    del merged
    model, fused = _merge(model, merges, pairs, own)
    model.eval()  # what timm's blocks merge into begins in training mode
    del merges, pairs, seen

    layers = {module: title for title, module in model.named_modules() if is_linear(module)}
    norms = [module for module in model.modules() if is_norm(module)]
    with torch.no_grad(), Watch(model, layers, norms, fold_norm) as watch:
        pairs = watch.pairs(_still_runs(model, x))
    for title, module in model.named_modules():
        if is_norm(module) and (reason := stays.get(module) or watch.why_not(module)):
            left.append(LeftLayer(title or name, type(module).__name__, reason))
    fused = _joined(fused, _fold(model, pairs))
    del pairs, watch
    model, changed, kept = plain(model, x)
    fused = _finished(fused, changed, model)
    left += [LeftLayer(*entry) for entry in kept if entry.name not in {layer.name for layer in left}]
    if not fused:
        raise NothingToFuseError(f"{name} has nothing to fuse: {_nothing(left)}")

    with torch.no_grad():
        after = _still_runs(model, x)
    apart = difference(before, after)
    worst = _worst(fused)
    layerwise = 0.0 if worst is None or worst.difference is None else worst.difference.relative
    log.info(
        "%s: %s; outputs differ by %.1e of their scale, those of single layers by at most %.1e; left %d",
        name, _counted(fused), apart.relative, layerwise, len(left),
    )  # fmt: skip
    if not max(apart.relative, layerwise) <= tolerance:
        raise RuntimeError(_too_far(model, fused, apart, layerwise, tolerance, turned=_turned(before, after)))
    if report is not None and cost is not None:
        done = tuple(fused), tuple(left)
        report(Reparameterization(name, *done, cost, _cost(model, x), apart, tolerance))
    return model


def _merges(root: nn.Module) -> tuple[list[_Merge], list[LeftLayer]]:
    """Return what merges itself, tried on copies, and what should and does not.

    A ``fuse()`` that acts in place and holds others is that of a whole network (timm's RepViT), and calls theirs: they
    are fused one by one.
    """
    twins: dict[nn.Module, nn.Module] = {}
    failed: dict[nn.Module, str] = {}
    names = {module: name for name, module in root.named_modules()}

    def works(module: nn.Module, method: str) -> bool:
        lost = next((inner for inner, part in module.named_modules() if hooked(part)), None)
        if lost is not None:
            where = ".".join(filter(None, (names[module], lost))) or type(module).__name__
            raise ValueError(f"{where} has hooks, which fusing would lose: remove them first.")
        twin = module if takes_norm(module) else duplicate(module)
        try:
            twins[module] = merge(twin, method)
        except Exception as error:
            if is_ours(module):
                raise
            failed[module] = f"its {method}() fails with {type(error).__name__}: {error}"
            return False
        if twins[module] is not twin:
            return True
        of_others = method == "fuse" and any(merge_method(inner) for inner in list(module.modules())[1:])
        return not of_others and _structure(twin) != _structure(module)

    merges = [
        _Merge(name, module, method, twins[module])
        for name, module, method in outermost(root, lambda module: works(module, merge_method(module) or ""))
    ]
    inside = {inner for tried in merges for inner in tried.module.modules()}
    for module in names:
        mixture = next((inner for inner in module.modules() if takes_norm(inner)), None)
        if mixture is not None and module not in inside and merge_method(module) is not None:
            failed[module] = f"its own method would look for a convolution where a {type(mixture).__name__} is"
    outer: list[str] = []
    for module, name in names.items():
        reason = computed(module) if merge_method(module) is not None else None
        if reason is not None and not any(name.startswith(prefix) for prefix in outer):
            outer.append(f"{name}." if name else "")
            failed[module] = reason
    left = [LeftLayer(names[m] or type(m).__name__, type(m).__name__, reason) for m, reason in failed.items()]
    for module, name in names.items():
        method = next((method for method in COLLECTIVE if callable(getattr(module, method, None))), None)
        if method is not None and inside.isdisjoint(module.modules()) and works(module, method):
            merges.append(_Merge(name, module, method, twins[module]))
            inside.update(module.modules())
    return merges, left


def _structure(module: nn.Module) -> list[tuple[str, object]]:
    """Return the parts of a module by which one that acted in place differs from one that had nothing to do."""
    parts: list[tuple[str, object]] = [(name, type(part)) for name, part in module.named_modules()]
    return parts + [(name, tuple(tensor.shape)) for name, tensor in module.state_dict().items()]


def _merge(
    root: nn.Module, merges: list[_Merge], pairs: list[Pair], own: dict[nn.Module, Difference]
) -> tuple[nn.Module, list[FusedLayer]]:
    """Merge for good, in place, what :func:`_merges` tried; return the root and what became of its layers."""
    followed = {pair.layer: pair for pair in pairs}
    names = {module: name for name, module in root.named_modules()}
    replacements: dict[nn.Module, nn.Module] = {}
    fused = []
    for tried in merges:
        module, pair, before = tried.module, followed.get(tried.module), type(tried.module).__name__
        kind = _kind(module)
        merged = merge(module, tried.method) if pair is None else pair.folded
        if merged is not module:
            replacements[module] = with_numbers(merged) if isinstance(module, DepthwiseConv2d) else merged
        if pair is not None:
            replacements[pair.norm] = without_norm(pair.norm)
        fused.append(
            FusedLayer(
                tried.name or before,
                None if pair is None else names[pair.norm],
                kind if pair is None else f"{kind} + {type(pair.norm).__name__}",
                before,
                type(replacements.get(module, module)).__name__,
                own.get(module) if pair is None else _larger(own.get(module), pair.difference),
            )
        )
    return replace(root, replacements).eval(), fused  # others' methods make layers in training mode


def _fold(root: nn.Module, pairs: list[Pair]) -> list[FusedLayer]:
    """Put folded layers in their places, and return what became of them."""
    names = {module: name for name, module in root.named_modules()}
    replacements: dict[nn.Module, nn.Module] = {}
    fused = []
    for pair in pairs:
        replacements[pair.layer], replacements[pair.norm] = pair.folded, without_norm(pair.norm)
        what = "linear layer" if isinstance(pair.layer, nn.Linear) else "convolution"
        before, after = type(pair.layer).__name__, type(pair.folded).__name__
        kind = f"{what} + {type(pair.norm).__name__}"
        fused.append(FusedLayer(names[pair.layer], names[pair.norm], kind, before, after, pair.difference))
    replace(root, replacements)
    return fused


def _joined(merged: list[FusedLayer], folded: list[FusedLayer]) -> list[FusedLayer]:
    """Return both in one list, where a layer of which both speak stands once."""
    first = {layer.name: layer for layer in merged}
    for layer in folded:
        if layer.name in first:
            was = first[layer.name]
            larger, kind = _larger(was.difference, layer.difference), layer.kind.partition(" + ")[2]
            layer = FusedLayer(layer.name, layer.norm, f"{was.kind} + {kind}", was.before, layer.after, larger)
        first[layer.name] = layer
    return list(first.values())


def _finished(fused: list[FusedLayer], changed: list[Changed], model: nn.Module) -> list[FusedLayer]:
    """Return the layers with the classes that they have in the end, and those that only changed their class."""
    known = {layer.name: layer for layer in fused}
    for name, before, after in changed:
        known.setdefault(name, FusedLayer(name, None, "layer", before, after, None))
    modules = dict(model.named_modules())  # the root goes by its class
    return [with_changes(layer, after=type(modules.get(layer.name, model)).__name__) for layer in known.values()]


def _fuse_with(layer: Any, norm: nn.Module) -> nn.Module:
    merged: nn.Module = layer.fuse(norm)
    return merged


def _kind(module: nn.Module) -> str:
    if isinstance(module, SameAligned):
        return _kind(module.layer)
    if isinstance(module, MoRFConv2d):
        return "mixture"
    if isinstance(module, (GMConv2d, DynamicGMConv2d)):
        return "mask"
    if isinstance(module, ReparamConv2d):
        return "branches"
    if isinstance(module, ConvNorm):
        return f"convolution + {type(module.bn).__name__}"
    return "convolution" if isinstance(module, DepthwiseConv2d) else "block"


def _larger(first: Difference | None, second: Difference | None) -> Difference | None:
    return max((d for d in (first, second) if d is not None), key=lambda d: d.relative, default=None)


def _worst(fused: tuple[FusedLayer, ...] | list[FusedLayer]) -> FusedLayer | None:
    measured = [layer for layer in fused if layer.difference is not None]
    return max(measured, key=lambda layer: 0.0 if layer.difference is None else layer.difference.relative, default=None)


def _counted(fused: tuple[FusedLayer, ...] | list[FusedLayer]) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(layer.kind for layer in fused).most_common())
    return f"fused {len(fused)} layer{'' if len(fused) == 1 else 's'} ({kinds})"


def _nothing(left: list[LeftLayer]) -> str:
    text = f"no module in it has a method {', '.join(MERGE_METHODS[:-1])} or {MERGE_METHODS[-1]}, "
    text += "and no batch norm alone reads the output of a convolution."
    if left:
        text += f" {len(left)} left, the first of them {left[0].name} ({left[0].reason})."
    return text


def _turned(before: Any, after: Any) -> bool:
    """Say whether an output of whole numbers, such as classes in the order of their scores, is another."""
    pairs = zip(*comparable(before, after), strict=True)
    return any(not (a.is_floating_point() or a.is_complex()) and not torch.equal(a, b) for a, b in pairs)


def _too_far(
    model: nn.Module,
    fused: list[FusedLayer],
    apart: Difference,
    layerwise: float,
    tolerance: float,
    *,
    turned: bool,
) -> str:
    guilty = [layer.name for layer in fused if layer.difference and not layer.difference.relative <= tolerance]
    named = guilty or [layer.name for layer in fused]
    more = f" and {len(named) - 5} more" if len(named) > 5 else ""
    grown = "" if guilty or not any(layer.difference for layer in fused) else (
        " Each alone is within it: either this network makes roundings grow (then it passes in float64), or something "
        "else reads what changed."
    )  # fmt: skip
    if grown and turned:
        grown = (
            " Each alone is within it, and an output of whole numbers differs: a ranking (top-k, non-maximum "
            "suppression) may have turned over near-equal scores. Try another example input, or the model without its "
            "ranking."
        )
    dtype = place(model)[1]
    half = "" if dtype.itemsize > 2 else (
        f" Its parameters are {dtype}, which rounds every folded kernel anew: re-parameterise in float32 and cast "
        "after that, or allow more."
    )  # fmt: skip
    return (
        f"re-parameterisation changed the outputs by {apart.relative:.2e} of their scale "
        f"({apart.max_abs:.2e} absolute) and those of single layers by up to {layerwise:.2e}, "
        f"more than tolerance={tolerance:.0e}. Look at: {', '.join(named[:5])}{more}.{grown}{half}"
    )


def _run(model: nn.Module, x: Tensor, *, made_up: bool) -> Any:
    if not made_up:
        return model(x)
    try:
        return model(x)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(
            f"the model does not run on the example input made up for it, {tuple(x.shape)}: pass example_input=."
        ) from error


def _cost(model: nn.Module, x: Tensor) -> bench.Cost:
    """Count for the whole example, of which not every model takes a part, and share the work out to its images."""
    counted = bench.cost(model, x)
    return bench.Cost(counted.parameters, counted.macs // max(1, len(x)), counted.uncounted)


def _still_runs(model: nn.Module, x: Tensor) -> Any:
    try:
        return model(x)
    except (AttributeError, KeyError, TypeError) as error:
        raise RuntimeError(
            f"the model no longer runs with its layers fused ({type(error).__name__}: {error}): its code reads "
            "something of a layer that is another now."
        ) from error
