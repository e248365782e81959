"""A made set for segmentation: rectangles on noise; val images differ in size, and their masks are larger still."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from widefield.data import Sample, base, seeded
from widefield.data.segmentation import SegmentationSet


class Patches(SegmentationSet):
    """Two classes of rectangles, brighter in another channel each, on a background of noise; borders are ignored."""

    classes = ("ground", "red", "green")
    palette = ((0, 0, 0), (255, 0, 0), (0, 255, 0))
    size_groups = ("small", "large")
    mean, std = (0.5,) * 3, (0.25,) * 3

    def __init__(self, split: str, *, count: int = 24, seed: int = 0) -> None:
        super().__init__(split, seed + (split == "val"))
        self.count = count
        self.crop_size = (32, 32) if split == "train" else None

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int) -> Sample:
        with seeded(self.key(index)):
            height, width = (32, 32) if self.split == "train" else (int(s) for s in torch.randint(32, 48, (2,)))
            image = 0.4 * torch.rand(3, height, width)
            mask = torch.zeros(height, width, dtype=torch.int64)
            group = torch.full((height, width), 255, dtype=torch.uint8)
            for label in (1, 2):
                side = int(torch.randint(5, 16, ()))
                top, left = (int(torch.randint(0, length - side, ())) for length in (height, width))
                place = slice(top, top + side), slice(left, left + side)
                image[(label - 1, *place)] += 0.6
                mask[place], group[place] = label, int(side > 10)
            mask[0] = 255
        if self.split == "val":  # masks have the size of the file, images that of the model
            mask = F.interpolate(mask[None, None].double(), scale_factor=1.5)[0, 0].long()
            group = F.interpolate(group[None, None].double(), scale_factor=1.5)[0, 0].byte()
        return {"image": base.normalize(image, self.mean, self.std), "mask": mask, "size_group": group}
