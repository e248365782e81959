"""Generate scenes of many objects of very different sizes, with exact labels of every kind, for dense prediction.

Colors and textures are random and independent of class and size, so only outlines tell the classes apart. Fine detail
identifies a small object; the pixels in the middle of a large one can be classified only by edges far away. So the
receptive field that is needed grows with the object, and results can be split by size. The background has textures and
edges of its own, and pale colors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from widefield import _checks
from widefield._pixels import NO_OBJECT
from widefield.data import _composition as composition
from widefield.data.base import SPLITS, Sample, normalize
from widefield.data.drawing import KEYPOINTS, KEYPOINTS_FLIPPED, OUTLINES
from widefield.data.photo_files import TWO_PHOTOGRAPHS, photograph_names
from widefield.data.photo_files import photographs as find_photographs
from widefield.data.segmentation import SegmentationSet

BACKGROUNDS = ("textures", "photos")
_COUNTS = {"train": 4_000, "val": 500}
_SIZES = 6 / 128, 108 / 128  # default sides of the smallest and the largest object, in units of the image's
_SMALLEST = 4.0  # pixels; below, many shapes look alike
_GROUPS = {"small": 0.0, "medium": 1 / 8, "large": 3 / 8}  # from this side on, in units of the image's
_PIXEL = 5  # bytes of a pixel that is kept: three of the image, two of the index of its object
_KEPT = 2**29  # bytes of the scenes that a process keeps
_KEPT_BY_WORKER = 2**26  # of a loader's worker: there are many, and most end with the epoch
_FLIP = 0x666C6970  # separates the flips' random streams from the scenes'

_Scene = tuple[NDArray[np.uint8], NDArray[np.int16], list[composition.Thing]]
"""Pixels (3, size, size), the index of the object at each pixel or -1 (size, size), and the objects, farthest first."""


class Scenes(SegmentationSet):
    """Scenes of objects of eight classes that hide each other, in sizes that differ by a factor of 18.

    A scene is a function of (seed, split, index) and of the drawing options, with the same bytes on every machine. It
    does not depend on ``count``. The splits use separate random streams, so they share no scene. Scenes are drawn when
    they are first read, in about 3 ms for 128 pixels. The first ones are kept as bytes, 82 kB each at 128 pixels: up to
    512 MB of them in a process, up to 64 MB in a worker of a loader. The others are drawn anew each time. Copies of a
    set, and workers of loaders that are spawned, start without any.

    Samples, for M objects in drawing order (later ones hide earlier ones):

    - ``image`` float32 (3, size, size), normalized.
    - ``mask`` int64 (size, size): the class at each pixel; 0 is the background.
    - ``size_group`` uint8 (size, size): an index into ``size_groups`` of the object at each pixel, 255 where there is
      none. Small objects have a side below 1/8 of the image's, large ones of at least 3/8.
    - ``labels`` int64 (M,): an index into ``object_classes``, which lack the background.
    - ``masks`` bool (M, size, size): the visible pixels of each object; they do not overlap.
    - ``boxes`` float32 (M, 4): the edges (left, top, right, bottom) of the visible pixels. The box of one pixel
      has width 1.
    - ``area`` float32 (M,): the number of visible pixels. ``crowd`` bool (M,): always False.
    - ``keypoints`` float32 (M, 5, 3): (x, y, visibility) of the points named in ``keypoint_names``. Visibility is 2 if
      the point is not covered, 1 if another object covers it, 0 if it is outside the image. All but the center are
      on the outline.
    - ``sides`` float32 (M,): the side of each object in pixels. An object covers 0.34 to 0.57 of its square.
    - ``size`` int64 (2,): (height, width) of the image.

    Coordinates are continuous: the pixel of row i and column j covers [j, j + 1] x [i, i + 1].

    Attributes:
        object_classes: names of the objects' classes: ``classes`` without the background.
        keypoint_names: names of the key points: the center, and the ends of the object's axes.
        keypoints_flipped: index of the point that each one becomes in a flipped image; left and right change places.

    Args:
        split: ``"train"`` or ``"val"``.
        size: side of the images in pixels, at least 32.
        count: number of scenes; None means 4,000 for train and 500 for val.
        seed: seed of the set; another seed gives other scenes of the same kind.
        objects: (fewest, most) objects placed in a scene; hidden ones are left out.
        object_sizes: (smallest, largest) side of an object in pixels, at least 4 and at most ``size``; the logarithm is
            uniform in between. None means 6/128 and 108/128 of ``size``, the first at least 4 pixels.
        min_visible: least visible part of an object's area, above 0 and up to 1. Objects of which less would be seen
            are left out of the scene.
        clutter: amplitude of the textures, from 0 to 2; 0 gives plain colors.
        camouflage: colorfulness of the generated background relative to the objects', from 0 to 1. At 0 it is gray. At
            1 background and objects are made of the same materials, and only outlines tell them apart.
        rotation: largest rotation of an object either way, in degrees, from 0 to 180.
        background: ``"textures"``, a patchwork of such materials as objects are made of, or ``"photos"``, crops of
            photographs (the left two thirds for train, the rest for val). The bytes of photographs depend on the JPEG
            decoder.
        photographs: names of the photographs (see `widefield.data.photographs`); default: scikit-learn's two. Others
            need scikit-image.
        hflip: probability that a train scene is flipped left to right, anew in each epoch; val is never flipped.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong type; the message names it.
        ModuleNotFoundError: the package of a photograph is not installed.
    """

    object_classes = tuple(OUTLINES)
    classes = ("background", *object_classes)
    palette = (
        (24, 24, 24),
        (0, 114, 178),
        (230, 159, 0),
        (0, 158, 115),
        (240, 228, 66),
        (213, 94, 0),
        (204, 121, 167),
        (86, 180, 233),
        (170, 68, 153),
    )
    size_groups = tuple(_GROUPS)
    image_size: int
    keypoint_names = KEYPOINTS
    keypoints_flipped = KEYPOINTS_FLIPPED
    mean = (0.5, 0.5, 0.5)
    std = (0.22, 0.22, 0.22)

    def __init__(
        self,
        split: str,
        *,
        size: int = 128,
        count: int | None = None,
        seed: int = 0,
        objects: tuple[int, int] = (6, 12),
        object_sizes: tuple[float, float] | None = None,
        min_visible: float = 0.25,
        clutter: float = 0.5,
        camouflage: float = 0.25,
        rotation: float = 30,
        background: str = "textures",
        photographs: Sequence[str] = TWO_PHOTOGRAPHS,
        hflip: float = 0.5,
    ) -> None:
        super().__init__(split, seed)
        self.image_size = _checks.integer("size", size, minimum=32)
        self.crop_size = self.image_size, self.image_size
        self._count = _COUNTS[split] if count is None else _checks.integer("count", count)
        self.objects = _objects(objects)
        self.object_sizes = _object_sizes(object_sizes, size)
        self.min_visible = _checks.number("min_visible", min_visible, maximum=1)
        if not self.min_visible:
            raise ValueError(
                "min_visible must be above 0, because an object without a visible pixel has no box; got 0."
            )
        self.clutter = _checks.number("clutter", clutter, maximum=2)
        self.camouflage = _checks.number("camouflage", camouflage, maximum=1)
        self.rotation = _checks.number("rotation", rotation, maximum=180)
        self.background = _checks.choice("background", background, BACKGROUNDS)
        self._photographs = tuple(photograph_names(photographs))
        if self.background == "photos":
            find_photographs(self._photographs)  # missing packages are found at once, not by a worker
        self.hflip = _checks.number("hflip", hflip, maximum=1)
        self._kept: dict[int, _Scene] = {}

    def __len__(self) -> int:
        return self._count

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_kept": {}}

    def sample(self, index: int) -> Sample:
        """Draw scene ``index``."""
        pixels, seen, things = self._scene(index)
        found = _annotations(things, seen)
        # One more entry for the background, which the index -1 reads.
        at_pixels = np.append(found["labels"] + 1, 0)
        groups = np.append(_size_groups(found["sides"], self.image_size), np.uint8(NO_OBJECT))
        arrays = {"mask": at_pixels[seen], "size_group": groups[seen], **found}
        image = normalize(torch.from_numpy(pixels) / 255, self.mean, self.std)
        sample = {"image": image, **{name: torch.from_numpy(array) for name, array in arrays.items()}}
        return _flipped(sample) if self._flips(index) else sample

    def pixels(self, index: int) -> torch.Tensor:
        """Return the image of scene ``index`` as it is drawn, uint8 (3, size, size); it is never flipped."""
        return torch.from_numpy(self._scene(index)[0])

    def annotations(self, index: int) -> dict[str, NDArray[Any]]:
        """Return the objects of scene ``index`` without drawing it: the entries of `sample` from ``labels`` on.

        They belong to `pixels`, so they are never flipped.
        """
        things = self._arranged(self._generator(index))
        return _annotations(things, composition.owners(things, self.image_size))

    def _scene(self, index: int) -> _Scene:
        """Return a scene from those that are kept, or draw it."""
        scene = self._kept.get(index) or self._drawn(index)
        if len(self._kept) < (_KEPT if get_worker_info() is None else _KEPT_BY_WORKER) // (_PIXEL * self.image_size**2):
            self._kept[index] = scene
        return scene

    def _generator(self, index: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, SPLITS.index(self.split), index))

    def _arranged(self, generator: np.random.Generator) -> list[composition.Thing]:
        """Draw the objects of a scene, farthest first; these are the generator's first numbers."""
        size, (fewest, most) = self.image_size, self.objects
        count = fewest + int(generator.random(1, dtype=np.float32)[0] * (most - fewest + 1))
        draws = generator.random((most, composition.OBJECT_DRAWS), dtype=np.float32)[:count].tolist()
        things = [composition.thing(one, size, self.object_sizes, self.rotation) for one in draws]
        return composition.arranged(things, size, self.min_visible)

    def _drawn(self, index: int) -> _Scene:
        """Draw a scene."""
        generator = self._generator(index)
        things = self._arranged(generator)
        size, most = self.image_size, self.objects[1]

        def uniform(*shape: int) -> NDArray[np.float32]:
            return generator.random(shape, dtype=np.float32)

        materials = composition.Materials(
            uniform(composition.PATCHES + most, composition.MATERIAL_DRAWS),
            2 * uniform(composition.Materials.nodes(size)) - 1,
            size,
            self.clutter,
        )
        if self.background == "photos":
            image = _photograph(uniform(4).tolist(), size, self.split, self._photographs)
        else:
            noise = 2 * uniform(composition.patch_nodes(size)) - 1
            image = composition.patchwork(materials, noise, size, self.camouflage)
        composition.paint(image, things, materials, composition.PATCHES)
        pixels = np.rint(255 * image.clip(0, 1)).astype(np.uint8)
        return pixels, composition.owners(things, size), [replace(one) for one in things]  # copies without their masks

    def _flips(self, index: int) -> bool:
        if self.split != "train" or not self.hflip:
            return False
        return bool(np.random.default_rng((_FLIP, *self.key(index))).random() < self.hflip)


def _annotations(things: Sequence[composition.Thing], seen: NDArray[np.int16]) -> dict[str, NDArray[Any]]:
    """Return the entries of a sample that describe its objects."""
    masks = seen == np.arange(len(things), dtype=np.int16)[:, None, None]
    return {
        "labels": np.array([one.shape for one in things], np.int64),
        "masks": masks,
        "boxes": _boxes(masks),
        "area": masks.sum((1, 2), dtype=np.float32),
        "crowd": np.zeros(len(things), np.bool_),
        "keypoints": composition.keypoints(things, seen),
        "sides": np.array([one.side for one in things], np.float32),
        "size": np.array(seen.shape, np.int64),
    }


def _boxes(masks: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return the edges (left, top, right, bottom) of masks (M, H, W) with a True pixel each, (M, 4)."""
    count, *shape = masks.shape
    columns, rows = masks.any(1).reshape(count, shape[1]), masks.any(2).reshape(count, shape[0])
    left, top = columns.argmax(1), rows.argmax(1)
    right, bottom = shape[1] - columns[:, ::-1].argmax(1), shape[0] - rows[:, ::-1].argmax(1)
    return np.stack([left, top, right, bottom], 1).astype(np.float32)


def _flipped(sample: Sample) -> Sample:
    """Return a sample of `Scenes` flipped left to right; the key points left and right change places."""
    width = sample["image"].shape[-1]
    left, top, right, bottom = sample["boxes"].unbind(1)
    points = sample["keypoints"][:, list(KEYPOINTS_FLIPPED)]
    points = torch.stack([width - points[..., 0], points[..., 1], points[..., 2]], -1)
    turned = {name: sample[name].flip(-1) for name in ("image", "mask", "size_group", "masks")}
    return {
        **sample,
        **turned,
        "boxes": torch.stack([width - right, top, width - left, bottom], 1),
        "keypoints": points,
    }


def _size_groups(sides: NDArray[np.float32], size: int) -> NDArray[np.uint8]:
    """Return the group of each side, an index into ``Scenes.size_groups``, (M,)."""
    _, *edges = _GROUPS.values()
    return np.searchsorted(np.array(edges) * size, sides, side="right").astype(np.uint8)


def _photograph(draws: list[float], size: int, split: str, names: tuple[str, ...]) -> NDArray[np.float32]:
    """Return a crop of a photograph in [0, 1], (3, size, size); one that is too small continues mirrored."""
    which, down, right, flip = draws
    part: NDArray[np.uint8] = find_photographs(names)[int(len(names) * which)].part(split).numpy()
    height, width = part.shape[1:]
    rows = _mirrored(int(down * max(1, height - size + 1)), size, height)
    columns = _mirrored(int(right * max(1, width - size + 1)), size, width)
    crop = part[:, rows][:, :, columns[::-1] if flip < 0.5 else columns]
    return np.divide(crop, 255, dtype=np.float32)


def _mirrored(start: int, size: int, length: int) -> NDArray[np.int64]:
    """Return ``size`` indices from ``start`` on into an axis of ``length``, reflected at its ends."""
    index = np.arange(start, start + size) % (2 * length - 2)
    return np.minimum(index, 2 * length - 2 - index)


def _objects(objects: Any) -> tuple[int, int]:
    """Check the number of objects; raises TypeError or ValueError."""
    if not isinstance(objects, (tuple, list)) or len(objects) != 2:
        raise TypeError(f"objects must be a pair (fewest, most) such as (6, 12); got {objects!r}.")
    fewest = _checks.integer("the fewest of objects", objects[0])
    most = _checks.integer("the most of objects", objects[1])
    if fewest > most:
        raise ValueError(f"objects must be two numbers in increasing order; got {tuple(objects)!r}.")
    return fewest, most


def _object_sizes(sizes: Any, image_size: int) -> tuple[float, float]:
    """Check the range of object sizes against the image; raises TypeError or ValueError."""
    if sizes is None:
        return max(_SMALLEST, _SIZES[0] * image_size), _SIZES[1] * image_size
    if not isinstance(sizes, (tuple, list)) or len(sizes) != 2:
        raise TypeError(f"object_sizes must be a pair (smallest, largest) such as (6, 108), or None; got {sizes!r}.")
    smallest = _checks.number("the smallest of object_sizes", sizes[0], minimum=_SMALLEST)
    largest = _checks.number("the largest of object_sizes", sizes[1])
    if not smallest <= largest <= image_size:
        raise ValueError(
            f"object_sizes must be two sides in increasing order, at most {image_size} in images of that many pixels; "
            f"got {tuple(sizes)!r}. Draw smaller objects or give a larger size."
        )
    return smallest, largest
