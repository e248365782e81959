"""Draw classes of images as bars: what all kinds share, and the likeliest classes of images that have one."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from widefield import report
from widefield.drawing.annotating import with_bars
from widefield.drawing.parts import Drawing, large_enough, preview, view
from widefield.tasks import ClassPrediction


class BarDrawing(Drawing):
    """Draws probabilities of classes as bars."""

    columns = ("rank", "label", "name", "probability")

    def names(self, labels: list[int]) -> list[str]:
        """Return the names of classes; equal names are told apart by their index."""
        names = [self.name(label) for label in labels]
        return [f"{n} ({k})" if names.count(n) > 1 else n for n, k in zip(names, labels, strict=True)]

    def likeliest(self, probabilities: Tensor, count: int) -> dict[str, float]:
        """Return the names and probabilities of the ``count`` likeliest classes, or of all if there are fewer."""
        values, labels = probabilities.topk(min(count, len(probabilities)))
        return dict(zip(self.names(labels.tolist()), values.tolist(), strict=True))

    @abstractmethod
    def best(self, prediction: Any) -> dict[str, float]:
        """Return the names and probabilities of the classes that are shown."""

    def texts(self, prediction: Any) -> list[str]:
        """Return these as short texts."""
        return [f"{name[:28].rstrip()} {100 * share:.0f} %" for name, share in self.best(prediction).items()]

    def entries(self, prediction: Any) -> list[dict[str, Any]]:
        """Return the classes of :meth:`data` in their order."""
        return [{"rank": rank, **entry} for rank, entry in enumerate(self.data(prediction)["classes"], start=1)]


class ClassDrawing(BarDrawing):
    """Draws the likeliest classes as bars."""

    explained = "Bars are the probabilities of the likeliest classes."

    def best(self, prediction: ClassPrediction) -> dict[str, float]:
        """Return the names and probabilities of the likeliest classes."""
        return self.likeliest(prediction.probabilities, self.top)

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

    def picture(self, image: Image.Image, prediction: ClassPrediction) -> Image.Image:
        """Return the image with the likeliest classes and their probabilities as bars under it."""
        return with_bars(large_enough(image), self.best(prediction))

    def panel(self, axis: Any, image: Image.Image, prediction: ClassPrediction) -> None:
        """Draw the image with the likeliest class under it."""
        axis.imshow(np.asarray(preview(image, 320)))
        axis.set_xlabel("\n".join(self.texts(prediction)[:3]), fontsize=6.5)
