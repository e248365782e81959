"""Frozen batch norms have no training mode and are folded like batch norms."""

import copy

import pytest
import timm
import torch
import torchvision
from test_folded_networks import shaken_a_little
from timm.layers import FrozenBatchNormAct2d, freeze_batch_norm_2d
from timm.layers.norm_act import FrozenBatchNorm2d
from torch import nn

import widefield
from tolerances import NETWORK, close
from widefield.surgery.folding import is_norm

NETWORKS = {
    "resnet18": lambda: timm.create_model("resnet18", num_classes=5),
    "torchvision": lambda: torchvision.models.mobilenet_v2(width_mult=0.35, num_classes=5),
    "norms with activations": lambda: timm.create_model("regnetx_002", num_classes=5),
    "blocks that merge themselves": lambda: timm.create_model("repvgg_a0", num_classes=5),
    "blocks with one convolution": lambda: timm.create_model("fastvit_t8", num_classes=5),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_frozen_network_is_reparameterized(name, inplace):
    torch.manual_seed(0)
    model, x = shaken_a_little(NETWORKS[name]()), torch.randn(2, 3, 64, 64)
    frozen = freeze_batch_norm_2d(copy.deepcopy(model).eval())
    assert any(module.training for module in frozen.modules() if is_norm(module))
    fused = widefield.reparameterize(frozen, x, inplace=inplace)
    assert not any(is_norm(module) for module in fused.modules())
    assert not any(module.training for module in fused.modules())
    close(fused(x), model(x), NETWORK)


def test_converted_layers_with_frozen_norms_merge():
    model = shaken_a_little(torchvision.models.mobilenet_v2(width_mult=0.35, num_classes=5))
    large, x = widefield.convert(model, widefield.LargeKernel(7)), torch.randn(2, 3, 64, 64)
    frozen = freeze_batch_norm_2d(copy.deepcopy(large).eval())
    fused = widefield.reparameterize(frozen, x)
    assert not any(is_norm(module) for module in fused.modules())
    close(fused(x), model(x), NETWORK)


def test_mixtures_behind_frozen_norms_are_specialized_and_trimmed():
    model, x = shaken_a_little(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))), torch.randn(2, 3, 9, 9)
    frozen = freeze_batch_norm_2d(widefield.convert(model, widefield.MoRF((3, 5)), where="0").eval())
    static = widefield.specialize(frozen, [x])
    close(static(x), model(x), NETWORK)
    close(widefield.trim(model.eval(), 0.0)(x), model(x), NETWORK)


@pytest.mark.parametrize("kind", [FrozenBatchNorm2d, FrozenBatchNormAct2d])
def test_other_layers_in_training_mode_are_still_refused(kind):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), kind(8)).eval()
    model[2].train()
    with pytest.raises(RuntimeError, match="2 is in training mode"):
        widefield.reparameterize(model)
