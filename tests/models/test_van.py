import math
import re

import pytest
import timm
import torch
from conformance import (
    check_features,
    check_logits,
    check_operator,
    check_state,
    filled,
    fixture,
    image,
    loaded,
    operators,
    same_numbers,
)
from safetensors.torch import save_file
from timm.data import resolve_model_data_config
from timm.optim import param_groups_layer_decay
from torch import nn

import widefield
from tolerances import FLOAT32, FLOAT64, close
from widefield.bench import cost
from widefield.models.van import STATED, VAN, Block, FusedBlock, PatchEmbed

WIDE = (64, 128, 320, 512)
PUBLISHED = {
    "van_b0": ((32, 64, 160, 256), (3, 3, 5, 2)),
    "van_b1": (WIDE, (2, 2, 4, 2)),
    "van_b2": (WIDE, (3, 3, 12, 3)),
    "van_b3": (WIDE, (3, 5, 27, 3)),
    "van_b4": (WIDE, (3, 6, 40, 3)),
    "van_b5": ((96, 192, 480, 768), (3, 3, 24, 3)),
    "van_b6": ((96, 192, 384, 768), (6, 6, 90, 6)),
}
TINY = {"depths": (1, 1, 2, 1), "widths": (8, 12, 16, 24), "mlp_ratios": (3, 2, 2, 1.5), "num_classes": 7}


def tiny(name="van_b0", **arguments):
    return timm.create_model(name, **{**TINY, **arguments})


def shown(model):
    """Set norm statistics, and layer scales that make every branch matter."""
    for name, parameter in filled(model).named_parameters():
        if "layer_scale" in name:
            nn.init.uniform_(parameter, 0.2, 0.4)
    return model


def meta(name, **arguments):
    with torch.device("meta"):
        return timm.create_model(name, **arguments).eval()


def counted(model, side=224):
    return cost(model, torch.empty(1, 3, side, side, device="meta"))


@pytest.mark.parametrize("name", ["van_b0", "van_b1"])
def test_is_the_official_network_before_and_after_merging(name):
    expected = fixture(name)
    model = filled(timm.create_model(name))
    check_state(model, expected["state_dict"])
    assert list(model.state_dict()) == list(expected["state_dict"])
    before_norm = {}
    for i in range(1, 5):
        norm = model.get_submodule(f"norm{i}")
        norm.register_forward_pre_hook(lambda module, args, i=i: before_norm.__setitem__(i, args[0]))
    for run in (*expected["extra_runs"], expected):
        check_logits(model, run)
        check_features(model, run)
    for i, entry in enumerate(expected["stage_features_prenorm"], start=1):
        assert list(before_norm[i].shape) == entry["shape"]
        same_numbers([before_norm[i].norm(), before_norm[i].mean()], [entry["l2"], entry["mean"]])
        same_numbers(before_norm[i].flatten()[:4], entry["first4"])
    fused = widefield.reparameterize(model, image(64))
    for run in (expected, *expected["extra_runs"]):
        check_logits(fused, run)  # exact, although the authors merge nothing
        check_features(fused, run)


def test_the_block_is_the_official_one_before_and_after_merging():
    case = operators()["van_block"]
    block = Block(3)
    assert list(block.state_dict()) == list(case["state_dict"])
    check_operator(loaded(block, case), case)
    check_operator(block.fuse(), case)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_networks_have_what_is_stated_of_them(name):
    widths, depths = PUBLISHED[name]
    model = meta(name)
    assert [info["num_chs"] for info in model.feature_info] == list(widths)
    assert [len(model.get_submodule(f"block{i}")) for i in range(1, 5)] == list(depths)
    hidden = [model.get_submodule(f"block{i}.0.mlp.fc1").out_channels for i in range(1, 5)]
    assert hidden == [ratio * width for ratio, width in zip((8, 8, 4, 4), widths, strict=True)]
    training, fused = counted(model), timm.utils.reparameterize_model(model)
    if name in ("van_b0", "van_b1"):
        assert (training.parameters, training.macs) == (fixture(name)["params"], fixture(name)["macs_224"])
        assert counted(fused).macs == training.macs
    stated = STATED[name]
    digits = len(stated.parameters.partition(".")[2].rstrip("M"))
    assert f"{training.parameters / 1e6:.{digits}f}M" == stated.parameters
    # Stated counts add norms and products to convolutions, about one percent. B6's stated count does not fit.
    lowest, highest = (training.macs * factor / 1e9 for factor in ((0.985, 1) if name == "van_b6" else (1, 1.01)))
    assert lowest - 0.05 <= float(stated.macs.rstrip("G")) <= highest + 0.05


@pytest.mark.parametrize(
    ("kernel_size", "dilation", "millions"), [(7, 2, "4.03"), (14, 3, "4.07"), (21, 3, "4.11"), (28, 4, "4.14")]
)
def test_other_kernels_have_the_parameters_of_the_paper_s_table(kernel_size, dilation, millions):
    model = meta("van_b0", kernel_size=kernel_size, dilation=dilation)
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}" == millions


def test_all_are_registered_and_have_stated_figures():
    assert timm.list_models("van_*") == sorted(STATED) == sorted(PUBLISHED)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"depths": (1, 1, 2)}, ValueError, r"one entry a stage each; got \[1, 1, 2\], \[8, 12, 16, 24\] and \[3.0, "),
        ({"mlp_ratios": (3, 2, 2)}, ValueError, r"one entry a stage each; got .* and \[3\.0, 2\.0, 2\.0\]"),
        ({"depths": (1, 0, 2, 1)}, ValueError, "every entry of depths must be at least 1; got 0"),
        ({"widths": (8, 12, 16, 2.5)}, TypeError, r"every entry of widths must be an integer; got 2\.5"),
        ({"mlp_ratios": (3, 2, 2, 0.5)}, ValueError, r"every entry of mlp_ratios must be from 1\.0 .*; got 0\.5"),
        ({"kernel_size": 0}, ValueError, "kernel_size must be at least 1; got 0"),
        ({"dilation": 1.5}, TypeError, r"dilation must be an integer; got 1\.5"),
        ({"drop_path_rate": 1.5}, ValueError, r"drop_path_rate must be from 0\.0 to 1\.0; got 1\.5"),
        ({"layer_scale_init": -1.0}, ValueError, "layer_scale_init must be from 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        VAN(**{**TINY, **arguments})


@pytest.mark.parametrize("kernel", [(21, 3), (7, 2), (5, 1)])
def test_a_fused_block_is_the_block(kernel):
    block = shown(Block(8, 2.5, kernel_size=kernel[0], dilation=kernel[1], drop_path=0.5))
    fused = block.fuse()
    x = torch.randn(2, 8, 19, 21, dtype=torch.float64)
    close(fused(x), block(x), 1e-12)
    assert isinstance(fused, FusedBlock)
    assert not any(module.training for module in fused.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert not {p.data_ptr() for p in fused.parameters()} & {p.data_ptr() for p in block.parameters()}
    fused(x).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in fused.parameters())
    assert all(p.grad is None for p in block.parameters())
    with pytest.raises(RuntimeError, match=r"call model\.eval\(\) first"):
        block.train().fuse()
    block.eval().norm2.train()
    with pytest.raises(RuntimeError, match=r"call model\.eval\(\) first"):
        block.fuse()


def test_a_fused_patch_embedding_is_the_embedding():
    embed = filled(PatchEmbed(3, 8, 7, 4))
    fused = embed.fuse()
    x = torch.randn(2, 3, 30, 27, dtype=torch.float64)
    close(fused(x), embed(x), 1e-12)
    assert list(fused.state_dict()) == ["proj.weight", "proj.bias"]
    with pytest.raises(RuntimeError, match=r"call model\.eval\(\) first"):
        embed.train().fuse()


def test_what_cannot_be_fused_is_refused_and_frozen_layers_stay_frozen():
    block = filled(Block(8)).requires_grad_(False)
    assert not any(p.requires_grad for p in block.fuse().parameters())
    block.norm1 = nn.BatchNorm2d(8, track_running_stats=False).double().eval()
    with pytest.raises(ValueError, match="batch norm without running statistics"):
        block.fuse()


def test_initialization_is_the_official_one():
    model = timm.create_model("van_b0", depths=(1, 1, 1, 1))
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            assert not module.bias.any(), name
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 1500:
            fan_out = math.prod(module.kernel_size) * module.out_channels / module.groups
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.08), name
        if isinstance(module, Block):
            assert (module.layer_scale_1 == 0.01).all()
            assert (module.layer_scale_2 == 0.01).all()
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    model.reset_classifier(50)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not model.head.bias.any()
    norms = {type(m): m.eps for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm))}
    assert sorted(norms.values()) == [1e-6, 1e-5]


def test_layers_in_order_for_layer_wise_decay():
    model = tiny()
    groups = param_groups_layer_decay(model, 0.05, layer_decay=0.5, no_weight_decay_list=())
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    of = {name: scales[id(p)] for name, p in model.named_parameters()}
    order = [
        ["head.weight"],
        ["block4.0.layer_scale_1", "patch_embed4.proj.weight", "patch_embed4.norm.bias", "norm4.weight"],
        ["block3.1.mlp.fc1.weight", "norm3.weight"],
        ["block3.0.norm1.weight", "patch_embed3.proj.weight"],
        ["block2.0.norm1.weight", "patch_embed2.proj.weight", "norm2.weight"],
        ["block1.0.norm1.weight", "norm1.weight"],
        ["patch_embed1.proj.weight", "patch_embed1.norm.bias"],
    ]
    for depth, names in enumerate(order):
        assert {of[name] for name in names} == {0.5**depth}, names
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert all((id(p) in decayed) == (p.ndim > 1) for p in model.parameters())
    coarse = timm.models.group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert coarse["block3.1.norm1.weight"] == coarse["patch_embed3.proj.weight"] == coarse["norm3.bias"] == 3


def test_configurations_are_the_official_evaluation():
    half, usual = ((0.5,) * 3, (0.5,) * 3), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for name, side, numbers, crop, classes in (
        ("van_b0", 224, half, 0.9, 1000),
        ("van_b4", 224, half, 0.9, 1000),
        ("van_b4.in22k", 224, usual, 0.875, 21841),
        ("van_b5", 224, usual, 0.875, 1000),
        ("van_b6.in22k_ft_in1k", 224, usual, 0.875, 1000),
        ("van_b6.in22k_ft_in1k_384", 384, usual, 1.0, 1000),
    ):
        model = timm.create_model(name, **{k: v for k, v in TINY.items() if k != "num_classes"})
        data = resolve_model_data_config(model)
        assert model.num_classes == model.head.out_features == classes
        assert data["input_size"] == (3, side, side)
        assert ((data["mean"], data["std"]), data["crop_pct"]) == (numbers, crop)
        assert data["interpolation"] == "bicubic"
        assert data["crop_mode"] == ("squash" if side == 384 else "center")


@pytest.mark.parametrize("size", [(64, 64), (75, 90)])
def test_features_at_strides_4_to_32(size):
    model = tiny(features_only=True).eval()
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    assert model.feature_info.channels() == [8, 12, 16, 24]
    steps = zip(model.feature_info.channels(), model.feature_info.reduction(), strict=True)
    shapes = [(1, channels, *(math.ceil(side / step) for side in size)) for channels, step in steps]
    features = model(torch.randn(1, 3, *size))
    assert [feature.shape for feature in features] == shapes
    for feature in features:  # the norm after a stage belongs to it
        close(feature.mean(1), torch.zeros_like(feature[:, 0]), FLOAT32)
    if size == (75, 90):
        assert [list(shape[2:]) for shape in shapes] == fixture("van_b0")["train_extra"]["arbitrary_size_check"][
            "stage_hw"
        ]
    first = tiny(features_only=True, out_indices=(0, 1))
    assert len(first(torch.randn(1, 3, 64, 64))) == 2
    assert not any(re.match(r"(block|norm|patch_embed)[34]|head", key) for key in first.state_dict())


def test_the_modules_that_the_feature_table_names_give_the_features():
    model = shown(tiny())
    seen = {}
    for info in model.feature_info:
        module = model.get_submodule(info["module"])
        module.register_forward_hook(lambda module, args, y, name=info["module"]: seen.__setitem__(name, y))
    features = model.forward_intermediates(image(64), intermediates_only=True)
    for info, feature in zip(model.feature_info, features, strict=True):
        assert torch.equal(seen[info["module"]], feature)
    close(model.forward_features(image(64)), features[-1], FLOAT64)


# Weights in the authors' format


def saved(state, path, wrap=None, **beside):
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save({wrap: state, **beside} if wrap else state, path)
    return {"file": str(path)}


@pytest.mark.parametrize("name", ["van_b4", "van_b5", "van_b6"])
def test_weights_for_21841_classes(tmp_path, caplog, name):
    source = shown(tiny(num_classes=21841)).float()
    overlay = saved(source.state_dict(), tmp_path / "van_22k.pth", "state_dict")
    x = torch.randn(1, 3, 64, 64)
    arguments = {k: v for k, v in TINY.items() if k != "num_classes"}
    options = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    close(timm.create_model(f"{name}.in22k", **options, **arguments).eval()(x), source(x), FLOAT32)
    assert not caplog.records
    model = tiny(name, **options).eval()  # for fine-tuning
    assert caplog.messages == ["the weights have 21841 classes, the network 7: its head starts afresh"]
    assert model(x).shape == (1, 7)
    close(model.forward_features(x), source.forward_features(x), FLOAT32)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"depths": (1, 1, 1, 1)}, r"do not fit van_b0: missing: block3\.1\.layer_scale_1"),
        ({"depths": (1, 1, 3, 1)}, r"not known: block3\.2\.layer_scale_1.* and \d+ more"),
        ({"widths": (8, 12, 16, 20)}, r"patch_embed4\.proj\.weight is \(20, 16, 3, 3\) and should be \(24, "),
        ({"kernel_size": 28, "dilation": 4}, r"conv0\.weight is \(8, 1, 7, 7\) and should be \(8, 1, 5, 5\)"),
    ],
)
def test_the_wrong_weights_are_refused_with_the_keys_that_differ(tmp_path, other, message):
    overlay = saved(tiny(**other).state_dict(), tmp_path / "w.pth", "state_dict")
    with pytest.raises(ValueError, match=message):
        tiny(pretrained=True, pretrained_cfg_overlay=overlay)
