"""Draw predictions on their images: as cards of a page, panels of a figure, and image files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from widefield import report
from widefield._coco.matching import box_overlaps
from widefield._pixels import IGNORED
from widefield.runs.annotating import Color, Marks, annotated, with_bars
from widefield.runs.drawing_parts import (
    GRAY,
    LISTED,
    SIDES_OF_BOXES,
    Drawing,
    encoded,
    large_enough,
    patch,
    preview,
    view,
)
from widefield.runs.label_drawing import LabelDrawing
from widefield.runs.pose_drawing import PoseDrawing
from widefield.runs.reconstruction_drawing import ReconstructionDrawing
from widefield.tasks import (
    BoxPrediction,
    ClassPrediction,
    LabelPrediction,
    MaskPrediction,
    PosePrediction,
    Prediction,
    ReconstructionPrediction,
)
from widefield.tasks.detection_errors import CLASSIFICATION, ERRORS, ImageErrors, classify

if TYPE_CHECKING:
    from torch import Tensor

Mask = NDArray[np.integer[Any]]
"""(H, W): the index of a class, or 255, at each pixel."""

_OPACITY = 0.6
_ERRORS = dict(enumerate(tuple(ERRORS)[:-1], start=CLASSIFICATION))
"""Kind of a wrong detection -> its name."""


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


class ClassDrawing(Drawing):
    """Draws classes as bars."""

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


class MaskDrawing(Drawing):
    """Draws masks in the colors of their classes."""

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
        handles = [patch(self.palette[k], f"{self.name(k)[:18]} {100 * share:.0f} %") for k, share in found]
        axis.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=2, fontsize=5.5,
                    handlelength=1, columnspacing=0.8, borderpad=0)  # fmt: skip

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


class BoxDrawing(Drawing):
    """Draws objects with boxes, masks, classes and scores."""

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
        detected = f"{len(shown)} of a score of at least {self.min_score:g}"
        if truth is None:
            views, legend = [view(small, "image"), view(self.annotated(small, shown), detected)], _counts(shown)
        else:
            judgment = judged(shown, truth)
            crowd = np.zeros(len(truth), np.bool_) if truth.crowd is None else truth.crowd.numpy()
            found = judgment.found | crowd
            errors = [_ERRORS.get(kind, "") for kind in judgment.kinds.tolist()]
            missing = f"{int((~found).sum())} not found (dashed)" if not found.all() else "all found"
            missed = f"label: {len(truth)} objects, {missing}"
            views = [
                view(self.annotated(small, truth, ["" if one else "not found" for one in found]), missed),
                view(self.annotated(small, shown, errors), f"prediction: {detected}; {_listed_errors(errors)}"),
            ]
            legend = {**_counts(truth), **{k: 0 for k in _counts(shown) if k not in _counts(truth)}}
        return report.Card(title, [report.Views(views), *self._legend(legend)])

    def _legend(self, counts: Mapping[int, int]) -> list[report.Part]:
        """Return the colors and names of classes, and how often they occur."""
        listed = list(counts.items())[:LISTED]
        more = len(counts) - len(listed)
        entries = [(self.palette[k], f"{self.name(k)}: {count}") for k, count in listed]
        return [report.Legend(entries), *([f"and {more} more classes"] if more else [])]

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
        handles = [patch(self.palette[k], f"{self.name(k)[:18]}: {count}") for k, count in found]
        axis.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=2, fontsize=5.5,
                    handlelength=1, columnspacing=0.8, borderpad=0)  # fmt: skip

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


DRAWINGS: Mapping[type, type[Drawing]] = {
    ClassPrediction: ClassDrawing,
    LabelPrediction: LabelDrawing,
    MaskPrediction: MaskDrawing,
    BoxPrediction: BoxDrawing,
    PosePrediction: PoseDrawing,
    ReconstructionPrediction: ReconstructionDrawing,
}
"""Kind of prediction -> how it is drawn."""


def drawing_of(prediction: Prediction, classes: Sequence[str], palette: Sequence[Color], **shown: Any) -> Drawing:
    """Return how predictions of this kind are drawn; ``shown`` are ``top`` and ``min_score`` of `Drawing`."""
    return DRAWINGS[type(prediction)](tuple(classes), tuple(palette), **shown)
