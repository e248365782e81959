"""Draw masks in the colors of their classes, on their images and as label files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from widefield import report
from widefield._pixels import IGNORED
from widefield.drawing.annotating import Color
from widefield.drawing.parts import GRAY, LISTED, Drawing, encoded, legend_below, preview, view
from widefield.tasks import MaskPrediction

Mask = NDArray[np.integer[Any]]
"""(H, W): the index of a class, or 255, at each pixel."""

_OPACITY = 0.6


def resized_mask(mask: Mask, size: tuple[int, int]) -> Mask:
    """Return a mask resized to (width, height) by the nearest pixel."""
    kind = mask.astype(np.uint8) if mask.max(initial=0) <= 255 else mask.astype(np.int32)
    return np.asarray(Image.fromarray(kind).resize(size, Image.Resampling.NEAREST))


def colored(mask: Mask, palette: Sequence[Color]) -> NDArray[np.uint8]:
    """Return a mask in the colors of its classes, uint8 (H, W, 3); 255 is gray unless it is a class."""
    return np.array(_filled(palette), dtype=np.uint8)[mask]


def _filled(palette: Sequence[Color]) -> list[Color]:
    """Return a palette with at least 256 colors; gray is added."""
    return [*palette, *[GRAY] * (256 - len(palette))]


def overlay(image: Image.Image, mask: Mask, palette: Sequence[Color], opacity: float = _OPACITY) -> Image.Image:
    """Return an image under the colors of its classes, with lines between regions; pixels without a class stay."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    colors = colored(mask, palette)
    mixed = (1 - opacity) * pixels + opacity * colors
    # Lines as wide as they look good at the size of the whole image.
    lines = _edges(mask, max(1, round(max(mask.shape) / 500)))
    mixed[lines] = 0.25 * mixed[lines] + 0.75 * 255
    ignored = (mask == IGNORED) & (len(palette) <= IGNORED)
    mixed[ignored] = pixels[ignored]
    return Image.fromarray(mixed.round().astype(np.uint8))


def _edges(mask: Mask, width: int) -> NDArray[np.bool_]:
    """Return the pixels that have a pixel of another class up to ``width`` pixels to the right or below."""
    found = np.zeros(mask.shape, dtype=bool)
    for step in range(1, width + 1):
        found[:, :-step] |= mask[:, :-step] != mask[:, step:]
        found[:-step] |= mask[:-step] != mask[step:]
    return found


def label_file(mask: Mask, palette: Sequence[Color]) -> bytes:
    """Return a mask as a PNG whose values are the indices of the classes, with the palette if there are at most 256."""
    if len(palette) > 256:
        return encoded(Image.fromarray(mask.astype(np.uint16)), "png")
    image = Image.fromarray(mask.astype(np.uint8), mode="P")
    # All 256 colors: with fewer, Pillow writes fewer bits per pixel, which 255 does not fit into.
    image.putpalette([channel for color in _filled(palette) for channel in color])
    return encoded(image, "png")


def shares(mask: Mask, count: int) -> dict[int, float]:
    """Return the share of the pixels of each class that occurs, largest first; 255 counts if it is a class."""
    pixels = np.bincount(mask.ravel(), minlength=count)[:count]
    order = sorted(np.flatnonzero(pixels), key=lambda k: (-pixels[k], k))
    return {int(k): float(pixels[k] / mask.size) for k in order}


class MaskDrawing(Drawing):
    """Draws masks in the colors of their classes."""

    explained = "The overlay is the image in the colors of its predicted classes. Percentages are shares of its pixels."

    wide = True

    def row(self, prediction: MaskPrediction) -> dict[str, str]:
        """Return the size of the mask and the classes that cover the most pixels."""
        found = shares(prediction.mask.numpy(), len(self.palette))
        listed = ", ".join(f"{self.name(k)} {100 * share:.0f} %" for k, share in list(found.items())[:3])
        height, width = prediction.mask.shape
        return {"size": f"{width}x{height}", "classes": str(len(found)), "largest": listed}

    def data(self, prediction: MaskPrediction) -> dict[str, Any]:
        """Return the share of the pixels of each class that occurs."""
        found = shares(prediction.mask.numpy(), len(self.palette))
        return {"classes": [{"label": k, "name": self.name(k), "share": share} for k, share in found.items()]}

    def card(
        self, title: str, image: Image.Image, prediction: MaskPrediction, truth: MaskPrediction | None = None
    ) -> report.Card:
        """Return the image, the overlay, the label if it is known and the mask side by side, and a legend."""
        masks = {"label": truth.mask.numpy()} if truth else {}
        return report.Card(title, self._compared(image, {**masks, "prediction": prediction.mask.numpy()}))

    def _compared(self, image: Image.Image, masks: Mapping[str, Mask]) -> list[report.Part]:
        """Return an image, the overlay of the last mask, and masks by their captions, with a legend."""
        small = preview(image).convert("RGB")
        few = {caption: resized_mask(mask, small.size) for caption, mask in masks.items()}
        last = list(few.values())[-1]
        figures = [
            view(small, "image"),
            view(overlay(small, last, self.palette), "overlay"),
        ]
        for caption, mask in few.items():
            figures.append(report.Photo(encoded(Image.fromarray(colored(mask, self.palette)), "png"), "png", caption))
        return [report.Views(figures), *self._legend(list(masks.values()))]

    def _legend(self, masks: Sequence[Mask]) -> list[report.Part]:
        """Return the colors and names of the classes in masks, with their share in the last one."""
        found = shares(masks[-1], len(self.palette))
        for mask in masks[:-1]:
            found |= {k: 0.0 for k in shares(mask, len(self.palette)) if k not in found}
        listed = list(found.items())[:LISTED]
        entries = [(self.palette[k], f"{self.name(k)} {100 * share:.1f} %") for k, share in listed]
        if any((mask == IGNORED).any() for mask in masks) and len(self.palette) <= IGNORED:
            entries.append((GRAY, "no class"))
        more = len(found) - len(listed)
        return [report.Legend(entries), *([f"and {more} more classes"] if more else [])]

    def panel(self, axis: Any, image: Image.Image, prediction: MaskPrediction) -> None:
        """Draw the overlay with the classes that cover the most pixels under it."""
        small = preview(image, 480).convert("RGB")
        mask = resized_mask(prediction.mask.numpy(), small.size)
        axis.imshow(np.asarray(overlay(small, mask, self.palette)))
        found = list(shares(mask, len(self.palette)).items())[:4]
        legend_below(axis, [(self.palette[k], f"{self.name(k)[:18]} {100 * share:.0f} %") for k, share in found])

    columns = ("label", "name", "share")

    def entries(self, prediction: MaskPrediction) -> list[dict[str, Any]]:
        """Return the share of the pixels of each class that occurs."""
        return list(self.data(prediction)["classes"])

    def picture(self, image: Image.Image, prediction: MaskPrediction) -> Image.Image:
        """Return the image under the colors of its classes, at its size."""
        return overlay(image, prediction.mask.numpy(), self.palette)

    def files(self, image: Image.Image, prediction: MaskPrediction) -> dict[str, bytes]:
        """Return the mask with its palette, and the overlay, both at the size of the image."""
        return {"labels": label_file(prediction.mask.numpy(), self.palette), **super().files(image, prediction)}
