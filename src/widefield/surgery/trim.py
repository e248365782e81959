"""Crop the kernels of a trained model to the taps that matter, within a tolerance."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from widefield import _checks, _history, bench
from widefield.ops.crop_table import CropTable
from widefield.surgery.anatomy import anatomy
from widefield.surgery.compare import Difference, difference
from widefield.surgery.detections import detections, sensitive
from widefield.surgery.inputs import Example, batches, check_loader, pixels
from widefield.surgery.inputs import example_input as made_up
from widefield.surgery.quick import quick
from widefield.surgery.trim_kernels import Call, Layer, Left, Sizes, crop_kernels, kernels_of, watch, zero_taps
from widefield.surgery.trim_report import TrimmedKernel, Trimming
from widefield.surgery.trim_search import ROUNDING, Search
from widefield.surgery.walk import begin, in_own_types, unmerged

log = logging.getLogger(__name__)


@_checks.guided
@in_own_types
def trim(
    model: nn.Module,
    tolerance: float = 0.01,
    *,
    example_input: Example | None = None,
    loader: Iterable[Any] | None = None,
    limit: int | None = None,
    inplace: bool = False,
    report: Callable[[Trimming], object] | None = None,
) -> nn.Module:
    """Return the model with every spatial kernel cropped as far as a tolerance allows.

    **Without a loader**, the tolerance holds for each layer. Its kernel becomes the smallest one for which no output
    channel loses more than ``tolerance`` of its L1 mass. Given the same input, no output of the layer moves by more
    than ``tolerance`` times the largest value that inputs of that size could give (Young's inequality). In a mixture
    this holds for every expert. The effect on later layers is not bounded. ``tolerance=0`` removes exact zeros only.

    **With a loader**, the tolerance is a budget for the whole model: its outputs change by at most ``tolerance`` on
    these images, as relative RMS (:class:`Difference`). Other images will probably change as little, but keep some to
    check. The crops that save the most multiply-accumulates per squared change come first. Each layer's change is
    measured alone on up to 32 images; bisection on all images then decides how many crops fit the budget.

    **With an example input**, the trimmed model is for images of that size only. Taps that never meet a feature map are
    then removed like zeros: of a 31x31 kernel on a 7x7 map, 13x13 taps remain.

    Kernels stay centered and padding shrinks with them, so outputs keep their size and position. Kernels without
    padding to give up, kernels that depend on the image or are shared, and layers with hooks stay as they are; the
    report gives the reason. The trimmed model is verified against the model with zeros in the same taps, on the images
    given or on noise. If the model runs on neither, a warning is logged.

    Args:
        model: in evaluation mode and reparameterized.
        tolerance: from 0 to 1; see above.
        example_input: the images that the model will see, as a tensor or a size: one side, (H, W), (C, H, W) or
            (N, C, H, W). Default: any size.
        loader: batches of images, with or without labels, see :func:`widefield.surgery.inputs.batches`. It is iterated
            ten to thirty times, so use a few hundred images; their size must be that of ``example_input``, if given.
        limit: longest kernel side in pixels that the target device supports. Larger kernels are cropped to it first,
            whatever that costs; the report states the cost.
        inplace: crop the layers of ``model`` itself instead of a copy.
        report: called once with the :class:`Trimming`: ``print``, or the ``append`` of a list.

    Returns:
        The trimmed model, with layers of the same types. A model with nothing to crop is returned as it is.

    Raises:
        RuntimeError: a part of the model is in training mode; or the trimmed model does not compute what it should,
            because a module reads a convolution's kernel size or padding, or because the loader's images disagree.
        ValueError: a number out of range; layers that are not reparameterized; no convolution with more than one tap;
            kernels that are not finite or on the meta device; a replaced ``forward``; an example input on which the
            model does not run, or of another size than the loader's images; no images; outputs that are not finite or
            hold no number.
        TypeError: an argument of another type.
    """
    tolerance = _checks.number("tolerance", tolerance, maximum=1.0)
    limit = None if limit is None else _checks.integer("limit", limit)
    begin(model, "trim needs the kernels of evaluation mode", report)
    _refuse_unmerged(model)
    fixed = example_input is not None
    x, loader = _images(model, example_input, loader)
    calls = None if x is None else _watch(model, x, noise=loader is None and not isinstance(example_input, Tensor))
    found = kernels_of(model, calls, fixed=fixed)
    layers = [layer for layer in found if isinstance(layer, Layer)]
    change: Difference | None = None
    if loader is None or x is None:
        sizes = {layer.name: _within(layer, tolerance, limit) for layer in layers}
    else:
        if not _detects(model, x):  # with such small kernels all its boxes may have equal scores
            _verify(model, {layer.name: layer.inside(0) for layer in layers}, x)  # cheap, so before any measurement
        search = Search(model, layers, loader, tolerance)
        sizes = search.run([_limited(layer.windows, limit) for layer in layers])
        change = search.change(sizes)
    example = _example(model) if x is None else x
    verified = None if example is None else _verify(model, sizes, example)
    before = _cost(model, x)
    trimmed = _history.carry(model, crop_kernels(model, sizes, inplace=inplace))
    _history.note(trimmed, "trim", sizes=sizes)
    after = _cost(trimmed, x)
    stages = anatomy(model).count_stages([layer.name for layer in found])
    done = Trimming(
        tuple(k for layer in found for k in _entries(layer, stages[layer.name], sizes.get(layer.name, ()), limit)),
        tolerance,
        limit,
        (x.shape[2], x.shape[3]) if fixed and x is not None else None,
        *(before[0], after[0]),
        *(before[1], after[1]),
        change,
        verified,
    )
    log.log(logging.WARNING if done.beyond() else logging.INFO, "%s", done.summary())
    if report is not None:
        report(done)
    return trimmed


def _detects(model: nn.Module, x: Tensor) -> bool:
    with torch.no_grad():
        return detections(model(x)) is not None


def _refuse_unmerged(model: nn.Module) -> None:
    waiting = unmerged(model)
    if waiting:
        more = f" and {len(waiting) - 3} more" if len(waiting) > 3 else ""
        raise ValueError(
            f"{', '.join(waiting[:3])}{more} must be merged first, because their kernels are not final: call "
            "widefield.reparameterize."
        )


def _cost(model: nn.Module, x: Tensor | None) -> tuple[int, int | None]:
    """Return parameters, and multiply-accumulates for one image if there is one."""
    parameters = sum(p.numel() for p in model.parameters())
    if x is None:
        return parameters, None
    with quick(model) as fast:
        return parameters, bench.cost(fast, x[:1]).macs


# Inputs


def _images(
    model: nn.Module, example: Example | None, loader: Iterable[Any] | None
) -> tuple[Tensor | None, Iterable[Any] | None]:
    """Return a batch to watch the model on, if any is known, and the loader, which checks its images' size."""
    x = None
    if example is not None:
        x = pixels(example) if isinstance(example, Tensor) else made_up(model, example)
    if loader is not None:
        check_loader(loader)
        loader = loader if x is None else _OneSize(loader, x.shape[1:])
        x = next(batches(loader, model))[0][:2]
    return x, loader


class _OneSize:
    """A loader whose images must all have one size, (C, H, W)."""

    def __init__(self, loader: Iterable[Any], size: Sequence[int]) -> None:
        self._loader, self._size = loader, tuple(size)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            images = pixels(batch)
            if len(images) and tuple(images.shape[1:]) != self._size:
                raise ValueError(
                    f"the loader's images have size {tuple(images.shape[1:])}, but example_input has {self._size}: "
                    "pass images of one size, or no example_input."
                )
            yield batch


def _example(model: nn.Module) -> Tensor | None:
    """Return noise on which the model runs; None, with a warning, if it does not run on any."""
    try:
        x = made_up(model)
        with torch.no_grad(), sensitive(model, x):
            outputs = model(x)
        difference(outputs, outputs)
    except Exception as error:  # models raise anything on inputs that they were not made for
        first = (str(error) or type(error).__name__).splitlines()[0]
        log.warning("the trimmed model is not verified, as it does not run on noise: pass example_input. %s", first)
        return None
    return x


def _watch(model: nn.Module, x: Tensor, *, noise: bool) -> dict[nn.Module, list[Call]]:
    try:
        return watch(model, x)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        if not noise:
            raise
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"the model does not run on example_input of size {tuple(x.shape[1:])}: {first}") from error


# One layer


def _limited(table: CropTable, limit: int | None) -> int:
    """Return the index of the largest crop within the limit, or of the whole kernel if none is small enough."""
    index = None if limit is None else table.fitting(limit)
    return len(table.sizes) - 1 if index is None else index


def _within(layer: Layer, tolerance: float, limit: int | None) -> Sizes:
    """Return the smallest kernel sizes for which no output channel loses more than ``tolerance`` of its L1 mass."""
    tables = [kernel.table for kernel in layer.kernels]
    return tuple(table.sizes[min(table.within(tolerance), _limited(table, limit))] for table in tables)


def _entries(layer: Layer | Left, stage: int, sizes: Sizes, limit: int | None) -> list[TrimmedKernel]:
    if isinstance(layer, Left):
        return [TrimmedKernel(layer.name, stage, layer.size, layer.size, layer.dilation, left=layer.why)]
    entries = []
    for kernel, size in zip(layer.kernels, sizes, strict=True):
        index = kernel.table.sizes.index(size)
        stuck = limit is not None and kernel.table.fitting(limit) is None
        why = "a smaller kernel would move its outputs: its padding is used up, or its sides are even"
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


# Proof


def _verify(model: nn.Module, sizes: Mapping[str, Sizes], x: Tensor) -> float:
    """Return how far the trimmed model is from the one with zeros in the same taps; RuntimeError if too far."""
    widened = x.dtype in (torch.float16, torch.bfloat16)  # their rounding would hide a difference
    with sensitive(model, x):  # copies keep the thresholds
        masked, trimmed = (make(model, sizes, share=not widened) for make in (zero_taps, crop_kernels))
    if widened:
        x, masked, trimmed = x.float(), masked.float(), trimmed.float()
    with torch.no_grad(), quick(masked) as masked, quick(trimmed) as trimmed:
        expected = masked(x)
        try:
            difference(expected, expected)
        except ValueError as error:
            raise type(error)(f"the trimmed model cannot be verified: {error}") from error
        try:
            change = difference(expected, trimmed(x), masked)
            apart = change.relative if change.within(ROUNDING) else max(change.relative, change.rms)
            why = f"its outputs are off by {apart:.1e} of their scale"
        except (RuntimeError, ValueError) as error:
            apart, why = math.inf, str(error).splitlines()[0]
    if not apart <= ROUNDING:
        raise RuntimeError(
            "the trimmed model differs from the model with zeros in the same taps, because some module reads a "
            f"convolution's kernel size or padding by itself: {why}. Cropped layers: "
            f"{', '.join(name or type(model).__name__ for name in sizes)}."
        )
    return apart
