"""From kernels as they were trained to the smallest that do the same, within a tolerance."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from widefield import _checks, bench
from widefield.ops.crops import CropTable
from widefield.surgery import cropping
from widefield.surgery.anatomy import anatomy
from widefield.surgery.cropping import Layer, Left, Sizes
from widefield.surgery.outputs import (
    Change,
    NothingToCompareError,
    batches,
    check_loader,
    difference,
    example_input,
    measure_change,
    pixels,
    place,
)
from widefield.surgery.trimming import TrimmedKernel, Trimming
from widefield.surgery.walk import begin, in_own_types, unmerged

log = logging.getLogger(__name__)

_ROUNDING = 1e-4
"""What float32 networks may differ by, in units of their outputs' scale, when the same sums are added up otherwise."""

_PROBED = 32
"""Images, at most, on which each layer is tried alone: enough for an order, and the budget is measured on all."""

_ROUNDS = 4
"""Times that the search for the largest cropping within a budget goes on without the layer at which it stopped."""


@in_own_types
def trim(
    model: nn.Module,
    tolerance: float = 0.01,
    *,
    loader: Iterable[Any] | None = None,
    limit: int | None = None,
    input_size: int | Sequence[int] | None = None,
    report: Callable[[Trimming], object] | None = None,
) -> nn.Module:
    """Return the model with every spatial kernel cropped as far as a tolerance allows, in real taps: it gets faster.

    - **Without a loader**, a guarantee for each layer: its kernel becomes the smallest by which no output channel loses
      more than ``tolerance`` of its L1 mass. So no output of the layer, given the same input, moves by more than
      ``tolerance`` times the largest that inputs of that size could give (Young's inequality), whatever the data. Of a
      mixture this holds for every expert, and with |routing weights| for their sum. What layers after it make of that
      is not bounded. 0: only what is exactly zero goes.
    - **With a loader**, a budget for the whole model: its outputs change by at most ``tolerance``, as relative RMS
      (:class:`widefield.surgery.outputs.Change`), on these images. On others the change is likely to be alike, which is
      no guarantee: keep some to check. Crops are taken in the order of what they save for what they cost, in
      multiply-accumulates for squared change, the latter measured for each layer alone on up to 32 images; how many, is
      found by bisection on all of the data, with a measurement at each step.

    Kernels stay centred, and padding shrinks with them: outputs keep their size and place. Left as they are: kernels
    whose padding has nothing to give up, that depend on the image or are shared, and convolutions that are no plain
    ones or have hooks; the report says why. The trimmed model is compared with the model that has zeros for the same
    taps: on the loader's images, on noise of the input size, or on an example made up for the model. Where it runs on
    none, a warning is logged.

    Args:
        model: in evaluation mode and re-parameterised: a kernel is final once its branches and masks are merged.
        tolerance: from 0 to 1; see above.
        loader: batches of images, perhaps with labels, as :func:`widefield.surgery.outputs.batches` takes them. It is
            gone through some ten to thirty times, so take a few hundred images; of ``input_size``, if that is given.
        limit: side in pixels of the largest kernel that a device takes. Kernels that span more are cropped to it at any
            cost, before all else; what this costs stands in the report.
        input_size: the only size of images that the model will see: one side, (H, W), (C, H, W) or (N, C, H, W). Taps
            that never meet the map are then cut off as zeros are: of a 31x31 kernel on a 7x7 map 13x13 are left.
        report: called once with what was done.

    Returns:
        A new model, whose layers are of the same types. ``model`` is untouched. Nothing to crop is no error.

    Raises:
        RuntimeError: the model is in training mode; or the trimmed model does not compute what it should, as some
            module reads a convolution's kernel size or padding by itself, or as what changes nothing on ``input_size``
            changes the outputs on the loader's images by more than the tolerance.
        ValueError, TypeError: numbers out of range; layers that are not re-parameterised yet; no convolution of more
            than one tap; kernels that are not finite, or on the meta device; a ``forward`` that was replaced on a
            module; an input size on which the model does not run, or other than that of one of the loader's images; no
            images; outputs that are not finite, or hold no number; a report that is no function.
    """
    tolerance = _checks.number("tolerance", tolerance, maximum=1.0)
    limit = None if limit is None else _checks.integer("limit", limit)
    begin(model, "trim needs the kernels of evaluation", report)
    waiting = unmerged(model)
    if waiting:
        more = f" and {len(waiting) - 3} more" if len(waiting) > 3 else ""
        raise ValueError(
            f"re-parameterise first (widefield.reparameterize): the kernels of {', '.join(waiting[:3])}{more} are not "
            "final before their branches or masks are merged."
        )
    x = None if input_size is None else _noise(model, input_size)
    if loader is not None:
        check_loader(loader)
        loader = loader if x is None else _OneSize(loader, x.shape[1:])
        x = next(batches(loader, model))[0][:2]
    calls = None if x is None else _watch(model, x, made_up=loader is None)
    found = cropping.layers(model, calls, fixed=input_size is not None)
    layers = [layer for layer in found if isinstance(layer, Layer)]
    change = verified = None
    if loader is None or x is None:
        sizes = {layer.name: _within(layer, tolerance, limit) for layer in layers}
    else:
        with suppress(NothingToCompareError):  # a detector with such small kernels may detect nothing
            _verify(model, {layer.name: layer.inside(0) for layer in layers}, x)  # before much is measured
        search = _Search(model, layers, loader, tolerance)
        sizes = search.run([_limited(layer.windows, limit) for layer in layers])
        change = search.change(sizes)
    example = _example(model) if x is None else x
    if example is not None:
        verified = _verify(model, sizes, example)
    trimmed = cropping.build(model, sizes)
    before, after = (None if x is None else bench.cost(each, x[:1]).macs for each in (model, trimmed))
    whole, left = (sum(p.numel() for p in each.parameters()) for each in (model, trimmed))
    stages = anatomy(model).count_stages([layer.name for layer in found])
    done = Trimming(
        tuple(k for layer in found for k in _entries(layer, stages[layer.name], sizes.get(layer.name, ()), limit)),
        tolerance,
        limit,
        None if input_size is None or x is None else (x.shape[2], x.shape[3]),
        whole,
        left,
        before,
        after,
        change,
        verified,
    )
    log.log(logging.WARNING if done.beyond() else logging.INFO, "%s", done.summary())
    if report is not None:
        report(done)
    return trimmed


# Inputs


def _noise(model: nn.Module, size: int | Sequence[int]) -> Tensor:
    """Return two images of noise of the size asked for."""
    given = (size,) if isinstance(size, int) else tuple(size)
    if not 1 <= len(given) <= 4 or isinstance(size, bool):
        raise ValueError(f"input_size must be one side, (H, W), (C, H, W) or (N, C, H, W); got {size!r}.")
    height, width = _checks.pair("input_size", given[-2:])
    device, dtype = place(model)
    if len(given) > 2:
        channels = _checks.integer("the channels of input_size", given[-3])
    else:
        try:
            channels = example_input(model).shape[1]
        except ValueError as error:
            raise ValueError("how many channels the images have is not known: pass input_size=(C, H, W).") from error
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)


class _OneSize:
    """A loader of which every batch must have images of one size, (C, H, W)."""

    def __init__(self, loader: Iterable[Any], size: Sequence[int]) -> None:
        self._loader, self._size = loader, tuple(size)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            images = pixels(batch)
            if len(images) and tuple(images.shape[1:]) != self._size:
                raise ValueError(
                    f"the loader's images are of {tuple(images.shape[1:])}, not of input_size={self._size}: taps that "
                    "never meet the map are those of one size only."
                )
            yield batch


def _example(model: nn.Module) -> Tensor | None:
    """Return an input made up for the model, or None, with a warning, where nothing can be seen on one."""
    try:
        x = example_input(model)
        with torch.no_grad():
            outputs = model(x)
        difference(outputs, outputs)
    except Exception as error:  # whatever a model raises on what it was not made for
        first = (str(error) or type(error).__name__).splitlines()[0]
        log.warning("the trimmed model is not verified: pass input_size. No example input could be made up: %s", first)
        return None
    return x


def _watch(model: nn.Module, x: Tensor, *, made_up: bool) -> dict[nn.Module, list[cropping.Call]]:
    try:
        return cropping.watch(model, x)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        if not made_up:
            raise
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"the model does not run on images of input_size, {tuple(x.shape[1:])}: {first}") from error


# One layer


def _limited(table: CropTable, limit: int | None) -> int:
    """Return the index of the largest crop within the limit, or of the whole where there is none so small."""
    index = None if limit is None else table.fitting(limit)
    return len(table.sizes) - 1 if index is None else index


def _within(layer: Layer, tolerance: float, limit: int | None) -> Sizes:
    """Return the smallest sizes of a layer by which no output channel loses more than ``tolerance`` of its L1 mass."""
    tables = [kernel.table for kernel in layer.kernels]
    return tuple(table.sizes[min(table.within(tolerance), _limited(table, limit))] for table in tables)


def _entries(layer: Layer | Left, stage: int, sizes: Sizes, limit: int | None) -> list[TrimmedKernel]:
    if isinstance(layer, Left):
        return [TrimmedKernel(layer.name, stage, layer.size, layer.size, layer.dilation, left=layer.why)]
    entries = []
    for kernel, size in zip(layer.kernels, sizes, strict=True):
        index = kernel.table.sizes.index(size)
        stuck = limit is not None and kernel.table.fitting(limit) is None
        why = "no smaller kernel keeps its outputs where they are: its padding is used up, or its sides are even"
        entries.append(
            TrimmedKernel(
                kernel.name,
                stage,
                kernel.size,
                size,
                kernel.dilation,
                float(kernel.table.energy[index]),
                float(kernel.table.l1[index]),
                why if stuck else None,
            )
        )
    return entries


# A budget for the whole model


@dataclass(frozen=True)
class _Step:
    """One crop more of one layer."""

    layer: int
    index: int
    """Of the layer's windows."""
    gain: float
    """Multiply-accumulates saved for each unit of squared change."""


class _Search:
    """Finds a large cropping by which outputs change by no more than the budget, each candidate being measured."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer], loader: Iterable[Any], budget: float) -> None:
        self._model, self._layers, self._loader, self._budget = model, layers, loader, budget
        self._measured: dict[tuple[Sizes, ...], Change] = {}

    def change(self, sizes: Mapping[str, Sizes]) -> Change:
        """Return how the outputs change by these crops, on all of the data."""
        key = tuple(sizes.values())
        if key not in self._measured:
            self._measured[key] = measure_change(self._model, cropping.build(self._model, sizes), self._loader)
        return self._measured[key]

    def run(self, chosen: list[int]) -> dict[str, Sizes]:
        """Return the sizes found, from windows that are given on.

        Raises RuntimeError where crops that should lose nothing, as no limit asks for more, break the budget.
        """
        lossless = chosen == [len(layer.windows.sizes) - 1 for layer in self._layers]
        rms = self.change(self._sizes(chosen)).rms
        if lossless and not rms <= self._budget + _rounding(self._model):
            raise RuntimeError(
                f"cropping what is zero, or never meets the map, changes the outputs by {rms:.2g} (relative RMS), more "
                f"than tolerance={self._budget:g}: layers get other maps on these images than on the first of them, or "
                "the model computes something else at every call."
            )
        if not self._budget or rms > self._budget:
            return self._sizes(chosen)
        pending = self._steps(chosen)
        for _ in range(_ROUNDS):
            low, high = 0, len(pending) + 1  # of the steps the first `low` fit
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if self._fits(_taken(chosen, pending[:middle])) else (low, middle)
            chosen = _taken(chosen, pending[:low])
            if low == len(pending):
                break
            pending = [step for step in pending[low + 1 :] if step.layer != pending[low].layer]
        return self._sizes(chosen)

    def _sizes(self, chosen: Sequence[int]) -> dict[str, Sizes]:
        return {layer.name: layer.inside(index) for layer, index in zip(self._layers, chosen, strict=True)}

    def _fits(self, chosen: Sequence[int]) -> bool:
        return self.change(self._sizes(chosen)).rms <= self._budget

    def _steps(self, start: Sequence[int]) -> list[_Step]:
        """Return the crops worth taking, the one that saves most for what it costs first.

        What a crop costs is measured for each layer alone, on a few images, down to the crop that breaks the budget by
        itself. Squared changes of several layers are taken to add up, as they do where the layers' errors are
        uncorrelated.
        """
        images = next(batches(self._loader, self._model))[0]
        whole = cropping.build(self._model, self._sizes(start))
        steps: list[_Step] = []
        for which, (layer, first) in enumerate(zip(self._layers, start, strict=True)):
            work = [layer.macs * rows * columns for rows, columns in layer.windows.sizes]
            moved = {first: 0.0}
            for index in range(first - 1, -1, -1):
                sizes = self._sizes(_taken(start, [_Step(which, index, 0.0)]))
                change = measure_change(whole, cropping.build(self._model, sizes), [images[:_PROBED]])
                if change.rms > self._budget:
                    break
                moved[index] = change.rms**2
            index = first
            while index > min(moved):  # along the lower convex hull of work over squared change
                gains = {
                    k: (work[index] - work[k]) / max(moved[k] - moved[index], 1e-300) for k in range(min(moved), index)
                }
                index = max(gains, key=lambda k: (gains[k], -k))
                steps.append(_Step(which, index, gains[index]))
        return sorted(steps, key=lambda step: -step.gain)


def _taken(chosen: Sequence[int], steps: Sequence[_Step]) -> list[int]:
    taken = list(chosen)
    for step in steps:
        taken[step.layer] = step.index
    return taken


# Proof


def _rounding(model: nn.Module) -> float:
    """Return what a model's outputs may differ by, as relative RMS, when the same sums are added up otherwise."""
    return max(_ROUNDING, 4 * torch.finfo(place(model)[1]).eps)


def _verify(model: nn.Module, sizes: Mapping[str, Sizes], x: Tensor) -> float:
    """Return how far the trimmed model is from the one with zeros for the same taps; RuntimeError where it is far."""
    masked, trimmed = cropping.mask(model, sizes), cropping.build(model, sizes)
    if x.dtype in (torch.float16, torch.bfloat16):  # whose rounding would hide what is sought
        x, masked, trimmed = x.float(), masked.float(), trimmed.float()
    with torch.no_grad():
        expected = masked(x)
        try:
            difference(expected, expected)
        except ValueError as error:
            raise type(error)(f"the trimmed model cannot be verified: {error}") from error
        try:
            apart = difference(expected, trimmed(x)).relative
            why = f"its outputs are off by {apart:.1e} of their scale"
        except (RuntimeError, ValueError) as error:
            apart, why = math.inf, str(error).splitlines()[0]
    if not apart <= _ROUNDING:
        raise RuntimeError(
            "the trimmed model is not the model with zeros for the same taps: some module reads a convolution's "
            f"kernel size or padding by itself. What was seen: {why}. Cropped were: "
            f"{', '.join(name or type(model).__name__ for name in sizes)}."
        )
    return apart
