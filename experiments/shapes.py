"""Dense labels of drawn shapes, and the small network that answers: what the experiments on fields share.

Images of `scales` with 48 pixels, each with one of eight shapes; the network says the class of every pixel. The sets
differ in what it must see. The network is a convolution of stride 2, two blocks of ConvNeXt at half the image's side,
and a linear classifier of each pixel: behind the stem, only the blocks' depthwise convolutions see neighbors. Layer
scale starts at 1e-6, as always in ConvNeXt; at these learning rates it is of order 1 after a hundred steps.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.models import register_model
from torch import nn
from trials import short_recipe

from widefield import data, tasks
from widefield.data import Scales
from widefield.runs import evaluate_model
from widefield.train import DataSpec, ModelSpec, Recipe, TaskSpec

SETS: dict[str, tuple[str, dict[str, Any]]] = {
    "small": ("shapes", {"object_sizes": [8, 14], "clutter": 0.1}),
    "large": ("shapes", {"object_sizes": [28, 42]}),
    "mixed": ("shapes", {"object_sizes": [6, 42]}),
    "colors": ("colors", {"object_sizes": [6, 42]}),
    "noise": ("noise", {"object_sizes": [6, 42]}),
}
"""Name -> data set and its options; sides of objects in pixels."""
BACKGROUND = 0.5
"""Weight of the background in the loss, against 1 for each shape: most pixels are background."""
BATCH = 16
BLOCKS = 2
TESTED = 1000
"""Test images, which no arm sees before."""


class Shapes(Scales):
    """`scales` with the class of every pixel: 0 is the background."""

    def __init__(self, split: str, **options: Any) -> None:
        super().__init__(split, **options)
        self.classes = ("background", *Scales.classes)

    def sample(self, index: int) -> data.Sample:
        """Return the image, ``mask`` int64 (size, size), and ``size``, the object's side in pixels."""
        found = super().sample(index)
        return {"image": found["image"], "mask": found["mask"] * (found["label"] + 1), "size": found["size"]}


class Colors(Shapes):
    """The same places, but each class has a color, on a gray background: one pixel tells it, up to noise."""

    def sample(self, index: int) -> data.Sample:
        """Return a sample of :class:`Shapes` with another image."""
        found = super().sample(index)
        hues = torch.arange(len(self.classes) - 1) * (2 * math.pi / (len(self.classes) - 1))
        shifts = torch.tensor([0.0, 2 * math.pi / 3, 4 * math.pi / 3])
        palette = torch.cat([torch.zeros(1, 3), torch.cos(hues[:, None] + shifts)])
        noise = torch.randn(3, *found["mask"].shape, generator=torch.Generator().manual_seed(index))
        return {**found, "image": palette[found["mask"]].permute(2, 0, 1) + 0.2 * noise}


class Noise(Shapes):
    """The same images, with a random class at each pixel: nothing can be learned, not even where objects are likely."""

    def sample(self, index: int) -> data.Sample:
        """Return a sample of :class:`Shapes` with another mask."""
        found = super().sample(index)
        stream = np.random.default_rng((self.seed, self.split == "val", index))
        classes = stream.integers(0, 2 * len(self.classes), found["mask"].shape)  # half of the pixels are background
        return {**found, "mask": torch.from_numpy(classes * (classes < len(self.classes)))}


data.catalog.SETS.update(shapes=Shapes, colors=Colors, noise=Noise)


@register_model
def shapes_net(pretrained: bool = False, **options: Any) -> nn.Module:
    """Return timm's ConvNeXt with PyTorch's own initialization: N(0, 0.02) is too little for 32 channels."""
    shape: dict[str, Any] = {"stem_type": "overlap", "patch_size": 2, "depths": [BLOCKS, 1, 1, 1], "dims": [32] * 4}
    model: nn.Module = timm.create_model("convnext_tiny", pretrained, **shape, **options)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and not pretrained:
            layer.reset_parameters()
    return model


def base(name: str, seed: int, *, images: int, epochs: int, lr: float, runs: Path) -> Recipe:
    """Return the recipe of the unchanged network, whose kernels are 7x7."""
    kind, options = SETS[name]
    steps = images // BATCH
    head = {"num_convs": 0, "concat_input": False, "auxiliary": False, "dropout": 0.0, "out_indices": [0]}
    weights = [BACKGROUND, *[1.0] * len(Scales.classes)]
    return short_recipe(
        f"{name}-{seed}",
        lr=lr,
        steps=epochs * steps,
        warmup=steps,
        runs=runs,
        seed=seed,
        batch_size=BATCH,
        model=ModelSpec("shapes_net", {"out_indices": [0]}),
        data=DataSpec(kind, {"size": 48, **options, "count": images, "seed": seed}),
        task=TaskSpec("segmentation", {"model": "fcn", "class_weights": weights, "head_args": head}),
    )


def tested(model: nn.Module, name: str, seed: int) -> dict[str, float]:
    """Return metrics on test images."""
    kind, options = SETS[name]
    test = data.create(kind, "val", **{"size": 48, **options, "count": TESTED, "seed": 1000 + seed})
    task = tasks.create("segmentation", test, model="fcn")
    return evaluate_model(model, test, task, batch_size=125, workers=0).metrics
