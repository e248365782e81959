"""Small versions of every registered network work with timm's and this library's tools."""

import argparse
import copy
import inspect
import io
import re

import pytest
import timm
import torch
from networks import BACKBONES, DISTINCT, NAMES, ONE_A_FAMILY, settled, small
from safetensors.torch import save_file
from torch import nn

import widefield
from tolerances import NETWORK, NETWORK_BFLOAT16, close
from widefield import models

BEFORE_A_NORM = re.compile(r"patch_embed\d\.projection\.(?:[03]\.)?bias|conv_head\.0\.bias")
"""Parameters without effect, because a norm follows them."""


def test_all_are_here():
    assert len(NAMES) >= 30
    assert set(NAMES) == set(models.STATED)


def test_small_versions_are_those_of_the_distinct_networks():
    """Layers, their settings and weights are compared, so that what holds of these holds of all."""
    found = {}
    for name in NAMES:
        with torch.device("meta"):
            model = small(name)
        settings = [
            {key: value for key, value in vars(module).items() if isinstance(value, (bool, int, float, str, tuple))}
            for module in model.modules()
        ]
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        found.setdefault(repr((model, settings, shapes)), []).append(name)
    assert sorted(name for names in found.values() for name in set(names) & set(DISTINCT)) == sorted(DISTINCT)
    assert len(found) == len(DISTINCT)


@pytest.mark.parametrize("name", DISTINCT)
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


@pytest.mark.parametrize("name", DISTINCT)
def test_every_parameter_gets_a_gradient(name):
    model = small(name, drop_path_rate=0.0 if "cifar" not in name else None).train()
    x = torch.randn(4, 3, 64, 64)
    loss = torch.nn.functional.cross_entropy(model(x), torch.arange(4))
    loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without


@pytest.mark.parametrize("name", DISTINCT)
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


@pytest.mark.parametrize("name", DISTINCT)
def test_state_dict_round_trip(name):
    one, other = settled(small(name)), small(name).eval()
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(one(x), other(x))


@pytest.mark.parametrize("name", DISTINCT)
def test_reparameterized_is_the_same_function(name):
    if name.startswith("resnet"):
        pytest.skip("plain networks, in which nothing merges")
    model = settled(small(name))
    x = torch.randn(2, 3, 64, 64)
    fused = widefield.reparameterize(model, x)
    with torch.no_grad():
        close(fused(x), model(x), NETWORK)


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_heads_can_be_changed(name):
    model = small(name, in_chans=1, drop_rate=0.1, drop_path_rate=0.1).eval()
    x = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        features = model.forward_features(x)
        close(model.forward_head(features), model(x), NETWORK)
        assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
        assert model.pretrained_cfg["architecture"] == name
        model.reset_classifier(3)
        assert model(x).shape == (2, 3)
        assert model.get_classifier().out_features == 3
        model.reset_classifier(0)
        assert model(x).shape == (2, model.head_hidden_size)
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        small(name, pretrained=True)


@pytest.mark.parametrize("name", [name for name in BACKBONES if name != "internimage_h"])  # it pools by attention
def test_every_pool_fits_the_classifier(name):
    model = small(name).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for pool, share in (("max", 1), ("catavgmax", 2)):
            model.reset_classifier(3, pool)
            assert model(x).shape == (2, 3)
            read = model.forward_head(model.forward_features(x), pre_logits=True)
            assert read.shape == (2, share * model.num_features)
        model.reset_classifier(3, "")
        assert model(x).shape == (2, 3, *model.forward_features(x).shape[2:])


@pytest.mark.parametrize("name", [name for name in BACKBONES if name != "internimage_h"])  # its head reads two stages
def test_intermediate_features_and_pruning(name):
    model = settled(small(name))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        last, features = model.forward_intermediates(x)
        close(last, model.forward_features(x), NETWORK)
        assert [feature.shape[1] for feature in features] == [info["num_chs"] for info in model.feature_info]
        (normed,) = model.forward_intermediates(x, 1, norm=True, intermediates_only=True)
        assert torch.equal(normed, last)
        early, (second,) = model.forward_intermediates(x, [1], stop_early=True)
        assert torch.equal(early, features[1])
        assert torch.equal(second, features[1])
        before = len(model.state_dict())
        assert model.prune_intermediate_layers([1]) == [1]
        assert len(model.state_dict()) < before
        assert torch.equal(model(x), features[1])
        assert torch.equal(model.forward_features(x), features[1])


@pytest.mark.parametrize("name", [*BACKBONES, "mobilenetv2_lk", "morf_convnext_tiny"])
def test_a_training_step_reaches_every_parameter(name):
    model = settled(small(name, drop_path_rate=0.1)).train()
    x, direction = torch.randn(8, 3, 64, 64), torch.randn(8, 7)
    y = model(x)
    assert y.isfinite().all()
    (y * direction).sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0 or BEFORE_A_NORM.fullmatch(key), key
    before = model(x)
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert not torch.equal(model(x), before)


@pytest.mark.parametrize("name", BACKBONES)
def test_drop_path_rates_grow_linearly(name):
    rates = [
        module.drop_prob for module in small(name, drop_path_rate=0.4).modules() if type(module).__name__ == "DropPath"
    ]
    assert rates == sorted(rates)
    assert (min(rates), max(rates)) == (0, pytest.approx(0.4))


@pytest.mark.parametrize("name", [*BACKBONES, "mobilenetv2_lk"])
def test_copies_layouts_and_empty_batches(name):
    model = settled(small(name))
    x = torch.randn(2, 3, 75, 90)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
        close(twin(x.contiguous(memory_format=torch.channels_last)), expected, NETWORK)
        assert model(x[:0]).shape == (0, 7)


@pytest.mark.parametrize("name", [name for name in BACKBONES if not name.startswith("resnet")])
def test_reparameterized_by_timm_under_autocast_and_as_features(name):
    model = settled(small(name))
    x = torch.randn(2, 3, 64, 64)
    merged = timm.utils.reparameterize_model(model)
    assert widefield.compare(model, merged, x).relative <= NETWORK
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = widefield.reparameterize(model, x)(x)
    expected = model(x)
    assert (low.float() - expected).norm() <= NETWORK_BFLOAT16 * expected.norm()
    features = settled(small(name, features_only=True))
    for ours, theirs in zip(widefield.reparameterize(features, x)(x), features(x), strict=True):
        close(ours, theirs, NETWORK)


SLOW_TO_COMPILE = [name for name in (*BACKBONES, "mobilenetv2_lk") if not name.startswith("slak")]


@pytest.mark.parametrize(
    "name", ["slak_tiny", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_TO_COMPILE)]
)
def test_compile_traces_both_forms_without_breaks(name):
    torch.compiler.reset()  # the families share a forward, which is compiled once for each class, at most 8 times
    model = settled(small(name))
    x = torch.randn(2, 3, 64, 64)
    for network in (model, model if name.startswith("resnet") else widefield.reparameterize(model, x)):
        close(torch.compile(network, backend="aot_eager", fullgraph=True)(x), network(x), NETWORK)


VARIANTS = [("hornet_tiny_gf", {"layer_scale_init": 0}), ("slak_tiny", {"decomposed": False})]
"""Networks with other keys or merged layers than the family's published ones."""


@pytest.mark.parametrize("form", ["training", "merged"])
@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in BACKBONES), *VARIANTS])
def test_published_weights_load_in_every_form_and_file(tmp_path, name, options, form):
    if form == "merged" and name.startswith("resnet"):
        pytest.skip("plain networks, in which nothing merges")
    x = torch.randn(2, 3, 64, 64)
    source = settled(small(name, num_classes=21, **options))
    source = widefield.reparameterize(source, x) if form == "merged" else source
    state = {key: value.contiguous() for key, value in source.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 300, "args": argparse.Namespace(lr=1e-3)}, tmp_path / "w.pth.tar")
    torch.save({"model": state}, tmp_path / "wrapped.pth")
    torch.save(state, tmp_path / "w.pth")
    save_file(state, tmp_path / "w.safetensors")

    def load(file="w.pth", **arguments):
        overlay = {"file": str(tmp_path / file)}
        return small(name, pretrained=True, pretrained_cfg_overlay=overlay, **options, **arguments)

    with torch.no_grad():
        for file in ("w.pth.tar", "wrapped.pth", "w.pth", "w.safetensors"):
            model = load(file, num_classes=21)
            assert model.training
            assert list(model.state_dict()) == list(state)
            close(model.eval()(x), source(x), NETWORK)
        body = source.forward_features(x)
        for classes in (7, 0):  # another head is newly initialized
            close(load(num_classes=classes).eval().forward_features(x), body, NETWORK)
        first = source.pretrained_cfg["first_conv"] + ".weight"
        gray = load(in_chans=1, num_classes=3)
        close(gray.state_dict()[first], state[first].sum(1, keepdim=True), NETWORK)
        assert gray.eval()(x[:, :1]).shape == (2, 3)
        features = load(features_only=True).eval()(x)
        for ours, theirs in zip(features, source.forward_intermediates(x, intermediates_only=True), strict=True):
            close(ours, theirs, NETWORK)


def test_constructors_start_with_the_same_arguments():
    classes = [value for value in vars(models).values() if isinstance(value, type) and issubclass(value, nn.Module)]
    assert len(classes) == 12
    for cls in classes:
        first = list(inspect.signature(cls).parameters.values())[:5]
        assert [p.name for p in first] == ["in_chans", "num_classes", "global_pool", "drop_rate", "drop_path_rate"]
        assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in first)


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
    if not name.startswith(("hornet", "internimage", "morf")):
        assert not any("widefield" in str(node.target) for node in program.graph.nodes)
