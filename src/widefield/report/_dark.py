"""Draw a finished figure once more in dark colors, for pages of readers who prefer them.

Gray tones change from light to dark and from dark to light, and dark lines become lighter. What lies on a picture, such
as a box or a label, keeps its colors, and so do pictures. Color maps that are light where nothing is are replaced by
maps that are dark there.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from widefield.report._drawing import PNG_DPI, drawing
from widefield.report._figures import FIXED

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

BACKGROUND = "#16181b"
"""Of dark pages; ``page.css`` has it, too."""
_NEUTRAL = 0.08
"""Largest difference between the channels of a gray."""
_DARKEST, _LIGHTEST = 0.095, 0.9
"""What white and black become, from 0 to 1."""

_Change = tuple[Callable[[Any], Any], Any, Any]
"""A setter, the value so far, the value for dark pages."""


def dark_png(figure: Figure) -> bytes:
    """Return a figure that was drawn before as a PNG in dark colors, of the same size; the figure stays as it is."""
    with darkened(figure):
        return drawing(figure, "png", PNG_DPI, background=BACKGROUND)


@contextmanager
def darkened(figure: Figure) -> Iterator[None]:
    """Give a figure dark colors in the block. It must have been drawn before, as this creates ticks and places axes."""
    changes = list(_changes(figure))
    layout = figure.get_layout_engine()
    try:
        for change, _, dark in changes:
            change(dark)
        if layout is not None:
            figure.set_layout_engine("none")  # the first drawing has placed everything
        yield
    finally:
        for change, light, _ in reversed(changes):
            change(light)
        if layout is not None:
            figure.set_layout_engine(layout)


def dark_color(color: Any, *, line: bool = True) -> tuple[float, float, float, float]:
    """Return a color for a dark page, RGBA: inverted gray tones; lighter colors for lines and text."""
    from matplotlib.colors import to_rgba

    red, green, blue, alpha = to_rgba(color)
    hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
    if max(red, green, blue) - min(red, green, blue) <= _NEUTRAL:
        level = _LIGHTEST + (_DARKEST - _LIGHTEST) * lightness
        return level, level, level, alpha
    if line:
        red, green, blue = colorsys.hls_to_rgb(hue, 0.4 + 0.6 * lightness, saturation)
    return red, green, blue, alpha


@cache
def _maps() -> dict[str, Colormap]:
    """Return the color map for dark pages by the name of one that is light where nothing is."""
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap

    made = {
        "Blues": [BACKGROUND, "#1d4e79", "#9fd0f5"],
        "RdBu_r": ["#7cc0ff", "#1f6fb0", BACKGROUND, "#b5413c", "#ff9d8c"],
    }
    found = {name: LinearSegmentedColormap.from_list(f"dark {name}", colors) for name, colors in made.items()}
    return {**found, "magma_r": colormaps["magma"], "YlGnBu": colormaps["YlGnBu_r"]}


def _changes(figure: Figure) -> Iterator[_Change]:
    kept: set[Any] = set()
    for axis in figure.findobj(lambda artist: hasattr(artist, "images")):
        images = axis.images  # type: ignore[attr-defined]
        for image in images:
            if (cmap := image.get_cmap()).name in _maps() and image.get_array().ndim == 2:
                yield image.set_cmap, cmap, _maps()[cmap.name]
        if any(image.get_array().ndim == 3 or image.get_cmap().name not in _maps() for image in images):
            on_picture = (*axis.texts, *axis.lines, *axis.patches, *axis.collections)  # type: ignore[attr-defined]
            kept |= {artist for one in on_picture for artist in one.findobj()}
    for artist in figure.findobj():
        if artist not in kept and artist.get_gid() != FIXED:
            yield from _of_artist(artist)


def _of_artist(artist: Any) -> Iterator[_Change]:
    import numpy as np  # slow, and the lists of runs do without it
    from matplotlib.collections import Collection
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.text import Text

    if isinstance(artist, Text):
        yield artist.set_color, artist.get_color(), dark_color(artist.get_color())
        if (box := artist.get_bbox_patch()) is not None:
            yield from _of_artist(box)
    elif isinstance(artist, Line2D):
        for name in ("color", "markerfacecolor", "markeredgecolor"):
            color = getattr(artist, f"get_{name}")()
            if not isinstance(color, str) or color != "none":
                yield getattr(artist, f"set_{name}"), color, dark_color(color)
    elif isinstance(artist, Patch):
        for name, line in (("facecolor", False), ("edgecolor", True)):
            color = getattr(artist, f"get_{name}")()
            yield getattr(artist, f"set_{name}"), color, dark_color(color, line=line)
    elif isinstance(artist, Collection) and artist.get_array() is None:
        for name in ("facecolor", "edgecolor"):
            colors = getattr(artist, f"get_{name}")()
            if len(colors):
                yield getattr(artist, f"set_{name}"), colors, np.array([dark_color(color) for color in colors])
