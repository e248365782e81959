"""Hold the predictions of a model for images: they list, draw, display and save themselves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from PIL import Image

from widefield import _checks, bench, report
from widefield._files import write_whole
from widefield.data.decoding import read
from widefield.data.listing import counted
from widefield.drawing.kinds import DRAWINGS
from widefield.drawing.parts import MIN_SCORE, Drawing, encoded, preview
from widefield.predictions.tables import csv_text, lines_text
from widefield.tasks import Prediction

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ON_A_PAGE = 60
"""Largest number of images on a page and in a notebook."""
IN_A_FIGURE = 12
_PICTURES = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg"}


@dataclass(frozen=True)
class Predicted:
    """An image and what a model predicts for it; it displays itself in notebooks.

    Attributes:
        path: the file; of an image in memory its name.
        name: its path in the folder that was given, or its name; different for every image.
        prediction: what the model predicts.
        drawing: how it is drawn and listed.
        decoding: how the file was decoded: arguments of `widefield.data.decoding.read`.
        pixels: the image itself, if it came from memory.
    """

    path: Path
    name: str
    prediction: Prediction
    drawing: Drawing = field(repr=False)
    decoding: Mapping[str, Any] = field(default_factory=dict, repr=False)
    pixels: Image.Image | None = field(default=None, repr=False, compare=False)

    def image(self) -> Image.Image:
        """Return the image as the model got it, before resizing; raises as `widefield.data.decoding.read` does."""
        return read(self.path, **self.decoding) if self.pixels is None else self.pixels

    def picture(self) -> Image.Image:
        """Return the image with what is predicted: classes under it, colors of pixels, boxes and masks, or skeletons.

        It has the size of the image; small ones are enlarged by a whole factor. Of masked images: all views.
        """
        return self.drawing.picture(self.image(), self.prediction)

    def row(self) -> dict[str, str]:
        """Return the image's row of a table, as text."""
        return {"image": self.name, **self.drawing.row(self.prediction)}

    def to_dict(self) -> dict[str, Any]:
        """Return the prediction in JSON types, without masks; of a detector the objects of all scores."""
        return {"path": str(self.path), "name": self.name, **self.drawing.data(self.prediction)}

    def save(self, path: str | Path) -> Path:
        """Write the annotated picture (.png, .jpg) or the prediction (.json), and return the path.

        Raises ValueError for another ending, OSError if the file cannot be written.
        """
        path = Path(path)
        _checks.choice("the suffix of path", path.suffix, (*_PICTURES, ".json"))
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            write_whole(path, document(self.to_dict()))
        else:
            write_whole(path, encoded(self.picture().convert("RGB"), _PICTURES[path.suffix]))
        return path

    def write_files(self, folder: Path) -> list[Path]:
        """Write the files of the image below a folder, and return their paths; raises OSError."""
        written = []
        for kind, content in self.drawing.files(self.image(), self.prediction).items():
            target = (folder / kind / self.name).with_suffix(".png")
            target.parent.mkdir(parents=True, exist_ok=True)
            write_whole(target, content)
            written.append(target)
        return written

    def card(self) -> report.Card:
        """Return the image and its prediction as a card of a page."""
        return self.drawing.card(self.name, self.image(), self.prediction)

    def __str__(self) -> str:
        return ", ".join(f"{key}: {value}" for key, value in self.row().items())

    def _repr_html_(self) -> str:
        """Return the card, which Jupyter displays."""
        return report.styled(report.Cards([self.card()], wide=self.drawing.wide))

    def _repr_png_(self) -> bytes:
        """Return the annotated picture, for front ends without HTML."""
        return encoded(preview(self.picture().convert("RGB")), "png")


@dataclass(frozen=True)
class Unreadable:
    """An image that could not be read, or that has a box outside of it, and why."""

    path: Path
    reason: str

    def to_dict(self) -> dict[str, str]:
        """Return path and error."""
        return {"path": str(self.path), "error": self.reason}


@dataclass(frozen=True)
class Predictions(report.Report):
    """The predictions of a model for some images, a sequence; it displays itself in notebooks, and saves itself.

    Attributes:
        name: the model's name.
        weights: where the model's weights come from.
        about: facts about how the images were prepared.
        classes: names of the classes; empty if they are unknown.
        palette: color of each class, (red, green, blue).
        top: number of classes that are listed for an image.
        images: the images that could be read, in order.
        unreadable: the others.
        min_score: least score of the objects that are drawn and listed.
    """

    name: str
    weights: str
    about: Mapping[str, Any]
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    top: int
    images: tuple[Predicted, ...]
    unreadable: tuple[Unreadable, ...] = ()
    min_score: float = MIN_SCORE

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Predicted]:
        return iter(self.images)

    @overload
    def __getitem__(self, index: int) -> Predicted: ...

    @overload
    def __getitem__(self, index: slice) -> Predictions: ...

    def __getitem__(self, index: int | slice) -> Predicted | Predictions:
        """Return an image; of a slice the predictions for these images, which display themselves, too."""
        return replace(self, images=self.images[index]) if isinstance(index, slice) else self.images[index]

    def summary(self) -> str:
        """Return the model, the number of images, and the ones that could not be read."""
        lines = [f"{self.name} ({self.weights}): {counted(len(self.images), 'image')}"]
        if self.unreadable:
            lines.append(f"{counted(len(self.unreadable), 'image')} could not be read:")
            lines += [f"{entry.path}: {entry.reason}" for entry in self.unreadable]
        return "\n".join(lines)

    def rows(self) -> list[dict[str, str]]:
        """Return one row per image: its largest classes."""
        return [found.row() for found in self.images]

    def to_dict(self) -> dict[str, Any]:
        """Return everything in JSON types, except the masks; of a detector the objects of all scores."""
        return {
            "model": self.name,
            "weights": self.weights,
            "about": dict(self.about),
            "classes": list(self.classes),
            "palette": [list(color) for color in self.palette],
            "images": [found.to_dict() for found in self.images],
            "unreadable": [{"path": str(entry.path), "reason": entry.reason} for entry in self.unreadable],
        }

    def plot(self, count: int = IN_A_FIGURE) -> Figure:
        """Return a figure of the first ``count`` images with their predictions."""
        with report.paper():
            shown = self.images[: _checks.integer("count", count)]
            columns = min(4, max(1, len(shown)))
            rows = max(1, -(-len(shown) // columns))
            images = [preview(found.image(), 480) for found in shown]
            heights = [x.height / x.width / one.drawing.beside for x, one in zip(images, shown, strict=True)]
            side = report.PAGE / 4
            figure = report.blank(side * columns + 0.2, (side * min(max(heights, default=1.0), 2.0) + 0.65) * rows)
            axes = figure.subplots(rows, columns, squeeze=False)
            for axis in axes.flat:
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
            for axis, image, found in zip(axes.flat, images, shown, strict=False):
                found.drawing.panel(axis, image, found.prediction)
                axis.set_title(_short(found.name, 26), fontsize=7)
        return figure

    def save(self, path: str | Path) -> Path:
        """Write a figure, the numbers, a page, or the images' files, by the ending of a path; return the path.

        - ``.png``, ``.pdf``, ``.svg``: a figure of the first images.
        - ``.json``: :meth:`to_dict`. ``.jsonl``: one line of JSON per image.
        - ``.csv``: a line for each listed class, object or key point; see `widefield.predictions.tables`.
        - ``.html``: a page.
        - none: a folder, which gets the annotated picture of each image as ``overlays/NAME.png``, and of a
          segmentation model the mask as ``labels/NAME.png``.

        Raises ValueError for another ending, OSError if a file cannot be written.
        """
        path = Path(path)
        if not path.suffix:
            for found in self.images:
                found.write_files(path)
            return path
        content: dict[str, Callable[[], bytes]] = {
            **{f".{kind}": lambda: report.drawing(self.plot(), path.suffix[1:]) for kind in ("png", "pdf", "svg")},
            ".json": lambda: document(self.to_dict()),
            ".jsonl": lambda: lines_text([*self.images, *self.unreadable]).encode(),
            ".csv": lambda: csv_text([*self.images, *self.unreadable]).encode(),
            ".html": lambda: page_of(self, self._cards()).encode(),
        }
        _checks.choice("the suffix of path", path.suffix, tuple(content))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content[path.suffix]())
        return path

    def _repr_html_(self) -> str:
        """Return the images as cards, which Jupyter displays."""
        return report.styled(*self.summary().splitlines(), grid_of(self._cards(), self.images))

    def _cards(self) -> list[report.Card]:
        return [found.card() for found in self.images[:ON_A_PAGE]]


def grid_of(cards: Sequence[report.Card], images: Sequence[Predicted]) -> report.Cards:
    """Return the cards of images as they fit a page."""
    return report.Cards(cards, wide=bool(images) and DRAWINGS[type(images[0].prediction)].wide)


def page_of(predictions: Predictions, cards: Sequence[report.Card], images: int | None = None) -> str:
    """Return a self-contained page with these cards; ``images`` is the number of images, if it is not of the cards."""
    total = len(predictions.images) if images is None else images
    lead = f"{counted(total, 'image')}, predicted by {predictions.name}. Weights: {predictions.weights}."
    if len(cards) < total:
        lead += f" The page shows the first {len(cards)}."
    sections = []
    if cards:
        explained = DRAWINGS[type(predictions.images[0].prediction)].explained
        sections = [report.Section("Predictions", [explained, grid_of(cards, predictions.images)])]
    if predictions.unreadable:
        rows = [{"file": str(entry.path), "problem": entry.reason} for entry in predictions.unreadable]
        sections.append(report.Section("Could not be read", [report.Table(rows)]))
    return report.page(f"Predictions of {predictions.name}", lead, sections, bench.environment())


def document(content: Mapping[str, Any]) -> bytes:
    """Return a JSON file with the environment."""
    whole = {"environment": bench.environment(), **content}
    return (json.dumps(whole, indent=1, allow_nan=False, ensure_ascii=False, default=str) + "\n").encode()


def _short(name: str, letters: int) -> str:
    return name if len(name) <= letters else f"…{name[1 - letters :]}"
