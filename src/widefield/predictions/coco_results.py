"""Write detections and poses as COCO's results, which pycocotools and evaluation servers read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from widefield import _checks
from widefield.predictions.image_paths import matched_names
from widefield.tasks import BoxPrediction, PosePrediction

if TYPE_CHECKING:
    from numpy.typing import NDArray


def coco_results(prediction: BoxPrediction, image_id: int, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Return the detections of an image as entries of COCO's results, in the order of their scores.

    Args:
        prediction: the detections.
        image_id: of the image.
        category_ids: of each class.

    Returns:
        for each detection ``image_id``, ``category_id``, ``bbox`` [left, top, width, height] in pixels of the file,
        ``score``, and with masks ``segmentation``, a compressed run-length code.
    """
    left, top, right, bottom = prediction.boxes.double().unbind(1)
    boxes = zip(left.tolist(), top.tolist(), (right - left).tolist(), (bottom - top).tolist(), strict=True)
    scores = [1.0] * len(prediction) if prediction.scores is None else prediction.scores.tolist()
    found = [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": list(box), "score": score}
        for label, box, score in zip(prediction.labels.tolist(), boxes, scores, strict=True)
    ]
    if prediction.masks is not None:
        for entry, mask in zip(found, prediction.masks.numpy(), strict=True):
            entry["segmentation"] = run_lengths(mask)
    return found


def coco_keypoints(prediction: PosePrediction, image_id: int, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Return the poses of an image as entries of COCO's results of key points, in the order of their scores.

    Args:
        prediction: the poses.
        image_id: of the image.
        category_ids: of each class.

    Returns:
        for each pose ``image_id``, ``category_id``, ``keypoints`` (x, y and score of each in one list, in pixels of the
        file) and ``score``.
    """
    kinds = [0] * len(prediction) if prediction.labels is None else prediction.labels.tolist()
    overall = [1.0] * len(prediction) if prediction.pose_scores is None else prediction.pose_scores.tolist()
    rows = torch.cat((prediction.keypoints, prediction.scores[..., None]), 2).flatten(1).tolist()
    return [
        {"image_id": image_id, "category_id": category_ids[label], "keypoints": points, "score": score}
        for label, points, score in zip(kinds, rows, overall, strict=True)
    ]


def run_lengths(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Return a mask (H, W) as COCO's compressed run-length code: ``size`` [H, W] and ``counts``, a text.

    The lengths of the runs, by columns and first of False, are differences from the length two runs before, from the
    fourth run on. Each is written in groups of five bits, the lowest first, as characters from ``0`` on; the sixth bit
    says that more groups follow (pycocotools, maskApi.c, rleToString).
    """
    columns = np.flatnonzero(mask.any(0))
    first, last = (columns[0], columns[-1] + 1) if len(columns) else (0, 0)
    # Only the columns of the object: a photo may have a hundred masks.
    flat = np.concatenate([[False], mask[:, first:last].ravel(order="F"), [False]])
    ends = np.flatnonzero(flat[1:] != flat[:-1]) + first * mask.shape[0]
    counts = np.diff(np.concatenate([[0], ends, [mask.size]]))
    # A last run of no length is left out; a mask without a pixel is one run.
    lengths = (counts[:-1] if len(counts) > 1 and counts[-1] == 0 else counts).tolist()
    text = []
    for index, length in enumerate(lengths):
        rest = length - lengths[index - 2] if index > 2 else length
        while True:
            group, rest = rest & 0x1F, rest >> 5
            ended = rest == (-1 if group & 0x10 else 0)
            text.append(chr(48 + (group if ended else group | 0x20)))
            if ended:
                break
    return {"size": list(mask.shape), "counts": "".join(text)}


@dataclass(frozen=True)
class CocoIds:
    """The ids of images and classes in COCO's results.

    Attributes:
        images: id of each image by the name of its file.
        categories: id of each class by its name.
        source: the file that they are from; "" if they are counted.
    """

    images: dict[str, int]
    categories: dict[str, int]
    source: str = ""

    def of_images(self, names: Sequence[str]) -> CocoIds:
        """Return the ids of these images alone, by their names; the same ids if they are counted.

        Args:
            names: of all images. A file may list an image without its folder, if no other image has the same name.

        Raises ValueError if the file does not name an image; the message counts them and names the first.
        """
        if not self.source:
            return self
        keys = matched_names(names, self.images, self.source)
        return replace(self, images={name: self.images[key] for name, key in keys.items()})

    def image(self, name: str, index: int) -> int:
        """Return the id of an image: by its name, or index + 1 if ids are counted.

        Raises ValueError for an image that the file does not name.
        """
        if not self.source:
            return index + 1
        return self.images[name] if name in self.images else self.of_images([name]).images[name]

    def classes(self, names: Sequence[str], count: int) -> tuple[int, ...]:
        """Return the id of each class: by its name, or from 1 on if ids are counted.

        Raises ValueError for a class that the file does not name.
        """
        if not self.source:
            return tuple(range(1, count + 1))
        for name in names:
            if name not in self.categories:
                near = _checks.did_you_mean(name, self.categories)
                raise ValueError(f"{self.source} has no category {name!r}, which is a class of the model.{near}")
        return tuple(self.categories[name] for name in names)


class CocoEntries:
    """Collects the entries of a file of COCO's results.

    Attributes:
        entries: the detections of all images, see :func:`coco_results`.
        images: number of images.
    """

    def __init__(self, ids: CocoIds, classes: Sequence[str], count: int) -> None:
        self.entries: list[dict[str, Any]] = []
        self.images = 0
        self._ids, self._categories = ids, ids.classes(classes, count)

    def add(self, name: str, prediction: BoxPrediction | PosePrediction) -> dict[str, int]:
        """Add the detections or poses of the next image, and return its id, as an entry of the image's data."""
        number = self._ids.image(name, self.images)
        self.images += 1
        if isinstance(prediction, PosePrediction):
            self.entries += coco_keypoints(prediction, number, self._categories)
        else:
            self.entries += coco_results(prediction, number, self._categories)
        return {"image_id": number}


def read_ids(path: str | Path | None) -> CocoIds:
    """Return the ids in a COCO file (``images`` and ``categories``), or ids that are counted from 1 for None.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a COCO file; the message names the entry.
    """
    if path is None:
        return CocoIds({}, {})
    path = Path(path).expanduser()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError, too
        raise ValueError(f"{path} is not a JSON file: {error}.") from error
    images, categories = names_by_id(path, content)
    return CocoIds(
        {name: number for number, name in images.items()},
        {name: number for number, name in categories.items()},
        str(path),
    )


def names_by_id(path: Path, content: Any) -> tuple[dict[int, str], dict[int, str]]:
    """Return the file names of the images and the names of the categories in a COCO file, by their ids.

    Raises:
        ValueError: it is not a COCO file; the message names ``path``.
    """
    try:
        images = {int(one["id"]): str(one["file_name"]) for one in content["images"]}
        categories = {int(one["id"]): str(one["name"]) for one in content["categories"]}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is not a COCO file with images (file_name, id) and categories (name, id): "
            f"{type(error).__name__}: {error}."
        ) from error
    return images, categories
