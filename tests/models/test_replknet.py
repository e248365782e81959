import copy

import pytest
import timm
import torch
from conformance import check_features, check_logits, check_state, check_tensors, filled, fixture
from safetensors.torch import save_file
from timm.models import group_parameters
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import widefield
from tolerances import FLOAT32, NETWORK, close
from widefield.models.replknet import STATED, RepLKNet
from widefield.nn import ConvNorm, LargeKernelConv2d, ReparamConv2d
from widefield.surgery.walk import fuse_layers

TINY = {"depths": (1, 1, 2, 1), "widths": (8, 16, 24, 32), "kernel_sizes": (9, 7, 5, 3), "num_classes": 7}


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def macs(model, size):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() // 2


def merged(model):
    """Merge only the layers that the authors' code merges."""
    return fuse_layers(copy.deepcopy(model).eval(), select=lambda m: isinstance(m, ReparamConv2d))[0]


def meta(name="replknet_31b", **arguments):
    with torch.device("meta"):
        return timm.create_model(name, **arguments).eval()


def tiny(**arguments):
    model = timm.create_model("replknet_31b", **{**TINY, **arguments})
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean, 0, 0.1)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return model.eval()


@pytest.mark.parametrize(("name", "kernels"), [("replknet_31b", (31, 29, 27, 13)), ("replknet_k13", (13, 13, 13, 13))])
def test_the_network_is_the_official_one_in_all_three_forms(name, kernels):
    expected = fixture(name)
    model = filled(timm.create_model("replknet_31b", kernel_sizes=kernels))
    check_state(model, expected["state_dict"])
    assert list(model.state_dict()) == list(expected["state_dict"])
    assert parameters(model) == expected["params"]
    check_logits(model, expected)
    check_features(model, expected)
    for run in expected["extra_runs"]:
        check_logits(model, run)
        check_features(model, run)
    for key, select in (("merged", ReparamConv2d), ("merged_all_bn", (ReparamConv2d, ConvNorm))):
        fuse_layers(model, select=lambda m, kinds=select: isinstance(m, kinds))
        check_state(model, expected[key]["state_dict"])
        assert parameters(model) == expected[key]["params"]
        check_logits(model, expected[key])
        check_tensors(model, {"tensor_checks": {}, **expected[key]})


@pytest.mark.parametrize("name", ["replknet_31b", "replknet_k13"])
def test_multiply_adds_are_the_official_ones(name):
    expected = fixture(name)
    model = meta(kernel_sizes=expected["config"]["large_kernel_sizes"])
    assert macs(model, 224) == expected["macs_224"]
    assert macs(merged(model), 224) == expected["merged"]["macs_224"]


# Table 5: kernels -> parameters in millions, multiply-adds in G.
TABLE_5 = {
    (3, 3, 3, 3): (71.8, 12.9),
    (7, 7, 7, 7): (72.2, 13.1),
    (13, 13, 13, 13): (73.7, 13.4),
    (25, 25, 25, 13): (78.2, 14.8),
    (31, 29, 27, 13): (79.3, 15.3),
}


@pytest.mark.parametrize("kernels", TABLE_5)
def test_table_5_counts_merged_networks_without_norms(kernels):
    """Four of five agree to the last printed digit. 31-29-27-13 has 79.39M and 15.354G, stated as 79.3M and 15.3G."""
    model = merged(meta(kernel_sizes=kernels))
    operations = macs(model, 224)
    fuse_layers(model, select=lambda m: isinstance(m, ConvNorm))
    left = sum(parameters(m) for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    counts = (parameters(model) - left) / 1e6, operations / 1e9
    within = (0.1, 0.1) if kernels[0] == 31 else (0.05, 0.05)
    for count, stated, gap in zip(counts, TABLE_5[kernels], within, strict=True):
        assert abs(count - stated) <= gap


@pytest.mark.parametrize(
    ("name", "size", "millions", "giga"),
    [("replknet_31b", 384, 79, 45.1), ("replknet_31l", 384, 172, 96.0), ("replknet_xl", 320, 335, 128.7)],
)
def test_table_6(name, size, millions, giga):
    model = merged(meta(name))
    assert parameters(model) / 1e6 == pytest.approx(millions, abs=0.6)
    assert macs(model, size) / 1e9 == pytest.approx(giga, abs=0.05)
    assert name in STATED


def test_the_largest_has_no_small_kernels_and_wider_large_ones():
    model = meta("replknet_xl")
    layers = [m for m in model.modules() if isinstance(m, LargeKernelConv2d)]
    assert len(layers) == 24
    assert all(len(layer.branches()) == 1 for layer in layers)
    convolutions = [layer.branches()[0][0] for layer in (layers[0], layers[2], layers[4], layers[-1])]
    assert [conv.in_channels for conv in convolutions] == [384, 768, 1536, 3072]
    assert [conv.kernel_size for conv in convolutions] == [(27, 27), (27, 27), (27, 27), (13, 13)]
    assert model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    assert model.pretrained_cfg["input_size"] == (3, 320, 320)


def test_configurations_of_the_published_weights():
    assert timm.list_models("replknet*") == ["replknet_31b", "replknet_31l", "replknet_xl"]
    large = meta("replknet_31b.in22k_ft_in1k_384").pretrained_cfg
    assert (large["input_size"], large["crop_pct"], large["crop_mode"]) == ((3, 384, 384), 1.0, "squash")
    assert meta("replknet_31l.in22k").head.out_features == 21841


def test_a_pair_of_blocks_shares_its_drop_path_rate():
    model = meta(drop_path_rate=0.5)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, timm.layers.DropPath)]
    assert rates[0::2] == rates[1::2]
    assert rates[0::2] == pytest.approx([0.5 * i / 23 for i in range(24)])


def test_any_size_and_timms_ways():
    model = tiny(in_chans=1, drop_path_rate=0.1, drop_rate=0.1)
    x = torch.randn(2, 1, 75, 90)
    features = model.forward_intermediates(x, intermediates_only=True)
    assert [tuple(f.shape[-2:]) for f in features] == [(19, 23), (10, 12), (5, 6), (3, 3)]
    assert model(x).shape == (2, 7)
    last, _ = model.forward_intermediates(x)
    close(model.forward_head(last), model(x), FLOAT32)
    assert model.forward_head(last, pre_logits=True).shape == (2, 32)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(3, "")
    assert model(x).shape == (2, 3, 3, 3)
    assert model.prune_intermediate_layers([1]) == [1]
    assert not any(name.startswith(("stages.2", "transitions.1", "norm", "head")) for name in model.state_dict())
    close(model.forward_intermediates(x, [1], intermediates_only=True)[0], features[1], FLOAT32)
    only = timm.create_model("replknet_31b", features_only=True, out_indices=(1, 3), **TINY)
    assert [tuple(f.shape) for f in only(torch.randn(1, 3, 64, 64))] == [(1, 16, 8, 8), (1, 32, 2, 2)]
    assert only.feature_info.reduction() == [8, 32]


@pytest.mark.parametrize("coarse", [False, True])
def test_layers_are_grouped_from_the_image_to_the_head(coarse):
    model = tiny()
    groups = group_parameters(model, model.group_matcher(coarse=coarse))
    order = [{name.rsplit(".", 1)[0] for name in names} for names in groups.values()]
    assert (
        len(order) == 1 + (4 if coarse else 10) + 3 + 1
    )  # stem; stages or blocks, the last one with the norm; transitions; head
    stages = [next(iter(sorted(names))) for names in order]
    assert stages[0].startswith("stem")
    assert stages[-1] == "head"
    assert [name.split(".")[1] for name in stages if name.startswith("transitions")] == ["0", "1", "2"]
    first = next(i for i, name in enumerate(stages) if name.startswith("stages.1"))
    assert stages[first - 1].startswith("transitions.0")
    assert any(name == "norm" for name in order[-2])


@pytest.mark.parametrize("small_kernel", [5, 0])
def test_reparameterization_keeps_the_function(small_kernel):
    model = tiny(small_kernel=small_kernel)
    fused = widefield.reparameterize(model, torch.randn(1, 3, 64, 64))
    assert not any(isinstance(m, (ReparamConv2d, ConvNorm)) for m in fused.modules())
    assert sum(isinstance(m, nn.BatchNorm2d) for m in fused.modules()) == 11  # before each block, and the last
    assert widefield.compare(model, fused, torch.randn(2, 3, 40, 72)).relative <= NETWORK
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert list(merged(synchronized).state_dict()) == list(merged(model).state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"kernel_sizes": (9, 7, 5)},
            r"one entry for each stage; got \(1, 1, 2, 1\), \(8, 16, 24, 32\) and \(9, 7, 5\)",
        ),
        ({"kernel_sizes": (9, 7, 5, 4)}, "kernel_size must be odd.*; got 4"),
        ({"drop_path_rate": 1.5}, "drop_path_rate must be from 0.0 to 1.0; got 1.5"),
        ({"small_kernel": 2}, "small must be odd.*; got 2"),
        ({"kernel_sizes": (9, 7, 5, 0)}, "every entry of kernel_sizes must be at least 1; got 0"),
        ({"small_kernel": -1}, "small_kernel must be at least 0; got -1"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RepLKNet(**{**TINY, **arguments})


# Weights in the authors' format


def saved(model, path, wrap=None):
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save({wrap: state} if wrap else state, path)
    return {"file": str(path)}


@pytest.mark.parametrize("form", ["training", "merged", "all"])
@pytest.mark.parametrize(("file", "wrap"), [("w.pth", None), ("w.pth", "model"), ("w.safetensors", None)])
def test_official_weights_load(tmp_path, form, file, wrap):
    source = {"training": copy.deepcopy, "merged": merged, "all": widefield.reparameterize}[form](tiny())
    overlay = saved(source, tmp_path / file, wrap)
    model = timm.create_model("replknet_31b", pretrained=True, pretrained_cfg_overlay=overlay, **TINY)
    assert model.training
    x = torch.randn(2, 3, 64, 64)
    close(model.eval()(x), source(x), FLOAT32)
    assert list(model.state_dict()) == list(source.state_dict())


@pytest.mark.parametrize("form", ["training", "merged"])
def test_official_weights_adapt(tmp_path, form):
    source = {"training": copy.deepcopy, "merged": merged}[form](tiny(num_classes=21))
    overlay = saved(source, tmp_path / "w.pth")

    def load(**arguments):
        return timm.create_model(
            "replknet_31b", pretrained=True, pretrained_cfg_overlay=overlay, **{**TINY, **arguments}
        ).eval()

    x = torch.randn(2, 3, 64, 64)
    close(load(num_classes=21)(x), source(x), FLOAT32)
    body = source.forward_features(x)
    for classes in (7, 0):
        close(load(num_classes=classes).forward_features(x), body, FLOAT32)
    gray = load(in_chans=1)
    close(gray.stem[0].conv.weight, source.stem[0].conv.weight.sum(1, keepdim=True), FLOAT32)
    features = load(features_only=True)(x)
    for ours, theirs in zip(features, source.forward_intermediates(x, intermediates_only=True), strict=True):
        close(ours, theirs, FLOAT32)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"depths": (1, 1, 1, 1)}, r"do not fit replknet_31b: missing: stages.2.blocks.2.pw1.conv.weight"),
        ({"depths": (1, 1, 3, 1)}, r"not known: stages.2.blocks.4.pw1.conv.weight.* and \d+ more"),
        ({"kernel_sizes": (11, 7, 5, 3)}, r"lkb_origin.conv.weight is \(8, 1, 11, 11\) and should be \(8, 1, 9, 9\)"),
        ({"small_kernel": 0}, r"missing: stages.0.blocks.0.large_kernel.small_conv.conv.weight"),
    ],
)
def test_the_wrong_weights_are_refused_with_the_keys_that_differ(tmp_path, other, message):
    overlay = saved(tiny(**other), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message):
        timm.create_model("replknet_31b", pretrained=True, pretrained_cfg_overlay=overlay, **TINY)
