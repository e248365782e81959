"""Measure translation stability: how a shift of the image changes a model's outputs (Zhang 2019)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from widefield import _checks, report
from widefield.analysis._model import chunks, track, turned, visited
from widefield.analysis._result import Result
from widefield.analysis._scores import logits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIRECTIONS = {"horizontal": (0, 1), "vertical": (1, 0), "diagonal": (1, 1)}
"""(rows, columns) of a shift by one pixel."""

SHIFTS = (1, 2, 4, 8, 16, 32)
_PART = 7
"""Least side of the model's images relative to the largest usual shift."""


def usual_shifts(side: int) -> tuple[int, ...]:
    """Return those of `SHIFTS` that suit a model's images of a side: up to a seventh of it, such as 4 for 32 pixels.

    The windows are that much smaller than the images, so all that measure a model must agree on the largest shift.
    """
    return tuple(shift for shift in SHIFTS if _PART * shift <= side) or SHIFTS[:1]


@dataclass(frozen=True)
class TranslationStability(Result):
    """How the outputs of one model change when its images shift.

    The arrays are (directions, shifts, images), in the order of :data:`DIRECTIONS` and ``shifts``.
    """

    name: str
    about: Mapping[str, Any]
    shifts: tuple[int, ...]
    """In pixels, ascending; a diagonal shift moves that far along both sides."""
    same: np.ndarray
    """bool: whether the class with the largest score stays the same."""
    cosine: np.ndarray
    """float64: cosine similarity of the scores before and after."""
    change: np.ndarray
    """float64: L2 norm of the change of the scores, relative to their norm before."""
    between: float
    """The same between different images instead of shifts (root mean square); NaN for a single image."""

    title = "Translation stability"
    lead = (
        "Shifted windows of larger images: how often the class with the largest score stays the same, and how far the "
        "scores move relative to their norm. Nothing is padded: as many columns or rows leave on one side as enter on "
        "the other. Bars are standard errors over images. Below, lines are medians and bands the middle half of the "
        "images; dotted: the change between different images. The table has means over directions and images."
    )

    def rows(self) -> list[dict[str, str]]:
        """Return one row per shift in pixels: means over images and directions, ± standard errors over images."""
        found = zip(self.shifts, self.same.mean(0) * 100, self.cosine.mean(0), self.change.mean(0), strict=True)
        return [
            {
                "model": self.name,
                "shift": str(shift),
                "same class (%)": f"{same.mean():.1f} ± {_error(same):.1f}",
                "cosine": f"{cosine.mean():.4f}",
                "change": f"{change.mean():.3g} ± {_error(change):.1g}",
                "other image": f"{self.between:.3g}" if np.isfinite(self.between) else "–",
            }
            for shift, same, cosine, change in found
        ]

    @classmethod
    def reading(cls, results: Mapping[str, TranslationStability]) -> str:
        """Return in how many images the class stays after the smallest and the largest shift."""
        parts = []
        for name, result in results.items():
            rows = {row["shift"]: row["same class (%)"] for row in result.rows()}
            shown = dict.fromkeys((str(result.shifts[0]), str(result.shifts[-1])))
            ends = " and ".join(f"{rows[shift]} % by {shift} px" for shift in shown)
            parts.append(f"{name} {ends}")
        return f"The class stays the same in this share of shifted images (± standard errors): {'; '.join(parts)}."

    @classmethod
    @report.paper()
    def draw(cls, results: Mapping[str, TranslationStability], **options: Any) -> Figure:
        """Draw consistency and relative change against the shift, one column per direction; takes no options."""
        if options:
            raise TypeError(f"the figure of translation stability takes no options; got {sorted(options)}.")
        figure = report.blank(report.PAGE, 3.6 + 0.14 * len(results))
        axes = figure.subplots(2, len(DIRECTIONS), sharex=True, sharey="row", squeeze=False)
        for index, (name, result) in enumerate(results.items()):
            style: dict[str, Any] = {
                "color": report.COLORS[index % len(report.COLORS)],
                "marker": report.MARKERS[index % len(report.MARKERS)],
            }
            for direction in range(len(DIRECTIONS)):
                above, below = axes[:, direction]
                same, change = result.same[direction] * 100.0, result.change[direction]
                above.errorbar(result.shifts, same.mean(1), _error(same), label=name, elinewidth=0.7, **style)
                low, median, high = np.quantile(change, (0.25, 0.5, 0.75), axis=1)
                below.plot(result.shifts, median, **style)
                below.fill_between(result.shifts, low, high, color=style["color"], alpha=0.15, linewidth=0)
                if np.isfinite(result.between):
                    below.axhline(result.between, color=style["color"], linestyle=":", linewidth=0.8)
        ticks = sorted({shift for result in results.values() for shift in result.shifts})
        for (above, below), title in zip(axes.T, DIRECTIONS, strict=True):
            above.set_title(title)
            below.set_xlabel("shift (pixels)")
            below.set_xscale("log", base=2)
            below.set_xticks(ticks, [str(tick) for tick in ticks])
            below.minorticks_off()
            for axis in (above, below):
                axis.grid(alpha=0.25, linewidth=0.5)
                axis.spines[["top", "right"]].set_visible(False)
        axes[0, 0].set_ylabel("same class (% of images)")
        axes[0, 0].set_ylim(top=102)
        axes[1, 0].set_ylabel("relative change of scores")
        if all(result.change.min() > 0 for result in results.values()):
            axes[1, 0].set_yscale("log")
        else:
            axes[1, 0].set_ylim(bottom=0)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=max(1, min(4, 100 // max(map(len, labels)))))
        return figure


@_checks.guided
def translation_stability(
    model: nn.Module,
    images: Tensor | Iterable[Any],
    *,
    shifts: Sequence[int] | None = None,
    batch_size: int = 8,
    name: str | None = None,
    about: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> TranslationStability:
    """Measure how much a classifier's scores change when its images shift by some pixels.

    The model sees windows whose sides are those of the images minus the largest shift: first the upper left one, then
    those shifted to the right, down, and both. Nothing is padded or wrapped around, so give images that exceed the
    model's size by the largest shift. The share of images whose class stays is the classification consistency of Zhang
    2019 ("Making convolutional networks shift-invariant again"), for given shifts instead of random ones. The model is
    left unchanged.

    Args:
        model: returns scores (N, classes).
        images: normalized images (N, C, H, W), or batches of them, all of one size.
        shifts: in pixels, each at least 1 and less than the images' sides. Default: 1, 2, 4 and so on up to 32, and to
            an eighth of the images' sides, a seventh of the model's.
        batch_size: images at a time.
        name: the model's name in tables and figures. Default: its class name.
        about: facts to store with the result.
        progress: show a progress bar.

    Raises:
        ValueError: shifts are empty, repeated, below 1 or too large for the images; outputs are not (N, classes) or not
            finite; images differ in size, or there are none.
        TypeError: images, shifts or batch size have the wrong type.
    """
    _checks.integer("batch_size", batch_size)
    steps = () if shifts is None else check_shifts(shifts)
    total = -(-len(images) // batch_size) if isinstance(images, Tensor) and images.ndim == 4 else None
    size: tuple[int, ...] = ()
    found: list[Tensor] = []
    spread = _Spread()
    with visited(model), torch.no_grad():
        for part in track(chunks(images, model, batch_size), "translation stability", total=total, show=progress):
            size = size or tuple(part.shape[2:])
            if tuple(part.shape[2:]) != size:
                raise ValueError(f"images must all be of one size; got {size} and {tuple(part.shape[2:])}.")
            steps = steps or tuple(shift for shift in SHIFTS if (_PART + 1) * shift <= min(size)) or SHIFTS[:1]
            if min(size) <= steps[-1]:
                raise ValueError(
                    f"a shift by {steps[-1]} pixels leaves nothing of images of {size} pixels: give larger images, "
                    f"ideally the model's size plus the largest shift, or smaller shifts.{turned(model, part.shape)}"
                )
            found.append(_compared(model, part, steps, spread))
    same, cosine, change = torch.cat(found, -1).numpy()
    window = [side - steps[-1] for side in size]
    return TranslationStability(
        name=type(model).__name__ if name is None else name,
        about={
            **(about or {}),
            "images": same.shape[-1],
            "size": size[0] if size[0] == size[1] else list(size),
            "window": window[0] if window[0] == window[1] else window,
            "shifts": list(steps),
        },
        shifts=steps,
        same=same.astype(bool),
        cosine=cosine,
        change=change,
        between=spread.distance(),
    )


def check_shifts(shifts: Sequence[int]) -> tuple[int, ...]:
    """Return shifts in ascending order; raises TypeError or ValueError unless they are distinct integers from 1."""
    if not isinstance(shifts, (Sequence, np.ndarray)):
        raise TypeError(f"shifts must be a sequence of pixels, such as (1, 2, 4); got {shifts!r}.")
    steps = sorted(_checks.integer("every entry of shifts", shift) for shift in shifts)
    if not steps or len(set(steps)) < len(steps):
        raise ValueError(f"shifts must be distinct numbers of pixels, such as (1, 2, 4); got {tuple(shifts)!r}.")
    return tuple(steps)


def _compared(model: nn.Module, images: Tensor, steps: Sequence[int], spread: _Spread) -> Tensor:
    """Return (same, cosine, change) of each direction, shift and image: (3, directions, shifts, N), float64."""
    height, width = (side - steps[-1] for side in images.shape[2:])

    def scores(down: int, right: int) -> Tensor:
        window = images[:, :, down : down + height, right : right + width].contiguous()
        return logits(model, window, images).cpu().double()  # some devices lack float64

    before = scores(0, 0)
    spread.add(before)
    norm = before.norm(dim=1)
    directions = []
    for down, right in DIRECTIONS.values():
        along = []
        for step in steps:
            after = scores(down * step, right * step)
            same = before.argmax(1) == after.argmax(1)
            # All-zero scores have no direction; unchanged scores count as fully similar.
            cosine = torch.cosine_similarity(before, after).masked_fill((before == after).all(1), 1)
            distance = (after - before).norm(dim=1)
            change = torch.where(distance > 0, distance / norm, 0)
            along.append(torch.stack([same.double(), cosine, change]))
        directions.append(torch.stack(along, 1))
    return torch.stack(directions, 1)


class _Spread:
    """Distances between the scores of different images, from running sums."""

    def __init__(self) -> None:
        self.count = 0
        self.norms = 0.0
        self.origin: Tensor | None = None
        self.total: Tensor | None = None
        self.squares = 0.0

    def add(self, scores: Tensor) -> None:
        # Relative to the first image's scores, as a common offset would lose digits.
        origin = scores[0] if self.origin is None else self.origin
        away = scores - origin
        total = away.sum(0)
        self.origin, self.total = origin, total if self.total is None else self.total + total
        self.count += len(scores)
        self.norms += float(scores.square().sum())
        self.squares += float(away.square().sum())

    def distance(self) -> float:
        """Return the root mean square distance between different images' scores, relative to that of their norms."""
        if self.count < 2 or self.total is None or not self.norms:
            return float("nan")
        deviations = self.squares - float(self.total.square().sum()) / self.count
        return float((2 * max(deviations, 0.0) / (self.count - 1) / (self.norms / self.count)) ** 0.5)


def _error(values: np.ndarray) -> np.ndarray:
    """Return standard errors of the means over the last dimension; 0 for a single value."""
    count = values.shape[-1]
    spread: np.ndarray = values.std(-1, ddof=min(1, count - 1)) / count**0.5
    return spread
