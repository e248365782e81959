"""Report what :func:`widefield.surgery.trim.trim` did to the kernels of a model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from widefield._checks import Pair
from widefield.report import Report
from widefield.surgery.compare import Difference


@dataclass(frozen=True)
class TrimmedKernel:
    """What happened to one kernel.

    Attributes:
        name: name of the layer; an expert of a mixture has its index in brackets.
        stage: index from 0, see :meth:`widefield.surgery.Anatomy.count_stages`.
        before, after: (rows, columns) in taps.
        dilation: (rows, columns) in pixels.
        energy: share of the sum of squares that was cut off, over the taps that meet the map.
        l1: share of the sum of absolute values, for the output channel that lost most.
        left: why the kernel was not cropped, or not to the limit; None if the tolerance alone decided.
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
        """The longer side after cropping, in pixels."""
        return max(d * (k - 1) + 1 for k, d in zip(self.after, self.dilation, strict=True))


@dataclass(frozen=True)
class Trimming(Report):
    """What :func:`trim` did.

    Attributes:
        kernels: every kernel with more than one tap, in the order of the model.
        tolerance, limit: the arguments.
        input_size: (H, W) of the only images that the trimmed model is for; None: any size.
        parameters_before, parameters_after: number of parameters of the model.
        macs_before, macs_after: multiply-accumulates for one image; None without a loader or an example input.
        change: of the outputs on the loader's images; None without a loader, when ``tolerance`` is for each layer.
        verified: largest difference between the trimmed model and the model with zeros in the same taps, relative to
            the scale of the outputs; None if the model ran on no input.
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
        """Return the kernels that became smaller."""
        return tuple(kernel for kernel in self.kernels if kernel.after != kernel.before)

    def beyond(self) -> tuple[TrimmedKernel, ...]:
        """Return the kernels that still exceed the limit; none without a limit."""
        return tuple(kernel for kernel in self.kernels if self.limit is not None and kernel.span > self.limit)

    def totals(self) -> dict[str, str]:
        """Return the cost and gain for the whole model as one table row."""
        row = {
            "cropped" if self.limit is None else f"cropped to {self.limit}": (
                f"{len(self.trimmed())} of {len(self.kernels)}"
            ),
            "still larger": str(len(self.beyond())),
            "parameters": f"{self.parameters_before:,} -> {self.parameters_after:,}",
        }
        if self.macs_before is not None and self.macs_after is not None:
            row["MACs"] = f"{self.macs_before / 1e6:.4g}M -> {self.macs_after / 1e6:.4g}M"
        if self.change is not None:
            change = self.change
            row["change (RMS)"] = f"{change.rms:.2g}"
            row["same class" if change.matched is None else change.same] = (
                "-" if change.agreement is None else f"{change.agreement:.1%}"
            )
            row["top-1" if change.score == "accuracy" else change.score] = (
                " -> ".join(f"{value:.1%}" for value in change.scores or ()) or "-"
            )
        return row

    def rows(self) -> list[dict[str, str]]:
        """Return one table row per kernel."""
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
        """Return the fields as mappings and lists for JSON, nested dataclasses included."""
        return dataclasses.asdict(self)

    def summary(self) -> str:
        """Return the result in a few sentences."""
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
            text += " Only for images of {}x{} pixels.".format(*self.input_size)
        if self.beyond():
            names = ", ".join(kernel.name for kernel in self.beyond())
            text += f" Still larger than {self.limit}x{self.limit}: {names}."
        return text


def _from_to(before: int, after: int) -> str:
    return f"{before:,} -> {after:,} ({100 * (after / before - 1):+.1f} %)" if before else f"{before} -> {after}"


def _percent(share: float) -> str:
    return f"{100 * share:.{2 if share < 0.995 else 3}g} %"
