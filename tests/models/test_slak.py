import copy

import pytest
import timm
import torch
from conformance import check_features, check_logits, check_operator, check_state, filled, fixture, loaded, operators
from safetensors.torch import save_file
from timm.models import group_parameters
from torch import nn

import widefield
from tolerances import FLOAT32, FLOAT64, close
from widefield.bench import cost
from widefield.models.slak import STATED, Block, SLaK
from widefield.nn import DecomposedConv2d, LargeKernelConv2d, ReparamConv2d

TINY = {
    "depths": (1, 1, 2, 1), "widths": (8, 12, 16, 24), "kernel_sizes": (13, 11, 9, 5), "small_kernel": 3,
    "num_classes": 7, "layer_scale_init": 0.3,
}  # fmt: skip


def tiny(**arguments):
    """Return a network with batch norm statistics like after training."""
    model = timm.create_model("slak_tiny", **{**TINY, **arguments})
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean, 0, 0.1)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.normal_(norm.weight, 1, 0.1)
            nn.init.normal_(norm.bias, 0, 0.1)
    return model.eval()


def meta(name, **arguments):
    with torch.device("meta"):
        return timm.create_model(name, **arguments).eval()


def counted(name, **arguments):
    return cost(meta(name, **arguments), torch.empty(1, 3, 224, 224, device="meta"))


def test_the_network_is_the_official_one_before_and_after_merging():
    expected = fixture("slak_tiny")
    model = filled(timm.create_model("slak_tiny"))
    check_state(model, expected["state_dict"])
    assert list(model.state_dict()) == list(expected["state_dict"])
    check_logits(model, expected)
    check_features(model, expected)
    (run,) = expected["extra_runs"]
    check_logits(model, run)
    check_features(model, run)
    fused = widefield.reparameterize(model, torch.randn(1, 3, 64, 64, dtype=torch.double), inplace=True)
    check_logits(fused, expected)  # exact, although the authors do not merge the bands


def test_the_block_is_the_official_one():
    case = operators()["slak_decomposed_block"]
    block = Block(4, 9, 5).double()
    assert list(block.state_dict()) == list(case["state_dict"])
    check_operator(loaded(block, case), case)


@pytest.mark.parametrize(
    ("name", "decomposed", "parameters", "macs"),
    [
        ("slak_tiny", True, 50_703_838, 8_704_776_370),  # the fixture's count
        ("slak_tiny_31", True, 49_581_838, 8_178_281_170),
        ("slak_tiny_61", True, 51_264_838, 8_968_023_970),
        ("slak_small", True, 91_131_820, 16_604_014_234),
        ("slak_base", True, 157_950_792, 28_509_057_219),
        ("slak_tiny", False, 60_818_614, 13_799_745_508),
    ],
)
def test_dense_counts(name, decomposed, parameters, macs):
    found = counted(name, decomposed=decomposed)
    assert (found.parameters, found.macs) == (parameters, macs)
    if name == "slak_tiny" and decomposed:
        assert (parameters, macs) == (fixture("slak_tiny")["params"], fixture("slak_tiny")["macs_224"])


@pytest.mark.parametrize("name", STATED)
def test_the_stated_parameters_are_those_left_by_40_percent_sparsity_in_every_matrix_and_kernel(name):
    model = meta(name)
    total = sum(p.numel() for p in model.parameters())
    left = total - 0.4 * sum(p.numel() for p in model.parameters() if p.ndim in (2, 4))
    assert f"{left / 1e6:.0f}M" == STATED[name].parameters


def test_widths_depths_and_names():
    assert timm.list_models("slak*") == sorted(STATED)
    assert sorted(STATED) == ["slak_base", "slak_small", "slak_tiny", "slak_tiny_31", "slak_tiny_61"]
    widths = {name: [info["num_chs"] for info in meta(name).feature_info] for name in STATED}
    assert widths == {
        "slak_tiny": [124, 249, 499, 998],
        "slak_tiny_31": [124, 249, 499, 998],
        "slak_tiny_61": [124, 249, 499, 998],
        "slak_small": [124, 249, 499, 998],
        "slak_base": [166, 332, 665, 1331],
    }
    assert [len(stage) for stage in meta("slak_small").stages] == [3, 3, 27, 3]
    narrow = meta("slak_tiny", width_factor=1, kernel_sizes=(7, 7, 7, 7), decomposed=False, small_kernel=100)
    # ConvNeXt-T with a batch norm after each kernel, as in the authors' repository
    convnext = {key: value.shape for key, value in timm.create_model("convnext_tiny").state_dict().items()}
    assert len(narrow.state_dict()) == len(convnext) + 18 * 4  # weight, bias and statistics of a norm replace a bias
    layers = [m for m in narrow.modules() if isinstance(m, LargeKernelConv2d)]
    assert {conv.kernel_size for layer in layers for conv, _ in layer.branches()} == {(7, 7)}


def test_starts_as_the_official_code_does():
    torch.manual_seed(0)
    model = timm.create_model("slak_tiny", depths=(1, 1, 1, 1), drop_path_rate=0.3)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.15)
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, Block):
            assert (module.gamma == 1e-6).all()
    assert [stage[0].drop_path.drop_prob for stage in model.stages] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert timm.create_model("slak_tiny", **{**TINY, "layer_scale_init": 0}).stages[0][0].gamma is None


def test_the_small_square_is_left_out_where_it_is_not_smaller():
    for decomposed, kind in ((True, DecomposedConv2d), (False, LargeKernelConv2d)):
        model = tiny(kernel_sizes=(9, 7, 3, 3), decomposed=decomposed)
        layers = [stage[0].large_kernel for stage in model.stages]
        assert all(isinstance(layer, kind) for layer in layers)
        assert [hasattr(layer, "small_conv") for layer in layers] == [True, True, False, False]


@pytest.mark.parametrize("decomposed", [True, False])
def test_reparameterization_keeps_the_function(decomposed):
    model = tiny(decomposed=decomposed).double()
    x = torch.randn(2, 3, 48, 64, dtype=torch.double)
    fused = widefield.reparameterize(model, x)
    close(fused(x), model(x), FLOAT64)
    assert not any(isinstance(m, (ReparamConv2d, nn.BatchNorm2d)) for m in fused.modules())
    keys = [key for key in fused.state_dict() if key.startswith("stages.0.0.large_kernel")]
    names = ["LoRA1.weight", "LoRA1.bias", "LoRA2.weight"] if decomposed else ["lkb_reparam.weight", "lkb_reparam.bias"]
    assert keys == [f"stages.0.0.large_kernel.{name}" for name in names]
    with pytest.raises(RuntimeError, match=r"model.eval\(\)"):
        widefield.reparameterize(model.train(), x)


def test_any_size_and_timms_ways():
    assert [tuple(f.shape[-2:]) for f in tiny().forward_intermediates(torch.randn(1, 3, 75, 90))[1]] == [
        tuple(size) for size in fixture("slak_tiny")["train_extra"]["arbitrary_size_check"]["stage_hw"]
    ]
    model = tiny(in_chans=1, drop_path_rate=0.1, drop_rate=0.1)
    x = torch.randn(2, 1, 75, 90)
    features = model.forward_intermediates(x, intermediates_only=True)
    expected = model(x)
    assert expected.shape == (2, 7)
    last, _ = model.forward_intermediates(x)
    close(model.forward_head(last), expected, FLOAT32)
    assert model.forward_head(last, pre_logits=True).shape == (2, 31)
    model.reset_classifier(3, "")
    assert model(x).shape == (2, 3, 2, 2)
    close(model(torch.zeros(1, 1, 32, 32))[:, :, 0, 0], pooled_twin(model)(torch.zeros(1, 1, 32, 32)), FLOAT32)
    assert model.prune_intermediate_layers([1]) == [1]
    left = {".".join(name.split(".")[:2]) for name in model.state_dict()}
    assert left == {"downsample_layers.0", "downsample_layers.1", "stages.0", "stages.1"}
    close(model.forward_intermediates(x, [1], intermediates_only=True)[0], features[1], FLOAT32)
    only = timm.create_model("slak_tiny", features_only=True, out_indices=(1, 3), **TINY)
    assert [tuple(f.shape) for f in only(torch.randn(1, 3, 64, 64))] == [(1, 15, 8, 8), (1, 31, 2, 2)]
    assert only.feature_info.reduction() == [8, 32]


def pooled_twin(model):
    twin = copy.deepcopy(model)
    twin.reset_classifier(3, "avg")
    twin.head = model.head
    return twin


@pytest.mark.parametrize("coarse", [False, True])
def test_layers_are_grouped_from_the_image_to_the_head(coarse):
    model = tiny()
    groups = group_parameters(model, model.group_matcher(coarse=coarse))
    first = [sorted({name.split(".")[0] for name in names}) for names in groups.values()]
    assert first[0] == ["downsample_layers"]
    order = [
        sorted({".".join(name.split(".")[1:3]) for name in names if "stages" in name}) for names in groups.values()
    ]
    if coarse:
        assert [sorted({name.split(".")[0] for name in part}) for part in order[1:5]] == [[str(i)] for i in range(4)]
    else:
        assert [part for part in order if part] == [["0.0"], ["1.0"], ["2.0"], ["2.1"], ["3.0"]]
    for i in (1, 2, 3):  # a stage's downsampling belongs to its first blocks
        (group,) = [names for names in groups.values() if f"downsample_layers.{i}.1.weight" in names]
        assert any(name.startswith(f"stages.{i}.0.") for name in group)
    assert sum(map(len, groups.values())) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_sizes": (9, 7, 5)}, r"must have one entry a stage each; got .* and \(9, 7, 5\)"),
        ({"kernel_sizes": (9, 7, 5, 4)}, "kernel_size must be odd.*; got 4"),
        ({"small_kernel": 2}, "small must be odd.*; got 2"),
        ({"width_factor": 0.01}, "every width times width_factor must be at least 1; got 0"),
        ({"drop_path_rate": 1.5}, "drop_path_rate must be from 0.0 to 1.0; got 1.5"),
        ({"layer_scale_init": -1.0}, "layer_scale_init must be from 0.0"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SLaK(**{**TINY, **arguments})


# Weights in the authors' format


def saved(model, path, wrap=None):
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save({wrap: state} if wrap else state, path)
    return {"file": str(path)}


def load(overlay, **arguments):
    options = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    return timm.create_model("slak_tiny", **options, **{**TINY, **arguments})


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("decomposed", [True, False])
@pytest.mark.parametrize(("file", "wrap"), [("w.pth", None), ("w.pth", "model"), ("w.safetensors", None)])
def test_official_weights_load(tmp_path, decomposed, merged, file, wrap):
    source = tiny(decomposed=decomposed)
    source = widefield.reparameterize(source) if merged else source
    model = load(saved(source, tmp_path / file, wrap), decomposed=decomposed)
    assert model.training
    x = torch.randn(2, 3, 64, 64)
    close(model.eval()(x), source(x), FLOAT32)
    assert list(model.state_dict()) == list(source.state_dict())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"depths": (1, 1, 1, 1)}, r"do not fit slak_tiny: missing: stages.2.1.gamma"),
        ({"depths": (1, 1, 3, 1)}, r"not known: stages.2.2.gamma.* and \d+ more"),
        ({"kernel_sizes": (15, 11, 9, 5)}, r"LoRA1.conv.weight is \(10, 1, 15, 3\) and should be \(10, 1, 13, 3\)"),
        ({"decomposed": False}, r"missing: stages.0.0.large_kernel.LoRA1.conv.weight.*not known: .*lkb_origin"),
        ({"width_factor": 1.0}, r"downsample_layers.0.1.weight is \(8,\) and should be \(10,\)"),
    ],
)
def test_the_wrong_weights_are_refused_with_the_keys_that_differ(tmp_path, other, message):
    with pytest.raises(ValueError, match=message):
        load(saved(tiny(**other), tmp_path / "w.pth"))
