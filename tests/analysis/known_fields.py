"""Models whose fields are known, and samples for them."""

from typing import NamedTuple

import torch
from torch import nn

from widefield import dense


class Blurred(nn.Module):
    """A pose model whose heatmaps are blurred channels of the image, so that fields are known squares.

    Args:
        sides: of the mean filter of each key point.
    """

    def __init__(self, sides=(3, 7, 11)):
        super().__init__()
        self.num_keypoints, self.stride = len(sides), 1
        self.blurs = nn.ModuleList(nn.AvgPool2d(side, 1, side // 2) for side in sides)
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def decode(self, heatmaps, image_size=None):
        size = tuple(heatmaps.shape[2:])
        return dense.HeatmapCodec(size, size).decode(heatmaps)

    def forward(self, images):
        return self.scale * torch.cat([blur(images[:, k : k + 1]) for k, blur in enumerate(self.blurs)], 1)


def person(points=((20, 15), (40, 22), (12, 50)), size=(64, 64), visible=(2, 1, 2), seed=0, **more):
    """Return a sample whose channels have a bright spot at each key point."""
    rows, columns = (torch.arange(side, dtype=torch.float64) for side in size)
    spots = [torch.exp(-((rows[:, None] - y) ** 2 + (columns - x) ** 2) / 50) for x, y in points]
    noise = torch.rand(3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    image = torch.stack(spots) + 1e-6 * noise
    labels = torch.tensor([[*point, seen] for point, seen in zip(points, visible, strict=True)], dtype=torch.float32)
    return {"image": image, "keypoints": labels, "area": torch.tensor(1600.0), **more}


class Scored(NamedTuple):
    logits: torch.Tensor
    probabilities: torch.Tensor


class Counter(nn.Module):
    """A detector whose logit of class k is the weighted sum of the blurred image inside of a box, for known fields.

    Args:
        blur: side of the mean filter before boxes are read.
    """

    def __init__(self, blur=1):
        super().__init__()
        self.blur = nn.AvgPool2d(blur, 1, blur // 2, count_include_pad=True)
        self.weight = nn.Parameter(torch.tensor([1.0, 3.0, -1.0], dtype=torch.float64))

    def maps(self, images):
        return [self.blur(images)]

    def detect(self, maps, sizes):
        raise AssertionError("true boxes need no detections")

    def box_scores(self, maps, boxes):
        found = []
        for one, own in zip(maps[0], boxes, strict=True):
            for left, top, right, bottom in own.round().long().tolist():
                found.append(one[:, top:bottom, left:right].sum() * self.weight)
        logits = torch.stack(found)
        return Scored(logits, logits.sigmoid())


def sample(boxes, labels=None, size=(64, 96), **more):
    generator = torch.Generator().manual_seed(len(boxes))
    image = torch.rand(3, *size, dtype=torch.float64, generator=generator)
    labels = torch.zeros(len(boxes), dtype=torch.int64) if labels is None else torch.tensor(labels)
    return {"image": image, "boxes": torch.tensor(boxes, dtype=torch.float64).view(-1, 4), "labels": labels, **more}
