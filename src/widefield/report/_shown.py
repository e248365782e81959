"""Figures that notebooks display."""

from __future__ import annotations

from matplotlib.figure import Figure

from widefield.report._drawing import png, width_of


class ShownFigure(Figure):
    """A figure that Jupyter displays, also without pyplot's inline backend."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        """Return the figure as a PNG, and its width on the page in CSS pixels."""
        file = png(self)
        return file, {"width": width_of(file)}
