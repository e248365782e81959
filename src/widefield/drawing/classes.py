"""Draw the class of an image, as bars of the likeliest classes."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from widefield import report
from widefield.drawing.annotating import with_bars
from widefield.drawing.parts import Drawing, large_enough, preview, view
from widefield.tasks import ClassPrediction


class ClassDrawing(Drawing):
    """Draws classes as bars."""

    explained = "Bars are the probabilities of the likeliest classes."

    def best(self, prediction: ClassPrediction) -> dict[str, float]:
        """Return the names and probabilities of the likeliest classes; equal names are told apart by their index."""
        values, labels = prediction.probabilities.topk(min(self.top, len(prediction.probabilities)))
        names = [self.name(label) for label in labels.tolist()]
        distinct = [f"{n} ({k})" if names.count(n) > 1 else n for n, k in zip(names, labels.tolist(), strict=True)]
        return dict(zip(distinct, values.tolist(), strict=True))

    def row(self, prediction: ClassPrediction) -> dict[str, str]:
        """Return the likeliest class, its probability, and the next one."""
        (first, sure), *others = self.best(prediction).items()
        return {"class": first, "probability": f"{100 * sure:.1f} %", "next": others[0][0] if others else "-"}

    def data(self, prediction: ClassPrediction) -> dict[str, Any]:
        """Return the likeliest classes and their probabilities."""
        values, labels = prediction.probabilities.topk(min(self.top, len(prediction.probabilities)))
        pairs = zip(labels.tolist(), values.tolist(), strict=True)
        return {"classes": [{"label": k, "name": self.name(k), "probability": value} for k, value in pairs]}

    def card(
        self, title: str, image: Image.Image, prediction: ClassPrediction, truth: ClassPrediction | None = None
    ) -> report.Card:
        """Return the image, and bars under it."""
        label = "" if truth is None else f"label: {self.name(int(truth.probabilities.argmax()))}"
        shown = view(preview(image).convert("RGB"), label)
        return report.Card(title, [report.Views([shown]), report.Bars(self.best(prediction))])

    columns = ("rank", "label", "name", "probability")

    def entries(self, prediction: ClassPrediction) -> list[dict[str, Any]]:
        """Return the likeliest classes."""
        return [{"rank": rank, **entry} for rank, entry in enumerate(self.data(prediction)["classes"], start=1)]

    def picture(self, image: Image.Image, prediction: ClassPrediction) -> Image.Image:
        """Return the image with the likeliest classes and their probabilities as bars under it."""
        return with_bars(large_enough(image), self.best(prediction))

    def panel(self, axis: Any, image: Image.Image, prediction: ClassPrediction) -> None:
        """Draw the image with the likeliest class under it."""
        axis.imshow(np.asarray(preview(image, 320)))
        lines = [f"{name[:28].rstrip()} {100 * share:.0f} %" for name, share in self.best(prediction).items()]
        axis.set_xlabel("\n".join(lines[:3]), fontsize=6.5)
