"""New token mixers start at the scale of the convolution that they replace."""

import pytest
import timm
import torch
from torch import nn

import widefield
from tolerances import FLOAT32, close
from widefield.nn.mixers import GATED, TOKEN_MIXERS, Rescaled, in_place_of


def depthwise(width=64, size=3, factor=1.0):
    torch.manual_seed(0)
    conv = nn.Conv2d(width, width, size, padding=size // 2, groups=width)
    conv.weight.data.mul_(factor)
    conv.bias.data.zero_()
    return conv.eval()


def inputs():
    """Return white noise, noise plus a constant per channel, and outputs of a ReLU."""
    torch.manual_seed(1)
    noise = torch.randn(2, 64, 20, 20)
    return noise, noise + torch.randn(2, 64, 1, 1), noise.relu()


@pytest.mark.parametrize("factor", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("mixer", [name for name in TOKEN_MIXERS if name != "pooling"])  # it has no parameters
def test_the_output_is_about_as_large(mixer, factor):
    conv = depthwise(factor=factor)
    layer = in_place_of(conv, mixer, 1)
    for x in inputs():
        ratio = layer(x).square().mean().sqrt() / conv(x).square().mean().sqrt()
        assert 1 / 4 < ratio < 4


@pytest.mark.parametrize("mixer", GATED)
@pytest.mark.parametrize("scale", [1e-3, 1e6])
def test_gated_mixers_keep_the_scale_of_their_input(mixer, scale):
    layer = in_place_of(depthwise(), mixer, 3)
    assert isinstance(layer, Rescaled)
    x = inputs()[1]
    close(layer(scale * x) / scale, layer(x), 1e-2 if scale < 1 else FLOAT32)


@pytest.mark.parametrize("name", ["starnet_s050", "ese_vovnet19b_slim_dw", "ghostnet_050", "efficientvit_b0"])
def test_shaken_networks_stay_finite(name):
    torch.manual_seed(0)
    model, x = timm.create_model(name, num_classes=5).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.3, 3.0)
        assert model(x).isfinite().all()
        for mixer in TOKEN_MIXERS:
            assert widefield.convert(model, widefield.TokenMixer(mixer))(x).isfinite().all(), mixer


def test_attention_takes_widths_that_32_does_not_divide():
    x = torch.randn(2, 112, 8, 8)
    assert TOKEN_MIXERS["attention"](112, 0)(x).shape == x.shape


def test_device_type_mode_and_gradients_are_those_of_the_convolution():
    conv = depthwise().double().requires_grad_(False).train()
    for mixer in TOKEN_MIXERS:
        layer = in_place_of(conv, mixer, 0)
        assert layer.training
        assert all(p.dtype == torch.float64 and not p.requires_grad for p in layer.parameters())


def test_a_mixer_that_cannot_have_the_channels_is_passed_over():
    (step,) = widefield.plan(nn.Sequential(depthwise(1)), widefield.TokenMixer("moga"), where="0").steps
    assert step.reason.startswith("moga does not support its 1 channels")
