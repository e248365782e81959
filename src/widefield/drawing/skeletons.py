"""Draw poses into an image as skeletons: points and links whose color and shape tell left from right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from widefield.data.skeleton import Skeleton
from widefield.drawing.annotating import Color

Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]
Point = tuple[float, float]

SIDES = ("middle", "left", "right")
COLORS: dict[str, Color] = {"middle": (255, 255, 255), "left": (86, 180, 233), "right": (230, 130, 0)}
"""Color of each side: blue and orange differ for everybody, and white differs from both by its lightness."""
_INK: Color = (20, 20, 20)
"""Edges of lines and points: the colors are bright, so that they are seen on any background with a dark edge."""
_SHARP = 4
"""Skeletons are drawn this much larger, then shrunk, for smooth edges."""
_LARGEST = 4_000_000
"""Pixels of the largest area that is drawn enlarged."""


@dataclass(frozen=True, eq=False)
class Figure:
    """One pose to draw.

    Attributes:
        points: (K, 2), x and y in continuous pixels of the image; (0, 0) is its top left corner.
        shown: bool (K,): which points are drawn. A link is drawn if both of its ends are.
        hollow: bool (K,): which points are drawn without a filling, or None for none.
        targets: (K, 2): where the points should be; a thin line goes there from each. None: no such lines.
    """

    points: Floats
    shown: Bools
    hollow: Bools | None = None
    targets: Floats | None = None


def sides(skeleton: Skeleton) -> tuple[str, ...]:
    """Return the side of each key point, one of ``SIDES``: by its name, or the first of a pair is left."""
    found = []
    for index, (name, other) in enumerate(zip(skeleton.names, skeleton.swapped, strict=True)):
        words = name.lower().replace("-", "_").replace(" ", "_").split("_")
        if other == index:
            found.append("middle")
        elif {"left", "l"} & set(words):
            found.append("left")
        elif {"right", "r"} & set(words):
            found.append("right")
        else:
            found.append("left" if index < other else "right")
    return tuple(found)


def with_skeletons(image: Image.Image, figures: Sequence[Figure], skeleton: Skeleton) -> Image.Image:
    """Return a copy of an image with poses, the first one on top.

    Left is blue with round points, right is orange with square ones, and what has no side is white with diamonds. Lines
    are as wide as suits the image, and thinner on small figures.
    """
    found = image.convert("RGB")
    of_side = sides(skeleton)
    for figure in reversed(figures):
        if figure.shown.any():
            _draw(found, figure, skeleton.links, of_side)
    return found


def _draw(image: Image.Image, figure: Figure, links: Sequence[tuple[int, int]], of_side: Sequence[str]) -> None:
    """Draw one pose into an image, in place."""
    points, shown = np.asarray(figure.points, np.float64), figure.shown & np.isfinite(figure.points).all(1)
    if not shown.any():
        return
    extent = float((points[shown].max(0) - points[shown].min(0)).max())
    width = max(1.0, min(max(image.size) / 180, extent / 20))
    targets = np.full_like(points, np.nan) if figure.targets is None else figure.targets
    aimed = shown & np.isfinite(targets).all(1)
    around, margin = np.concatenate([points[shown], targets[aimed]]), 4 * width + 2
    low = np.maximum(np.floor(around.min(0) - margin), 0).astype(int)
    high = np.minimum(np.ceil(around.max(0) + margin), image.size).astype(int)
    if (high <= low).any():
        return
    area = (low[0], low[1], high[0], high[1])
    factor = _SHARP if (high - low).prod() * _SHARP**2 <= _LARGEST else 1
    part = image.crop(area)
    canvas = part.resize((part.width * factor, part.height * factor), Image.Resampling.BICUBIC)
    pen = _Pen(ImageDraw.Draw(canvas), width * factor, max(1.0, 0.45 * width) * factor)
    places = [(x, y) for x, y in (np.where(shown[:, None], points - low, 0) * factor).tolist()]
    drawn = [(a, b, _of_link(of_side[a], of_side[b])) for a, b in links if shown[a] and shown[b]]
    for edge in (True, False):  # the edges of all lines first, or those of one would cut the others
        for a, b, side in drawn:
            pen.line(places[a], places[b], COLORS[side], edge=edge)
    for index in np.flatnonzero(aimed).tolist():
        x, y = ((targets[index] - low) * factor).tolist()
        pen.gap(places[index], (x, y))
    for index in np.flatnonzero(shown).tolist():
        hollow = figure.hollow is not None and bool(figure.hollow[index])
        pen.point(places[index], of_side[index], hollow=hollow)
    image.paste(canvas.resize(part.size, Image.Resampling.BOX) if factor > 1 else canvas, area[:2])


def _of_link(first: str, second: str) -> str:
    """Return the side of a link: that of its ends, if they have no different ones."""
    found = {first, second} - {"middle"}
    return found.pop() if len(found) == 1 else "middle"


class _Pen:
    """Draws with lines of one width, and dark edges of another."""

    def __init__(self, draw: ImageDraw.ImageDraw, width: float, edge: float) -> None:
        self.draw, self.width, self.edge = draw, width, edge

    def line(self, start: Point, end: Point, color: Color, *, edge: bool) -> None:
        """Draw a line with round ends, or its edge."""
        thick = self.width + (2 * self.edge if edge else 0)
        ink = _INK if edge else color
        self.draw.line([start, end], ink, max(1, round(thick)))
        for x, y in (start, end):
            reach = thick / 2
            self.draw.ellipse((x - reach, y - reach, x + reach, y + reach), ink)

    def gap(self, start: Point, end: Point) -> None:
        """Draw a thin line from a point to where it should be, and a cross there."""
        thin = 0.55 * self.width
        for thick, ink in ((thin + self.edge, _INK), (thin, (255, 255, 255))):
            wide, reach = max(1, round(thick)), self.width
            self.draw.line([start, end], ink, wide)
            for sign in (-1, 1):
                corners = [(end[0] - reach, end[1] - sign * reach), (end[0] + reach, end[1] + sign * reach)]
                self.draw.line(corners, ink, wide)

    def point(self, place: Point, side: str, *, hollow: bool) -> None:
        """Draw a point in the shape and color of its side."""
        reach, color = 1.45 * self.width, COLORS[side]
        self._shape(place, side, reach + self.edge, _INK)
        self._shape(place, side, reach, color)
        if hollow:
            self._shape(place, side, 0.62 * reach, _INK)

    def _shape(self, place: Point, side: str, reach: float, color: Color) -> None:
        x, y = place
        if side == "left":
            self.draw.ellipse((x - reach, y - reach, x + reach, y + reach), color)
        elif side == "right":
            reach *= 0.89  # a square of the same area
            self.draw.rectangle((x - reach, y - reach, x + reach, y + reach), color)
        else:
            reach *= 1.25
            self.draw.polygon([(x - reach, y), (x, y - reach), (x + reach, y), (x, y + reach)], color)
