import copy

import pytest
import timm
import torch
from conformance import check_features, check_logits, check_state, filled, fixture, same_numbers
from conformance import image as official_image
from safetensors.torch import save_file
from timm.data import resolve_model_data_config
from timm.models import group_parameters
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn

import widefield
from tolerances import close
from widefield.bench import cost
from widefield.models.moganet import STATED, Convs, FusedBlock, MogaBlock, MogaNet
from widefield.nn.moga import FusedChannelAggregationFFN, MultiOrderDWConv
from widefield.surgery.walk import fuse_layers

PUBLISHED = {
    "xtiny": ((3, 3, 10, 2), (32, 64, 96, 192)),
    "tiny": ((3, 3, 12, 2), (32, 64, 128, 256)),
    "small": ((2, 3, 12, 2), (64, 128, 320, 512)),
    "base": ((4, 6, 22, 3), (64, 160, 320, 512)),
    "large": ((4, 6, 44, 4), (64, 160, 320, 640)),
    "xlarge": ((6, 6, 44, 4), (96, 192, 480, 960)),
}
TINY = {"depths": (1, 1, 2, 1), "widths": (8, 16, 24, 32), "ffn_ratios": (2, 2, 2.5, 2), "num_classes": 7}


def tiny(name="moganet_tiny", **arguments):
    return timm.create_model(name, **{**TINY, "layer_scale_init": 0.5, **arguments})


def lively(module):
    """Make norms and scales look trained. Values stay moderate, because consecutive gates multiply."""
    for name, parameter in module.named_parameters():
        if "scale" in name:
            nn.init.uniform_(parameter, *((0.05, 0.15) if "layer_scale" in name else (0.2, 0.8)))
    for norm in module.modules():
        if isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            nn.init.normal_(norm.running_mean, 0, 0.2)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.normal_(norm.weight, 1, 0.2)
            nn.init.normal_(norm.bias, 0, 0.2)
    return module.eval()


def counted(model, side=224):
    """Return parameters, multiply-accumulates, and these plus one for every bias and two for every norm's output."""
    more = 0

    def count(module, given, y):
        nonlocal more
        more += y.numel() * (2 if isinstance(module, nn.BatchNorm2d) else 1)

    kinds = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)
    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, kinds)]
    found = cost(model, torch.empty(1, 3, side, side, device="meta"))
    for handle in handles:
        handle.remove()
    return found.parameters, found.macs, found.macs + more


@pytest.mark.parametrize("name", ["moganet_xtiny", "moganet_tiny"])
def test_the_network_is_the_official_one_before_and_after_merging(name):
    expected = fixture(name)
    model = filled(timm.create_model(name))
    check_state(model, expected["state_dict"])
    assert list(model.state_dict()) == list(expected["state_dict"])
    assert sum(p.numel() for p in model.parameters()) == expected["params"]
    merged, _ = fuse_layers(copy.deepcopy(model))
    for network in (model, merged):
        for run in (expected, *expected["extra_runs"]):
            check_logits(network, run)
            check_features(network, run)
    seen = []
    for index in range(1, 5):
        model.get_submodule(f"norm{index}").register_forward_pre_hook(lambda norm, given: seen.append(given[0]))
    with torch.no_grad():
        model(official_image(expected["input"]["size"]))
    for feature, entry in zip(seen, expected["stage_features_prenorm"], strict=True):
        assert list(feature.shape) == entry["shape"]
        same_numbers(feature.norm(), entry["l2"])
        same_numbers(feature.mean(), entry["mean"])
        same_numbers(feature.flatten()[:4], entry["first4"])
    for network in (model, merged):
        assert counted(network.float().to("meta"))[1] == expected["macs_224"]


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_published_networks_have_what_is_stated_of_them(size):
    depths, widths = PUBLISHED[size]
    name = f"moganet_{size}"
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    assert [info["num_chs"] for info in model.feature_info] == list(widths)
    assert tuple(len(model.get_submodule(f"blocks{i}")) for i in (1, 2, 3, 4)) == depths
    hidden = [model.get_submodule(f"blocks{i}.0.mlp.fc1").out_channels for i in (1, 2, 3, 4)]
    assert [h / w for h, w in zip(hidden, widths, strict=True)] == [8, 8, 4, 4]
    parameters, macs, with_norms = counted(model)
    merged = counted(fuse_layers(model)[0])
    assert merged[1] == macs
    stated = STATED[name]
    assert parameters / 1e6 == pytest.approx(float(stated.parameters[:-1]), rel=0.005)  # the fixture has 2.956M for XT
    digits = len(stated.macs.partition(".")[2]) - 1
    assert abs(with_norms / 1e9 - float(stated.macs[:-1])) <= 0.55 * 10**-digits  # XL: 34.554, stated as 34.5


def test_all_are_registered_and_have_stated_figures():
    names = {f"moganet_{size}" for size in PUBLISHED}
    assert set(timm.list_models("moganet_*")) == set(STATED) == names


@pytest.mark.parametrize("layer_scale_init", [0.7, 1e-5, 0])
@pytest.mark.parametrize("split", [(1, 3, 4), (0, 1, 1)])
def test_a_fused_block_is_the_block(split, layer_scale_init):
    block = lively(MogaBlock(16, 40, drop_path=0.5, dilations=(1, 2, 2), split=split)).double()
    for scale in (block.layer_scale_1, block.layer_scale_2):
        nn.init.constant_(scale, layer_scale_init)
    before = copy.deepcopy(block.state_dict())
    fused = block.fuse()
    x = torch.randn(2, 16, 11, 13, dtype=torch.double)
    close(fused(x), block(x), 1e-12)
    assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())
    assert isinstance(fused, FusedBlock)
    assert isinstance(fused.mlp, FusedChannelAggregationFFN)
    assert not any(isinstance(module, nn.BatchNorm2d) or module.training for module in fused.modules())
    assert not {p.data_ptr() for p in fused.parameters()} & {p.data_ptr() for p in block.parameters()}
    fused(x).square().sum().backward()
    assert all(p.grad is not None for p in fused.parameters())
    with pytest.raises(RuntimeError, match=r"call model\.eval\(\) first"):
        block.train().fuse()


def test_norms_of_other_kinds():
    model = lively(nn.SyncBatchNorm.convert_sync_batchnorm(tiny(features_only=True)))
    x = torch.randn(1, 3, 64, 64)
    fused = widefield.reparameterize(model, x)
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in fused.modules()) == 4
    block = MogaBlock(8, 16).eval()
    block.norm2 = nn.BatchNorm2d(8, track_running_stats=False).eval()
    with pytest.raises(ValueError, match="without running statistics"):
        block.fuse()
    block.norm2 = nn.BatchNorm2d(8).train()
    with pytest.raises(RuntimeError, match=r"call model\.eval\(\) first"):
        block.fuse()


def test_frozen_layers_stay_frozen():
    model = lively(tiny()).requires_grad_(False)
    model.blocks2.requires_grad_(True)
    fused, _ = fuse_layers(model)
    for name, parameter in fused.named_parameters():
        assert parameter.requires_grad == name.startswith("blocks2"), name


def test_convolutions_take_up_the_norms_behind_them():
    model = lively(tiny(in_chans=4)).double()
    for name, channels in (("patch_embed1.projection", 4), ("patch_embed3", 16)):
        convs = model.get_submodule(name)
        assert isinstance(convs, Convs)
        fused = convs.fuse()
        x = torch.randn(2, channels, 15, 18, dtype=torch.double)
        close(fused(x), convs(x), 1e-12)
        with pytest.raises(RuntimeError, match=r"call model\.eval\(\) first"):
            convs.train().fuse()
    fused, names = fuse_layers(tiny().eval())
    keys = list(fused.state_dict())
    assert keys[:4] == [f"patch_embed1.projection.{i}.{name}" for i in (0, 3) for name in ("weight", "bias")]
    assert {key for key in keys if key.startswith("patch_embed2")} == {
        "patch_embed2.projection.weight",
        "patch_embed2.projection.bias",
    }
    assert len(names) == 4 + 5
    assert [key for key in keys if "running_mean" in key] == [f"norm{i}.running_mean" for i in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"depths": (1, 1, 2)}, ValueError, r"one entry a stage each; got \(1, 1, 2\), \(8, 16, 24, 32\) and"),
        ({"depths": (1, 0, 2, 1)}, ValueError, "every entry of depths must be at least 1; got 0"),
        ({"widths": (8, 16.0, 24, 32)}, TypeError, "every entry of widths must be an integer"),
        ({"widths": (2, 16, 24, 32)}, ValueError, r"\(1, 3, 4\) of 2 gives \(1, 0, 1\)"),
        ({"ffn_ratios": (8, 8, -1, 4)}, ValueError, r"every entry of ffn_ratios must be from 0\.0"),
        ({"ffn_ratios": (8, 8, 0.01, 4)}, ValueError, "hidden must be at least 1; got 0"),
        ({"dilations": (1, 2)}, ValueError, r"dilations must have three entries.*got \(1, 2\)"),
        ({"split": (1, 3, 0)}, ValueError, "every entry of split must be at least 1; got 0"),
        ({"drop_path_rate": 1.5}, ValueError, r"drop_path_rate must be from 0\.0 to 1\.0; got 1\.5"),
        ({"layer_scale_init": "1"}, TypeError, "layer_scale_init must be a number"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        MogaNet(**{**TINY, **arguments})


def test_initialization_is_the_official_one():
    model = timm.create_model("moganet_xtiny", drop_path_rate=0.34)
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        if "scale" in name:
            assert (parameter == 1e-5).all(), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        elif isinstance(module, nn.BatchNorm2d):
            assert (parameter == 1).all(), name
        elif parameter.numel() > 4000:
            size, groups = module.weight.shape[2:].numel() if parameter.ndim == 4 else 1, getattr(module, "groups", 1)
            std = 0.02 if name == "head.weight" else (2 / (size * parameter.shape[0] / groups)) ** 0.5
            assert parameter.std().item() == pytest.approx(std, rel=0.08), name
    model.reset_classifier(50)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.06)
    rates = [block.drop_path.drop_prob for i in (1, 2, 3, 4) for block in model.get_submodule(f"blocks{i}")]
    assert rates == pytest.approx([0.02 * i for i in range(18)])


def test_depthwise_convolutions_are_as_asked():
    model = tiny(dilations=(1, 2, 1), split=(1, 1, 2))
    layers = [module for module in model.modules() if isinstance(module, MultiOrderDWConv)]
    assert [layer.splits for layer in layers] == [(2, 2, 4), (4, 4, 8), (6, 6, 12), (6, 6, 12), (8, 8, 16)]
    assert all(layer.DW_conv2.dilation == (1, 1) for layer in layers)


def test_weights_of_one_number_a_channel_are_not_decayed():
    model = tiny()
    decayed = {"attn.proj_1.weight", "attn.value.DW_conv0.weight", "mlp.dwconv.weight", "mlp.fc2.weight"}
    kept = {"layer_scale_1", "attn.sigma.scale", "mlp.decompose.weight", "mlp.fc1.bias", "norm1.weight"}
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)
    of = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    block = dict(model.blocks1[0].named_parameters())
    assert {of[id(block[name])] for name in decayed} == {0.05}
    assert {of[id(block[name])] for name in kept} == {0}


def test_layers_in_order_for_layer_wise_decay():
    model = tiny()
    groups = param_groups_layer_decay(model, 0.05, layer_decay=0.5, no_weight_decay_list=())
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    of = {name: scales[id(p)] for name, p in model.named_parameters()}
    assert of["head.weight"] == 1
    assert of["norm4.weight"] == of["blocks4.0.layer_scale_1"] == of["patch_embed4.projection.weight"] == 0.5
    assert of["norm3.weight"] == of["blocks3.1.layer_scale_1"] == 0.25
    assert of["blocks3.0.layer_scale_1"] == of["patch_embed3.norm.bias"] == 0.125
    assert of["blocks1.0.mlp.fc1.weight"] == of["norm1.bias"] == 2**-5
    assert of["patch_embed1.projection.0.weight"] == of["patch_embed1.projection.4.weight"] == 2**-6
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert coarse["blocks3.1.layer_scale_1"] == coarse["norm3.weight"] == coarse["patch_embed3.norm.bias"] == 3
    assert len(coarse) == len(list(model.parameters()))


def test_configurations_are_the_official_evaluation():
    for name, side in (("moganet_xtiny", 224), ("moganet_tiny.in1k_256", 256), ("moganet_xlarge", 224)):
        model = timm.create_model(name, **{k: v for k, v in TINY.items() if k != "num_classes"})
        data = resolve_model_data_config(model)
        assert model.head.out_features == 1000
        assert data["input_size"] == (3, side, side)
        assert (data["mean"], data["std"]) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        assert (data["interpolation"], data["crop_mode"], data["crop_pct"]) == ("bicubic", "center", 0.9)


def test_features_of_any_size():
    model = tiny(features_only=True).eval()
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    assert model.feature_info.module_name() == ["norm1", "norm2", "norm3", "norm4"]
    for name in ("moganet_xtiny", "moganet_tiny"):
        check = fixture(name)["train_extra"]["arbitrary_size_check"]
        features = model(torch.randn(1, 3, *check["input"]))
        assert [list(feature.shape[2:]) for feature in features] == check["stage_hw"]
    assert [feature.shape[1] for feature in features] == [8, 16, 24, 32]
    first = tiny(features_only=True, out_indices=(0, 1))
    assert len(first(torch.randn(1, 3, 64, 64))) == 2
    assert {key.split(".")[1] for key in first.state_dict()} == {
        *(f"{part}{i}" for part in ("patch_embed", "blocks", "norm") for i in (1, 2))
    }


# Weights in the authors' format


def saved(state, path, wrapped=True):
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save({"arch": "moganet_tiny", "state_dict": state, "metric": 79.0} if wrapped else state, path)
    return {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}


def test_averaged_weights_are_preferred_as_in_the_official_evaluation(tmp_path):
    averaged = lively(tiny())
    torch.save({"state_dict": tiny().state_dict(), "state_dict_ema": averaged.state_dict()}, tmp_path / "ema.pth.tar")
    given = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "ema.pth.tar")}}
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(tiny(**given).eval()(x), averaged(x))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"widths": (8, 16, 24, 40)},
            r"do not fit moganet_tiny: .*patch_embed4\.projection\.weight is \(40, 24, 3, 3\)",
        ),
        ({"depths": (1, 1, 1, 1)}, r"do not fit moganet_tiny: missing: blocks3\.1\.layer_scale_1"),
        ({"split": (1, 1, 2)}, r"DW_conv1\.weight is \(2, 1, 5, 5\) and should be \(3, 1, 5, 5\)"),
    ],
)
def test_weights_of_another_network_are_refused(tmp_path, other, message):
    given = saved(tiny(**other).state_dict(), tmp_path / "other.pth.tar")
    with pytest.raises(ValueError, match=message):
        tiny(**given)


def test_weights_of_a_detector_are_refused(tmp_path):
    state = {f"backbone.{key}": value for key, value in tiny().state_dict().items()}
    with pytest.raises(ValueError, match=r"missing: .*not known: backbone\.patch_embed1"):
        tiny(**saved(state, tmp_path / "mmdetection.pth"))
