"""Draw poses on their images: skeletons, with boxes and scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from widefield import report
from widefield.drawing.annotating import Color, Marks, annotated
from widefield.drawing.parts import SIDES_OF_BOXES, Drawing, large_enough, patch, preview, view
from widefield.drawing.skeletons import COLORS, SIDES, Figure, sides, with_skeletons
from widefield.tasks import PosePrediction

_PLAIN: Color = (235, 235, 235)
"""Color of the boxes if there is one class only, or the class is not known."""
_WHOLE = 0.5
"""Largest distance in pixels between a box and the image's border for the box to be the whole image."""


class PoseDrawing(Drawing):
    """Draws poses as skeletons, whose colors and shapes tell left from right."""

    explained = "Key points that the model is not sure of are not drawn."

    wide = True

    def row(self, prediction: PosePrediction) -> dict[str, str]:
        """Return the number of poses, how many of their key points are sure, and the pose with the highest score."""
        names = [name or "pose" for name in self._names(prediction)]
        counts = {name: names.count(name) for name in names}
        listed = sorted(counts.items(), key=lambda one: -one[1])[:4]
        scores = prediction.pose_scores
        best = f"{names[0]} {float(scores[0]):.2f}" if names and scores is not None else "-"
        height, width = prediction.size
        return {
            "size": f"{width}x{height}",
            "poses": str(len(prediction)),
            "key points": f"{int(prediction.shown.sum())} of {prediction.shown.numel()}",
            "found": ", ".join(f"{count} {name}" for name, count in listed) or "-",
            "best": best,
        }

    def data(self, prediction: PosePrediction) -> dict[str, Any]:
        """Return all poses with all of their key points: x, y and score of each, by name."""
        entries = zip(
            self._labels(prediction),
            self._names(prediction),
            _pose_scores(prediction).tolist(),
            prediction.boxes.tolist(),
            _triples(prediction),
            strict=True,
        )
        names = prediction.skeleton.names
        return {
            "size": list(prediction.size),
            "poses": [
                {"label": label, "name": name, "score": score, "box": box}
                | {"keypoints": dict(zip(names, points, strict=True))}
                for label, name, score, box, points in entries
            ],
        }

    def _labels(self, prediction: PosePrediction) -> list[int | None]:
        """Return the class of each pose; None if it is not known which of several it is."""
        if prediction.labels is not None:
            return list(prediction.labels.tolist())
        return [0 if len(self.classes) == 1 else None] * len(prediction)

    def _names(self, prediction: PosePrediction) -> list[str | None]:
        return [None if label is None else self.name(label) for label in self._labels(prediction)]

    def card(
        self, title: str, image: Image.Image, prediction: PosePrediction, truth: PosePrediction | None = None
    ) -> report.Card:
        """Return the image or the true pose, and next to it the prediction, as a card."""
        small = preview(image).convert("RGB")
        if truth is None:
            count = f"{len(prediction)} pose{'' if len(prediction) == 1 else 's'}"
            views = [view(small, "image"), view(self.drawn(small, prediction), count)]
        else:
            labeled = truth.shown
            hidden = int((truth.visible == 1).sum()) if truth.visible is not None else 0
            label = f"label: {int(labeled.sum())} key points, {hidden} of them covered (with a dark center)"
            sure = int((prediction.shown & labeled).sum())
            found = f"prediction, with lines to the labels; sure of {sure} of {int(labeled.sum())} key points"
            views = [
                view(self.drawn(small, truth), label),
                view(self.drawn(small, prediction, truth if len(truth) == len(prediction) else None), found),
            ]
        return report.Card(title, [report.Views(views), report.Legend(self._legend(prediction))])

    def _legend(self, prediction: PosePrediction) -> list[tuple[Color, str]]:
        """Return the colors of the sides that the skeleton has, and what they mean."""
        return [(COLORS[side], text) for side, text in _TEXTS.items() if side in sides(prediction.skeleton)]

    def drawn(self, image: Image.Image, prediction: PosePrediction, truth: PosePrediction | None = None) -> Image.Image:
        """Return an image with poses; thin lines lead to the true points, if they are given."""
        height, width = prediction.size
        scale = np.array([image.width / width, image.height / height])
        shown, hollow = prediction.shown.numpy(), None
        if prediction.visible is not None:
            hollow = (prediction.visible == 1).numpy()
        targets = None
        if truth is not None:
            labeled = truth.shown.numpy()[..., None]
            targets = np.where(labeled, _continuous(truth, scale), np.nan)
        points = _continuous(prediction, scale)
        figures = [
            Figure(points[k], shown[k], None if hollow is None else hollow[k], None if targets is None else targets[k])
            for k in range(len(prediction))
        ]
        return self._boxed(with_skeletons(image, figures, prediction.skeleton), prediction, scale)

    def _boxed(self, image: Image.Image, prediction: PosePrediction, scale: np.ndarray[Any, Any]) -> Image.Image:
        """Return an image with the boxes of poses, without those that are the whole image."""
        height, width = prediction.size
        edges = prediction.boxes.new_tensor([0, 0, width, height])
        inner = ((prediction.boxes - edges).abs() > _WHOLE).any(1)
        scores = prediction.pose_scores
        labels = [label for label, kept in zip(self._labels(prediction), inner.tolist(), strict=True) if kept]
        colors = [_PLAIN if label is None or len(self.palette) < 2 else self.palette[label] for label in labels]
        names = ["" if label is None or len(self.palette) < 2 else self.name(label)[:24] for label in labels]
        values: Sequence[float | None] = [None] * len(labels) if scores is None else scores[inner].tolist()
        return annotated(
            image,
            Marks(
                prediction.boxes[inner].numpy() * np.tile(scale, 2),
                colors,
                [_texts(name, value) for name, value in zip(names, values, strict=True)],
            ),
        )

    def panel(self, axis: Any, image: Image.Image, prediction: PosePrediction) -> None:
        """Draw the image with its poses, and the colors of the sides under it."""
        axis.imshow(np.asarray(self.drawn(preview(image, 480), prediction)))
        handles = [patch(COLORS[side], side) for side in SIDES if side in sides(prediction.skeleton)]
        axis.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=3, fontsize=5.5,
                    handlelength=1, columnspacing=0.8, borderpad=0)  # fmt: skip

    columns = ("pose", "label", "name", "score", *SIDES_OF_BOXES, "keypoint", "x", "y", "keypoint_score")

    def entries(self, prediction: PosePrediction) -> list[dict[str, Any]]:
        """Return the key points of all poses, in pixels; poses are counted from 1."""
        listed = []
        for number, pose in enumerate(self.data(prediction)["poses"], start=1):
            own = {key: pose[key] for key in ("label", "name", "score")}
            box = dict(zip(SIDES_OF_BOXES, pose["box"], strict=True))
            for name, (x, y, score) in pose["keypoints"].items():
                listed.append({"pose": number, **own, **box, "keypoint": name, "x": x, "y": y, "keypoint_score": score})
        return listed

    def picture(self, image: Image.Image, prediction: PosePrediction) -> Image.Image:
        """Return the image with its poses."""
        return self.drawn(large_enough(image), prediction)


_TEXTS = dict(zip(SIDES, ("middle", "left (round)", "right (square)"), strict=True))
"""What the colors of the sides mean."""


def _continuous(prediction: PosePrediction, scale: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return key points (D, K, 2) in continuous pixels of an image that is scaled: pixel 0 covers [0, 1]."""
    found: np.ndarray[Any, Any] = (prediction.keypoints.numpy().astype(np.float64) + 0.5) * scale
    return found


def _triples(prediction: PosePrediction) -> list[list[list[float]]]:
    """Return x, y and score of each key point of each pose."""
    triples: list[list[list[float]]] = torch.cat((prediction.keypoints, prediction.scores[..., None]), -1).tolist()
    return triples


def _pose_scores(prediction: PosePrediction) -> Tensor:
    """Return the scores of poses, (D,); 1 for true ones."""
    return torch.ones(len(prediction)) if prediction.pose_scores is None else prediction.pose_scores


def _texts(name: str, score: float | None) -> list[str]:
    """Return the labels of a pose, from the longest to the shortest."""
    if score is None:
        return [name, ""]
    short = f"{score:.2f}".removeprefix("0")
    return [f"{name} {score:.2f}", short] if name else [short]
