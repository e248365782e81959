"""Draw reconstructions of masked images: the image, what the model saw of it, and what it predicts."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from widefield import report
from widefield.drawing.parts import Drawing, encoded, preview, view
from widefield.tasks import ReconstructionPrediction


class ReconstructionDrawing(Drawing):
    """Draws an image, its visible part, and the visible part with the prediction at masked pixels."""

    explained = "Gray parts are hidden from the network, and its prediction fills them."

    wide = True
    beside = 3

    def row(self, prediction: ReconstructionPrediction) -> dict[str, str]:
        """Return the size, the masked share and the mean error at masked pixels."""
        height, width = prediction.size
        error = _error(prediction)
        return {
            "size": f"{width}x{height}",
            "masked": f"{100 * float(prediction.masked.float().mean()):.0f} %",
            "error": "-" if error is None else f"{error:.1f} of 255",
        }

    def data(self, prediction: ReconstructionPrediction) -> dict[str, Any]:
        """Return the masked share and the mean absolute error at masked pixels, of 255."""
        return {"masked": float(prediction.masked.float().mean()), "error": _error(prediction)}

    def card(
        self, title: str, image: Image.Image, prediction: ReconstructionPrediction, truth: Any = None
    ) -> report.Card:
        """Return the pictures side by side."""
        pictures = [view(preview(picture, 320), caption) for caption, picture in pictures_of(prediction).items()]
        return report.Card(title, [report.Views(pictures)])

    def panel(self, axis: Any, image: Image.Image, prediction: ReconstructionPrediction) -> None:
        """Draw the pictures side by side in one panel."""
        axis.imshow(np.asarray(_image(prediction.panel())))
        axis.set_xlabel(", ".join(pictures_of(prediction)), fontsize=6.5)

    columns = ("masked", "difference")

    def entries(self, prediction: ReconstructionPrediction) -> list[dict[str, Any]]:
        """Return the masked share and the mean absolute error at masked pixels, of 255."""
        return [{"masked": float(prediction.masked.float().mean()), "difference": _error(prediction)}]

    def picture(self, image: Image.Image, prediction: ReconstructionPrediction) -> Image.Image:
        """Return the pictures side by side."""
        return _image(prediction.panel())

    def files(self, image: Image.Image, prediction: ReconstructionPrediction) -> dict[str, bytes]:
        """Return the pictures side by side as ``reconstructions``."""
        return {"reconstructions": encoded(self.picture(image, prediction), "png")}


def pictures_of(prediction: ReconstructionPrediction) -> dict[str, Image.Image]:
    """Return the image, its visible part and, if pixels are predicted, the reconstruction, by caption."""
    return {caption: _image(pixels) for caption, pixels in prediction.views.items()}


def _image(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _error(prediction: ReconstructionPrediction) -> float | None:
    if prediction.reconstruction is None:
        return None
    gap = (prediction.reconstruction.float() - prediction.image.float()).abs()
    return float(gap[:, prediction.masked].mean())
