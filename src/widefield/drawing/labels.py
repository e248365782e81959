"""Draw the classes of images that may show several: as bars, those above the threshold first."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from widefield import report
from widefield.drawing.annotating import with_bars
from widefield.drawing.parts import Drawing, large_enough, preview, view
from widefield.tasks import LabelPrediction


class LabelDrawing(Drawing):
    """Draws the classes that an image is given, and the likeliest others, as bars."""

    explained = "Bars are the probabilities of the likeliest classes. An image is given those that reach the threshold."

    columns = ("rank", "label", "name", "probability")

    def _names(self, labels: list[int]) -> list[str]:
        """Return the names of classes; equal names are told apart by their index."""
        names = [self.name(label) for label in labels]
        return [f"{n} ({k})" if names.count(n) > 1 else n for n, k in zip(names, labels, strict=True)]

    def best(self, prediction: LabelPrediction) -> dict[str, float]:
        """Return the names and probabilities of the likeliest classes: all that are given, and ``top`` at least."""
        count = min(max(self.top, len(prediction.labels)), len(prediction.probabilities))
        values, labels = prediction.probabilities.topk(count)
        return dict(zip(self._names(labels.tolist()), values.tolist(), strict=True))

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
        given = ", ".join(self._names(prediction.labels)) or "none"
        words = f"given, from a probability of {prediction.threshold:g}: {given}"
        return report.Card(title, [report.Views([shown]), words, report.Bars(self.best(prediction))])

    def entries(self, prediction: LabelPrediction) -> list[dict[str, Any]]:
        """Return the classes that the image is given."""
        return [{"rank": rank, **entry} for rank, entry in enumerate(self.data(prediction)["classes"], start=1)]

    def picture(self, image: Image.Image, prediction: LabelPrediction) -> Image.Image:
        """Return the image with bars under it: of the classes that it is given, or else of the likeliest one."""
        shares = self.best(prediction)
        given = dict(list(shares.items())[: len(prediction.labels)])
        name, share = next(iter(shares.items()))
        return with_bars(large_enough(image), given or {f"none; next: {name}": share})

    def panel(self, axis: Any, image: Image.Image, prediction: LabelPrediction) -> None:
        """Draw the image with the classes that it is given under it, or the likeliest one."""
        axis.imshow(np.asarray(preview(image, 320)))
        lines = [f"{name[:28].rstrip()} {100 * share:.0f} %" for name, share in self.best(prediction).items()]
        shown = lines[: len(prediction.labels)] or [f"none; next: {lines[0]}"]
        more = [f"and {len(shown) - 3} more"] if len(shown) > 4 else []
        axis.set_xlabel("\n".join([*(shown[:3] if more else shown), *more]), fontsize=6.5)
