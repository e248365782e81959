"""Decide which colors a figure has on dark pages.

Gray tones change from light to dark and from dark to light, and dark lines become lighter. What lies on a picture, such
as a box or a label, keeps its colors, and so do pictures. Color maps that are light where nothing is are replaced by
maps that are dark there.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from widefield.report._figures import FIXED

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

BACKGROUND = "#16181b"
"""Of dark pages; ``page.css`` has it, too."""
_NEUTRAL = 0.08
"""Largest difference between the channels of a gray."""
_LIGHTEST = 0.9
"""What black becomes, from 0 to 1; white becomes the background."""

RGBA = tuple[float, float, float, float]


class Colored(NamedTuple):
    """One color of an artist, or several of a collection, which differ on dark pages."""

    change: Callable[[Any], Any]
    """Sets the color."""
    light: Any
    """The color so far."""
    line: bool
    """Whether it is that of a line or a text."""


def dark_color(color: Any, *, line: bool = True) -> RGBA:
    """Return a color for a dark page, RGBA: inverted gray tones; lighter colors for lines and text."""
    from matplotlib.colors import to_rgba

    red, green, blue, alpha = to_rgba(color)
    hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
    if max(red, green, blue) - min(red, green, blue) <= _NEUTRAL:
        ground = to_rgba(BACKGROUND)
        red, green, blue = (_LIGHTEST + (ground[k] - _LIGHTEST) * lightness for k in range(3))
        return red, green, blue, alpha
    if line:
        red, green, blue = colorsys.hls_to_rgb(hue, 0.4 + 0.6 * lightness, saturation)
    return red, green, blue, alpha


@cache
def dark_maps() -> dict[str, Colormap]:
    """Return the color map for dark pages by the name of one that is light where nothing is."""
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap

    made = {
        "Blues": [BACKGROUND, "#1d4e79", "#9fd0f5"],
        "RdBu_r": ["#7cc0ff", "#1f6fb0", BACKGROUND, "#b5413c", "#ff9d8c"],
    }
    found = {name: LinearSegmentedColormap.from_list(f"dark {name}", colors) for name, colors in made.items()}
    return {**found, "magma_r": colormaps["magma"], "YlGnBu": colormaps["YlGnBu_r"]}


def has_dark_map(image: Any) -> bool:
    """Return whether an image of an axes gets another color map on dark pages: one of these maps, unchanged."""
    from matplotlib import colormaps

    cmap = image.get_cmap()
    return image.get_array().ndim == 2 and cmap.name in dark_maps() and cmap == colormaps[cmap.name]


def colored(figure: Figure, skipped: set[Any]) -> Iterator[Colored]:
    """Yield the colors of a figure that depend on the page, except those of images and of ``skipped`` artists.

    These include images with a dark map. The figure must have been laid out before, which creates ticks.
    """
    kept = set(skipped)
    for axis in figure.findobj(lambda artist: hasattr(artist, "images")):
        if not all(image in skipped for image in axis.images):  # type: ignore[attr-defined]
            on_picture = (*axis.texts, *axis.lines, *axis.patches, *axis.collections)  # type: ignore[attr-defined]
            kept |= {artist for one in on_picture for artist in one.findobj()}
    for artist in figure.findobj():
        if artist not in kept and artist.get_gid() != FIXED:
            yield from _of_artist(artist)


def _of_artist(artist: Any) -> Iterator[Colored]:
    from matplotlib.collections import Collection
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.text import Text

    if isinstance(artist, Text):
        yield Colored(artist.set_color, artist.get_color(), line=True)
        if (box := artist.get_bbox_patch()) is not None:
            yield from _of_artist(box)
    elif isinstance(artist, Line2D):
        for name in ("color", "markerfacecolor", "markeredgecolor"):
            color = getattr(artist, f"get_{name}")()
            follows = getattr(artist, f"_{name}", None) == "auto"  # the line's color, as it will be
            if not follows and not (isinstance(color, str) and color == "none"):
                yield Colored(getattr(artist, f"set_{name}"), color, line=True)
    elif isinstance(artist, Patch):
        for name, line in (("facecolor", False), ("edgecolor", True)):
            yield Colored(getattr(artist, f"set_{name}"), getattr(artist, f"get_{name}")(), line)
    elif isinstance(artist, Collection) and artist.get_array() is None:
        for name in ("facecolor", "edgecolor"):
            colors = getattr(artist, f"get_{name}")()
            if len(colors):
                yield Colored(getattr(artist, f"set_{name}"), colors, line=True)
