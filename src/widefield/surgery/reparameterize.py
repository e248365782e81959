"""Merge a trained model into its inference structure, and verify that it computes the same."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from dataclasses import replace as with_changes
from typing import Any

import torch
from torch import Tensor, nn

from widefield import _checks, _history, bench
from widefield.nn import DepthwiseConv2d, MoRFConv2d, SameAligned
from widefield.nn.fusing import fold_norm
from widefield.nn.gmconv import DynamicGMConv2d, GMConv2d
from widefield.nn.reparam import ConvNorm, ReparamConv2d
from widefield.surgery import inputs
from widefield.surgery.compare import Difference, comparable, difference
from widefield.surgery.detections import detections, sensitive
from widefield.surgery.folding import Pair, Watch, is_linear, is_norm, without_norm
from widefield.surgery.inputs import Example, place
from widefield.surgery.plain import Changed, plain, with_numbers
from widefield.surgery.quick import quick
from widefield.surgery.reparameterize_report import FusedLayer, LeftLayer, Reparameterization, counted, larger, worst
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
    """A model that has nothing to reparameterize."""


@dataclass(frozen=True)
class _Merge:
    name: str
    module: nn.Module
    method: str
    twin: nn.Module
    """The merged copy of the module."""


@dataclass
class _Work:
    """A model in progress, and what happened to its layers so far."""

    model: nn.Module
    name: str
    x: Tensor
    before: Any
    """Outputs of the original model on ``x``."""
    cost: bench.Cost | None
    fused: list[FusedLayer]
    left: list[LeftLayer]
    stays: dict[nn.Module, str]
    """Norms that cannot be folded into the mixture that they follow, with the reason."""
    watched: tuple[Watch, list[Pair]] | None
    """The layers and norms of the original model; None if layers merged themselves, so that it has others now."""
    merged: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Name, merge method and norm of each layer that merged itself; for the history."""
    folded: list[tuple[str, str]] = field(default_factory=list)
    """Names of the layers and the norms that were folded into them afterward; for the history."""


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
    """Return the model with every mergeable layer fused, the root included, and verify its outputs.

    Layers with ``fuse()`` are merged first, and blocks that timm or official code merges in place by
    ``reparameterize()``, ``switch_to_deploy()``, ``merge_kernel()`` or ``merge_dilated_branches()``. Then every batch
    norm is folded into the convolution, transposed convolution, linear layer, mixture or masked convolution before it,
    if nothing else reads that layer's output. The example input determines which modules read each output, so the model
    must be used along the paths that the example takes. Layers that are called more than once, shared, hooked, or
    compute their kernel are left unchanged, as are norms without running statistics.

    Our depthwise layers become ``torch.nn.Conv2d``, which is slow for large kernels. To serve the model in PyTorch,
    convert the result with :class:`FastDepthwise`.

    Two checks must pass: the outputs of the model, and the output of every fused layer on its own input, because a
    network can hide its layers (timm starts the last norm of each residual branch at zero).

    Args:
        model: in evaluation mode.
        example_input: images (N, C, H, W) to verify on, or their size: one side, (H, W), (C, H, W) or (N, C, H, W).
            Default: noise of the input size in timm's configuration, or of 64x64 with the channels of the first layer.
        tolerance: largest difference allowed, relative to the largest absolute output. The default suits float32. Half
            precision rounds every folded kernel again, so reparameterize before casting.
        inplace: fuse ``model`` itself instead of a copy.
        report: called once with the :class:`Reparameterization`: ``print``, or the ``append`` of a list. Counting costs
            for it takes two more forward passes.

    Raises:
        RuntimeError: a part of the model is in training mode; outputs differ by more than the tolerance, or the fused
            model does not run. The original is unchanged unless ``inplace``.
        NothingToFuseError: a ValueError, the model has nothing to fuse.
        ValueError: a layer to merge has hooks, which would be lost; a replaced ``forward`` (unless ``inplace``); no
            example input could be made up; parameters on the meta device; outputs that cannot be compared.
        TypeError: an argument of another type.
    """
    tolerance = _checks.number("tolerance", tolerance)
    begin(model, "reparameterize needs the evaluation-mode function", report)
    model = model.eval() if inplace else copied(model)  # frozen norms may still be in training mode
    x = inputs.example_input(model, example_input)
    with sensitive(model, x):
        work = _merged(model, x, made_up=not isinstance(example_input, Tensor), count=report is not None)
        _fold_norms(work)
        before = {name for name, _ in work.model.named_modules()}
        work.model, changed, kept = plain(work.model, x)
        work.fused = _finished(work.fused, changed, work.model)
        work.left += [LeftLayer(*entry) for entry in kept if entry.name not in {layer.name for layer in work.left}]
        if not work.fused:
            raise NothingToFuseError(f"{work.name} has nothing to fuse: {_nothing(work.left)}")
        apart = _verified(work, tolerance)
    _history.carry(model, work.model)
    plained = [layer.name if layer.name in before else "" for layer in changed]  # the root goes by its class
    _history.note(work.model, "reparameterize", merged=work.merged, folded=work.folded, plain=plained)
    if report is not None and work.cost is not None:
        done = work.cost, _cost(work.model, x), apart, tolerance
        report(Reparameterization(work.name, tuple(work.fused), tuple(work.left), *done))
    return work.model


def _merged(model: nn.Module, x: Tensor, *, made_up: bool, count: bool) -> _Work:
    """Merge the layers that merge themselves, in place, and the norms that can be folded into mixtures.

    If there are no such layers, the one forward pass watches the others.
    """
    merges, left = _merges(model)
    mixtures = {tried.module: tried.name for tried in merges if takes_norm(tried.module)}
    norms = [module for module in model.modules() if is_norm(module)]
    merged = {tried.module: tried.twin for tried in merges}
    layers, fold = (mixtures, _fuse_with) if merges else (_linear(model), fold_norm)
    with torch.no_grad(), Watch(model, layers, norms, fold, merged) as seen:
        before = _run(model, x, made_up=made_up)
        pairs = seen.pairs(before)
    cost = _cost(model, x) if count else None
    name = type(model).__name__
    if not merges:
        return _Work(model, name, x, before, cost, [], left, {}, (seen, pairs))
    stays = {norm: reason for norm in norms if seen.read_by(norm) and (reason := seen.why_not(norm))}
    names = {module: path for path, module in model.named_modules()}
    followed = {pair.layer: names[pair.norm] for pair in pairs}
    history = [(tried.name, tried.method, followed.get(tried.module)) for tried in merges]
    model, fused = _merge(model, merges, pairs, seen.own)
    # timm's merged blocks begin in training mode
    return _Work(model.eval(), name, x, before, cost, fused, left, stays, None, history)


def _linear(model: nn.Module) -> dict[nn.Module, str]:
    """Return the layers that a norm may be folded into, with their names."""
    return {module: name for name, module in model.named_modules() if is_linear(module)}


def _fold_norms(work: _Work) -> None:
    """Fold batch norms into the layers before them, in place."""
    if work.watched is None and not any(map(is_norm, work.model.modules())):
        return
    watch, pairs = work.watched or _watched(work)
    work.watched = None  # holds the layers that are replaced here
    for title, module in work.model.named_modules():
        if is_norm(module) and (reason := work.stays.get(module) or watch.why_not(module)):
            work.left.append(LeftLayer(title or work.name, type(module).__name__, reason))
    names = {module: name for name, module in work.model.named_modules()}
    work.folded = [(names[pair.layer], names[pair.norm]) for pair in pairs]
    work.fused = _joined(work.fused, _fold(work.model, pairs))


def _watched(work: _Work) -> tuple[Watch, list[Pair]]:
    """Watch a forward pass of the model with its merged layers."""
    norms = [module for module in work.model.modules() if is_norm(module)]
    with torch.no_grad(), Watch(work.model, _linear(work.model), norms, fold_norm) as watch:
        return watch, watch.pairs(_still_runs(work.model, work.x))


def _verified(work: _Work, tolerance: float) -> Difference:
    """Return how far the outputs moved; raises RuntimeError if they, or those of a layer, moved too far."""
    with torch.no_grad(), quick(work.model) as fast:
        after = _still_runs(fast, work.x)
    apart = difference(work.before, after, work.model)
    moved = worst(work.fused)
    layerwise = 0.0 if moved is None or moved.difference is None else moved.difference.relative
    log.info(
        "%s: %s; outputs differ by %.1e of their scale, those of single layers by at most %.1e; left %d",
        work.name, counted(work.fused), apart.relative, layerwise, len(work.left),
    )  # fmt: skip
    if not (apart.within(tolerance) and layerwise <= tolerance):
        turned = _turned(work.before, after)
        raise RuntimeError(_too_far(work.model, work.fused, apart, layerwise, tolerance, turned=turned))
    return apart


def _merges(root: nn.Module) -> tuple[list[_Merge], list[LeftLayer]]:
    """Return the modules that merge themselves, tried on copies, and those whose method fails.

    An in-place ``fuse()`` of a whole network (timm's RepViT) calls those of its layers; the layers are merged instead.
    """
    twins: dict[nn.Module, nn.Module] = {}
    failed: dict[nn.Module, str] = {}
    names = {module: name for name, module in root.named_modules()}

    def works(module: nn.Module, method: str) -> bool:
        lost = next((inner for inner, part in module.named_modules() if hooked(part)), None)
        if lost is not None:
            where = ".".join(filter(None, (names[module], lost))) or type(module).__name__
            raise ValueError(f"{where} has hooks, which fusing would lose: remove them first.")
        twin = module if takes_norm(module) or _leaves(module, method) else duplicate(module)
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
            failed[module] = f"its own method expects a convolution where a {type(mixture).__name__} is"
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


def _leaves(module: nn.Module, method: str) -> bool:
    """Return whether a merge leaves the module as it is, and returns another one; see :mod:`widefield.nn.fusing`."""
    return is_ours(module) and method == "fuse"


def _structure(module: nn.Module) -> list[tuple[str, object]]:
    """Return types and shapes of a module's parts, which an in-place merge changes."""
    parts: list[tuple[str, object]] = [(name, type(part)) for name, part in module.named_modules()]
    return parts + [(name, tuple(tensor.shape)) for name, tensor in module.state_dict().items()]


def _merge(
    root: nn.Module, merges: list[_Merge], pairs: list[Pair], own: dict[nn.Module, Difference]
) -> tuple[nn.Module, list[FusedLayer]]:
    """Merge in place what :func:`_merges` tried on copies; return the root and the fused layers."""
    followed = {pair.layer: pair for pair in pairs}
    names = {module: name for name, module in root.named_modules()}
    replacements: dict[nn.Module, nn.Module] = {}
    fused = []
    for tried in merges:
        module, pair, before = tried.module, followed.get(tried.module), type(tried.module).__name__
        kind = _kind(module)
        if pair is not None:
            merged = pair.folded
        else:
            merged = tried.twin if _leaves(module, tried.method) else merge(module, tried.method)
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
                own.get(module) if pair is None else larger(own.get(module), pair.difference),
            )
        )
    return replace(root, replacements).eval(), fused  # others' methods make layers in training mode


def _fold(root: nn.Module, pairs: list[Pair]) -> list[FusedLayer]:
    """Replace layers and norms with their folds, and return the fused layers."""
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
    """Return both lists as one, with one entry per layer."""
    first = {layer.name: layer for layer in merged}
    for layer in folded:
        if layer.name in first:
            was = first[layer.name]
            apart, kind = larger(was.difference, layer.difference), layer.kind.partition(" + ")[2]
            layer = FusedLayer(layer.name, layer.norm, f"{was.kind} + {kind}", was.before, layer.after, apart)
        first[layer.name] = layer
    return list(first.values())


def _finished(fused: list[FusedLayer], changed: list[Changed], model: nn.Module) -> list[FusedLayer]:
    """Return the fused layers with their final classes, and the layers that only changed their class."""
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


def _nothing(left: list[LeftLayer]) -> str:
    text = f"no module in it has a method {', '.join(MERGE_METHODS[:-1])} or {MERGE_METHODS[-1]}, "
    text += "and no batch norm alone reads the output of a convolution."
    if left:
        text += f" {len(left)} left, the first of them {left[0].name} ({left[0].reason})."
    return text


def _turned(before: Any, after: Any) -> bool:
    """Return whether an output of integers changed, such as classes in the order of their scores."""
    if detections(before) is not None:
        return False
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
        " Each layer alone is within it: either this network amplifies rounding (then it passes in float64), or other "
        "code reads what changed."
    )  # fmt: skip
    if grown and turned:
        grown = (
            " Each layer alone is within it, and an output of integers differs: a ranking (top-k, non-maximum "
            "suppression) may have swapped near-equal scores. Try another example input, or the model without the "
            "ranking."
        )
    dtype = place(model)[1]
    half = "" if dtype.itemsize > 2 else (
        f" Its parameters are {dtype}, which rounds every folded kernel anew: reparameterize in float32 and cast "
        "after that, or allow more."
    )  # fmt: skip
    kept = "" if apart.matched is None else f", with {apart.agreed}"
    return (
        f"reparameterization changed the outputs by {apart.relative:.2e} of their scale "
        f"({apart.max_abs:.2e} absolute{kept}) and those of single layers by up to {layerwise:.2e}, "
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
    """Return the cost per image, counted on the whole example because not every model accepts part of it."""
    with quick(model) as fast:
        counted = bench.cost(fast, x)
    return bench.Cost(counted.parameters, counted.macs // max(1, len(x)), counted.uncounted)


def _still_runs(model: nn.Module, x: Tensor) -> Any:
    try:
        return model(x)
    except (AttributeError, KeyError, TypeError) as error:
        raise RuntimeError(
            f"the model no longer runs with its layers fused ({type(error).__name__}: {error}): its code reads "
            "an attribute of a layer that was replaced."
        ) from error
