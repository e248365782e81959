"""Make routing static where the data allow it: a mixture becomes one plain convolution.

A mixture's kernel is linear in its routing weights, and a dynamically masked kernel is linear in the mask. The mean of
either over images therefore gives exactly the mean kernel of these images. A layer with that kernel is exact if the
routing is constant; otherwise it is the best guess of one kernel without training.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from widefield import _checks, _history, bench
from widefield.nn.gmconv import DynamicGMConv2d
from widefield.nn.morf import FusedMoRFConv2d, MoRFConv2d
from widefield.report import Report
from widefield.surgery import walk
from widefield.surgery.anatomy import anatomy
from widefield.surgery.compare import Difference, Tally, comparable, compare
from widefield.surgery.detections import detections
from widefield.surgery.inputs import batches, check_loader
from widefield.surgery.quick import quick, quicker

log = logging.getLogger(__name__)

POLICIES = ("mean", "auto")
UNSEEN = "the data never reach it"

Routed = MoRFConv2d | FusedMoRFConv2d | DynamicGMConv2d
Layers = Mapping[str, Routed]
Statics = Mapping[str, nn.Module]


@dataclass(frozen=True)
class RoutedLayer:
    """One routed layer, and the effect of its routing on the data; None where the data never reach it."""

    name: str
    stage: int
    """Index from 0, see :meth:`widefield.surgery.Anatomy.count_stages`."""
    kind: str
    """Its class."""
    reason: str | None
    """Why the layer keeps its routing; None if it was made static."""
    variation: float | None = None
    """Root mean square distance of the routing weights (or masks) from their mean, over the norm of that mean."""
    own: float | None = None
    """Change of the layer's own output if it is static, on its inputs in the original model, as ``Difference.rms``."""
    change: Difference | None = None
    """Change of the model's outputs if only this layer is static."""


@dataclass(frozen=True)
class Specialization(Report):
    """What :func:`specialize` did and what it cost. Changes are of the model's outputs on the loader."""

    policy: str
    tolerance: float
    layers: tuple[RoutedLayer, ...]
    """In the order of the model's modules."""
    predicted: Difference | None
    """Change if all layers are static, predicted from the change by each layer alone. This ignores that a layer reads
    the changed outputs of earlier layers. None for detectors, whose detections do not add up."""
    independent: float
    """A coarser prediction of its ``rms``, for independent changes: the root of the sum of the squared changes."""
    together: Difference
    """Measured change if all layers are static."""
    measured: Difference
    """Measured change of the returned model; with policy "mean" the same as ``together``."""
    before: bench.Cost
    """Cost for one image."""
    after: bench.Cost

    @property
    def images(self) -> int:
        """Number of images in the loader."""
        return self.measured.images

    @property
    def static(self) -> tuple[str, ...]:
        """Names of the layers that were made static."""
        return tuple(layer.name for layer in self.layers if layer.reason is None)

    def rows(self) -> list[dict[str, str]]:
        """Return one table row per routed layer."""
        return [
            {
                "layer": layer.name,
                "stage": str(layer.stage + 1),
                "kind": layer.kind,
                "routing varies by": _text(layer.variation),
                "own output changes by": _text(layer.own),
                "outputs change by": _text(layer.change.rms if layer.change else None),
                self.measured.same: _share(layer.change.agreement if layer.change else None),
                self.measured.score: _share(layer.change.scores[1] if layer.change and layer.change.scores else None),
                "static": "yes" if layer.reason is None else f"no: {layer.reason}",
            }
            for layer in self.layers
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as mappings and lists for JSON."""
        return {**asdict(self), "images": self.images}

    def summary(self) -> str:
        """Return what was made static, what it changes, and the costs, a line each."""
        count = sum(layer.change is not None for layer in self.layers)
        lines = [_headline(self.static, self.layers, self.policy, self.tolerance, self.measured)]
        if self.measured != self.together:
            lines.append(f"all {count} static: {self.together}")
        if self.predicted is not None:
            lines.append(f"predicted for all {count} from each alone: {self.predicted}")
        lines += [
            f"parameters {self.before.parameters:,} -> {self.after.parameters:,}, "
            f"MACs an image {self.before.macs:,} -> {self.after.macs:,}",
        ]
        return "\n".join(lines)


@_checks.guided
@walk.in_own_types
def specialize(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    policy: str = "mean",
    tolerance: float = 0.01,
    inplace: bool = False,
    report: Callable[[Specialization], object] | None = None,
) -> nn.Module:
    """Return the model with static routing: each routed layer becomes one convolution with its mean kernel.

    Routed layers are :class:`MoRFConv2d`, reparameterized or not, and :class:`DynamicGMConv2d`. Means are taken in
    float64 over all images, from the routing in the original model. Norms stay; ``reparameterize`` folds them.

    The loader is iterated twice, which takes three passes of the model. What each of L routed layers changes takes L
    more; it is measured for a report, which also counts costs on one image, and for "auto", which adds about three
    rounds of two passes each, and at most L.

    Args:
        model: in evaluation mode.
        loader: batches of images, with or without labels, see :func:`widefield.surgery.inputs.batches`; it must give
            the same images each time.
        policy: "mean": every layer that the data reach. "auto": as many layers as the tolerance allows, those that
            matter least first. If there are none, the model keeps its layers and a warning is logged.
        tolerance: for "auto": largest change of the model's outputs on the loader, as ``Difference.rms``.
        inplace: change ``model`` itself instead of a copy.
        report: called once with the :class:`Specialization`: ``print``, or the ``append`` of a list.

    Raises:
        RuntimeError: a part of the model is in training mode.
        ValueError: an unknown policy; no routed layer, or none that the data reach; a routed layer with hooks, which
            would be lost, or called by keyword; a replaced ``forward``; no images; parameters on the meta device;
            outputs that are not finite or hold no number.
        TypeError: a loader without images; an argument of another type.
    """
    policy = _checks.choice("policy", policy, POLICIES)
    tolerance = _checks.number("tolerance", tolerance)
    walk.begin(model, "specialize needs the evaluation-mode function", report)
    check_loader(loader)
    _routed_layers(model)  # refused before a large model is copied
    work = walk.copied(model)
    layers = _routed_layers(work)
    with torch.no_grad():
        routing, example = _record(work, layers, loader)
        reached = {name: layer for name, layer in layers.items() if routing[name].count}
        if not reached:
            raise ValueError(f"the data never reach a routed layer of {type(model).__name__}: {', '.join(layers)}.")
        statics = {name: _static(name, layer, routing[name].mean()) for name, layer in reached.items()}
        tried = {name: quicker(conv) for name, conv in statics.items()}
        effects = _Effects(tried if policy == "auto" or report is not None else (), work)
        effects.measure(work, reached, tried, loader)
        chosen, measured = list(reached), effects.together.difference()
        if policy == "auto":
            chosen, found = _within(model, work, reached, tried, loader, tolerance, effects)
            measured = found or effects.unchanged.difference()
        result, untouched = (model, work) if inplace else (work, model)
        places = _routed_layers(result)
        found_at = {module: name for name, module in result.named_modules()}
        result = _history.carry(result, walk.replace(result, {places[name]: statics[name] for name in chosen}))
        if chosen:
            _history.note(result, "specialize", layers=[found_at[places[name]] for name in chosen])
        log.info("%s", _headline(chosen, layers, policy, tolerance, measured))
        _warn(layers, reached, chosen, effects, tolerance)
        if report is None:
            return result
        with quick(result) as fast:
            before, after = bench.cost(untouched, example), bench.cost(fast, example)
    stages = anatomy(model).count_stages(list(layers))
    report(
        Specialization(
            policy,
            tolerance,
            tuple(_entry(name, stages[name], layer, routing[name], effects, chosen) for name, layer in layers.items()),
            effects.predicted(),
            _independent(effects.alone_differences().values()),
            effects.together.difference(),
            measured,
            before,
            after,
        )
    )
    return result


def _entry(
    name: str, stage: int, layer: Routed, routing: _Moments, effects: _Effects, chosen: Sequence[str]
) -> RoutedLayer:
    """Return the report's entry of one layer."""
    kind = type(layer).__name__
    if not routing.count:
        return RoutedLayer(name, stage, kind, reason=UNSEEN)
    return RoutedLayer(
        name,
        stage,
        kind,
        reason=None if name in chosen else "outputs would change by more than the tolerance",
        variation=routing.variation(),
        own=effects.own[name].difference().rms,
        change=effects.alone[name].difference(),
    )


def _headline(
    static: Sequence[str], layers: Sequence[object] | Layers, policy: str, tolerance: float, measured: Difference
) -> str:
    within = f" within {tolerance:g}" if policy == "auto" else ""
    return f"specialized {len(static)} of {len(layers)} routed layers, policy {policy!r}{within}: {measured}"


def _warn(layers: Layers, reached: Layers, chosen: Sequence[str], effects: _Effects, tolerance: float) -> None:
    unseen = [name for name in layers if name not in reached]
    if unseen:
        log.warning("left routed, as the data never reach them: %s", ", ".join(unseen))
    if not chosen:
        change, name = min((change.rms, name) for name, change in effects.alone_differences().items())
        log.warning(
            "nothing was specialized: %s, which matters least, alone changes the outputs by %.1e, tolerance=%g",
            name,
            change,
            tolerance,
        )


# Layers


def _routed_layers(model: nn.Module) -> dict[str, Routed]:
    """Return the routed layers by name; raises what :func:`specialize` says."""
    layers = {name or type(m).__name__: m for name, m in model.named_modules() if isinstance(m, Routed)}
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no routed layer: no MoRFConv2d, FusedMoRFConv2d or DynamicGMConv2d in it, "
            "such as convert() with MoRF() or GMConv() makes."
        )
    lost = [name for name, layer in layers.items() if any(walk.hooked(part) for part in layer.modules())]
    if lost:
        raise ValueError(f"{', '.join(lost)} has hooks, which specializing would lose: remove them first.")
    return layers


def _routing(layer: Routed, x: Tensor) -> Tensor:
    """Return the routing of each image, in which the kernel is linear: weights (N, n) or masks (N, KH, KW)."""
    if isinstance(layer, DynamicGMConv2d):
        return layer.masks(x if x.ndim == 4 else x[None])
    weights: Tensor = layer.router(x)
    return weights


def _static(name: str, layer: Routed, mean: Tensor) -> nn.Conv2d:
    if not mean.isfinite().all():
        raise ValueError(f"the routing of {name} is not finite on these images: choose other images, or fix the model.")
    return layer.collapse(mean)


class _Moments:
    """Mean and spread of tensors in float64, relative to the first one, so that equal tensors have no spread at all."""

    def __init__(self) -> None:
        self.count = 0
        self._first: Tensor = torch.zeros(())
        self._total: Tensor = torch.zeros(())
        self._squares: Tensor = torch.zeros(())

    def add(self, values: Tensor) -> None:
        """Take in (N, ...)."""
        if not len(values):
            return
        values = values.double()
        if not self.count:
            self._first = values[0]
            self._total, self._squares = torch.zeros_like(self._first), torch.zeros_like(self._first)
        offsets = values - self._first
        self._total = self._total + offsets.sum(0)
        self._squares = self._squares + offsets.square().sum(0)
        self.count += len(values)

    def mean(self) -> Tensor:
        return self._first + self._total / self.count

    def variation(self) -> float:
        spread = (self._squares / self.count - (self._total / self.count).square()).clamp(min=0).sum().sqrt().item()
        size = self.mean().norm().item()
        return spread / size if size else (math.inf if spread else 0.0)


# Passes


@contextmanager
def _watched(layers: Layers, see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Call ``see`` with name, input and output for every call of a layer, before other code can change them."""

    def hook(name: str, module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Any], output: Tensor) -> None:
        if kwargs:
            raise ValueError(
                f"{name} is called by keyword ({', '.join(kwargs)}=), which a convolution does not accept: "
                "pass its input by position."
            )
        see(name, args[0], output)

    handles = [layer.register_forward_hook(partial(hook, name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _swapped(root: nn.Module, layers: Layers, statics: Statics, names: Iterable[str]) -> Iterator[nn.Module]:
    """Give the model with these layers static, for as long as the block lasts."""
    names = list(names)
    try:
        yield walk.replace(root, {layers[name]: statics[name] for name in names})
    finally:
        walk.replace(root, {statics[name]: layers[name] for name in names})


def _record(model: nn.Module, layers: Layers, loader: Iterable[Any]) -> tuple[dict[str, _Moments], Tensor]:
    """Return the routing of every layer over a loader, and the first image (1, C, H, W)."""
    routing = {name: _Moments() for name in layers}
    example = torch.empty(0)
    with _watched(layers, lambda name, x, y: routing[name].add(_routing(layers[name], x))):
        for images, _ in batches(loader, model):
            example = example if len(example) else images[:1].clone()
            model(images)
    return routing, example


class _Effects:
    """The changes by static layers: of their own outputs and of the model's, of some alone, and of all together."""

    def __init__(self, names: Iterable[str], model: nn.Module) -> None:
        names = list(names)
        self.own = {name: Tally(predicts=False) for name in names}
        self.alone = {name: Tally(model) for name in names}
        self.unchanged, self.together, self._summed = (Tally(model) for _ in range(3))
        self._sums = True

    def predicted(self) -> Difference | None:
        """Return the change if all are static, from the sum of the changes by each; None if outputs do not add up."""
        return self._summed.difference() if self._sums else None

    def alone_differences(self) -> dict[str, Difference]:
        """Return what each layer changes in the model's outputs alone."""
        return {name: tally.difference() for name, tally in self.alone.items()}

    def measure(self, model: nn.Module, layers: Layers, statics: Statics, loader: Iterable[Any]) -> None:
        """Run the model and all its variants on every batch of a loader."""
        alone = {name: layers[name] for name in self.alone}
        for images, labels in batches(loader, model):
            given = {"labels": labels, "images": len(images), "size": images.shape[-2:]}
            with _watched(alone, lambda name, x, y: self.own[name].add(y, statics[name](x))):
                outputs = model(images)
            self._sums &= detections(outputs) is None
            plain = comparable(outputs, outputs)[0] if self._sums else []
            shifted = [leaf.double() for leaf in plain]
            for name, tally in self.alone.items():
                with _swapped(model, layers, statics, [name]) as variant:
                    moved = variant(images)
                tally.add(outputs, moved, **given)
                if self._sums:
                    pairs = zip(shifted, plain, comparable(outputs, moved)[1], strict=True)
                    shifted = [sum_ + (new.double() - old.double()) for sum_, old, new in pairs]
            with _swapped(model, layers, statics, layers) as variant:
                self.together.add(outputs, variant(images), **given)
            if self._sums:
                self._summed.add(outputs, shifted, **given)
            self.unchanged.add(outputs, outputs, **given)


def _independent(changes: Iterable[Difference]) -> float:
    return math.sqrt(sum(change.rms**2 for change in changes))


def _within(
    model: nn.Module,
    work: nn.Module,
    layers: Layers,
    statics: Statics,
    loader: Iterable[Any],
    tolerance: float,
    effects: _Effects,
) -> tuple[list[str], Difference | None]:
    """Return the layers that can be static within the tolerance, and their measured change (None without any).

    Layers are sorted by the change that each causes alone. A search finds the longest prefix whose measured change is
    within the tolerance: prefixes of length ``good`` are, those of length ``bad`` are not. The next length to measure
    is predicted from independent changes, times the error of the previous prediction.
    """
    alone, together = effects.alone_differences(), effects.together.difference()
    order = sorted((name for name in alone if alone[name].rms <= tolerance), key=lambda name: alone[name].rms)
    if not order:
        return [], None
    guesses = [_independent(alone[name] for name in order[:length]) for length in range(len(order) + 1)]
    guess = _independent(alone.values())
    factor = together.rms / guess if guess else 1.0
    good, best, bad = 1, alone[order[0]], len(order) + 1
    if len(order) == len(layers) > 1:
        if together.rms <= tolerance:
            return order, together
        bad = len(order)
    while bad - good > 1:
        fitting = sum(factor * guess <= tolerance for guess in guesses[1:])
        length = min(max(fitting, good + 1), bad - 1)
        with _swapped(work, layers, statics, order[:length]) as variant:
            change = compare(model, variant, loader)
        if change.rms <= tolerance:
            good, best = length, change
        else:
            bad = length
        factor = change.rms / guesses[length] if guesses[length] else 1.0
    return order[:good], best


# Texts


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
