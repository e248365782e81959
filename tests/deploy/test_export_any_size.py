"""Graphs with a dynamic height and width: pooling, resizing, and whole segmentation models at awkward sizes."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import get_same_padding
from timm.layers.conv2d_same import Conv2dSame
from torch import nn

import widefield
from tolerances import FLOAT32, close
from widefield import deploy
from widefield.deploy._trace import same_padding

BOTH = ("batch", "size")


class PoolAndResize(nn.Module):
    """Pools to a fixed grid and resizes to the images' size, as pyramid pooling does."""

    def __init__(self, grid=(3, 2), align_corners=False):
        super().__init__()
        self.conv, self.down = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)
        self.grid, self.align_corners = grid, align_corners

    def forward(self, x):
        y = self.conv(x)
        pooled = F.adaptive_avg_pool2d(self.down(y), self.grid)
        y = y + F.interpolate(pooled, size=y.shape[2:], mode="bilinear", align_corners=self.align_corners)
        return F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=self.align_corners)


LEAST = {".onnx": 1, ".pt2": 5, ".xml": 1}
"""The side from which a graph accepts images: torch.export excludes sizes at which a map inside has one row."""


@pytest.mark.parametrize(
    ("suffix", "align_corners"), [(".onnx", False), (".onnx", True), (".pt2", False), (".xml", True)]
)
def test_pooling_and_resizing_agree_at_every_size(tmp_path, suffix, align_corners):
    model = PoolAndResize(align_corners=align_corners).eval()
    done = deploy.export(model, tmp_path / f"net{suffix}", (2, 3, 24, 40), dynamic=BOTH)
    assert {check.shape[2:] for check in done.checks} == {(24, 40), (30, 60), (27, 35)}
    exported = deploy.load(tmp_path / f"net{suffix}")
    with torch.no_grad():
        for size in (
            (24, 40),
            (1, 1),
            (3, 2),
            (4, 9),
            (23, 31),
            (65, 127),
            (101, 3),
        ):  # maps smaller than the grid, too
            x = torch.randn(3, 3, *size)
            if min(size) < LEAST[suffix]:
                with pytest.raises(ValueError, match=r"does not run on images of .* Guard failed"):
                    exported(x)
            else:
                close(exported(x), model(x), FLOAT32)


@pytest.mark.parametrize("grid", [1, 6, (1, 4)])
def test_pooling_alone(tmp_path, grid):
    model = nn.Sequential(nn.AdaptiveAvgPool2d(grid), nn.Conv2d(3, 4, 1)).eval()
    deploy.export(model, tmp_path / "net.onnx", (2, 3, 12, 12), dynamic=BOTH)
    exported = deploy.load(tmp_path / "net.onnx")
    with torch.no_grad():
        for size in ((12, 12), (5, 7), (61, 2)):
            x = torch.randn(1, 3, *size)
            close(exported(x), model(x), FLOAT32)


class Multiples(nn.Module):
    """A model that takes only sides that are multiples of 16."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 4, 4)

    def forward(self, x):
        torch._check(x.shape[2] % 16 == 0)
        torch._check(x.shape[3] % 16 == 0)
        return self.conv(x)


def test_a_model_for_multiples_of_a_side_is_verified_at_multiples(tmp_path):
    done = deploy.export(Multiples().eval(), tmp_path / "net.onnx", (2, 3, 16, 32), dynamic=BOTH)
    assert {check.shape[2:] for check in done.checks} == {(16, 32), (32, 96)}


def test_same_padding_is_recorded_in_short_expressions(tmp_path):
    """Seven layers of stride 2: timm's own expressions of their sizes take torch.export minutes."""
    layers = [Conv2dSame(3 if index == 0 else 4, 4, size, 2) for index, size in enumerate((3, 5, 2, 3, 1, 3, 3))]
    model = nn.Sequential(*layers).eval()
    done = deploy.export(model, tmp_path / "net.onnx", (2, 3, 96, 160), dynamic=BOTH)
    exported = deploy.load(tmp_path / "net.onnx")
    assert len(done.checks) > 1
    for height, width in ((64, 128), (65, 127), (96, 99)):
        images = torch.randn(1, 3, height, width)
        close(exported(images), model(images), FLOAT32)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
def test_same_padding_by_integers_is_timms(size, stride, dilation):
    for side in range(1, 40):
        assert same_padding(side, size, stride, dilation) == get_same_padding(side, size, stride, dilation)


def test_many_routed_layers_with_same_padding_have_no_dynamic_size(tmp_path):
    plain = nn.Sequential(*[Conv2dSame(3, 3, 3, 2) for _ in range(3)]).eval()
    mixture = widefield.convert(plain, widefield.MoRF((3, 5)), where="*").eval()
    images = torch.randn(2, 3, 48, 64)
    with pytest.raises(ValueError, match=r"3 layers with 'SAME' padding .*widefield\.specialize"):
        deploy.export(mixture, tmp_path / "net.onnx", images, dynamic=BOTH)
    static = widefield.reparameterize(widefield.specialize(mixture, [images]))
    deploy.export(static, tmp_path / "net.onnx", images, dynamic=BOTH)
    close(deploy.load(tmp_path / "net.onnx")(images[..., :47, :63]), static(images[..., :47, :63]), FLOAT32)
