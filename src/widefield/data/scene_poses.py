"""Provide generated scenes for pose estimation: one crop for each object, with its five key points."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor

from widefield.data.object_index import ObjectIndex
from widefield.data.poses import PoseSet
from widefield.data.scenes import Scenes
from widefield.data.skeleton import Skeleton

_COUNTS = {"train": 1_000, "val": 125}
_OF_SCENES = (
    "objects",
    "object_sizes",
    "min_visible",
    "clutter",
    "camouflage",
    "rotation",
    "background",
    "photographs",
)


class ScenePoses(PoseSet):
    """The objects of `Scenes` in crops of one size, each with its center and the ends of its axes.

    An object's box and area are those of its visible part. A key point is labeled 2 if it can be seen, 1 if another
    object covers it, 0 if it is outside the scene. `Scenes` states key points in continuous pixels; here they are in
    pixel indices, less by half a pixel.

    A scene gives some 8 crops. The objects of all scenes are arranged when the set is built, in about 1 ms each for
    128 pixels; scenes are drawn when they are first read.

    Samples: those of `PoseSet`.

    Args:
        split: ``"train"`` or ``"val"``.
        crop_size: (height, width) of the crops in pixels, or the side of a square.
        size: side of the scenes in pixels.
        count: number of scenes; None means 1,000 for train and 125 for val.
        seed: seed of the scenes and of the augmentation.
        mean, std: of each channel for pixels in [0, 1].
        rotate_factor: the crop turns by up to this many degrees either way. The default is 0, because objects are
            rotated already, by up to 30 degrees. From 45 degrees on, a square's top and right ends look alike.
        options: those of `Scenes`, such as ``objects``, ``object_sizes`` and ``rotation``, and of `PoseSet`.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong type; the message names it.
    """

    further = (*_OF_SCENES, *PoseSet.further)

    def __init__(
        self,
        split: str,
        *,
        crop_size: int | tuple[int, int] = 64,
        size: int = 128,
        count: int | None = None,
        seed: int = 0,
        mean: tuple[float, ...] = Scenes.mean,
        std: tuple[float, ...] = Scenes.std,
        rotate_factor: float = 0.0,
        **options: Any,
    ) -> None:
        drawing = {name: options.pop(name) for name in _OF_SCENES if name in options}
        super().__init__(
            split, crop_size=crop_size, seed=seed, mean=mean, std=std, rotate_factor=rotate_factor, **options
        )
        count = _COUNTS[split] if count is None else count
        self.scenes = Scenes(split, size=size, count=count, seed=seed, **drawing)
        self._hold(_indexed(self.scenes), Scenes.object_classes, Skeleton.load("scenes"))

    def pixels(self, file: int) -> Tensor:
        """Return scene ``file``, uint8 (3, size, size)."""
        return self.scenes.pixels(file)

    def _identity(self) -> Iterable[bytes]:
        return ()


def _indexed(scenes: Scenes) -> ObjectIndex:
    """Return the objects of all scenes."""
    found = [scenes.annotations(index) for index in range(len(scenes))]
    counts = [len(one["labels"]) for one in found]

    def column(name: str, kind: Any) -> Any:
        return np.concatenate([one[name] for one in found]).astype(kind)

    keypoints = column("keypoints", np.float32)
    keypoints[..., :2] -= 0.5
    keypoints[keypoints[..., 2] == 0] = 0
    return ObjectIndex(
        names=np.zeros(len(scenes), "S1"),
        ids=np.arange(len(scenes)),
        sizes=np.full((len(scenes), 2), scenes.image_size, np.int32),
        starts=np.concatenate([[0], np.cumsum(counts)]),
        boxes=column("boxes", np.float32),
        labels=column("labels", np.int32),
        crowd=column("crowd", np.bool_),
        areas=column("area", np.float32),
        object_ids=np.concatenate([np.arange(count) for count in counts]),
        outlines=None,
        keypoints=keypoints,
    )
