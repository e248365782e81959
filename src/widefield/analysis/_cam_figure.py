"""Draw class activation maps and receptive fields over their images, and mark what they explain."""

from __future__ import annotations

from typing import Any

import numpy as np


def shown(image: np.ndarray) -> np.ndarray:
    """Return an image (H, W, C) with three channels; other numbers of channels are averaged."""
    return image if image.shape[-1] == 3 else np.repeat(image.mean(-1, keepdims=True), 3, -1)


def mark(axis: Any, where: np.ndarray | None) -> None:
    """Mark the pixel, or outline the region, bool (H, W), whose class logit a map explains."""
    if where is None:
        return
    H, W = where.shape
    rows, columns = where.nonzero()
    if len(rows) == 1:
        axis.plot((columns[0] + 0.5) / W, (rows[0] + 0.5) / H, "+", color="cyan", markersize=7, markeredgewidth=1.2)
        return
    # One pixel of margin, so that the outline of a region at the border is closed.
    across, down = ((np.arange(-1, n + 1) + 0.5) / n for n in (W, H))
    axis.contour(across, down, np.pad(where, 1).astype(float), levels=[0.5], colors="cyan", linewidths=0.9)
    axis.set(xlim=(0, 1), ylim=(1, 0))


def mark_box(axis: Any, box: np.ndarray, size: tuple[int, int]) -> None:
    """Outline the box whose class logit a map explains; NaN: there is none."""
    H, W = size
    left, top, right, bottom = box / (W, H, W, H)
    axis.plot([left, right, right, left, left], [top, top, bottom, bottom, top], color="cyan", linewidth=0.9)
    axis.set(xlim=(0, 1), ylim=(1, 0))


def mark_point(axis: Any, point: np.ndarray, size: tuple[int, int]) -> None:
    """Mark the key point whose peak a map explains."""
    H, W = size
    axis.plot((point[0] + 0.5) / W, (point[1] + 0.5) / H, "+", color="cyan", markersize=7, markeredgewidth=1.2)
    axis.set(xlim=(0, 1), ylim=(1, 0))


def overlay(axis: Any, scores: np.ndarray, image: np.ndarray | None) -> Any:
    """Draw a map (H, W) over a gray image; return the mappable for a color bar."""
    H, W = scores.shape
    place: dict[str, Any] = {"extent": (0, 1, 1, 0), "aspect": H / W}
    if image is not None:
        axis.imshow(shown(image.mean(-1, keepdims=True)), **place)
    shades = axis.imshow(
        scores, cmap="inferno", vmin=0, vmax=1, alpha=None if image is None else 0.6, interpolation="nearest", **place
    )
    if scores.max() == 0:
        axis.text(0.5, 0.5, "empty", color="white", ha="center", va="center")
    elif scores.min() < 0.5:
        # Centers of pixels, as contours do not extend to the edges.
        across, down = ((np.arange(n) + 0.5) / n for n in (W, H))
        axis.contour(across, down, scores, levels=[0.5], colors="white", linewidths=0.7)
    return shades


def field_over(axis: Any, image: np.ndarray, field: np.ndarray, faintest: float) -> None:
    """Draw a field (H, W) over a gray image (H, W, 3): darker on a logarithmic scale down to ``faintest``."""
    from matplotlib import colormaps

    gray = np.repeat(image.mean(-1, keepdims=True), 3, -1)
    axis.imshow((0.35 + 0.65 * gray).clip(0, 1))
    strength = (1 - np.log10(np.maximum(field, faintest)) / np.log10(faintest)).clip(0, 1)
    layer = colormaps["magma_r"](0.25 + 0.75 * strength)
    layer[..., 3] = 0.85 * strength
    axis.imshow(layer)
