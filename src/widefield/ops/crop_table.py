"""Measure what each centered crop of a kernel loses.

A crop of side k keeps the taps inside a centered window of k x k pixels. It removes as many taps at one end of an axis
as at the other, so the kernel stays in place with less padding, and each side keeps its parity. The shorter side of a
rectangle stays whole until the window is as small. With a dilation the window is in pixels and sizes are in taps.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from widefield import _checks
from widefield._checks import Pair
from widefield.ops import fold
from widefield.report import Report

_CHUNK = 1 << 22
"""Numbers of a kernel that are turned into float64 at a time."""


@dataclass(frozen=True)
class CropTable(Report):
    """What each centered crop of a kernel leaves outside; the last entry is the whole kernel, which leaves nothing.

    Attributes:
        sizes: (rows, columns) of each crop in taps, each inside the next; n of them.
        spans: the longer side of each in pixels.
        energy: (n,), float64, on the CPU: share of the kernel's energy, the sum of squares, that lies outside.
        l1: (n,), likewise: share of the sum of absolute values outside, of the output channel that loses most.
        bound: (n,), likewise: the largest sum of absolute values outside of an output channel. No output of the
            convolution moves by more than this times the largest absolute value of its input.
    """

    sizes: tuple[Pair, ...]
    spans: tuple[int, ...]
    energy: Tensor
    l1: Tensor
    bound: Tensor

    def summary(self) -> str:
        """Return the kernel's size and the number of crops."""
        rows, columns = self.sizes[-1]
        return f"Kernel of {rows}x{columns}: what each of its {len(self.sizes)} centered crops leaves outside"

    def rows(self) -> list[dict[str, str]]:
        """Return one row per crop."""
        return [
            {
                "crop": f"{rows}x{columns}",
                "span, px": str(span),
                "energy outside": f"{100 * energy:.2f} %",
                "L1 outside, worst channel": f"{100 * l1:.2f} %",
                "bound": f"{bound:.3g}",
            }
            for (rows, columns), span, energy, l1, bound in zip(
                self.sizes, self.spans, self.energy.tolist(), self.l1.tolist(), self.bound.tolist(), strict=True
            )
        ]

    def keeping(self, share: float) -> int:
        """Return the index of the smallest crop that keeps at least this share of the energy.

        Raises ValueError for a share that is not from 0 to 1.
        """
        lost = 1 - _checks.number("share", share, maximum=1.0)
        return int((self.energy <= lost * (1 + 1e-9)).int().argmax())  # as 1 - 0.9 is 0.0999...

    def within(self, tolerance: float) -> int:
        """Return the index of the smallest crop by which no output channel loses more than this share of its L1 mass.

        Raises ValueError for a negative tolerance.
        """
        return int((self.l1 <= _checks.number("tolerance", tolerance)).int().argmax())

    def fitting(self, side: int) -> int | None:
        """Return the index of the largest crop within side x side pixels, or None where the smallest is too large.

        Raises ValueError for a side below 1.
        """
        index = bisect_right(self.spans, _checks.integer("side", side)) - 1
        return index if index >= 0 else None


def crop_table(weight: Tensor, dilation: int | Pair = 1, *, least: int | Pair = 1) -> CropTable:
    """Measure what every centered crop of a convolution's kernel leaves outside; see this module for what a crop is.

    For a convolution y with this kernel and y' with a crop of it, of an input no larger than x in absolute value:
    ``|y - y'| <= bound * x``, whatever stride, padding and groups are (Young's inequality), and an input with the signs
    of the kernel attains it. ``energy`` says the same of the mean over inputs that are white noise: it is the share of
    the output's variance that is lost.

    Args:
        weight: (C_out, C_in/groups, rows, columns), of any floating dtype and device; sums are in float64.
        dilation: pixels from tap to tap, one number or (rows, columns).
        least: taps that every crop keeps, one number or (rows, columns); no more than the kernel has.

    Returns:
        The table. A kernel of zeros loses nothing by any crop.

    Raises:
        TypeError: no tensor of floating-point numbers.
        ValueError: another shape, numbers that are not finite, or none at all (the meta device); ``least`` beyond the
            kernel's size.
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = f"dtype {weight.dtype}" if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight must be a tensor of floating-point numbers; got {got}.")
    if weight.ndim != 4 or not weight.numel():
        raise ValueError(f"weight must be (C_out, C_in/groups, rows, columns); got {tuple(weight.shape)}.")
    if weight.is_meta:
        raise ValueError("weight is on the meta device and holds no numbers: load the model's weights first.")
    weight = weight.detach()
    scale = weight.abs().amax().double().item()
    if not math.isfinite(scale):
        raise ValueError(f"weight must be finite; its largest absolute value is {scale}.")
    size: Pair = (weight.shape[2], weight.shape[3])
    smallest = _checks.pair("least", least)
    if smallest[0] > size[0] or smallest[1] > size[1]:
        raise ValueError(f"least must be at most the kernel's size {size}; got {smallest}.")
    sizes, spans = _chain(size, smallest, _checks.pair("dilation", dilation))
    rings = _rings(size, sizes).flatten()
    energy, masses = torch.zeros(len(sizes), dtype=torch.float64), []
    for part in weight.split(max(1, _CHUNK // weight[0].numel())):
        values = part.to("cpu", torch.float64).flatten(2) / (scale or 1.0)  # or squares of tiny numbers vanish
        energy.index_add_(0, rings, values.square().sum((0, 1)))
        mass = values.abs().sum(1)
        masses.append(mass.new_zeros(len(mass), len(sizes)).index_add_(1, rings, mass))
    mass = torch.cat(masses)
    outside, whole = _later(mass), mass.sum(1, keepdim=True)
    return CropTable(
        sizes,
        spans,
        energy=_later(energy) / energy.sum() if scale else torch.zeros_like(energy),
        l1=torch.where(whole > 0, outside / whole, 0.0).amax(0),
        bound=outside.amax(0) * scale,
    )


def _chain(size: Pair, least: Pair, dilation: Pair) -> tuple[tuple[Pair, ...], tuple[int, ...]]:
    """Return the sizes of all crops in taps, smallest first, and their longer sides in pixels."""
    axes = [
        [(fold.effective_size(taps, step), taps) for taps in range(low + (whole - low) % 2, whole + 1, 2)]
        for whole, low, step in zip(size, least, dilation, strict=True)
    ]
    found: dict[Pair, int] = {}
    for side in sorted({span for axis in axes for span, _ in axis}):
        inside = [max((entry for entry in axis if entry[0] <= side), default=axis[0]) for axis in axes]
        (high, rows), (wide, columns) = inside
        found[rows, columns] = max(high, wide)
    return tuple(found), tuple(found.values())


def _rings(size: Pair, sizes: Sequence[Pair]) -> Tensor:
    """Return for each tap the index of the first crop that it belongs to: (rows, columns), int64."""
    first = []
    for axis, whole in enumerate(size):
        kept = [crop[axis] for crop in sizes]
        first.append(torch.tensor([bisect_left(kept, whole - 2 * min(i, whole - 1 - i)) for i in range(whole)]))
    return torch.maximum(first[0][:, None], first[1])


def _later(rings: Tensor) -> Tensor:
    """Return for each ring the sum over all later ones, (..., n): added from the outside, so that no digit is lost."""
    total = torch.zeros_like(rings)
    total[..., :-1] = rings[..., 1:].flip(-1).cumsum(-1).flip(-1)
    return total
