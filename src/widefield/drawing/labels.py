"""Draw the classes of images that may show several: as bars, those above the threshold first."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from widefield import report
from widefield.drawing.annotating import with_bars
from widefield.drawing.classes import BarDrawing
from widefield.drawing.parts import large_enough, preview, view
from widefield.tasks import LabelPrediction


class LabelDrawing(BarDrawing):
    """Draws the classes that an image is given, and the likeliest others, as bars."""

    explained = "Bars are the probabilities of the likeliest classes. An image is given those that reach the threshold."

    def best(self, prediction: LabelPrediction) -> dict[str, float]:
        """Return the names and probabilities of the likeliest classes: all that are given, and ``top`` at least."""
        return self.likeliest(prediction.probabilities, max(self.top, len(prediction.labels)))

    def row(self, prediction: LabelPrediction) -> dict[str, str]:
        """Return the classes that the image is given, and the likeliest other one."""
        shares = [f"{name} {100 * share:.0f} %" for name, share in self.best(prediction).items()]
        given = len(prediction.labels)
        return {
            "classes": str(given),
            "found": ", ".join(shares[:given]) or "-",
            "next": shares[given] if len(shares) > given else "-",
        }

    def data(self, prediction: LabelPrediction) -> dict[str, Any]:
        """Return the classes that the image is given, the threshold, and the probabilities of all classes."""
        values = prediction.probabilities.tolist()
        return {
            "threshold": prediction.threshold,
            "classes": [{"label": k, "name": self.name(k), "probability": values[k]} for k in prediction.labels],
            "probabilities": values,
        }

    def card(
        self, title: str, image: Image.Image, prediction: LabelPrediction, truth: LabelPrediction | None = None
    ) -> report.Card:
        """Return the image, the classes that it is given, and bars under it."""
        label = "" if truth is None else f"label: {', '.join(map(self.name, truth.labels)) or 'none'}"
        shown = view(preview(image).convert("RGB"), label)
        given = ", ".join(self.names(prediction.labels)) or "none"
        words = f"given, from a probability of {prediction.threshold:g}: {given}"
        return report.Card(title, [report.Views([shown]), words, report.Bars(self.best(prediction))])

    def picture(self, image: Image.Image, prediction: LabelPrediction) -> Image.Image:
        """Return the image with bars under it: of the classes that it is given, or else of the likeliest one."""
        shares = self.best(prediction)
        given = dict(list(shares.items())[: len(prediction.labels)])
        name, share = next(iter(shares.items()))
        return with_bars(large_enough(image), given or {f"none; next: {name}": share})

    def panel(self, axis: Any, image: Image.Image, prediction: LabelPrediction) -> None:
        """Draw the image with the classes that it is given under it, or the likeliest one."""
        axis.imshow(np.asarray(preview(image, 320)))
        lines = self.texts(prediction)
        shown = lines[: len(prediction.labels)] or [f"none; next: {lines[0]}"]
        more = [f"and {len(shown) - 3} more"] if len(shown) > 4 else []
        axis.set_xlabel("\n".join([*(shown[:3] if more else shown), *more]), fontsize=6.5)
