"""Draw objects on their images, with boxes, masks and scores, and what is wrong with each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from widefield import report
from widefield._coco.matching import box_overlaps
from widefield.data.listing import counted
from widefield.drawing.annotating import Marks, annotated
from widefield.drawing.parts import GRAY, LISTED, SIDES_OF_BOXES, Drawing, large_enough, legend_below, preview, view
from widefield.tasks import BoxPrediction
from widefield.tasks.detection_errors import CLASSIFICATION, ERRORS, ImageErrors, classify

_ERRORS = dict(enumerate(tuple(ERRORS)[:-1], start=CLASSIFICATION))
"""Kind of a wrong detection -> its name."""


class BoxDrawing(Drawing):
    """Draws objects with boxes, masks, classes and scores."""

    explained = "Numbers at the objects are scores, from 0 to 1. Objects below the least score are not drawn."

    wide = True

    def row(self, prediction: BoxPrediction) -> dict[str, str]:
        """Return the number of objects, their classes, and the one with the highest score."""
        shown = prediction.at_least(self.min_score)
        listed = ", ".join(f"{count} {self.name(k)}" for k, count in list(_counts(shown).items())[:4])
        best = f"{self.name(int(shown.labels[0]))} {float(_scores(shown)[0]):.2f}" if len(shown) else "-"
        height, width = prediction.size
        return {"size": f"{width}x{height}", "objects": str(len(shown)), "found": listed or "-", "best": best}

    def data(self, prediction: BoxPrediction) -> dict[str, Any]:
        """Return all objects, also those of lower scores than are drawn, without their masks."""
        entries = zip(prediction.labels.tolist(), _scores(prediction).tolist(), prediction.boxes.tolist(), strict=True)
        return {
            "size": list(prediction.size),
            "objects": [{"label": k, "name": self.name(k), "score": score, "box": box} for k, score, box in entries],
        }

    def card(
        self, title: str, image: Image.Image, prediction: BoxPrediction, truth: BoxPrediction | None = None
    ) -> report.Card:
        """Return the true objects if they are known, or the image; next to it the detections; and a legend."""
        small, shown = preview(image).convert("RGB"), prediction.at_least(self.min_score)
        detected = f"{counted(len(shown), 'object')} with a score of at least {self.min_score:g}"
        if truth is None:
            views, legend = [view(small, "image"), view(self.annotated(small, shown), detected)], _counts(shown)
        else:
            judgment = judged(shown, truth)
            crowd = np.zeros(len(truth), np.bool_) if truth.crowd is None else truth.crowd.numpy()
            found = judgment.found | crowd
            errors = [_ERRORS.get(kind, "") for kind in judgment.kinds.tolist()]
            wrong = f"; {_listed_errors(errors)}" if errors else ""
            missing = f"{int((~found).sum())} not found (dashed)" if not found.all() else "all found"
            missed = f"label: {len(truth)} objects, {missing}"
            views = [
                view(self.annotated(small, truth, ["" if one else "not found" for one in found]), missed),
                view(self.annotated(small, shown, errors), f"prediction: {detected}{wrong}"),
            ]
            legend = {**_counts(truth), **{k: 0 for k in _counts(shown) if k not in _counts(truth)}}
        return report.Card(title, [report.Views(views), *self._legend(legend)])

    def _legend(self, counts: Mapping[int, int]) -> list[report.Part]:
        """Return the colors and names of classes, and how often they occur."""
        listed = list(counts.items())[:LISTED]
        more = len(counts) - len(listed)
        entries = [(self.palette[k], f"{self.name(k)}: {count}") for k, count in listed]
        return [*([report.Legend(entries)] if entries else []), *([f"and {more} more classes"] if more else [])]

    def annotated(
        self, image: Image.Image, prediction: BoxPrediction, errors: Sequence[str] | None = None
    ) -> Image.Image:
        """Return an image with the objects of a prediction.

        ``errors`` say what is wrong with each object, "" for nothing: such objects have dashed lines.
        """
        height, width = prediction.size
        scale = np.array([image.width / width, image.height / height] * 2)
        crowd = [False] * len(prediction) if prediction.crowd is None else prediction.crowd.tolist()
        labels = prediction.labels.tolist()
        wrong = [""] * len(labels) if errors is None else list(errors)
        scores = [None] * len(labels) if prediction.scores is None else prediction.scores.tolist()
        return annotated(
            image,
            Marks(
                prediction.boxes.numpy() * scale,
                [GRAY if one else self.palette[k] for k, one in zip(labels, crowd, strict=True)],
                [
                    ["crowd", ""] if one else _texts(self.name(k)[:24], score, error)
                    for k, score, error, one in zip(labels, scores, wrong, crowd, strict=True)
                ],
                None if prediction.masks is None else prediction.masks.numpy(),
                [bool(error) for error in wrong],
            ),
        )

    def panel(self, axis: Any, image: Image.Image, prediction: BoxPrediction) -> None:
        """Draw the image with its objects, and the number of objects of each class under it."""
        shown = prediction.at_least(self.min_score)
        axis.imshow(np.asarray(self.annotated(preview(image, 480), shown)))
        found = list(_counts(shown).items())[:4]
        legend_below(axis, [(self.palette[k], f"{self.name(k)[:18]}: {count}") for k, count in found])

    columns = ("label", "name", "score", *SIDES_OF_BOXES)

    def entries(self, prediction: BoxPrediction) -> list[dict[str, Any]]:
        """Return the objects that are drawn, with the edges of their boxes in pixels."""
        entries = self.data(prediction.at_least(self.min_score))["objects"]
        boxes = [dict(zip(SIDES_OF_BOXES, entry.pop("box"), strict=True)) for entry in entries]
        return [{**entry, **box} for entry, box in zip(entries, boxes, strict=True)]

    def picture(self, image: Image.Image, prediction: BoxPrediction) -> Image.Image:
        """Return the image with its objects."""
        return self.annotated(large_enough(image), prediction.at_least(self.min_score))


def judged(prediction: BoxPrediction, truth: BoxPrediction) -> ImageErrors:
    """Return why each detection is right or wrong, as evaluations count errors, and which objects are found."""
    crowd = np.zeros(len(truth), np.bool_) if truth.crowd is None else truth.crowd.numpy()
    overlaps = box_overlaps(prediction.boxes.double().numpy(), truth.boxes.double().numpy(), crowd)
    return classify(overlaps, prediction.labels.numpy(), truth.labels.numpy(), crowd)


def _scores(prediction: BoxPrediction) -> Tensor:
    """Return the scores, (D,); 1 for true objects."""
    return prediction.boxes.new_ones(len(prediction)) if prediction.scores is None else prediction.scores


def _texts(name: str, score: float | None, error: str) -> list[str]:
    """Return the labels of an object, from the longest to the shortest."""
    if score is None:
        return [name, ""]
    texts = [f"{name} {score:.2f}", f"{score:.2f}".removeprefix("0")]
    return [f"{texts[0]} {error}", *texts] if error else texts


def _listed_errors(errors: Sequence[str]) -> str:
    """Return how many errors of each type there are, as text."""
    counts = {name: errors.count(name) for name in ERRORS if name in errors}
    listed = ", ".join(f"{count} {name}" for name, count in counts.items())
    return f"wrong (dashed): {listed}" if listed else "none is wrong"


def _counts(prediction: BoxPrediction) -> dict[int, int]:
    """Return the number of objects of each class that occurs, the most frequent first."""
    labels, counts = prediction.labels.unique(return_counts=True)
    found = zip(labels.tolist(), counts.tolist(), strict=True)
    return dict(sorted(found, key=lambda one: (-one[1], one[0])))
