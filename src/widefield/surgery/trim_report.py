"""What became of the kernels of a model: the report of :func:`widefield.surgery.trim.trim`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from widefield.report import Report
from widefield.surgery.compare import Difference
from widefield.surgery.trim_kernels import Pair


@dataclass(frozen=True)
class TrimmedKernel:
    """What became of one kernel.

    Attributes:
        name: of the layer; an expert of a mixture has its index in brackets.
        stage: from 0; see :func:`widefield.surgery.Anatomy.count_stages`.
        before, after: (rows, columns) in taps.
        dilation: (rows, columns) in pixels.
        energy: share of the sum of squares that was cut off, of the taps that meet the map.
        l1: likewise of the sum of absolute values, of the output channel that lost most.
        left: why it stays as it is, or larger than the limit; None: for no other reason than what it would lose.
    """

    name: str
    stage: int
    before: Pair
    after: Pair
    dilation: Pair
    energy: float = 0.0
    l1: float = 0.0
    left: str | None = None

    @property
    def span(self) -> int:
        """The longer side in pixels that is left."""
        return max(d * (k - 1) + 1 for k, d in zip(self.after, self.dilation, strict=True))


@dataclass(frozen=True)
class Trimming(Report):
    """What :func:`trim` did.

    Attributes:
        kernels: every kernel of more than one tap, in the order of the model.
        tolerance, limit: as asked for.
        input_size: (H, W) of the images that the trimmed model is for, and no others; None: for all.
        parameters_before, parameters_after: numbers in the model.
        macs_before, macs_after: multiply-accumulates for one image of the loader, or of ``input_size``; None: no size
            was given.
        change: of the outputs on the loader's images; None: there was no loader, and ``tolerance`` is each layer's.
        verified: largest difference between the trimmed model and the model with zeros for the same taps, in units of
            the outputs' scale; None: no input is known on which the model runs.
    """

    kernels: tuple[TrimmedKernel, ...]
    tolerance: float
    limit: int | None
    input_size: Pair | None
    parameters_before: int
    parameters_after: int
    macs_before: int | None
    macs_after: int | None
    change: Difference | None
    verified: float | None

    def trimmed(self) -> tuple[TrimmedKernel, ...]:
        """Return the kernels that have become smaller."""
        return tuple(kernel for kernel in self.kernels if kernel.after != kernel.before)

    def beyond(self) -> tuple[TrimmedKernel, ...]:
        """Return the kernels that still span more than the limit; none if there is no limit."""
        return tuple(kernel for kernel in self.kernels if self.limit is not None and kernel.span > self.limit)

    def rows(self) -> list[dict[str, str]]:
        """Return one row a kernel."""
        return [
            {
                "layer": kernel.name or "(the model itself)",
                "stage": str(kernel.stage + 1),
                "kernel": "x".join(map(str, kernel.before))
                + (f" -> {'x'.join(map(str, kernel.after))}" if kernel.after != kernel.before else ""),
                "energy lost": _percent(kernel.energy),
                "L1 lost": _percent(kernel.l1),
                "left because": kernel.left or "-",
            }
            for kernel in self.kernels
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, nested dataclasses included, as mappings, which JSON can hold."""
        return dataclasses.asdict(self)

    def summary(self) -> str:
        """Return what was done in a few sentences."""
        parts = [f"{len(self.trimmed())} of {len(self.kernels)} kernels cropped"]
        parts.append(f"parameters {_from_to(self.parameters_before, self.parameters_after)}")
        if self.macs_before is not None and self.macs_after is not None:
            parts.append(f"MACs {_from_to(self.macs_before, self.macs_after)}")
        text = ", ".join(parts) + "."
        if self.change is None:
            most = max((kernel.l1 for kernel in self.kernels), default=0.0)
            text += f" No output channel of a layer lost more than {most:.2g} of its kernel's L1 mass."
        else:
            text += f" Measured: {self.change}. Other images may change more."
        if self.input_size is not None:
            text += " For images of {}x{} pixels only.".format(*self.input_size)
        if self.beyond():
            names = ", ".join(kernel.name for kernel in self.beyond())
            text += f" Beyond {self.limit}x{self.limit} all the same: {names}."
        return text


def _from_to(before: int, after: int) -> str:
    return f"{before:,} -> {after:,} ({100 * (after / before - 1):+.1f} %)" if before else f"{before} -> {after}"


def _percent(share: float) -> str:
    return f"{100 * share:.{2 if share < 0.995 else 3}g} %"
