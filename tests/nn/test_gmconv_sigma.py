"""Training changes sigma as intended, and every value of sigma gives a valid mask."""

import math

import pytest
import torch
from torch import nn

from tolerances import FLOAT32, close
from widefield.nn.gmconv import DynamicGMConv2d, GMConv2d, gaussian_mask

BOTH = pytest.mark.parametrize("layer_type", [GMConv2d, DynamicGMConv2d])
WILD = [-3.0, 0.0, -0.0, 1e-38, -1e-3, 0.2, 500.0, -1e4, 1e30, -1e30]


@pytest.mark.parametrize("value", WILD)
@pytest.mark.parametrize("kernel_size", [3, 4, 11, (1, 7)])
def test_any_stored_sigma_gives_a_finite_mask_and_a_gradient_that_leads_back(value, kernel_size):
    layer = GMConv2d(1, 1, kernel_size)
    nn.init.constant_(layer.sigma, value)
    mask = layer.mask()
    assert mask.isfinite().all()
    assert mask.max() == 1
    mask.sum().backward()  # a larger |sigma| gives a larger mask
    assert layer.sigma.grad.isfinite()
    assert layer.sigma.grad * (-1 if value < 0 else 1) > 0
    if abs(value) > 1:
        close(mask, gaussian_mask(layer.kernel_size, torch.tensor(min(abs(value), layer.longest))), FLOAT32)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_no_number_leaves_the_kernel_as_it_is(value):
    layer, dynamic = GMConv2d(1, 1, 5), DynamicGMConv2d(1, 1, 5)
    nn.init.constant_(layer.sigma, value)
    nn.init.constant_(dynamic.predictor.out.bias, value)
    for mask in (layer.mask(), dynamic.mask(), dynamic.masks(torch.ones(1, 1, 3, 3))[0]):
        close(mask, torch.ones(5, 5), 1e-4)


@pytest.mark.parametrize("bias", [(a, b) for a in WILD for b in WILD])
def test_any_predicted_sigma_gives_a_finite_mask_and_finite_gradients(bias):
    for predict in ("sigma", "sigma1_sigma2", "sigma1_ratio"):
        layer = DynamicGMConv2d(2, 1, 5, predict=predict)
        with torch.no_grad():
            layer.predictor.out.bias.copy_(torch.tensor(bias[: len(layer.predictor.out.bias)]))
        masks = layer.masks(torch.randn(2, 2, 6, 6))
        assert masks.isfinite().all()
        assert masks.amax((1, 2)).eq(1).all()
        masks.sum().backward()
        assert all(p.grad.isfinite().all() for p in layer.predictor.parameters())
        assert layer.predictor.out.bias.grad.abs().max() > 0


BRUTAL = {
    "sgd": lambda p: torch.optim.SGD(p, 1e6),
    "sgd with decay": lambda p: torch.optim.SGD(p, 1e6, weight_decay=5e-4),
    "sgd with momentum": lambda p: torch.optim.SGD(p, 1e4, momentum=0.99),
    "sgd uphill": lambda p: torch.optim.SGD(p, 1e3, maximize=True),
    "adam": lambda p: torch.optim.Adam(p, 1e3),
    "adamw": lambda p: torch.optim.AdamW(p, 1.0, weight_decay=10.0),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e8),
}


@BOTH
@pytest.mark.parametrize("optimizer", BRUTAL)
def test_no_optimizer_breaks_the_mask(layer_type, optimizer):
    layer = layer_type(2, 2, 5, padding=2)
    learn = [layer.sigma] if layer_type is GMConv2d else [layer.predictor.out.bias]
    optimizer = BRUTAL[optimizer](learn)
    x, target = torch.randn(2, 2, 7, 7), torch.randn(2, 2, 7, 7)
    for _ in range(40):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        assert learn[0].grad.isfinite().all()
        optimizer.step()
        mask = layer.mask()
        assert mask.isfinite().all()
        assert mask.max() == 1
        assert layer(x).isfinite().all()


@pytest.mark.parametrize("start", [0.0, -3.0, 0.01, -20.0])
def test_sigma_comes_back_from_anywhere(start):
    target, layer = GMConv2d(2, 2, 5, padding=2, sigma=1.5), GMConv2d(2, 2, 5, padding=2)
    layer.load_state_dict(target.state_dict())
    nn.init.constant_(layer.sigma, start)
    x = torch.randn(4, 2, 9, 9)
    optimizer = torch.optim.Adam([layer.sigma], lr=0.2)
    for _ in range(200):
        optimizer.zero_grad()
        (layer(x) - target(x).detach()).square().mean().backward()
        optimizer.step()
    assert abs(layer.sigma.item()) == pytest.approx(1.5, abs=0.05)


@BOTH
def test_training_shrinks_a_receptive_field_that_is_too_large(layer_type):
    layer = layer_type(2, 2, 7, padding=3)
    nn.init.ones_(layer.weight)
    x = torch.randn(16, 2, 10, 10)
    learn = [layer.sigma] if layer_type is GMConv2d else list(layer.predictor.parameters())
    optimizer = torch.optim.Adam(learn, lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        (layer(x) - x).square().mean().backward()
        optimizer.step()
    mask = layer.mask() if layer_type is GMConv2d else layer.masks(x).mean(0)
    assert mask.sum() < 42 / 4  # at sigma 5 it is 42
