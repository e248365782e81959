import copy
import math
import re

import pytest
import timm
import torch
from conformance import (
    OPERATORS_WITHIN,
    array,
    check_features,
    check_logits,
    check_operator,
    check_state,
    check_tensors,
    filled,
    fixture,
    loaded,
    operators,
)
from networks import settled, small
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from timm.optim import param_groups_layer_decay
from torch.utils.flop_counter import FlopCounterMode

import widefield
from tolerances import FLOAT32, NETWORK, close
from widefield.models.unireplknet import STATED, FusedBlock, UniRepLKNet, UniRepLKNetBlock, default_kernel_sizes
from widefield.nn.large_kernel import DILATED_BRANCHES
from widefield.surgery.walk import fuse_layers

FOUR = (2, 2, 6, 2), (2, 2, 8, 2), (3, 3, 18, 3), (3, 3, 27, 3)
PUBLISHED = {
    "a": ((40, 80, 160, 320), FOUR[0]),
    "f": ((48, 96, 192, 384), FOUR[0]),
    "p": ((64, 128, 256, 512), FOUR[0]),
    "n": ((80, 160, 320, 640), FOUR[1]),
    "t": ((80, 160, 320, 640), FOUR[2]),
    "s": ((96, 192, 384, 768), FOUR[3]),
    "b": ((128, 256, 512, 1024), FOUR[3]),
    "l": ((192, 384, 768, 1536), FOUR[3]),
    "xl": ((256, 512, 1024, 2048), FOUR[3]),
}
THIRD_STAGE = dict(zip(FOUR, ([13] * 6, [13] * 8, [13, 3] * 9, [13, 3, 3] * 9), strict=True))
TINY = {"depths": (1, 1, 2, 1), "widths": (8, 12, 16, 24), "kernel_sizes": (3, 7, (13, 3), 5), "num_classes": 7}


def tiny(name="unireplknet_t", **arguments):
    return timm.create_model(name, **{**TINY, "layer_scale_init": 0.5, **arguments})


def kernel_size(block):
    return (block.dwconv.branches()[0][0] if hasattr(block.dwconv, "branches") else block.dwconv).kernel_size[0]


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def macs(model, side):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.float().to("meta")(torch.empty(1, 3, side, side, device="meta"))
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("name", ["unireplknet_a", "unireplknet_t"])
def test_both_forms_are_the_official_network(name):
    expected = fixture(name)
    model = filled(timm.create_model(name))
    check_state(model, expected["state_dict"])
    assert list(model.state_dict()) == list(expected["state_dict"])
    assert parameters(model) == expected["params"]
    for run in (expected, *expected["extra_runs"]):
        check_logits(model, run)
        check_features(model, run)
    merged, _ = fuse_layers(copy.deepcopy(model))
    check_state(merged, expected["merged"]["state_dict"])
    assert list(merged.state_dict()) == list(expected["merged"]["state_dict"])
    assert parameters(merged) == expected["merged"]["params"]
    check_logits(merged, expected["merged"])
    check_tensors(merged, expected["merged"])
    assert macs(model, 224) == expected["macs_224"]
    assert macs(merged, 224) == expected["merged"]["macs_224"]


@pytest.mark.parametrize("size", [3, 13])
def test_the_block_is_the_official_one(size):
    case = operators()[f"unireplknet_block_k{size}"]
    block = loaded(UniRepLKNetBlock(4, size).double(), case)
    assert list(block.state_dict()) == list(case["state_dict"])
    check_operator(block, case)
    fused = block.fuse()
    check_operator(fused, case)
    state = fused.state_dict()
    assert list(state) == list(case["merged_state_dict"])
    for key, entry in case["merged_state_dict"].items():
        close(state[key], array(entry), OPERATORS_WITHIN)


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_published_networks_have_what_is_stated_of_them(size):
    widths, depths = PUBLISHED[size]
    with torch.device("meta"):
        model = timm.create_model(f"unireplknet_{size}").eval()
    assert [info["num_chs"] for info in model.feature_info] == list(widths)
    found = [[kernel_size(block) for block in stage] for stage in model.stages]
    assert found == [[3] * depths[0], [13] * depths[1], THIRD_STAGE[depths], [13] * depths[3]]
    stated = STATED[f"unireplknet_{size}"]
    side = 384 if "384" in stated.macs else 224
    merged, _ = fuse_layers(model)
    for ours, theirs in ((parameters(merged) / 1e6, stated.parameters), (macs(merged, side) / 1e9, stated.macs)):
        number = re.match(r"[\d.]+", theirs)[0]
        digits = len(number.partition(".")[2])
        # XL has 386.53M parameters; the repository truncates to 386M
        assert abs(ours - float(number)) <= 0.54 * 10**-digits, theirs


def test_all_are_registered_and_have_stated_figures():
    names = {f"unireplknet_{size}" for size in PUBLISHED}
    assert set(timm.list_models("unireplknet_*")) == set(STATED) == names


def test_default_kernel_sizes_at_other_depths():
    assert default_kernel_sizes((1, 2, 4, 1)) == [[3], [13, 13], [13] * 4, [13]]
    assert default_kernel_sizes((1, 1, 20, 1))[2] == [13, 3] * 10
    assert default_kernel_sizes((1, 1, 28, 1))[2] == [13, 3, 3] * 9 + [13]
    assert kernel_size(UniRepLKNet(depths=(1, 1), widths=(8, 8)).stages[1][0]) == 13


def test_kernel_sizes_of_stages_and_blocks():
    model = tiny(kernel_sizes=(3, 5, (17, 9), 7))
    assert [kernel_size(block) for stage in model.stages for block in stage] == [3, 5, 17, 9, 7]
    plain = [hasattr(block.dwconv, "weight") for stage in model.stages for block in stage]
    assert plain == [True, True, False, False, False]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kernel_sizes": (3, 13, 13)}, ValueError, r"one entry for each of 4 stages; got \(3, 13, 13\)"),
        ({"kernel_sizes": 13}, ValueError, "one entry for each of 4 stages; got 13"),
        ({"kernel_sizes": (3, 13, (13, 3, 3), 13)}, ValueError, "stage 2 has 2 blocks and kernel_sizes has 3 sizes"),
        ({"kernel_sizes": (3, 13, (13, 4), 13)}, ValueError, "one of 3, 5, 7, 9, 11, 13, 15, 17; got 4"),
        ({"kernel_sizes": (3, 31, 13, 13)}, ValueError, "one of 3, 5, .*; got 31"),
        ({"kernel_sizes": (3, 13.0, 13, 13)}, TypeError, r"must be an integer; got 13\.0"),
        ({"depths": (1, 1, 2)}, ValueError, r"one entry a stage; got \[1, 1, 2\] and \[8, 12, 16, 24\]"),
        ({"depths": (1, 0, 2, 1)}, ValueError, "every entry of depths must be at least 1; got 0"),
        ({"widths": (3, 12, 16, 24)}, ValueError, "every entry of widths must be at least 4; got 3"),
        ({"drop_path_rate": 1.5}, ValueError, r"drop_path_rate must be from 0\.0 to 1\.0; got 1\.5"),
        ({"layer_scale_init": -1.0}, ValueError, "layer_scale_init must be from 0"),
        ({"head_init_scale": "1"}, TypeError, "head_init_scale must be a number"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        tiny(**arguments)


@pytest.mark.parametrize("layer_scale_init", [0.3, 0, None])
@pytest.mark.parametrize("size", [3, *DILATED_BRANCHES])
def test_a_fused_block_is_the_block(size, layer_scale_init):
    block = filled(UniRepLKNetBlock(8, size, drop_path=0.5, layer_scale_init=layer_scale_init))
    assert (block.gamma is None) == (not layer_scale_init)
    fused = block.fuse()
    x = torch.randn(2, 8, 19, 21, dtype=torch.float64)
    close(fused(x), block(x), 1e-12)
    assert isinstance(fused, FusedBlock)
    assert not any(module.training for module in fused.modules())
    assert not {p.data_ptr() for p in fused.parameters()} & {p.data_ptr() for p in block.parameters()}
    fused(x).square().sum().backward()
    assert all(p.grad is not None for p in fused.parameters())
    with pytest.raises(RuntimeError, match=r"call model\.eval\(\) first"):
        block.train().fuse()


def test_frozen_layers_stay_frozen():
    fused = filled(UniRepLKNetBlock(8, 7)).requires_grad_(False).fuse()
    assert not any(p.requires_grad for p in fused.parameters())


def test_initialization_is_the_official_one():
    model = timm.create_model("unireplknet_a", head_init_scale=0.5)
    for name, parameter in model.named_parameters():
        if name.endswith("act.1.gamma") or name.endswith(("bias", "beta")):
            assert not parameter.any(), name
        elif name.endswith("gamma"):
            assert (parameter == 1e-6).all(), name
        elif parameter.ndim == 1:
            assert (parameter == 1).all(), name
        elif parameter.numel() > 5000:
            assert parameter.std().item() == pytest.approx(0.01 if name == "head.weight" else 0.02, rel=0.06), name
    model.reset_classifier(50)
    assert model.head.weight.std().item() == pytest.approx(0.01, rel=0.06)


def test_layers_in_order_for_layer_wise_decay():
    model = tiny()
    groups = param_groups_layer_decay(model, 0.05, layer_decay=0.5, no_weight_decay_list=())
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    of = {name: scales[id(p)] for name, p in model.named_parameters()}
    assert of["head.weight"] == of["norm.weight"] == 1
    assert of["stages.3.0.gamma"] == of["downsample_layers.3.0.weight"] == 0.5
    assert of["stages.2.1.gamma"] == 0.25
    assert of["stages.2.0.gamma"] == of["downsample_layers.2.0.weight"] == 0.125
    assert of["downsample_layers.0.0.weight"] == 2**-6
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert all((id(p) in decayed) == (p.ndim > 1) for p in model.parameters())  # GRN's tensors decay as well
    coarse = timm.models.group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert coarse["stages.2.1.gamma"] == coarse["downsample_layers.2.0.weight"] == 3


def test_configurations_are_the_official_evaluation():
    for name, side, mode, classes in (
        ("unireplknet_a", 224, "center", 1000),
        ("unireplknet_s.in22k_ft_in1k_384", 384, "squash", 1000),
        ("unireplknet_b", 384, "squash", 1000),
        ("unireplknet_b.in22k", 224, "center", 21841),
        ("unireplknet_xl.in22k", 192, "center", 21841),
    ):
        model = timm.create_model(name, **{k: v for k, v in TINY.items() if k != "num_classes"})
        data = resolve_model_data_config(model)
        assert model.num_classes == classes
        assert model.head.out_features == classes
        assert data["input_size"] == (3, side, side)
        assert (data["mean"], data["std"]) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        assert data["interpolation"] == "bicubic"
        assert (data["crop_mode"], data["crop_pct"]) == (mode, 0.875 if mode == "center" else 1.0)
    assert "Resize(size=(384, 384)" in str(create_transform(input_size=(3, 384, 384), crop_mode="squash", crop_pct=1.0))


def test_each_half_of_catavgmax_is_normalized():
    model = tiny(global_pool="catavgmax", num_classes=0).eval()
    halves = model(5 * torch.randn(2, 3, 64, 64)).unflatten(1, (2, -1))
    close(halves.mean(-1), torch.zeros(2, 2), FLOAT32)
    close(halves.var(-1, unbiased=False), torch.ones(2, 2), NETWORK)


@pytest.mark.parametrize("size", [(64, 64), (75, 90)])
def test_features_at_strides_4_to_32(size):
    model = tiny(features_only=True).eval()
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    assert model.feature_info.channels() == [8, 12, 16, 24]
    steps = zip(model.feature_info.channels(), model.feature_info.reduction(), strict=True)
    shapes = [(1, channels, *(math.ceil(side / step) for side in size)) for channels, step in steps]
    assert [feature.shape for feature in model(torch.randn(1, 3, *size))] == shapes
    first = tiny(features_only=True, out_indices=(0, 1))
    assert len(first(torch.randn(1, 3, 64, 64))) == 2
    assert not any(key.startswith(("stages.2", "downsample_layers.3", "norm", "head")) for key in first.state_dict())


def saved(state, path, wrapped):
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save({"model": state} if wrapped else state, path)
    return {"file": str(path)}


@pytest.mark.parametrize("form", ["training", "deployed"])
def test_weights_for_21841_classes(tmp_path, form):
    source = filled(tiny(num_classes=21841)).float()
    if form == "deployed":
        source = widefield.reparameterize(source)
    file = saved(source.state_dict(), tmp_path / "in22k.pth", wrapped=True)
    x = torch.randn(1, 3, 64, 64)
    arguments = {k: v for k, v in TINY.items() if k != "num_classes"}
    tagged = timm.create_model("unireplknet_l.in22k", pretrained=True, pretrained_cfg_overlay=file, **arguments).eval()
    assert torch.equal(tagged(x), source(x))
    model = tiny("unireplknet_l", pretrained=True, pretrained_cfg_overlay=file).eval()  # for fine-tuning
    assert model(x).shape == (1, 7)
    assert torch.equal(model.forward_features(x), source.forward_features(x))


def test_weights_of_another_network_are_refused(tmp_path):
    file = saved(tiny(widths=(8, 12, 16, 20)).state_dict(), tmp_path / "other.pth", wrapped=True)
    with pytest.raises(ValueError, match=r"do not fit unireplknet_t: .*downsample_layers\.3\.0\.weight is \(20, 16"):
        tiny(pretrained=True, pretrained_cfg_overlay=file)
    file = saved(tiny(kernel_sizes=(3, 7, 3, 5)).state_dict(), tmp_path / "smaller.pth", wrapped=True)
    with pytest.raises(ValueError, match=r"do not fit unireplknet_t: missing: stages\.2\.0\.dwconv\.lk_origin"):
        tiny(pretrained=True, pretrained_cfg_overlay=file)


def test_a_network_whose_branches_were_merged_in_place_reparameterizes_further():
    model = settled(small("unireplknet_a"))
    x = torch.randn(1, 3, 64, 64)
    merged = copy.deepcopy(model)
    for layer in list(merged.modules()):
        if hasattr(layer, "merge_dilated_branches"):  # like the authors' scripts
            layer.merge_dilated_branches()
    with torch.no_grad():
        close(widefield.reparameterize(merged, x)(x), model(x), NETWORK)
