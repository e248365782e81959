"""Provide the base class of detection sets of image files with annotations."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from widefield import _checks
from widefield.data import transforms
from widefield.data.base import Sample, seeded
from widefield.data.corrupt import CorruptFiles
from widefield.data.decoding import CorruptImageError, decoding_options, read
from widefield.data.listing import Skipped, counted
from widefield.data.object_index import AnnotationError, ObjectIndex
from widefield.data.objects import DetectionSet, object_palette
from widefield.data.transforms import IMAGENET_MEAN, IMAGENET_STD, DetectionAugmentation

_LEAST_SIDE = 1.0  # pixels of the file; smaller boxes are not trained on, as in OpenMMLab's loader


class ObjectFiles(DetectionSet):
    """Images in files of any size with annotations of objects; images are decoded when they are needed.

    Samples: those of `DetectionSet`, and with ``names`` the image's ``name``, str: its path below the set's root. Train
    images are flipped, resized and perhaps cropped, and the objects follow them. Boxes are clipped to the image.
    Objects that are cropped away, and those with a side below one pixel of the file, are left out. Val images are
    resized and keep their aspect ratio; their objects stay as the file of annotations has them. Each split ignores the
    options of the other.

    Args:
        split: ``"train"`` or ``"val"``.
        masks: read the masks of objects, too; every object must then have one.
        repair: leave out or mend entries of the annotations that cannot be right, and images whose file is missing or
            has another size, instead of raising an error. `found` counts them. The size of every image file is then
            checked when the set is built, and otherwise when the image is read.
        filter_empty: leave out train images without objects.
        min_image_size: leave out train images whose shorter side is smaller, in pixels.
        group_by_shape: make train batches of wide images or of tall ones, which need less padding. It has no effect
            with ``pipeline="large_scale_jitter"``.
        test_scale: val: (longer side, shorter side) of the rectangle that images are fitted into; None means ``scale``.
        seed: seed of the augmentation.
        names: give each sample its ``name``.
        corrupt: how to treat an image that cannot be fully decoded: ``"refuse"`` raises OSError, ``"skip"`` warns once
            per file and leaves the image out of its batch.
        max_corrupt: largest fraction of the split that may be skipped, from 0 to 1.
        exif_orientation: rotate images by their EXIF orientation; boxes and masks must be of the rotated image.
        max_pixels: refuse files with more pixels; None means Pillow's limit.
        mean: mean of each of the 3 channels for pixels in [0, 1].
        std: standard deviation of each of the 3 channels.
        augmentation: the arguments of `widefield.data.transforms.DetectionAugmentation`, such as ``scale``,
            ``pipeline`` and ``hflip``.

    Attributes:
        index: the objects of all images of the file.
        rows: place in the index of each image of the split, int64 (N,).

    Raises:
        ValueError: an argument is out of range.
        TypeError: an argument is of the wrong type.
    """

    further = tuple(option.name for option in fields(DetectionAugmentation))

    def __init__(
        self,
        split: str,
        *,
        masks: bool = False,
        repair: bool = False,
        filter_empty: bool = False,
        min_image_size: int = 0,
        group_by_shape: bool = True,
        test_scale: Sequence[int] | None = None,
        seed: int = 0,
        names: bool = False,
        corrupt: str = "refuse",
        max_corrupt: float = 0.01,
        exif_orientation: bool = True,
        max_pixels: int | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        **augmentation: Any,
    ) -> None:
        from widefield.data import joint, joint_boxes  # torchvision.transforms.v2 is slow to import

        super().__init__(split, seed)
        self.has_masks, self.repair = _checks.boolean("masks", masks), repair
        self.filter_empty = _checks.boolean("filter_empty", filter_empty)
        self.min_image_size = _checks.integer("min_image_size", min_image_size, minimum=0)
        self.names = bool(names)
        self._corrupt = CorruptFiles(corrupt, max_corrupt)
        self.decoding = decoding_options(exif_orientation, max_pixels)
        self.mean, self.std = transforms.statistics(mean, std)
        _checks.known_arguments(type(self).__name__, augmentation, self.further)
        drawn = DetectionAugmentation(**augmentation)
        if drawn.copy_paste and not masks:
            raise ValueError("copy_paste needs masks: set masks: true, or leave it out.")
        self._grouped = bool(group_by_shape) and drawn.pipeline != "large_scale_jitter"
        self._train = joint_boxes.Training(drawn, self.mean, self.std)
        self.test_scale = transforms.rectangle("test_scale", drawn.scale if test_scale is None else test_scale)
        self._val = joint.evaluation(self.test_scale, self.mean, self.std, antialias=drawn.antialias)

    def _hold(
        self, index: ObjectIndex, classes: Sequence[str], root: Path, skipped: Skipped, repaired: Skipped
    ) -> None:
        """Store the subclass's index and classes, and choose the images of the split."""
        self.classes = tuple(classes)
        self.palette = object_palette(self.classes)
        self.place = str(root)
        self.index, self.skipped, self.repaired = index, skipped, repaired
        kept = np.ones(len(index), np.bool_)
        if self.split == "train":
            small = index.sizes.min(1, initial=2**31 - 1) < self.min_image_size
            empty = (index.counts == 0) & self.filter_empty
            kept = ~(small | empty)
            for reason, left_out in (
                ("images below min_image_size", small),
                ("images without objects", empty & ~small),
            ):
                for name in index.names[left_out]:
                    skipped.add(reason, os.fsdecode(name))
        self.rows: NDArray[np.int64] = np.flatnonzero(kept)
        if not len(self.rows):
            left_out = ", ".join(str(one) for one in (skipped, repaired) if one)
            raise AnnotationError(
                f"the {self.split} split in {self.place} has no images.{left_out and f' Left out: {left_out}.'}"
            )
        self._corrupt.expect(len(self), self.split)

    def found(self) -> str:
        """Return one line: images, objects and classes of the split, what was left out, and what was repaired."""
        counts = self.index.counts[self.rows]
        without = counted(int((counts == 0).sum()), "image")
        objects = f", {counted(int(counts.sum()), 'object')} ({without} without)"
        return f"{super().found()}{objects}{self.skipped.clause()}{self.repaired.clause('repaired')}"

    def _identity(self) -> Iterable[bytes]:
        yield from self.index.names[self.rows]
        for values in (self.rows, self.index.starts, self.index.labels, self.index.boxes, self.index.crowd):
            yield values.tobytes()
        yield repr(self.classes).encode()

    def __len__(self) -> int:
        return len(self.rows)

    def batch_groups(self) -> NDArray[np.int64] | None:
        """Return 0 for wide images and 1 for tall ones, (N,); None if batches need not be alike in shape."""
        if self.split != "train" or not self._grouped:
            return None
        height, width = self.index.sizes[self.rows].T
        groups: NDArray[np.int64] = (width < height).astype(np.int64)
        return groups

    def name(self, index: int) -> str:
        """Return the path of image ``index``."""
        return str(Path(self.place, os.fsdecode(self.index.names[self.rows[index]])))

    def sample(self, index: int) -> Sample | None:
        """Return sample ``index``, or None for a corrupt file under ``corrupt="skip"``.

        Raises:
            OSError: the file cannot be opened or read or, under ``corrupt="refuse"``, is corrupt; the message names it.
            CorruptImagesError: more files are corrupt than ``max_corrupt`` allows; the message lists them.
            AnnotationError: the image has another size than the annotations say.
            MemoryError: the image does not fit into memory.
        """
        from widefield.data import joint

        found = self._stored(index)
        if found is None:
            return None
        size = torch.tensor(found["image"].shape[-2:])
        if self.split == "train":
            with seeded(self.key(index)):
                sample = self._train(found, self._other)
        else:
            sample = {**found, **joint.apply(self._val, {"image": found["image"]})}
        sample = {**sample, "size": size, **self._further(int(self.rows[index]))}
        if self.names:
            sample["name"] = os.fsdecode(self.index.names[self.rows[index]])
        return sample

    def _further(self, row: int) -> Sample:
        """Return further entries of the sample of the image at place ``row`` of the index."""
        return {}

    def _other(self) -> Sample | None:
        """Return a random image with its objects, for copy-paste."""
        return self._stored(int(torch.randint(len(self), ())))

    def _stored(self, index: int) -> Sample | None:
        """Return an image and its objects as the files have them, or None for a corrupt file that is skipped."""
        from torchvision.transforms.functional import pil_to_tensor

        row = int(self.rows[index])
        try:
            picture = read(self.name(index), **self.decoding)
        except CorruptImageError as error:
            self._corrupt.report(index, error, self.name)
            return None
        check_size(picture, self.index, row, self.place, self.decoding)
        first, last = self.index.starts[row : row + 2].tolist()
        objects = slice(first, last)
        labels = self.index.labels[objects].astype(np.int64)
        found: dict[str, NDArray[Any]] = {
            "boxes": self.index.boxes[objects],
            "labels": labels,
            "crowd": self.index.crowd[objects],
            "area": self.index.areas[objects],
        }
        if self.index.outlines is not None:
            found["masks"] = self.index.outlines.masks(first, last, picture.height, picture.width)
        if self.split == "train":
            left, top, right, bottom = found["boxes"].T
            kept = ((right - left) >= _LEAST_SIDE) & ((bottom - top) >= _LEAST_SIDE)
            found = {name: values[kept] for name, values in found.items()}
        tensors = {name: torch.from_numpy(values.copy()) for name, values in found.items()}
        return {"image": pil_to_tensor(picture), **tensors}


def check_size(picture: Image.Image, index: ObjectIndex, row: int, place: str, decoding: Mapping[str, Any]) -> None:
    """Raise AnnotationError if an image has another size than its annotations say.

    Args:
        picture: the decoded image.
        index: the images of the set.
        row: the image's place in it.
        place: folder of the set.
        decoding: options of `widefield.data.decoding.read`.
    """
    height, width = index.sizes[row].tolist()
    if picture.size == (width, height):
        return
    turned = picture.size == (height, width) and decoding["exif_orientation"]
    hint = " If the image was rotated by its EXIF orientation, set exif_orientation: false." if turned else ""
    name = Path(place, os.fsdecode(index.names[row]))
    raise AnnotationError(
        f"the image {name} is {picture.width} x {picture.height} pixels, and its annotations (image "
        f"{index.ids[row]}) are for {width} x {height}. Correct the file of annotations, or set repair: true "
        f"to leave such images out.{hint}"
    )


def filled(option: str, pattern: object, split: str) -> str:
    """Return a path with the name of the split in place of ``{split}``; raises TypeError."""
    if not isinstance(pattern, str):
        raise TypeError(f"{option} must be a path such as 'annotations/{{split}}.json'; got {pattern!r}.")
    return pattern.replace("{split}", split)


def names_of(option: str, names: object) -> tuple[str, ...]:
    """Return names of classes; raises TypeError or ValueError unless they are different texts, at least one."""
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{option} must be a list of names, such as ['person', 'car']; got {names!r}.")
    if len(set(names)) < len(names):
        raise ValueError(f"{option} must be different names; got {list(names)!r}.")
    return tuple(names)
