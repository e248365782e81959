"""Fashion-MNIST (Xiao et al. 2017, MIT license) from its four files, for experiments.

The files are those of ``FashionMNIST/raw`` of ``torchvision.datasets.FashionMNIST(download=True)``, or of the Debian
package ``dataset-fashion-mnist``.
"""

from __future__ import annotations

import functools
import gzip
import struct
from pathlib import Path

import numpy as np
import torch

from widefield import data


class FashionMnist(data.LabeledImages):
    """Photographs of goods, 28x28 in gray, with black around them: 32x32, as three equal channels.

    Args:
        split: "train" or "val", which is the test part of 10,000 images.
        root: the folder of the files.
        labels: train: images of each class; None: all.
        held_out: the last 5,000 train images are the val split, and no longer in the train split.
        limit: val: number of images, from the first; None: all.
        seed: of the choice of images and of the augmentation: shifts of up to 2 pixels, and flips.
    """

    classes = ("top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")

    def __init__(
        self, split: str, *, root: str, labels: int | None = None, held_out: bool = False, limit: int | None = None,
        seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(split, 32, seed)
        self.mean, self.std = (0.286,) * 3, (0.353,) * 3
        test = split == "val" and not held_out
        images, classes = read(Path(root), "t10k" if test else "train")
        if held_out:
            part = slice(-5000, None) if split == "val" else slice(-5000)
            images, classes = images[part], classes[part]
        if split == "val" and limit is not None:
            images, classes = images[:limit], classes[:limit]
        if split == "train" and labels is not None:
            order = np.random.default_rng((seed, 1)).permutation(len(classes))  # the first 10 are among the first 100
            chosen = np.concatenate([order[classes[order] == label][:labels] for label in range(10)])
            images, classes = images[chosen], classes[chosen]
        padded = np.pad(images, ((0, 0), (4, 4), (4, 4)))
        self._images = torch.from_numpy(padded).float().div_(255).sub_(self.mean[0]).div_(self.std[0])[:, None]
        self._classes: list[int] = classes.tolist()

    def __len__(self) -> int:
        return len(self._classes)

    def sample(self, index: int) -> data.Sample:
        top, left, flip = 2, 2, 0
        if self.split == "train":
            top, left, flip = np.random.default_rng(self.key(index)).integers((0, 0, 0), (5, 5, 2)).tolist()
        image = self._images[index, :, top : top + 32, left : left + 32]
        return {"image": (image.flip(2) if flip else image).expand(3, -1, -1), "label": self._classes[index]}


@functools.cache
def read(root: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images uint8 (N, 28, 28) and labels uint8 (N,) of the part "train" or "t10k"."""
    found = []
    for kind in ("images-idx3", "labels-idx1"):
        content = gzip.decompress((root / f"{part}-{kind}-ubyte.gz").read_bytes())
        axes = content[3]
        shape = struct.unpack(f">{axes}I", content[4 : 4 + 4 * axes])
        found.append(np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape))
    return found[0], found[1]


data.catalog.SETS["fashion_mnist"] = FashionMnist
