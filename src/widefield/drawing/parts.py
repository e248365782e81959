"""Share what drawings of all kinds of predictions need: their interface, image files, captions."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from PIL import Image

from widefield import report
from widefield.drawing.annotating import Color

PREVIEW = 640
"""Longest side of the images on a page, in pixels."""
LISTED = 10
"""Largest number of classes in a legend."""
GRAY: Color = (128, 128, 128)
"""Color of pixels without a class, and of crowds of objects."""
MIN_SCORE = 0.3
"""Least score of the objects that are drawn and listed, if none is asked for."""
SIDES_OF_BOXES = ("left", "top", "right", "bottom")
"""Columns of the edges of a box."""
SMALL = 320
"""Images of fewer pixels a side are enlarged for their files with labels, or none would fit."""


def preview(image: Image.Image, side: int = PREVIEW) -> Image.Image:
    """Return an image of at most ``side`` pixels a side.

    Images of less than half of that are enlarged by a whole factor, so that lines between their classes are thin.
    """
    factor = side // max(image.size)
    if factor > 1:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    found = image.copy()
    found.thumbnail((side, side), Image.Resampling.LANCZOS)
    return found


def encoded(image: Image.Image, kind: str) -> bytes:
    """Return an image as a file, "png" or "jpeg"."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 88} if kind == "jpeg" else {}))
    return buffer.getvalue()


@dataclass(frozen=True)
class Drawing(ABC):
    """How predictions of one kind are drawn, saved and listed.

    Attributes:
        classes: names of the classes; empty if they are unknown.
        palette: color of each class.
        top: number of classes that are listed for an image.
        min_score: least score of the objects that are drawn and listed.
    """

    classes: tuple[str, ...]
    palette: tuple[Color, ...]
    top: int = 5
    min_score: float = MIN_SCORE
    columns: ClassVar[tuple[str, ...]] = ()
    """Columns of the entries in a CSV file."""
    explained: ClassVar[str]
    """What a card shows, in a sentence or two."""
    wide: ClassVar[bool] = False
    """Whether a card takes the whole width of a page."""
    beside: ClassVar[int] = 1
    """Number of pictures side by side in a panel."""

    def name(self, label: int) -> str:
        """Return the name of a class."""
        return self.classes[label] if self.classes else f"class {label}"

    @abstractmethod
    def row(self, prediction: Any) -> dict[str, str]:
        """Return the columns of a table of images."""

    @abstractmethod
    def data(self, prediction: Any) -> dict[str, Any]:
        """Return the prediction in JSON types, without pixels."""

    @abstractmethod
    def card(self, title: str, image: Image.Image, prediction: Any, truth: Any = None) -> report.Card:
        """Return the prediction on its image, next to the label if it is known, as a card of a page."""

    @abstractmethod
    def panel(self, axis: Any, image: Image.Image, prediction: Any) -> None:
        """Draw the prediction into a matplotlib axis."""

    @abstractmethod
    def entries(self, prediction: Any) -> list[dict[str, Any]]:
        """Return what is listed, each with the values of ``columns``."""

    @abstractmethod
    def picture(self, image: Image.Image, prediction: Any) -> Image.Image:
        """Return the image with the prediction, at the size of the image or enlarged by a whole factor."""

    def files(self, image: Image.Image, prediction: Any) -> dict[str, bytes]:
        """Return the PNG files of a prediction, by the name of their folder."""
        return {"overlays": encoded(self.picture(image, prediction), "png")}


def large_enough(image: Image.Image) -> Image.Image:
    """Return an image on which labels fit: itself, or enlarged by a whole factor."""
    return image if max(image.size) >= SMALL else preview(image)


def view(image: Image.Image, caption: str) -> report.Photo:
    """Return an image with a caption."""
    return report.Photo(encoded(image, "jpeg"), "jpeg", caption)


def patch(color: Color, label: str) -> Any:
    """Return a matplotlib legend's entry."""
    from matplotlib.patches import Patch

    red, green, blue = color
    return Patch(facecolor=(red / 255, green / 255, blue / 255), edgecolor="gray", linewidth=0.4, label=label)


def legend_below(axis: Any, entries: Sequence[tuple[Color, str]]) -> None:
    """List colors and their names under a matplotlib axis, in two columns."""
    handles = [patch(color, label) for color, label in entries]
    axis.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=2, fontsize=5.5,
                handlelength=1, columnspacing=0.8, borderpad=0)  # fmt: skip
