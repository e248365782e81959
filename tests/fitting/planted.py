"""A planted truth: classes that differ in the distance between two dots, and a network with one spatial convolution.

A kernel sees both dots of a pair only if it is larger than their distance, so the size that the data need is known.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models import register_model
from timm.models._registry import _model_entrypoints
from torch import Tensor, nn

from train.helpers import QUIET
from widefield.data import LabeledImages, Sample
from widefield.data.catalog import SETS
from widefield.fitting import fit
from widefield.train import DataSpec, ModelSpec, OptimizerSpec, Recipe, ScheduleSpec

SIZE = 14


class Pairs(LabeledImages):
    """Images with pairs of dots at one of two horizontal distances; the label is which.

    With ``noise`` the labels are random. With ``other``, images whose index is listed get another label.
    """

    mean, std = (0.1,), (0.3,)
    classes = ("near", "far")

    def __init__(
        self,
        split: str,
        *,
        count: int = 256,
        distances: Any = (1, 2),
        noise: bool = False,
        other: Any = (),
        seed: int = 0,
    ) -> None:
        super().__init__(split, SIZE, seed)
        self._count, self._distances, self._noise, self._other = count, distances, noise, set(other)

    def __len__(self) -> int:
        return self._count

    def sample(self, index: int) -> Sample:
        generator = np.random.default_rng((self.seed, self.split == "val", index))
        label = index % 2
        distance = self._distances[label]
        rows = torch.arange(1, SIZE, 2)
        columns = torch.from_numpy(generator.integers(0, SIZE - distance, len(rows)))
        image = torch.zeros(1, SIZE, SIZE)
        image[0, rows, columns] = image[0, rows, columns + distance] = 1.0
        label = int(generator.integers(2)) if self._noise else label
        if self.split == "val" and index in self._other:
            label = 1 - label
        return {"image": (image - 0.1) / 0.3, "label": label, "size": torch.tensor(float(distance))}


class OneConvolution(nn.Module):
    """1x1, norm, depthwise 7x7, pointwise layers, mean over the image."""

    def __init__(self, num_classes: int = 2, width: int = 8, norm: str = "batch") -> None:
        super().__init__()
        self.num_classes = num_classes
        self.stem = nn.Conv2d(1, width, 1)
        self.mix = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(1, width)
        self.grow = nn.Conv2d(width, 2 * width, 1)
        self.classifier = nn.Linear(2 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.grow(torch.relu(self.norm(self.mix(self.stem(x))))))
        return self.classifier(x.mean((2, 3)))


def one_convolution(pretrained: bool = False, **options: Any) -> OneConvolution:
    return OneConvolution(**{k: v for k, v in options.items() if k in ("num_classes", "width", "norm")})


@contextmanager
def registered() -> Iterator[None]:
    """Let recipes know the data set and the network in the block."""
    SETS["pairs"] = Pairs
    one_convolution.__module__ = __name__
    if "one_convolution" not in _model_entrypoints:
        register_model(one_convolution)
    try:
        yield
    finally:
        del SETS["pairs"]


def recipe_of(folder: Path, distances: tuple[int, int], **changes: Any) -> Recipe:
    """Return a recipe of a few seconds."""
    args = {"distances": list(distances), **changes.pop("data", {})}
    model = changes.pop("model", {})
    return Recipe(
        **{
            "name": "pairs",
            "model": ModelSpec("one_convolution", model),
            "data": DataSpec("pairs", args),
            "output": str(folder),
            "optimizer": OptimizerSpec(lr=3e-2),
            "schedule": ScheduleSpec(warmup_steps=10),
            "max_steps": 160,
            "evaluate_every": 160,
            "batch_size": 32,
            "workers": 0,
            "trackers": [],
            **changes,
        }
    )


def continued(folder: Path) -> None:
    """Continue a fit, in a process of its own."""
    torch.set_num_threads(1)
    with registered():
        fit(folder, console=QUIET)
