"""Ask a detector about one box: the scores of every class there, with gradients through the feature maps only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from widefield import _checks
from widefield.analysis._model import running

_NEEDED = ("maps", "detect", "box_scores")
"""Methods of a detector of ``widefield.dense`` that are used here."""


@dataclass(frozen=True)
class DetectionScore:
    """The score of one class for one box of a detector: a detection of each image, or a box that is given.

    The score is the class's logit, before sigmoid or softmax, where the detector computes it for this box: a second
    stage pools its features inside the box, and a dense head reads the anchor or point that fits the box best. The box
    is held fixed, so that the gradient flows through the feature maps only and not through the box's coordinates. In a
    two-stage detector the box of a detection was refined once more after its score was computed; the logit of the
    refined box therefore differs a little from the detection's.

    Attributes:
        label: index of the class. None: the detection's class; of a given box the class with the largest logit.
        index: rank of the detection in each image, 0 being the one with the highest score; with ``label`` among the
            detections of that class.
        box: (left, top, right, bottom) in pixels of the images, instead of a detection's.
    """

    label: int | None = None
    index: int = 0
    box: tuple[float, float, float, float] | None = None

    def __post_init__(self) -> None:
        if self.label is not None:
            object.__setattr__(self, "label", _checks.integer("label", self.label, minimum=0))
        object.__setattr__(self, "index", _checks.integer("index", self.index, minimum=0))
        if self.box is None:
            return
        if self.index:
            raise ValueError(f"index {self.index} chooses a detection, and box replaces it: leave out one of them.")
        if not isinstance(self.box, (tuple, list)) or len(self.box) != 4:
            raise TypeError(f"box must be (left, top, right, bottom) in pixels; got {self.box!r}.")
        left, top, right, bottom = (_checks.number("every entry of box", side) for side in self.box)
        if left >= right or top >= bottom:
            raise ValueError(f"box (left, top, right, bottom) must have left < right and top < bottom; got {self.box}.")
        object.__setattr__(self, "box", (left, top, right, bottom))

    def place(self, size: Sequence[int]) -> str:
        """Return the box as text; raises ValueError if it lies outside images of this size, (H, W)."""
        if self.box is None:
            return f"detection {self.index}"
        if self.box[2] > size[1] or self.box[3] > size[0]:
            raise ValueError(f"the box {self.box} (left, top, right, bottom) leaves the image of {size[0]}x{size[1]}.")
        return f"box ({', '.join(f'{side:g}' for side in self.box)})"


class AskedBoxes(NamedTuple):
    """What a detector says about one box in each of N images."""

    values: Tensor
    """(N, K): logits; gradients flow through. 0 without gradient where there is no such detection."""
    probability: Tensor
    """(N, K), float32."""
    labels: Tensor
    """int64 (N,): the class that is meant; -1 where there is no such detection."""
    boxes: Tensor
    """(N, 4): left, top, right, bottom in pixels of the images; NaN where there is no such detection."""


def is_detector(model: nn.Module) -> bool:
    """Return whether a model can be asked about boxes."""
    return all(callable(getattr(model, name, None)) for name in _NEEDED)


def check_detector(model: nn.Module, what: str) -> None:
    """Raise ValueError unless a model can be asked about boxes."""
    if not is_detector(model):
        raise ValueError(
            f"{what} needs a detector of widefield.dense, which has the methods {', '.join(_NEEDED)}; got "
            f"{type(model).__name__}. For other models, give a layer or a class."
        )


def box_scores(model: nn.Module, images: Tensor, target: DetectionScore) -> AskedBoxes:
    """Return the scores of one box in each image (N, C, H, W), from one forward pass.

    Raises ValueError for other models than detectors, a box outside of the images, or an unknown class.
    """
    check_detector(model, "DetectionScore")
    detector: Any = model
    size = (images.shape[-2], images.shape[-1])
    target.place(size)
    with running(model, images):
        maps = detector.maps(images)
    if target.box is None:
        with torch.no_grad():
            found = detector.detect([one.detach() for one in maps], [size] * len(images))
        chosen = [_ranked(one, target) for one in found]
    else:
        chosen = [(images.new_tensor(target.box), target.label)] * len(images)
    whole = images.new_tensor([0.0, 0, size[1], size[0]])
    boxes = torch.stack([whole if box is None else box.to(whole) for box, _ in chosen])
    scores = detector.box_scores(maps, list(boxes[:, None]))
    count = scores.logits.shape[1]
    if target.label is not None and target.label >= count:
        raise ValueError(f"label must be a class from 0 to {count - 1}; got {target.label}.")
    known = [label for _, label in chosen]
    largest = scores.logits.argmax(1)
    labels = torch.stack([largest[i] if k is None else torch.full_like(largest[i], k) for i, k in enumerate(known)])
    nothing = torch.tensor([box is None for box, _ in chosen], device=images.device)
    return AskedBoxes(
        scores.logits.masked_fill(nothing[:, None], 0),
        scores.probabilities.detach().float().masked_fill(nothing[:, None], 0),
        labels.masked_fill(nothing, -1),
        boxes.masked_fill(nothing[:, None], torch.nan),
    )


def _ranked(found: Any, target: DetectionScore) -> tuple[Tensor | None, int | None]:
    """Return the box and the class of the detection that is meant; no box if there are not as many."""
    fits = found.labels >= 0 if target.label is None else found.labels == target.label
    places = fits.nonzero()[:, 0]
    if len(places) <= target.index:
        return None, 0
    place = places[target.index]
    return found.boxes[place], int(found.labels[place])
