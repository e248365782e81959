"""Small models with a backbone, a neck and heads, for tests."""

import torch
import torch.nn.functional as F
from torch import nn


def conv(inputs, outputs, stride=1):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Encoder(nn.Module):
    """Return all maps, like the encoders of segmentation-models-pytorch."""

    def __init__(self):
        super().__init__()
        self.stem, self.layer1, self.layer2 = conv(3, 8), conv(8, 12, 2), conv(12, 16, 2)

    def forward(self, x):
        maps = [x, self.stem(x)]
        for layer in (self.layer1, self.layer2):
            maps.append(layer(maps[-1]))
        return maps


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([conv(16 + 12, 12), conv(12 + 8, 8)])

    def forward(self, maps):
        x = maps[-1]
        for block, other in zip(self.blocks, (maps[2], maps[1]), strict=True):
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0), other], 1))
        return x


class UNet(nn.Module):
    """encoder, decoder and segmentation_head, called as in segmentation-models-pytorch."""

    def __init__(self, classes=4):
        super().__init__()
        self.encoder, self.decoder, self.segmentation_head = Encoder(), Decoder(), nn.Conv2d(8, classes, 3, padding=1)

    def forward(self, x):
        return self.segmentation_head(self.decoder(self.encoder(x)))


class Detector(nn.Module):
    """Detect one object per quadrant: its label is fixed, its score is one channel of the backbone's map there."""

    labels = (3, 1, 3, 2)

    def __init__(self, threshold=0.0):
        super().__init__()
        self.backbone = nn.ModuleDict({"body": conv(3, 8, 2), "fpn": nn.Conv2d(8, 6, 1)})
        self.threshold = threshold

    def forward(self, images):
        found = []
        for maps in self.backbone["fpn"](self.backbone["body"](images)):
            h, w = (side // 2 for side in maps.shape[1:])
            parts = maps[:, :h, :w], maps[:, :h, w:], maps[:, h:, :w], maps[:, h:, w:]
            scores = torch.stack([part[k].mean().sigmoid() for k, part in enumerate(parts)])
            labels, kept = torch.tensor(self.labels), scores > self.threshold
            found.append({"boxes": maps.new_zeros(int(kept.sum()), 4), "labels": labels[kept], "scores": scores[kept]})
        return found


class Answers(nn.Module):
    """A classifier whose output is ``form`` of its scores and its map."""

    def __init__(self, form, classes=5):
        super().__init__()
        self.features, self.fc, self.form = conv(3, 8, 2), nn.Linear(8, classes), form

    def forward(self, x):
        maps = self.features(x)
        return self.form(self.fc(maps.mean((2, 3))), maps)


def shaken(model):
    """Give every norm different statistics, and return the model in evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean, std=0.1)
    return model.eval()
