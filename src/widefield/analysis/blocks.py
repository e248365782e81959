"""Measure how much each residual block contributes: switch it off, and compare the outputs.

A residual block returns ``x + f(x)``. Switched off, it returns x. Networks of such blocks still work without some of
them (Veit et al. 2016, "Residual networks behave like ensembles of relatively shallow networks", section 4.1). A block
that can be switched off without loss cannot tell one design of its kernels from another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from widefield import _checks, report
from widefield.analysis import _stages
from widefield.analysis._model import batched, track, visited, watched
from widefield.analysis._residual import FixedBlock, residual_blocks, switched_off
from widefield.analysis._result import Result
from widefield.surgery.compare import Difference, Tally
from widefield.surgery.inputs import batches

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALL = "all blocks"
"""Name of the entry for all blocks at once."""


@dataclass(frozen=True)
class BlockContribution:
    """What changes without one residual block, or without all of them.

    Attributes:
        name: of the module; :data:`ALL` for all.
        kind: name of its class; "" for all.
        adds: norm of what the block adds to its input, relative to the norm of the input, mean over the images; None
            for all.
        change: root mean square change of the outputs, relative to their root mean square.
        agreement: share of the predictions that stay, see :class:`widefield.surgery.Difference`; None if the outputs
            predict nothing.
        score: of the model without the block, from 0 to 1; None without labels.
    """

    name: str
    kind: str
    adds: float | None
    change: float
    agreement: float | None
    score: float | None


@dataclass(frozen=True)
class BlockContributions(Result):
    """The contributions of a model's residual blocks.

    Attributes:
        metric: name of the score: "accuracy", "mIoU", "box AP" or "PCK".
        score: of the whole model, from 0 to 1; None without labels.
        blocks: in the order of the calls.
        together: without all of them.
        fixed: blocks that cannot be switched off.
    """

    title: ClassVar[str] = "Contributions of blocks"
    lead: ClassVar[str] = (
        "Each residual block in turn is switched off: it returns its input. Above: what that costs, in points of the "
        "score, or, without labels, in percent of the predictions that change. Below: the change of the outputs, "
        "relative to the outputs. Dotted: all blocks off at once. A point at zero is a block that these images do not "
        "need: its kernel cannot show that it is better than another."
    )

    name: str
    about: Mapping[str, Any]
    metric: str
    score: float | None
    blocks: tuple[BlockContribution, ...]
    together: BlockContribution
    fixed: tuple[FixedBlock, ...]

    def rows(self) -> list[dict[str, str]]:
        """Return one row per block, one for all of them, and one per block that cannot be switched off."""
        found = [self._row(block) for block in (*self.blocks, self.together)]
        empty = dict.fromkeys(found[0], "–")
        return found + [
            {**empty, "model": self.name, "block": block.name, "score without it (%)": f"stays on: {block.reason}"}
            for block in self.fixed
        ]

    def _row(self, block: BlockContribution) -> dict[str, str]:
        score = "–"
        if block.score is not None and self.score is not None:
            score = f"{100 * block.score:.1f} of {100 * self.score:.1f} {self.metric}"
        return {
            "model": self.name,
            "block": block.name,
            "adds (% of input)": "–" if block.adds is None else f"{100 * block.adds:.3g}",
            "change of outputs": f"{block.change:.3g}",
            "same predictions (%)": "–" if block.agreement is None else f"{100 * block.agreement:.1f}",
            "score without it (%)": score,
        }

    def drop(self, block: BlockContribution) -> float | None:
        """Return how many points the score loses without a block; None without labels."""
        return None if self.score is None or block.score is None else 100 * (self.score - block.score)

    @property
    def line(self) -> str:
        """The contributions in one line: what one block and all blocks cost."""
        if self.score is None:
            changes = [block.change for block in self.blocks]
            return (
                f"{self.name}: without one of {len(changes)} blocks outputs change by {min(changes):.2g} to "
                f"{max(changes):.2g} of their size, without all by {self.together.change:.2g}"
            )
        drops = [self.drop(block) or 0.0 for block in self.blocks]
        return (
            f"{self.name}: {100 * self.score:.1f}% {self.metric}; without one of {len(drops)} blocks "
            f"{min(drops):.1f} to {max(drops):.1f} points less, without all {self.drop(self.together):.1f}"
        )

    @classmethod
    def reading(cls, results: Mapping[str, Self]) -> str:
        """Return what one block and all blocks cost, for each model."""
        counts = sorted({str(result.about["images"]) for result in results.values() if "images" in result.about})
        images = f"On {' and '.join(counts)} images: " if counts else ""
        return f"{images}{'; '.join(result.line for result in results.values())}."

    @classmethod
    @report.paper()
    def draw(cls, results: Mapping[str, Self]) -> Figure:
        """Draw the cost of each block, and the change of the outputs, over the blocks in the order of the calls."""
        costs, label = _costs(list(results.values()))
        panels: list[tuple[str, Callable[[BlockContributions, BlockContribution], float]]] = [
            (label, costs),
            ("change of outputs", lambda result, block: block.change),
        ]
        figure: Any = report.blank(report.PAGE, 3.6 + 0.14 * len(results))
        axes = figure.subplots(len(panels), 1, sharex=True)
        for index, (name, result) in enumerate(results.items()):
            style: dict[str, Any] = {
                "color": report.COLORS[index % len(report.COLORS)],
                "marker": report.MARKERS[index % len(report.MARKERS)],
            }
            x = range(1, len(result.blocks) + 1)
            for axis, (_, value) in zip(axes, panels, strict=True):
                axis.plot(x, [value(result, block) for block in result.blocks], label=_stages.short(name), **style)
                axis.axhline(value(result, result.together), color=style["color"], linestyle=":", linewidth=0.9)
        for axis, (text, _) in zip(axes, panels, strict=True):
            axis.set_ylabel(text)
            axis.grid(alpha=0.25, linewidth=0.5)
            axis.spines[["top", "right"]].set_visible(False)
        if all(block.change > 0 for result in results.values() for block in (*result.blocks, result.together)):
            axes[1].set_yscale("log")
        axes[1].set_xlabel("residual block, from the image on")
        axes[1].xaxis.get_major_locator().set_params(integer=True)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(results)))
        drawn: Figure = figure
        return drawn


def _costs(
    results: list[BlockContributions],
) -> tuple[Callable[[BlockContributions, BlockContribution], float], str]:
    """Return what the upper panel draws, and its label; NaN where it is unknown."""
    nothing = float("nan")
    metrics = {result.metric for result in results}
    if all(result.score is not None for result in results) and len(metrics) == 1:
        return lambda result, block: nothing if (loss := result.drop(block)) is None else loss, (
            f"points of {metrics.pop()} lost"
        )
    return (
        lambda result, block: nothing if block.agreement is None else 100 * (1 - block.agreement),
        "predictions changed (%)",
    )


@_checks.guided
def block_contributions(
    model: nn.Module,
    images: Tensor | Iterable[Any],
    *,
    batch_size: int = 8,
    name: str | None = None,
    about: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> BlockContributions:
    """Switch off each residual block of a model, then all of them, and measure how outputs and score change.

    Residual blocks are found in the graph of one forward pass: modules whose output is their input plus something
    else. Their names and classes do not matter. Blocks that change the shape of their input have no such shortcut and
    stay on; they are listed in ``fixed``. A block with several branches, such as attention and MLP, is switched off as
    a whole. The model is restored, also after an error.

    Args:
        model: any model; the score is that of its task, as in :func:`widefield.compare`.
        images: normalized images (N, C, H, W), or batches. Labels in the batches, as ``{"image": ..., "label": ...}``,
            ``{"image": ..., "mask": ...}`` or (images, labels), give scores.
        batch_size: images at a time, if ``images`` is one tensor. Batches are taken as they are.
        name: the model's name in tables and figures. Default: its class name.
        about: facts to store with the result.
        progress: show a progress bar.

    Raises:
        ValueError: the model has no residual block; there are no images, or the outputs hold no numbers.
        TypeError: images or batch size have the wrong type.
    """
    _checks.integer("batch_size", batch_size)
    total = -(-len(images) // batch_size) if isinstance(images, Tensor) and images.ndim == 4 else None
    blocks: dict[str, nn.Module] = {}
    fixed: tuple[FixedBlock, ...] = ()
    tallies: dict[str, Tally] = {}
    sums = _Sums()
    with visited(model), torch.no_grad():
        for part, labels in track(_labeled(images, model, batch_size), "blocks", total=total, show=progress):
            if not blocks:
                blocks, fixed = residual_blocks(model, part[:1])
                if not blocks:
                    raise ValueError(
                        f"{type(model).__name__} has no residual block: no module returns its input plus something "
                        "else. Networks without shortcuts, or with shortcuts by convolutions only, cannot be measured."
                    )
                tallies = {ALL: Tally(model), **{block: Tally(model) for block in blocks}}
            with watched(blocks, sums.see):
                before = model(part)
            for block, tally in tallies.items():
                with switched_off(blocks.values() if block == ALL else [blocks[block]]):
                    after = model(part)
                tally.add(before, after, labels, images=len(part), size=part.shape[-2:])
    if not blocks:
        raise ValueError("images is empty: give at least one image.")
    changes = {block: tally.difference() for block, tally in tallies.items()}
    whole = changes[ALL]
    return BlockContributions(
        name=type(model).__name__ if name is None else name,
        about={**(about or {}), "images": whole.images},
        metric=whole.score,
        score=None if whole.scores is None else whole.scores[0],
        blocks=tuple(
            _contribution(block, type(module).__name__, sums.mean(block), changes[block])
            for block, module in blocks.items()
        ),
        together=_contribution(ALL, "", None, whole),
        fixed=fixed,
    )


def _labeled(images: Tensor | Iterable[Any], model: nn.Module, size: int) -> Iterator[tuple[Tensor, Any]]:
    """Yield (images, labels or None); each batch is read once, so that a generator will do."""
    for batch in images.split(size) if isinstance(images, Tensor) and images.ndim else batched(images):
        if not isinstance(batch, Tensor) or len(batch):
            yield from batches([batch], model)


def _contribution(name: str, kind: str, adds: float | None, found: Difference) -> BlockContribution:
    score = None if found.scores is None else found.scores[1]
    return BlockContribution(name, kind, adds, found.rms, found.agreement, score)


class _Sums:
    """Sums over images of the norm of what a block adds, relative to that of its input."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def see(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Add one call of a block; that of :func:`widefield.analysis._model.watched`."""
        x = args[0].flatten(1).float()
        share = (output.flatten(1).float() - x).norm(dim=1) / x.norm(dim=1).clamp(min=torch.finfo(x.dtype).tiny)
        self._sums[name] = self._sums.get(name, 0.0) + float(share.sum())
        self._counts[name] = self._counts.get(name, 0) + len(share)

    def mean(self, name: str) -> float:
        """Return the mean over all images."""
        return self._sums[name] / self._counts[name]
