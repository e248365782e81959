import re

import pytest
import timm
import torch
from conformance import check_features, check_logits, check_state, filled, fixture
from safetensors.torch import save_file
from timm.data import resolve_model_data_config
from timm.optim import param_groups_layer_decay

import widefield
from tolerances import FLOAT32, FLOAT64, close
from widefield.bench import cost
from widefield.models.hornet import STATED, Block, Branches, HorNet
from widefield.nn import DepthwiseConv2d
from widefield.nn.gnconv import GlobalLocalFilter

TINY = {"depths": (1, 1, 2, 1), "widths": (8, 16, 32, 64), "num_classes": 7}
NAMES = ["hornet_tiny_7x7", "hornet_tiny_gf"]


def tiny(name="hornet_tiny_gf", **arguments):
    return timm.create_model(name, **{**TINY, "layer_scale_init": 0.5, **arguments})


def filters(model):
    return [module for module in model.modules() if isinstance(module, GlobalLocalFilter)]


@pytest.mark.parametrize("name", NAMES)
def test_is_the_official_network_before_and_after_merging(name):
    expected = fixture(name)
    model = filled(timm.create_model(name))
    check_state(model, expected["state_dict"])
    assert list(model.state_dict()) == list(expected["state_dict"])
    assert sum(p.numel() for p in model.parameters()) == expected["params"]
    config = expected["config"]
    assert [block.gnconv.scale for stage in model.stages for block in stage] == [config["depthwise_scale"]] * 25
    for run in (expected, *expected["extra_runs"]):
        check_logits(model, run)
        if "stage_features" in run:
            check_features(model, run)
    found = [layer.complex_weight.shape[1:3] for layer in filters(model)]
    assert sorted(set(map(tuple, found)), reverse=True) == [tuple(hw) for hw in config["global_filter_hw"] or ()]
    x = torch.randn(1, 3, 64, 64, dtype=torch.double)
    check_logits(widefield.reparameterize(model, x, inplace=True), expected)  # the official code has no merged form


@pytest.mark.parametrize("name", [name for name in STATED if STATED[name].macs != "not stated"])
def test_the_published_networks_have_what_is_stated_of_them(name):
    side = 384 if "384" in name else 224
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    found = cost(model, torch.empty(1, 3, side, side, device="meta"))
    stated = STATED[name]
    if name in NAMES:
        assert (found.parameters, found.macs) == (fixture(name)["params"], fixture(name)["macs_224"])
    assert f"{found.parameters / 1e6:.0f}M" == stated.parameters
    # The official counts include norms and Fourier transforms: at most 0.6 % of the total.
    given = float(re.match(r"[\d.]+", stated.macs)[0])
    assert 0.994 * given - 0.05 <= found.macs / 1e9 <= given + 0.05
    assert [info["num_chs"] for info in model.feature_info] == [model.feature_info[0]["num_chs"] << i for i in range(4)]
    assert [len(stage) for stage in model.stages] == [2, 3, 18, 2]


def test_all_are_registered_and_have_stated_figures():
    assert set(timm.list_models("hornet_*")) == set(STATED)
    sizes = {
        "hornet_large_gf": [(14, 8), (7, 4)],
        "hornet_large_gf_img384": [(24, 13), (12, 7)],
        "hornet_base_gf_img384": [(24, 13), (12, 7)],
        "hornet_base_7x7": [],
    }
    for name, expected in sizes.items():
        with torch.device("meta"):
            layers = filters(timm.create_model(name, depths=(1, 1, 1, 1)))
        assert [tuple(layer.complex_weight.shape[1:3]) for layer in layers] == expected


def test_the_22k_classes_are_those_at_which_the_stated_parameters_fit():
    """The README states 209M, 211M and 216M for the networks trained on ImageNet-22K."""
    for name, expected in (("7x7", "209M"), ("gf", "211M"), ("gf_img384", "216M")):
        with torch.device("meta"):
            model = timm.create_model(f"hornet_large_{name}.in22k")
        assert model.num_classes == 10450
        assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f}M" == expected


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"depths": (1, 1, 2)}, ValueError, r"one entry for each stage: depths=\(1, 1, 2\), widths=\(8, 16, 32, 64\)"),
        ({"global_filters": (None, (4, 3))}, ValueError, r"one entry for each stage: .*global_filters=\(None, \(4, 3"),
        ({"depths": (1, 0, 2, 1)}, ValueError, "every entry of depths must be at least 1; got 0"),
        ({"widths": (8, 16, 20, 64)}, ValueError, "divisible by 8, .* order=4; got 20. Use an order of at most 3"),
        ({"widths": (8, 16, 24, 64)}, ValueError, "divisible by 16 for order=4; got 24"),
        ({"kernel_sizes": (7, 6, 7, 7)}, ValueError, "kernel_size must be odd.*got 6"),
        ({"scale": "1/3"}, TypeError, "scale must be a number; got '1/3'"),
        ({"drop_path_rate": 1.5}, ValueError, r"drop_path_rate must be from 0\.0 to 1\.0; got 1\.5"),
        ({"layer_scale_init": -1.0}, ValueError, "layer_scale_init must be from 0"),
        ({"head_init_scale": "1"}, TypeError, "head_init_scale must be a number"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        tiny(**arguments)


def test_stages_have_what_they_are_given():
    model = HorNet(depths=(1, 2), widths=(8, 12), orders=(4, 1), kernel_sizes=(3, 5), global_filters=(None, (4, 3)))
    assert [[len(block.gnconv.widths) for block in stage] for stage in model.stages] == [[4], [1, 1]]
    assert model.stages[0][0].gnconv.dwconv.kernel_size == (3, 3)
    assert isinstance(model.stages[0][0].gnconv.dwconv, DepthwiseConv2d)
    assert [tuple(layer.complex_weight.shape) for layer in filters(model)] == [(6, 4, 3, 2)] * 2


@pytest.mark.parametrize("layer_scale_init", [0.3, 0, None])
@pytest.mark.parametrize("global_filter", [None, (4, 3)])
def test_a_fused_block_is_the_block(layer_scale_init, global_filter):
    options = {"kernel_size": 5, "scale": 1 / 3, "global_filter": global_filter}
    block = filled(Block(8, 2, drop_path=0.5, layer_scale_init=layer_scale_init, **options))
    assert (block.gamma1 is None) == (block.gamma2 is None) == (not layer_scale_init)
    fused = block.fuse()
    x = torch.randn(2, 8, 6, 7, dtype=torch.double)
    close(fused(x), block(x), 1e-12)
    assert type(fused) is Branches
    assert not any(hasattr(module, "fuse") for module in (fused, fused.gnconv))
    assert not any(module.training for module in fused.modules())
    assert not {p.data_ptr() for p in fused.parameters()} & {p.data_ptr() for p in block.parameters()}
    fused(x).square().sum().backward()
    assert all(p.grad is not None for p in fused.parameters())
    assert not any(p.requires_grad for p in block.requires_grad_(False).fuse().parameters())
    with pytest.raises(RuntimeError, match=r"call model\.eval\(\) first"):
        block.train().fuse()


def test_initialization_is_the_official_one():
    model = timm.create_model("hornet_tiny_gf", depths=(1, 1, 1, 1), head_init_scale=0.5)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "gamma" in name:
            assert (parameter == 1e-6).all(), name
        elif parameter.ndim == 1:
            assert (parameter == 1).all(), name
        elif parameter.numel() > 5000:
            assert parameter.std().item() == pytest.approx(0.01 if name == "head.weight" else 0.02, rel=0.06), name
    model.reset_classifier(50)
    assert model.head.weight.std().item() == pytest.approx(0.01, rel=0.06)
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}


def test_layers_in_order_for_layer_wise_decay():
    model = tiny()
    groups = param_groups_layer_decay(model, 0.05, layer_decay=0.5, no_weight_decay_list=())
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    of = {name: scales[id(p)] for name, p in model.named_parameters()}
    assert of["head.weight"] == of["norm.weight"] == 1
    assert of["stages.3.0.gamma1"] == of["downsample_layers.3.1.weight"] == 0.5
    assert of["stages.2.1.gnconv.dwconv.complex_weight"] == 0.25
    assert of["stages.2.0.gamma2"] == of["downsample_layers.2.0.weight"] == 0.125
    assert of["downsample_layers.0.0.weight"] == 2**-6
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert all((id(p) in decayed) == (p.ndim > 1) for p in model.parameters())  # including the filters
    coarse = timm.models.group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert coarse["stages.2.1.gamma1"] == coarse["downsample_layers.2.0.weight"] == 3


def test_configurations_are_the_official_evaluation():
    for name, side, mode, classes in (
        ("hornet_tiny_7x7", 224, "center", 1000),
        ("hornet_large_gf", 224, "center", 1000),
        ("hornet_base_gf_img384", 384, "squash", 1000),
        ("hornet_large_gf_img384", 384, "squash", 1000),
        ("hornet_large_gf_img384.in22k", 384, "squash", 10450),
    ):
        model = timm.create_model(name, **{k: v for k, v in TINY.items() if k != "num_classes"})
        data = resolve_model_data_config(model)
        assert model.head.out_features == classes
        assert data["input_size"] == (3, side, side)
        assert (data["mean"], data["std"]) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        assert data["interpolation"] == "bicubic"
        assert (data["crop_mode"], data["crop_pct"]) == (mode, 0.875 if mode == "center" else 1.0)


@pytest.mark.parametrize("name", NAMES)
def test_any_size_and_features_at_strides_4_to_32(name):
    model = tiny(name, features_only=True).eval()
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    check = fixture(name)["train_extra"]["arbitrary_size_check"]
    found = model(torch.randn(1, 3, *check["input"]))
    assert [list(feature.shape[-2:]) for feature in found] == check["stage_hw"]
    assert [feature.shape[1] for feature in found] == model.feature_info.channels() == [8, 16, 32, 64]
    first = tiny(name, features_only=True, out_indices=(0, 1))
    assert len(first(torch.randn(1, 3, 64, 64))) == 2
    assert not any(key.startswith(("stages.2", "downsample_layers.3", "norm", "head")) for key in first.state_dict())
    assert tiny(name)(torch.randn(0, 3, 64, 64)).shape == (0, 7)


@pytest.mark.parametrize("size", [(75, 90), 96, (224, 160)])
def test_filters_are_stored_for_another_size(size):
    model = filled(tiny())
    sides = (size, size) if isinstance(size, int) else size
    x = torch.randn(2, 3, *sides, dtype=torch.double)
    expected = model(x)
    model.set_input_size(size)
    shapes = [tuple(layer.complex_weight.shape[1:3]) for layer in filters(model)]
    maps = [(sides[0] // step, sides[1] // step // 2 + 1) for step in (16, 16, 32)]
    assert shapes == maps
    close(model(x), expected, FLOAT64)
    fused = widefield.reparameterize(model, x)
    fused.set_input_size(128)
    assert [tuple(layer.complex_weight.shape[1:3]) for layer in filters(fused)] == [(8, 5), (8, 5), (4, 3)]
    with pytest.raises(ValueError, match="img_size must be at least 32; got 24"):
        model.set_input_size((64, 24))


@pytest.mark.parametrize("name", ["hornet_base_gf", "hornet_large_gf"])
def test_the_384_network_is_that_for_224_with_its_filters_resized(name, tmp_path):
    model = tiny(name)
    model.set_input_size(384)
    torch.save({"model": model.state_dict()}, tmp_path / "img384.pth")
    file = {"file": str(tmp_path / "img384.pth")}
    larger = tiny(f"{name}_img384", pretrained=True, pretrained_cfg_overlay=file)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(larger.eval()(x), model.eval()(x))
    with pytest.raises(ValueError, match=f"do not fit {name}:"):  # so the right name is necessary
        tiny(name, pretrained=True, pretrained_cfg_overlay=file)


@pytest.mark.parametrize("name", NAMES)
def test_export_of_the_fused_network(name):
    fused = widefield.reparameterize(filled(tiny(name, depths=(1, 1, 1, 1))).float())
    sizes = {
        0: torch.export.Dim("batch", min=1, max=16),
        2: 32 * torch.export.Dim("rows", min=2, max=8),
        3: 32 * torch.export.Dim("columns", min=2, max=8),
    }
    program = torch.export.export(fused, (torch.randn(3, 3, 64, 96),), dynamic_shapes=(sizes,))
    for shape in ((1, 3, 96, 64), (2, 3, 224, 224)):
        x = torch.randn(shape)
        close(program.module()(x), fused(x), FLOAT32)
    assert not any("widefield" in str(node.target) for node in program.graph.nodes)


# Weights in the authors' format


def saved(state, path, wrapped=True):
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save({"model": state} if wrapped else state, path)
    return {"file": str(path)}


def load(overlay, name="hornet_tiny_gf", **arguments):
    return tiny(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments).eval()


@pytest.mark.parametrize("classes", [10450, 21841, 21842])
def test_weights_for_other_classes(tmp_path, classes):
    source = filled(tiny(num_classes=classes)).float()
    file = saved(source.state_dict(), tmp_path / "in22k.pth")
    x = torch.randn(1, 3, 64, 64)
    name = "hornet_large_gf.in22k"
    assert torch.equal(load(file, name, num_classes=classes)(x), source(x))
    model = load(file, "hornet_large_gf")  # for fine-tuning
    assert model(x).shape == (1, 7)
    assert torch.equal(model.forward_features(x), source.forward_features(x))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"widths": (8, 16, 32, 96)}, r"do not fit hornet_tiny_gf: .*\(96,\) and should be \(64,\)"),
        ({"depths": (1, 1, 1, 1)}, r"missing: stages\.2\.1\.gamma1"),
        ({"global_filters": (None,) * 4}, r"missing: stages\.2\.0\.gnconv\.dwconv\.complex_weight"),
        ({"global_filters": (None, None, (24, 13), (12, 7))}, r"complex_weight is \(30, 24, 13, 2\) and should be"),
        ({"orders": (2, 3, 3, 5)}, r"missing: stages\.2\.0\.gnconv\.pws\.2\.weight"),
        ({"layer_scale_init": 0}, r"missing: stages\.0\.0\.gamma1"),
    ],
)
def test_weights_of_another_network_are_refused(tmp_path, other, message):
    with pytest.raises(ValueError, match=message):
        load(saved(tiny(**other).state_dict(), tmp_path / "other.pth"))
