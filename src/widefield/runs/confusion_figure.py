"""Draw which class is mistaken for which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from widefield import report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 30
"""Largest number of classes in a figure."""


@report.paper()
def confusion_figure(counts: NDArray[np.floating[Any]], names: Sequence[str], of: str) -> Figure:
    """Draw a confusion matrix as shares of the true class.

    Args:
        counts: (K, K), by (true class, predicted class).
        names: of the classes.
        of: what is counted, such as "pixels".
    """
    wrong = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()
    present = np.flatnonzero(counts.sum(0) + counts.sum(1))
    chosen = np.sort(present[np.argsort(-wrong[present], kind="stable")][:MOST])
    total = counts.sum(1, keepdims=True)
    shares = np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)[np.ix_(chosen, chosen)]
    short = [_short(names[k]) for k in chosen]
    side = min(report.PAGE, 1.4 + 0.3 * len(short))
    figure = report.blank(side + 0.9, side)
    axis = figure.subplots()
    image = axis.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
    size = 7 if len(short) <= 20 else 5.5
    axis.set_xticks(range(len(short)), short, rotation=90, fontsize=size)
    axis.set_yticks(range(len(short)), short, fontsize=size)
    axis.set(xlabel="predicted", ylabel="true")
    axis.tick_params(length=0)
    if len(short) <= 20:
        for (y, x), share in np.ndenumerate(100 * shares):
            if share >= 0.5:
                dark = share > 55
                axis.text(x, y, f"{share:.0f}", ha="center", va="center", fontsize=6, color="w" if dark else "k")
    if len(chosen) < len(present):
        axis.set_title(f"the {len(chosen)} of {len(present)} classes with the most wrong {of}")
    figure.colorbar(image, shrink=0.7, label="share of the true class (%)", ax=axis)
    return figure


def _short(name: str, letters: int = 18) -> str:
    return name if len(name) <= letters else f"{name[: letters - 1]}…"
