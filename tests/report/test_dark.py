"""Figures for light and for dark pages: what changes, what stays, and that the figure itself is as before."""

import base64
import io
import re

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.colors import to_hex, to_rgba
from PIL import Image

from widefield import report
from widefield.report._dark import BACKGROUND, dark_color, dark_maps


def test_grays_change_sides_and_colors_of_lines_stay_apart():
    assert dark_color("white")[0] < 0.15
    assert dark_color("black")[0] > 0.85
    assert dark_color("0.88")[0] < dark_color("0.5")[0] < dark_color("0.1")[0]
    assert dark_color((0, 0, 0, 0.25))[3] == 0.25
    lines = [dark_color(color) for color in report.COLORS]
    ground = np.array(to_rgba(BACKGROUND)[:3])
    for index, line in enumerate(lines):
        assert np.abs(np.array(line[:3]) - ground).max() > 0.3
        assert all(np.abs(np.array(line) - other).max() > 0.1 for other in np.array(lines[:index]).reshape(-1, 4))
    assert dark_color(report.COLORS[0], line=False) == to_rgba(report.COLORS[0])  # bars keep their color


def colors_of(drawn, dark):
    """Return a drawing with the colors in place of the variables."""
    style = re.search(
        r"@media \(prefers-color-scheme:dark\)\{[^{]*\{(--0[^}]*)\}" if dark else r"\{(--0[^}]*)\}", drawn
    )[1]
    pairs = dict(part.split(":") for part in style.split(";"))
    return re.sub(r"var\((--\d+)\)", lambda found: pairs[found[1]], drawn.partition("</style>")[2])


def texts(drawn):
    """Return the style of each text of a drawing, by what it says."""
    return {said: style for style, said in re.findall(r'<text style="([^"]*)"[^>]*>([^<]*)</text>', drawn)}


def images(drawn):
    """Return the pictures in a drawing, and the class of each."""
    found = re.findall(r'<image [^>]*?href="data:image/(\w+);base64,([^"]*)"[^>]*?(?: class="([^"]*)")?[^>]*?/>', drawn)
    return [(Image.open(io.BytesIO(base64.b64decode(file))), kind, name) for kind, file, name in found]


def test_a_drawing_has_both_colors_of_everything_and_the_figure_stays():
    figure = report.curves({"a": ([1, 2], [3, 4]), "b": ([1, 2], [4, 3])}, "x", "y")
    axis = figure.axes[0]
    axis.fill_between([1, 2], [3, 3], [4, 4], color="red", alpha=0.2)
    axis.errorbar([1, 2], [3, 4], [0.1, 0.1])
    axis.annotate("here", (1, 3), bbox={"facecolor": "white", "edgecolor": "none"})
    before = report.png(figure)
    drawn = report.svg(figure, 'a "quoted" <name>')
    assert report.png(figure) == before
    assert 'aria-label="a &quot;quoted&quot; &lt;name&gt;"' in drawn
    light, dark = (colors_of(drawn, dark) for dark in (False, True))
    assert "#01fe" not in light + dark  # what stands for colors while the figure is drawn
    assert to_hex(dark_color("black")) in texts(dark)["here"]
    assert "#000000" in texts(light)["here"]
    for color in report.COLORS[:2]:
        assert color.lower() not in dark
    assert to_hex(dark_color("red")) in dark
    assert BACKGROUND in dark
    assert BACKGROUND not in light
    width, height = map(int, re.search(r'width="(\d+)" height="(\d+)"', drawn).groups())
    assert (width, height) == pytest.approx([round(0.75 * side) for side in Image.open(io.BytesIO(before)).size], abs=2)


def test_names_in_drawings_do_not_meet():
    figures = [report.curves({"a": ([1, 2], [3, last])}, "x", "y") for last in (4, 5, 4)]
    figures[2].axes[0].lines[0].set_color("red")  # as the first one in all but a color
    drawings = [report.svg(figure, "") for figure in figures]
    names = [set(re.findall(r' (?:id|class)="([^"]*)"', drawn)) for drawn in drawings]
    assert all(names)
    assert not names[0] & names[1] | names[0] & names[2] | names[1] & names[2]


def test_texts_and_fonts():
    figure = report.curves({"a": ([1, 2], [3, 4])}, "x", "y")
    said = "#01fe00 xlink:href url(#a) id='b' x='0.1234' 'DejaVu Sans'"
    figure.axes[0].set_title(said)
    figure.axes[0].set_xlabel("$x^2$")
    drawn = report.svg(figure, "")
    assert said in drawn
    styles = re.findall(r"font(?:-family)?: ?([^;\"]*)", drawn.partition("</style>")[2])
    assert styles
    assert all(style.endswith("var(--font)") for style in styles)


def test_a_figure_is_as_it_was():
    figure = report.blank(3, 2)
    axis = figure.subplots()
    (line,) = axis.plot([0, 1], [0, 1], "o-", color="black")
    shown = axis.imshow(np.array([[0.0, 1.0], [np.nan, 0.0]]), cmap="Blues")
    bar = figure.colorbar(shown, ax=axis)
    bar.set_ticks([0, 1], labels=["low", "high"])
    drawn = report.svg(figure, "")
    assert {"low", "high"} <= set(texts(drawn))
    assert [text.get_text() for text in bar.ax.get_yticklabels()] == ["low", "high"]
    line.set_color("red")  # the markers follow
    assert to_rgba(line.get_markerfacecolor()) == to_rgba(line.get_markeredgecolor()) == to_rgba("red")


@pytest.mark.parametrize("cmap", [colormaps["Blues"].with_extremes(bad="red"), colormaps["Blues"].resampled(4)])
def test_color_maps_of_others_are_kept(cmap):
    figure = report.blank(2, 2)
    figure.subplots().imshow(np.array([[0.0, 0.9], [np.nan, 0.4]]), cmap=cmap)
    drawn = report.svg(figure, "")
    ((image, _, name),) = images(drawn)
    assert name == ""
    assert "<filter" not in drawn
    pixels = np.asarray(image.convert("RGBA")).reshape(-1, 4) / 255
    for pixel, value in zip(pixels, (0.0, 1.0, np.nan, 0.4 / 0.9), strict=True):
        assert pixel[3] == pytest.approx(cmap(value)[3])
        if pixel[3]:
            assert pixel == pytest.approx(cmap(value), abs=2 / 255)


def test_photographs_are_stored_once_and_what_lies_on_them_stays():
    figure = report.blank(2, 2)
    axis = figure.subplots()
    picture = np.full((4, 4, 3), 0.8)
    picture[0, 0] = (1, 0, 0)
    axis.imshow(picture)
    axis.text(1, 1, "label", color="green")
    axis.set_title("title", color="black")
    axis.plot([0, 1], [0, 1], color="white")
    drawn = report.svg(figure, "")
    dark = texts(colors_of(drawn, True))
    assert to_hex("green") in dark["label"]
    assert to_hex(dark_color("black")) in dark["title"]
    assert "#ffffff" in colors_of(drawn, True)  # the line on it
    ((image, kind, name),) = images(drawn)
    assert (image.size, kind, name) == ((4, 4), "png", "")  # with its own pixels, which a page enlarges
    assert "pixelated" in drawn
    assert np.asarray(image.convert("RGB"))[0].tolist() == [[255, 0, 0], *[[204, 204, 204]] * 3]


def test_large_photographs_are_smoothed_and_compressed():
    figure = report.blank(3, 3)
    rows, columns = np.mgrid[:200, :200]
    noise = np.random.default_rng(0).normal(0, 0.01, (200, 200, 3))
    figure.subplots().imshow((np.stack([rows, columns, rows + columns], -1) / 400 + noise).clip(0, 1))
    ((image, kind, _),) = images(report.svg(figure, ""))
    assert (image.size, kind) == ((200, 200), "jpeg")
    assert "pixelated" not in report.svg(figure, "")


def test_light_color_maps_are_gray_levels_with_two_filters():
    figure = report.blank(3, 2)
    axis = figure.subplots()
    shown = axis.imshow(np.array([[0.0, 1.0], [0.5, 0.0]]), cmap="Blues")
    bar = figure.colorbar(shown, ax=axis, extend="min")
    axis.text(0, 1, "0", color="k")
    axis.text(0, 0, "x", color="k", gid=report.FIXED)
    drawn = report.svg(figure, "")
    assert shown.get_cmap().name == bar.cmap.name == "Blues"
    assert bar.solids.get_visible()
    found = images(drawn)
    assert [name for _, _, name in found] == ["map-Blues"] * 2  # the picture, and the shades of the color bar
    assert np.asarray(found[0][0]).tolist() == [[0, 255], [128, 0]]
    tables = re.findall(r'<feFuncR type="table" tableValues="([^"]*)"', drawn)
    for table, cmap in zip(tables, (colormaps["Blues"], dark_maps()["Blues"]), strict=True):
        red = [float(value) for value in table.split()]
        assert (red[0], red[16], red[-1]) == pytest.approx([cmap(level)[0] for level in (0.0, 0.5, 1.0)], abs=1e-3)
    dark = texts(colors_of(drawn, True))
    assert to_hex(dark_color("black")) in dark["0"]
    assert "fill" not in dark["x"]  # black, as it was


def test_grounds_of_pages_and_figures_are_one_color():
    assert f"--paper: {BACKGROUND}" in report.page("t", "", [], {})
