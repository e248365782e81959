"""Provide generated scenes for multi-label classification: which classes of objects an image shows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from widefield.data.base import MultiLabelImages, Sample
from widefield.data.scenes import Scenes


class SceneLabels(MultiLabelImages):
    """The images of `Scenes`, each with the classes of the objects in it.

    Samples: those of `MultiLabelImages`. Objects are placed when the set is built, in about 1 ms for each image; images
    are drawn when they are first read.

    Args:
        split: ``"train"`` or ``"val"``.
        size: side of the images in pixels.
        count: number of images; None means 4,000 for train and 500 for val.
        seed: seed of the set.
        objects: (fewest, most) objects placed in a scene; the default is fewer than that of `Scenes`, whose images show
            most classes.
        options: the other options of `Scenes`, such as ``object_sizes``, ``background`` and ``hflip``.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong type; the message names it.
    """

    classes = Scenes.object_classes
    further = ("object_sizes", "min_visible", "clutter", "camouflage", "rotation", "background", "photographs", "hflip")

    def __init__(
        self,
        split: str,
        *,
        size: int = 64,
        count: int | None = None,
        seed: int = 0,
        objects: tuple[int, int] = (1, 4),
        **options: Any,
    ) -> None:
        super().__init__(split, size, seed)
        self.scenes = Scenes(split, size=size, count=count, seed=seed, objects=objects, **options)
        self.mean, self.std = self.scenes.mean, self.scenes.std
        self.present: NDArray[np.bool_] = np.zeros((len(self.scenes), len(self.classes)), np.bool_)
        for index in range(len(self.scenes)):
            self.present[index, self.scenes.annotations(index)["labels"]] = True

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, from 0, that seeds the next flips."""
        super().set_epoch(epoch)
        self.scenes.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.scenes)

    def sample(self, index: int) -> Sample:
        """Return sample ``index``."""
        return {"image": self.scenes.sample(index)["image"], "present": torch.from_numpy(self.present[index].copy())}
