"""Report what :func:`widefield.surgery.reparameterize.reparameterize` fused, left, and changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from widefield import bench
from widefield.report import Report
from widefield.surgery.compare import Difference


@dataclass(frozen=True)
class FusedLayer:
    """A layer that became a simpler one.

    Attributes:
        name: name of the layer in the model.
        norm: name of the batch norm that was folded in; its activation or an identity is left in its place. None: no
            norm was folded.
        kind: "mixture", "mask", "branches", "convolution", "linear layer", or "block" for other merges; and the norm.
        before, after: class of the layer.
        difference: of the output of the layer and the norm, on the layer's own input. None: the example does not reach
            the layer, or its input was changed in place before it could be tried.
    """

    name: str
    norm: str | None
    kind: str
    before: str
    after: str
    difference: Difference | None


@dataclass(frozen=True)
class LeftLayer:
    """A batch norm, or a block that could merge, that stays as it is.

    Attributes:
        name: name of the layer in the model.
        kind: its class.
        reason: why it stays.
    """

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Reparameterization(Report):
    """What :func:`reparameterize` did, and how far the outputs moved.

    Attributes:
        model: class of the model.
        fused, left: layers that changed, and layers that could not.
        before, after: parameters, and multiply-accumulates for one image of the example.
        difference: of the model's outputs on the example input.
        tolerance: the argument.
    """

    model: str
    fused: tuple[FusedLayer, ...]
    left: tuple[LeftLayer, ...]
    before: bench.Cost
    after: bench.Cost
    difference: Difference
    tolerance: float

    @property
    def worst(self) -> FusedLayer | None:
        """The layer whose own output moved most; None if none was measured."""
        return worst(self.fused)

    def counts(self) -> dict[str, int]:
        """Return kind -> number of fused layers, the most frequent first."""
        return dict(Counter(layer.kind for layer in self.fused).most_common())

    def rows(self) -> list[dict[str, str]]:
        """Return one table row per fused layer, then one per layer that was left."""
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
        """Return the fields as mappings and lists for JSON."""
        return asdict(self)

    def summary(self) -> str:
        """Return what was fused, the costs, and how far the outputs moved, in four lines."""
        moved = self.worst
        at = "" if moved is None or moved.difference is None else (
            f", those of single layers by at most {moved.difference.relative:.1e} ({moved.name})"
        )  # fmt: skip
        dense = self.difference.pixels is not None or self.difference.matched is not None
        same = f", {self.difference.agreed}" if dense and self.difference.agreed else ""
        return (
            f"{self.model}: {counted(self.fused)}; {len(self.left)} left\n"
            f"parameters {self.before.parameters:,} -> {self.after.parameters:,}\n"
            f"MACs an image {self.before.macs:,} -> {self.after.macs:,}\n"
            f"outputs differ by {self.difference.relative:.1e} of their scale{at}{same}; tolerance {self.tolerance:.0e}"
        )


def larger(first: Difference | None, second: Difference | None) -> Difference | None:
    """Return the larger of two differences; None if neither was measured."""
    return max((d for d in (first, second) if d is not None), key=lambda d: d.relative, default=None)


def worst(fused: Sequence[FusedLayer]) -> FusedLayer | None:
    """Return the layer whose own output moved most; None if none was measured."""
    measured = [layer for layer in fused if layer.difference is not None]
    return max(measured, key=lambda layer: 0.0 if layer.difference is None else layer.difference.relative, default=None)


def counted(fused: Sequence[FusedLayer]) -> str:
    """Return the number of fused layers, in total and by kind, as text."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(layer.kind for layer in fused).most_common())
    return f"fused {len(fused)} layer{'' if len(fused) == 1 else 's'} ({kinds})"
