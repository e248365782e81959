"""Draw a finished figure once, as SVG for pages in light and in dark colors.

Colors that differ are variables of the style sheet. An image whose color map differs is stored once, as gray levels,
which a filter turns into either map.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from widefield.report._dark import RGBA, colored, dark_color, dark_maps, has_dark_map
from widefield.report._drawing import PNG_DPI, SCALE

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

FONT = "'DejaVu Sans', Verdana, sans-serif"
"""Verdana has about the widths of the letters that matplotlib has measured."""
_LEVELS = 33
"""Colors of a map between which a filter interpolates."""
_SMOOTH = 64
"""Images with more pixels along a side are smoothed when a page scales them; of smaller ones the pixels are seen."""
_PHOTO = 0.5
"""A photograph is stored as JPEG if that takes at most this share of the bytes."""
_QUALITY = 92
_MARGIN = 0.1
"""Inches around a figure, as matplotlib's ``bbox_inches="tight"`` has them."""
_FIRST = 0x01FE00
"""First of the colors that stand for variables while a figure is drawn."""


def svg(figure: Figure, text: str) -> str:
    """Return a figure as an ``<svg>`` element in the colors of its page; the figure stays as it is.

    Args:
        figure: as matplotlib has it.
        text: what it shows, for those who cannot see it; plain text.
    """
    palette = _Palette()
    with ExitStack() as stack:
        box = stack.enter_context(_placed(figure))
        maps, drawn = stack.enter_context(_gray_maps(figure))
        stack.enter_context(_recolored(figure, palette, drawn))
        stack.enter_context(_unsampled(figure))
        written = _written(figure)
    return _finished(written, box, text, palette, maps)


class _Palette:
    """The pairs of colors of a figure, and a color that stands for each while it is drawn."""

    def __init__(self) -> None:
        self.pairs: dict[tuple[str, str], str] = {}

    def stand_in(self, light: Any, dark: Any) -> RGBA:
        """Return the color that stands for a pair, with the alpha of the light one."""
        from matplotlib.colors import to_hex, to_rgba

        pair = to_hex(light), to_hex(dark)
        if pair[0] == pair[1]:
            return to_rgba(light)
        word = self.pairs.setdefault(pair, f"#{_FIRST + len(self.pairs):06x}")
        return to_rgba(word, to_rgba(light)[3])

    def variables(self, drawn: str, scope: str) -> tuple[str, str]:
        """Return a drawing with variables for the colors that stand for them, and the style that defines these."""
        variables = {word: f"var(--{number})" for number, word in enumerate(self.pairs.values())}
        light = ";".join(f"--{number}:{plain}" for number, (plain, _) in enumerate(self.pairs))
        dark = ";".join(f"--{number}:{inverse}" for number, (_, inverse) in enumerate(self.pairs))

        def filled(tag: str) -> str:
            return re.sub("#01[0-9a-f]{4}", lambda word: variables.get(word[0], word[0]), tag)

        return _in_tags(filled, drawn), _in_both(scope, light, dark) if light else ""


@contextmanager
def _placed(figure: Figure) -> Iterator[Any]:
    """Place everything once, which takes longer than to draw it; yield the box of what there is, in inches."""
    layout = figure.get_layout_engine()
    if layout is not None:
        layout.execute(figure)
        figure.set_layout_engine("none")
    try:
        yield figure.get_tightbbox().padded(_MARGIN)  # creates the ticks, too
    finally:
        if layout is not None:
            figure.set_layout_engine(layout)


def _written(figure: Figure) -> str:
    """Return what matplotlib writes; unlike ``savefig`` it draws once, as everything has its place."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    canvas_of: Any = FigureCanvasSVG
    canvas, dpi, visible = figure.canvas, figure.dpi, figure.patch.get_visible()
    figure.patch.set_visible(False)
    figure.dpi = PNG_DPI  # of pixels in the file
    try:
        with matplotlib.rc_context(
            {"svg.fonttype": "none", "svg.hashsalt": "widefield", "image.composite_image": False}
        ):
            canvas_of(figure).print_svg(buffer, metadata={"Date": None})
    finally:
        figure.dpi = dpi
        figure.patch.set_visible(visible)
        figure.set_canvas(canvas)
    return buffer.getvalue()


@contextmanager
def _recolored(figure: Figure, palette: _Palette, skipped: set[Any]) -> Iterator[None]:
    """Give a figure the colors that stand for pairs of colors."""
    import numpy as np
    from matplotlib.colors import to_rgba

    def stands(color: Any, line: bool) -> Any:
        if isinstance(color, np.ndarray) and color.ndim == 2:
            return np.array([stands(one, line) for one in color])
        light = to_rgba(color)
        return palette.stand_in(light, dark_color(light, line=line)) if light[3] else light

    found = list(colored(figure, skipped))
    try:
        for one in found:
            one.change(stands(one.light, one.line))
        yield
    finally:
        for one in reversed(found):
            one.change(one.light)


@contextmanager
def _gray_maps(figure: Figure) -> Iterator[tuple[dict[str, Colormap], set[Any]]]:
    """Draw images whose color map differs on dark pages, and their color bars, in gray with the map's name as id.

    Yields the maps by name, and the artists that need no other colors.
    """
    maps: dict[str, Colormap] = {}
    drawn: set[Any] = set()
    axes: list[Any] = figure.axes
    bars = {axis._colorbar.mappable: axis._colorbar for axis in axes if hasattr(axis, "_colorbar")}
    with ExitStack() as undo:
        for image in [image for axis in axes for image in axis.images if has_dark_map(image)]:
            cmap, gid = image.get_cmap(), image.get_gid()
            maps[cmap.name] = cmap
            name = f"map-{cmap.name}"
            if image in bars:  # which are made anew with each map, and would lose labels that were set
                bars[image].formatter = bars[image].long_axis.get_major_formatter()
            undo.callback(image.set, cmap=cmap, gid=gid)
            image.set(cmap="gray", gid=name)
            drawn.add(image)
            if image in bars:
                drawn.update(bars[image]._extend_patches)
                undo.callback(_shades(bars[image], name).remove)
        yield maps, drawn


def _shades(bar: Any, name: str) -> Any:
    """Replace the many cells of a color bar by an image, and return it."""
    from matplotlib.image import BboxImage

    shades = BboxImage(bar.ax.bbox, cmap="gray", origin="lower", interpolation="nearest", gid=name)
    steps = range(256)
    shades.set_data([[step] for step in steps] if bar.orientation == "vertical" else [list(steps)])
    shades.set_zorder(bar.solids.get_zorder())
    bar.solids.set_visible(False)
    bar.ax.add_artist(shades)
    for patch in bar._extend_patches:
        patch.set_gid(name)
    return shades


@contextmanager
def _unsampled(figure: Figure) -> Iterator[None]:
    """Store images that are shown larger than they are with their own pixels."""
    changed = []
    axes: list[Any] = figure.axes
    for image in [image for axis in axes for image in axis.images]:
        extent = image.get_window_extent()
        shown = (extent.height * PNG_DPI / figure.dpi, extent.width * PNG_DPI / figure.dpi)
        if all(own <= size for own, size in zip(image.get_array().shape, shown, strict=False)):
            changed.append((image, image.get_interpolation()))
            image.set_interpolation("none")
    try:
        yield
    finally:
        for image, before in changed:
            image.set_interpolation(before)


def _in_both(scope: str, light: str, dark: str) -> str:
    return f"{scope}{{{light}}}@media (prefers-color-scheme:dark){{{scope}{{{dark}}}}}"


def _finished(written: str, box: Any, text: str, palette: _Palette, maps: dict[str, Colormap]) -> str:
    """Return matplotlib's file as a part of a page: smaller, with variables and filters, and names of its own."""
    whole, drawn = _contents(written)
    left, top, wide, high = 72 * box.x0, whole - 72 * box.y1, 72 * box.width, 72 * box.height
    drawn = _in_tags(_smaller, drawn)
    name = f"f{hashlib.sha256(f'{drawn}{palette.pairs}'.encode()).hexdigest()[:8]}"
    drawn = _own_names(drawn, name)
    drawn, style = palette.variables(drawn, f".{name}")
    style = f".{name}{{--font:{FONT};stroke-linejoin:round;stroke-linecap:butt}}{style}"
    filters = ""
    for number, (key, light) in enumerate(maps.items()):
        first, second = (f"{name}-{kind}{number}" for kind in "ld")
        style += _in_both(f".{name} .map-{key}", f"filter:url(#{first})", f"filter:url(#{second})")
        filters += _filter(first, light) + _filter(second, dark_maps()[key])
    width, height = (round(side / 72 * PNG_DPI * SCALE) for side in (wide, high))
    return (
        f'<svg class="{name}" viewBox="{left:.2f} {top:.2f} {wide:.2f} {high:.2f}" width="{width}" height="{height}" '
        f'role="img" aria-label="{html.escape(text)}"><style>{style}</style>{filters}{drawn}</svg>'
    )


def _in_tags(change: Callable[[str], str], drawn: str) -> str:
    """Change the tags of a drawing, and no text that a reader sees."""
    return re.sub(r"<[^>]*>", lambda tag: change(tag[0]), drawn)


def _smaller(tag: str) -> str:
    """Return a tag with a smaller picture, fewer digits and short fonts; what has the name of a map gets its class."""
    tag = _IMAGE.sub(_image, tag).replace("xlink:", "")
    tag = re.sub(r'(?<= [dxy]=)"[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), tag)
    tag = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", tag)
    return re.sub(r' id="(map-[^"]*)"', r' class="\1"', tag)


_IMAGE = re.compile(r'<image [^>]*?href="data:image/png;base64,\s*([^"]*)"[^>]*>')


def _contents(written: str) -> tuple[float, str]:
    """Return the height of matplotlib's file in points and what it draws, without what a page needs not."""
    start = written.index("<svg ")
    head, _, rest = written[start:].partition(">")
    height = float(re.findall(r'viewBox="0 0 \S+ (\S+)"', head)[0])
    rest = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style .*?</style>", "", rest, flags=re.DOTALL)
    return height, re.sub(r"\s*\n\s*(?=[<\"/])|(?<=>)\s*\n\s*", "", rest).removesuffix("</svg>")


def _own_names(drawn: str, name: str) -> str:
    """Return a drawing with names that no other figure of a page has, and without those that nothing refers to."""
    tags = "".join(re.findall(r"<[^>]*>", drawn))
    used = set(re.findall(r'(?:url\(|href=")#([^)"]*)', tags))

    def renamed(tag: str) -> str:
        tag = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", tag)
        return re.sub(r'(url\(|href=")#', rf"\1#{name}-", tag)

    return _in_tags(renamed, drawn)


def _image(found: re.Match[str]) -> str:
    """Return an ``<image>`` with a smaller file of the same picture."""
    from PIL import Image

    picture: Image.Image = Image.open(io.BytesIO(base64.b64decode(found[1])))
    smooth = max(picture.size) > _SMOOTH
    if picture.mode == "RGBA" and picture.getchannel("A").getextrema() == (255, 255):
        picture = picture.convert("RGB")
    if picture.mode == "RGB" and _is_gray(picture):
        picture = picture.getchannel(0)
    file, kind = _encoded(picture, "png", optimize=True), "png"
    if smooth and picture.mode in ("RGB", "L") and "map-" not in found[0]:
        photo = _encoded(picture, "jpeg", quality=_QUALITY)
        if len(photo) <= _PHOTO * len(file):
            file, kind = photo, "jpeg"
    text = found[0].replace(found[1], base64.b64encode(file).decode()).replace("image/png", f"image/{kind}")
    return re.sub(r' style="image-rendering[^"]*"', "", text) if smooth else text


def _is_gray(picture: Any) -> bool:
    red, *others = picture.split()
    return all(other.tobytes() == red.tobytes() for other in others)


def _encoded(picture: Any, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _filter(name: str, cmap: Colormap) -> str:
    """Return the filter that turns gray levels into the colors of a map."""
    colors = [cmap(level / (_LEVELS - 1)) for level in range(_LEVELS)]
    tables = (
        f'<feFunc{letter} type="table" tableValues="{" ".join(f"{color[k]:.3g}" for color in colors)}"/>'
        for k, letter in enumerate("RGB")
    )
    return (
        f'<filter id="{name}" color-interpolation-filters="sRGB"><feComponentTransfer>{"".join(tables)}'
        "</feComponentTransfer></filter>"
    )
