"""Every registered network, made small, does what timm's and this library's tools ask of a network."""

import copy
import io

import pytest
import torch
from networks import NAMES, ONE_A_FAMILY, settled, small

import widefield
from tolerances import NETWORK, NETWORK_BFLOAT16, close
from widefield import models


def test_all_are_here():
    assert len(NAMES) >= 30
    assert set(NAMES) == set(models.STATED)


@pytest.mark.parametrize("name", NAMES)
def test_finite_outputs_at_two_sizes_in_float32_and_under_autocast(name):
    model = settled(small(name))
    for size in ((64, 64), (75, 90)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            y = model(x)
            assert y.shape == (2, 7)
            assert y.isfinite().all()
            with torch.autocast("cpu", torch.bfloat16):
                low = model(x)
        assert (low.float() - y).norm() <= NETWORK_BFLOAT16 * y.norm()


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(name):
    model = small(name, drop_path_rate=0.0 if "cifar" not in name else None).train()
    x = torch.randn(4, 3, 64, 64)
    loss = torch.nn.functional.cross_entropy(model(x), torch.arange(4))
    loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without


@pytest.mark.parametrize("name", NAMES)
def test_features(name):
    model = small(name, features_only=True).eval()
    with torch.no_grad():
        features = model(torch.randn(1, 3, 64, 64))
    reductions = model.feature_info.reduction()
    assert [64 // feature.shape[2] for feature in features] == reductions
    assert [feature.shape[1] for feature in features] == model.feature_info.channels()
    if "cifar" not in name:
        assert reductions[-4:] == [4, 8, 16, 32]
    fewer = small(name, features_only=True, out_indices=(0, 1)).eval()
    assert len(fewer(torch.randn(1, 3, 64, 64))) == 2


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_round_trip(name):
    one, other = settled(small(name)), small(name).eval()
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(one(x), other(x))


@pytest.mark.parametrize("name", NAMES)
def test_reparameterized_is_the_same_function(name):
    if name.startswith("resnet"):
        pytest.skip("plain networks, in which nothing merges")
    model = settled(small(name))
    x = torch.randn(2, 3, 64, 64)
    fused = widefield.reparameterize(model, x)
    with torch.no_grad():
        close(fused(x), model(x), NETWORK)


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_heads_can_be_changed_and_blocks_checkpointed(name):
    model = small(name, in_chans=1).eval()
    x = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        features = model.forward_features(x)
        close(model.forward_head(features), model(x), NETWORK)
        assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
        model.reset_classifier(3)
        assert model(x).shape == (2, 3)
        model.reset_classifier(0)
        assert model(x).shape == (2, model.head_hidden_size)
    plain, checkpointed = small(name).train(), None
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    x = torch.randn(2, 3, 64, 64)
    gradients = []
    for network in (plain, checkpointed):
        torch.manual_seed(0)
        network(x).square().sum().backward()
        gradients.append([p.grad for p in network.parameters()])
    for a, b in zip(*gradients, strict=True):
        close(b, a, NETWORK)


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_the_fused_network_exports_with_a_dynamic_batch(name):
    model = settled(small(name))
    x = torch.randn(2, 3, 64, 64)
    fused = model if name.startswith("resnet") else widefield.reparameterize(model, x)
    batch = torch.export.Dim("batch", min=1, max=16)
    program = torch.export.export(fused, (x,), dynamic_shapes=({0: batch},))
    for count in (2, 3):
        x = torch.randn(count, 3, 64, 64)
        with torch.no_grad():
            close(program.module()(x), fused(x), NETWORK)
