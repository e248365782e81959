"""Weights computed in every call: parametrizations, weight and spectral norm, pruning."""

import logging
from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import widefield
from tolerances import FLOAT32, close
from widefield.surgery import NothingToFuseError

WAYS = {
    "weight_norm": (parametrizations.weight_norm, "remove_parametrizations"),
    "spectral_norm": (parametrizations.spectral_norm, "remove_parametrizations"),
    "old weight_norm": (weight_norm, "remove_weight_norm"),
    "old spectral_norm": (spectral_norm, "remove_spectral_norm"),
    "pruning": (lambda layer: prune.l1_unstructured(layer, "weight", 0.3), "prune.remove"),
}
CONVERSIONS = {
    "none": None,
    "fast": widefield.FastDepthwise(),
    "mask": widefield.GMConv(body="static"),
    "dynamic mask": widefield.GMConv(body="dynamic"),
    "large": widefield.LargeKernel(9),
    "bands": widefield.LargeKernel(9, branches="bands", small=7),
    "inception": widefield.InceptionSplit(),
    "lka": widefield.TokenMixer("lka"),
    "gnconv": widefield.TokenMixer("gnconv"),
}


def network(config=None):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 7, padding=3, groups=8)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), conv, nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    ).eval()
    return model if config is None else widefield.convert(model, config, where="1")


def spatial_name(model):
    """Return the name of the layer with a kernel that replaced the depthwise convolution."""
    return next(
        name
        for name, module in model.named_modules()
        if name.split(".")[0] == "1" and isinstance(getattr(module, "weight", None), nn.Parameter)
        if module.weight.ndim == 4
    )


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CONVERSIONS)
def test_they_are_left_with_the_reason(name, way):
    make, remover = WAYS[way]
    model, x = network(CONVERSIONS[name]), torch.randn(2, 3, 12, 12)
    layer = spatial_name(model)
    make(model.get_submodule(layer))
    model.eval()
    expected = model(x)  # the weight is not a leaf now, which copy.deepcopy rejects
    reports = []
    with suppress(NothingToFuseError):
        widefield.reparameterize(model, x, report=reports.append)
    for report in reports:
        assert name == "none" or any(remover in left.reason for left in report.left)
    fused = widefield.reparameterize(model, x) if reports else model
    close(fused(x), expected, FLOAT32)
    if any(isinstance(m, nn.Conv2d) and set(m.kernel_size) != {1} for m in fused.modules()):
        close(widefield.trim(fused, 0.0)(x), expected, FLOAT32)
    for step in widefield.plan(model, widefield.MoRF((7, 9)), where="*").steps:
        assert step.name != layer or step.after is None


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("index", [2, 6])
def test_norms_and_linear_layers_are_left_too(index, way):
    make, _ = WAYS[way]
    model, x = network(widefield.LargeKernel(9)), torch.randn(2, 3, 12, 12)
    if index == 2 and way != "pruning":
        pytest.skip("they take weights of two dimensions and more")
    make(model[index])
    model.eval()
    expected = model(x)
    fused = widefield.reparameterize(model, x)
    close(fused(x), expected, FLOAT32)
    assert type(fused[index]) is type(model[index])


def test_what_is_removed_merges_again():
    model, x = network(widefield.LargeKernel(9)), torch.randn(2, 3, 12, 12)
    layer = model.get_submodule(spatial_name(model))
    prune.l1_unstructured(layer, "weight", 0.3)
    expected = model(x)
    prune.remove(layer, "weight")
    close(widefield.reparameterize(model, x)(x), expected, FLOAT32)


def test_specialize_takes_a_parametrized_mask():
    model, x = network(widefield.GMConv(body="dynamic")), torch.randn(2, 3, 12, 12)
    parametrizations.weight_norm(model[1])
    model.eval()
    static = widefield.specialize(model, [x])
    close(static(x), model(x), FLOAT32)


def test_sparse_training_says_what_stays_dense(caplog):
    model = network()
    parametrizations.weight_norm(model[1])
    with caplog.at_level(logging.WARNING, "widefield"):
        sparse = widefield.surgery.DynamicSparsity(model, init="uniform")
    assert "1 layers stay dense. 1: its weight is parametrized" in caplog.text
    sparse.start()
    assert set(sparse.masks) == {"0.weight", "6.weight"}
    lone = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)))
    with pytest.raises(ValueError, match=r"whose weight is trained\. 0: its weight is parametrized"):
        widefield.surgery.DynamicSparsity(lone, init="uniform")


@pytest.mark.parametrize("make", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_weight_norm_on_a_model_in_evaluation_mode(make):
    """torch adds it in training mode, which does not affect its outputs."""
    model, x, reports = network(widefield.GMConv(body="static")), torch.randn(2, 3, 12, 12), []
    make(model[1])
    with suppress(NothingToFuseError):
        close(widefield.reparameterize(model, x, report=reports.append)(x), model(x), FLOAT32)
    parametrizations.spectral_norm(model[0]).parametrizations.weight[0].train()
    with pytest.raises(RuntimeError, match="is in training mode"):  # it iterates in each call until eval()
        widefield.reparameterize(model, x)
