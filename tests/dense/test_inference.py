"""Whole images, windows, scales and mirror images, against plain loops and the rules' formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tolerances import FLOAT64, close
from widefield.dense import largest_at, segment


class Pointwise(nn.Module):
    """Logits of each pixel alone, so that windows and mirror images change nothing."""

    def __init__(self, stride: int = 1, align_corners: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 5, 1, dtype=torch.float64)
        self.stride, self.align_corners = stride, align_corners
        self.seen: list[tuple[int, int]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(tuple(images.shape[2:]))
        return self.conv(images[:, :, :: self.stride, :: self.stride])


class Wide(nn.Module):
    """Logits that see the whole window, with batch norm and dropout: they depend on the mode and on the borders."""

    align_corners = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 4, 5, padding=2), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 3, 1))
        self.net.double()

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images) + images.mean((1, 2, 3), keepdim=True)


def images(*size: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def starts(length: int, window: int, stride: int) -> list[int]:
    """Return where windows begin, by the published formula: ceil((length - window) / stride) + 1 of them."""
    count = max(math.ceil((length - window) / stride), 0) + 1
    return [max(min(i * stride + window, length) - window, 0) for i in range(count)]


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(1, 40)] * 2), st.tuples(*[st.integers(1, 24)] * 2), st.data())
def test_windows_are_those_of_the_formula(size: tuple[int, int], window: tuple[int, int], draw: Any) -> None:
    stride = tuple(draw.draw(st.integers(1, side)) for side in window)
    model, batch = Wide().eval(), images(*size, count=1)
    found = segment(model, batch, window=window, stride=stride)
    total, count = torch.zeros_like(found), torch.zeros(size)
    for top in starts(size[0], window[0], stride[0]):
        for left in starts(size[1], window[1], stride[1]):
            place = slice(top, top + window[0]), slice(left, left + window[1])
            with torch.no_grad():
                total[(..., *place)] += model(batch[(..., *place)])
            count[place] += 1
    assert count.min() >= 1
    close(found, total / count, FLOAT64)


def test_published_windows() -> None:
    """ADE20K at 512 x 2048 in windows of 512 with stride 341, which is the default: two thirds."""
    seen: list[tuple[int, int, int]] = []

    class Places(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append((int(images[0, 0, 0, 0]), int(images[0, 0, 0, -1]), images.shape[2]))
            return images[:, :, ::16, ::16]

    columns = torch.arange(2048.0).expand(1, 2, 512, 2048)
    segment(Places(), columns, window=512)
    assert seen == [(left, left + 511, 512) for left in (0, 341, 682, 1023, 1364, 1536)]


@pytest.mark.parametrize("options", [{}, {"window": 16}, {"window": (9, 50), "stride": (7, 50)}])
@pytest.mark.parametrize("size", [None, (31, 29), (7, 90)])
@pytest.mark.parametrize("corners", [False, True])
def test_logits_of_one_view(options: dict[str, Any], size: tuple[int, int] | None, corners: bool) -> None:
    model, batch = Pointwise(align_corners=corners), images(30, 43)
    expected = model(batch)
    if size is not None:
        expected = F.interpolate(expected, size, mode="bilinear", align_corners=corners)
    close(segment(model, batch, size=size, **options), expected.detach(), FLOAT64)


def test_coarse_logits_are_resized_to_the_view_and_then_to_the_size() -> None:
    """As published: first to the network's input, then to the size of the file."""
    model, batch = Pointwise(stride=4), images(32, 24)
    there = F.interpolate(model(batch), (32, 24), mode="bilinear")
    expected = F.interpolate(there, (50, 41), mode="bilinear")
    close(segment(model, batch, size=(50, 41)), expected.detach(), FLOAT64)


@pytest.mark.parametrize("window", [None, (12, 10)])
def test_several_views_give_the_mean_of_probabilities(window: tuple[int, int] | None) -> None:
    model, batch, scales, size = Wide().eval(), images(21, 26), (0.5, 1.0, 1.75), (40, 33)
    found = segment(model, batch, window=window, scales=scales, flip=True, size=size)
    shares = []
    for scale in scales:
        view = F.interpolate(batch, [int(side * scale + 0.5) for side in (21, 26)], mode="bilinear")
        for mirrored in (view, view.flip(3)):
            logits = segment(model, mirrored, window=window)
            logits = logits.flip(3) if mirrored is not view else logits
            shares.append(F.interpolate(logits, size, mode="bilinear").softmax(1))
    close(found, torch.stack(shares).mean(0), FLOAT64)
    close(found.sum(1), torch.ones(2, *size), FLOAT64)


def test_scale_one_without_flip_gives_logits_and_flip_alone_probabilities() -> None:
    model, batch = Pointwise(), images(8, 8)
    close(segment(model, batch, flip=True), segment(model, batch).softmax(1), FLOAT64)


def test_the_model_runs_in_evaluation_mode_without_gradients_and_is_restored() -> None:
    model = Wide()
    model.net[1].eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    first, again = (segment(model, images(9, 9)) for _ in range(2))
    assert not first.requires_grad
    assert torch.equal(first, again)
    assert [module.training for module in model.modules()] == [True, True, True, False, True, True]
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_half_precision_logits_are_averaged_in_float32() -> None:
    model = Pointwise().bfloat16()
    found = segment(model, images(8, 9).bfloat16(), window=4)
    assert found.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 8, "stride": 9}, r"stride must not exceed window, or pixels are left out; got 9 and 8"),
        ({"stride": 9}, r"stride is for windows, and window is None; got stride=9. Give window too"),
        ({"window": 0}, r"window must be at least 1; got 0"),
        ({"window": (1, 2, 3)}, r"window must be an integer or two, \(height, width\); got \(1, 2, 3\)"),
        ({"scales": ()}, r"scales must be a tuple or list of numbers, such as"),
        ({"scales": (0.0,)}, r"every entry of scales must be above 0"),
        ({"crop_size": 8}, r"segment\(\) has no argument 'crop_size'"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        segment(Pointwise(), images(8, 8), **options)


def test_images_and_models_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"got shape \(3, 8, 8\). Add the batch dimension with images\[None\]"):
        segment(Pointwise(), images(8, 8)[0])

    class Classifier(nn.Module):
        def forward(self, images: Tensor) -> Sequence[Tensor]:
            return (images.mean((2, 3)),)

    with pytest.raises(
        ValueError, match=r"Classifier returns no logits \(N, classes, H, W\) for images \(2, 3, 8, 8\)"
    ):
        segment(Classifier(), images(8, 8))


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)),
    size=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    corners=st.booleans(),
    rows=st.integers(1, 7),
)
def test_the_largest_logit_is_that_of_resized_logits(shape, size, corners, rows):
    logits = torch.randn(2, *shape, dtype=torch.float64)
    expected = F.interpolate(logits, size, mode="bilinear", align_corners=corners)
    found = largest_at(logits, size, align_corners=corners, rows=rows)
    assert found.shape == (2, *size)
    # Equal logits, as at the border of a map of one pixel, may come in either order.
    chosen = expected.gather(1, found[:, None])[:, 0]
    assert (expected.amax(1) - chosen).max() < 1e-12
