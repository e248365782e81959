"""Figures in dark colors: what changes, what stays, and that the figure itself is as before."""

import io

import numpy as np
from matplotlib.colors import to_rgba
from PIL import Image

from widefield import report
from widefield.report._dark import BACKGROUND, dark_color, dark_png, darkened


def brightness(file):
    return np.asarray(Image.open(io.BytesIO(file)).convert("L"), dtype=float).mean()


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


def test_a_figure_is_dark_of_the_same_size_and_unchanged_afterwards():
    figure = report.curves({"a": ([1, 2], [3, 4]), "b": ([1, 2], [4, 3])}, "x", "y")
    axis = figure.axes[0]
    axis.fill_between([1, 2], [3, 3], [4, 4], alpha=0.2)
    axis.errorbar([1, 2], [3, 4], [0.1, 0.1])
    axis.annotate("a", (1, 3), bbox={"facecolor": "white", "edgecolor": "none"})
    light = report.png(figure)
    dark = dark_png(figure)
    assert brightness(light) > 200
    assert brightness(dark) < 60
    assert Image.open(io.BytesIO(light)).size == Image.open(io.BytesIO(dark)).size
    assert report.png(figure) == light


def test_photographs_and_what_lies_on_them_stay():
    figure = report.blank(2, 2)
    axis = figure.subplots()
    axis.imshow(np.full((4, 4, 3), 0.8))
    on_picture, title = axis.text(1, 1, "label", color="black"), axis.set_title("title", color="black")
    (line,) = axis.plot([0, 1], [0, 1], color="white")
    report.png(figure)
    with darkened(figure):
        assert on_picture.get_color() == "black"
        assert line.get_color() == "white"
        assert title.get_color()[0] > 0.8


def test_light_color_maps_are_replaced_with_their_numbers():
    figure = report.blank(2, 2)
    axis = figure.subplots()
    shown = axis.imshow(np.eye(2), cmap="Blues")
    low, kept = axis.text(0, 1, "0", color="k"), axis.text(0, 0, "x", color="k", gid=report.FIXED)
    report.png(figure)
    with darkened(figure):
        assert sum(shown.cmap(0.0)[:3]) < 0.5
        assert low.get_color()[0] > 0.8
        assert kept.get_color() == "k"
    assert shown.cmap.name == "Blues"


def test_grounds_of_pages_and_figures_are_one_color():
    assert f"--paper: {BACKGROUND}" in report.page("t", "", [], {})
