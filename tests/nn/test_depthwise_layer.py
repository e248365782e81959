import copy
import pickle

import pytest
import torch
from torch import nn

from tolerances import FLOAT32, close
from widefield.nn import DepthwiseConv2d

CASES = [
    {"kernel_size": 7, "padding": 3},
    {"kernel_size": (15, 5), "padding": "same", "bias": False},
    {"kernel_size": 5, "stride": 2, "padding": 2},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": 4, "padding": "valid"},
    {"kernel_size": 7, "padding": 3, "padding_mode": "reflect"},
    {"kernel_size": 5, "padding": "same", "padding_mode": "circular"},
]


def pair(**options):
    conv = nn.Conv2d(6, 6, groups=6, **options)
    return conv, DepthwiseConv2d.from_conv2d(conv)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_it_is_the_convolution_that_it_takes_the_place_of(options):
    conv, layer = pair(**options)
    assert layer.weight is conv.weight
    assert layer.bias is conv.bias
    assert layer.state_dict().keys() == conv.state_dict().keys()
    assert isinstance(layer, nn.Conv2d)
    x = torch.randn(2, 6, 13, 12)
    close(layer(x), conv(x), FLOAT32)
    close(layer(x[0]), conv(x[0]), FLOAT32)  # without a batch
    seen = x.contiguous(memory_format=torch.channels_last)
    close(layer(seen), conv(seen), FLOAT32)
    x.requires_grad_()
    for a, b in zip(*(torch.autograd.grad(m(x).square().sum(), [x, conv.weight]) for m in (layer, conv)), strict=True):
        close(a, b, FLOAT32)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_fuse_gives_the_plain_convolution_back(options):
    conv, layer = pair(**options)
    plain = layer.eval().fuse()
    assert type(plain) is nn.Conv2d
    assert torch.equal(plain.weight, conv.weight)
    assert repr(plain) == repr(conv)
    assert not plain.training
    x = torch.randn(1, 6, 13, 12)
    assert torch.equal(plain(x), conv(x))


def test_the_constructor_is_conv2d_s():
    torch.manual_seed(0)
    layer = DepthwiseConv2d(4, 4, 5, stride=2, padding=1, bias=False, dtype=torch.double)
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 5, stride=2, padding=1, groups=4, bias=False, dtype=torch.double)
    assert torch.equal(layer.weight, conv.weight)
    x = torch.randn(2, 4, 9, 9, dtype=torch.double)
    assert torch.equal(layer(x), conv(x))
    assert DepthwiseConv2d(4, 4, 31, padding="same")(torch.randn(1, 4, 6, 5)).shape == (1, 4, 6, 5)


def test_copies():
    layer = DepthwiseConv2d(4, 4, 15, padding="same", backend="aten")
    x = torch.randn(1, 4, 8, 8)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.backend == "aten"
        assert torch.equal(twin(x), layer(x))


def test_bad_input():
    with pytest.raises(ValueError, match=r"backend must be one of .* got 'atan'. Did you mean 'aten'"):
        DepthwiseConv2d(4, 4, 3, padding="same", backend="atan")
    with pytest.raises(ValueError, match="it is not depthwise: 4 input channels, 8 output channels, groups=4"):
        DepthwiseConv2d.from_conv2d(nn.Conv2d(4, 8, 3, groups=4))
    with pytest.raises(ValueError, match="it is a LazyConv2d"):
        DepthwiseConv2d.from_conv2d(nn.LazyConv2d(8, 3))
    with pytest.raises(ValueError, match=r"must be \(N, 4, H, W\); got shape \(2, 3, 5, 5\)"):
        DepthwiseConv2d(4, 4, 3, padding="same")(torch.randn(2, 3, 5, 5))
    with pytest.raises(ValueError, match="cannot compute the forward of this convolution"):
        DepthwiseConv2d(4, 4, 3, stride=2, padding=1, backend="fft")(torch.randn(2, 4, 5, 5))
