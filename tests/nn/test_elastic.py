"""Elastic convolutions against sums of padded kernels, and what becomes of the convolutions that they replace."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tolerances import FLOAT32, FLOAT64, close
from widefield.nn import DepthwiseConv2d, ElasticConv2d
from widefield.nn.elastic import resized


def lived(layer: ElasticConv2d) -> ElasticConv2d:
    """Return the layer with random experts."""
    with torch.no_grad():
        for expert in layer.experts:
            expert.normal_()
    return layer


def summed(layer: ElasticConv2d, size: int) -> Tensor:
    """Return the kernel of a size, tap by tap."""
    total = torch.zeros(*layer.experts[0].shape[:2], size, size, dtype=layer.experts[0].dtype)
    for expert, own in zip(layer.experts, layer.kernel_sizes, strict=True):
        if own <= size:
            margin = (size - own) // 2
            total[..., margin : margin + own, margin : margin + own] += expert.detach()
    return total


@given(
    sizes=st.sets(st.sampled_from([1, 3, 5, 7, 9]), min_size=1, max_size=4),
    channels=st.sampled_from([(4, 4, 4), (4, 6, 2), (3, 5, 1)]),
    stride=st.integers(1, 3),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    data=st.data(),
)
def test_each_size_is_a_convolution_with_the_sum_of_the_experts_up_to_it(
    sizes: set[int], channels: tuple[int, int, int], stride: int, height: int, width: int, data: st.DataObject
) -> None:
    ins, outs, groups = channels
    layer = lived(ElasticConv2d(ins, outs, tuple(sizes), stride, groups=groups, dtype=torch.float64)).eval()
    layer.kernel_size = data.draw(st.sampled_from(layer.kernel_sizes))
    x = torch.randn(2, ins, height, width, dtype=torch.float64)
    kernel, padding = summed(layer, layer.kernel_size), layer.kernel_size // 2
    expected = F.conv2d(x, kernel, layer.bias, stride, padding, groups=groups)
    close(layer(x), expected, FLOAT64)
    fused = layer.fuse()
    assert fused.kernel_size == (layer.kernel_size, layer.kernel_size)
    assert isinstance(fused, DepthwiseConv2d) == (groups == ins == outs)
    close(fused(x), expected, FLOAT64)


@pytest.mark.parametrize("own", [1, 5, 9])
@pytest.mark.parametrize("groups", [1, 6])
def test_it_takes_the_place_of_a_convolution_and_its_smaller_sizes_crop(own: int, groups: int) -> None:
    conv = nn.Conv2d(6, 6, own, 2, own // 2, groups=groups).eval()
    layer = ElasticConv2d.from_conv2d(conv, (3, 7))
    assert layer.kernel_sizes == tuple(sorted({3, 7, own}))
    assert (layer.kernel_size, layer.training) == (own, False)
    x = torch.randn(2, 6, 11, 10)
    close(layer(x), conv(x), FLOAT32)
    for size in layer.kernel_sizes:
        layer.kernel_size = size
        assert torch.equal(layer.kernel(), F.pad(conv.weight, [(size - own) // 2] * 4))
        close(layer(x), resized(conv, size)(x), FLOAT32)


def test_training_runs_at_the_drawn_size_and_leaves_larger_experts_alone() -> None:
    layer = lived(ElasticConv2d(4, 4, (3, 5, 7), groups=4))
    layer.drawn = 5
    x = torch.randn(1, 4, 8, 8)
    drawn = layer(x)
    drawn.sum().backward()
    assert [expert.grad is not None for expert in layer.experts] == [True, True, False]
    close(drawn, F.conv2d(x, summed(layer, 5), layer.bias, padding=2, groups=4), FLOAT32)
    close(layer.eval()(x), F.conv2d(x, summed(layer, 7), layer.bias, padding=3, groups=4), FLOAT32)


def test_frozen_convolutions_stay_frozen() -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
    assert not any(p.requires_grad for p in ElasticConv2d.from_conv2d(conv).parameters())
    assert not any(p.requires_grad for p in resized(conv, 5).parameters())


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(4, 4, 4), "its kernel size is even"),
        (nn.Conv2d(4, 4, 3), "its padding is"),
        (nn.Conv2d(4, 4, 3, padding=2, dilation=2), "it is dilated by 2"),
        (nn.Conv2d(4, 4, (3, 5), padding="same"), "its kernel is not square"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "its padding mode is 'reflect'"),
    ],
)
def test_what_cannot_be_replaced_says_why(conv: nn.Conv2d, reason: str) -> None:
    with pytest.raises(ValueError, match=f"cannot become an ElasticConv2d: {reason}"):
        ElasticConv2d.from_conv2d(conv)
    with pytest.raises(ValueError, match=f"cannot be resized: {reason}"):
        resized(conv, 5)


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ((), ValueError, "kernel_sizes is empty"),
        ((3, 4), ValueError, "4"),
        (3, TypeError, r"such as \(3, 5, 7\); got 3"),
    ],
)
def test_sizes_are_checked(sizes: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ElasticConv2d(4, 4, sizes)  # type: ignore[arg-type]
