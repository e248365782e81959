import pytest
import timm
import torch
import torchvision
from torch import nn

import widefield
from tolerances import FLOAT32, NETWORK, close
from widefield.bench import cost
from widefield.models.resnet_cifar import STATED, CifarResNet, PaddedShortcut
from widefield.nn.gmconv import DynamicGMConv2d, GMConv2d, why_not
from widefield.surgery.walk import replace

MODELS = ["resnet18_cifar", "resnet20_cifar", "resnet56_cifar"]
TINY = {"depths": (1, 2, 1), "widths": (4, 8, 12)}


def masked(model, dynamic):
    """Tables I and II: masks on all spatial convolutions; the first mask is dynamic if requested."""
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d) and why_not(m) is None]
    kinds = [DynamicGMConv2d if dynamic and i == 0 else GMConv2d for i in range(len(layers))]
    replace(model, {conv: kind.from_conv2d(conv) for conv, kind in zip(layers, kinds, strict=True)})
    return len(layers)


def norm_outputs(model, x):
    """Return the number of outputs of a model's batch norms."""
    counts = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda module, args, y: counts.append(y.numel()))
    model(x)
    return sum(counts)


TABLES = {
    "ResNet-20": (lambda: timm.create_model("resnet20_cifar"), 32, "0.27", None),
    "ResNet-56": (lambda: timm.create_model("resnet56_cifar"), 32, "0.85", 128e6),
    "ResNet-18, CIFAR": (lambda: timm.create_model("resnet18_cifar", num_classes=100), 32, "11.22", 558e6),
    "MobileNetV2": (lambda: timm.create_model("mobilenetv2_100"), 224, "3.50", 0.327e9),
    "ResNet-18": (lambda: timm.create_model("resnet18"), 224, "11.69", 1.82e9),
    "ResNet-50": (lambda: timm.create_model("resnet50"), 224, "25.56", 4.13e9),
    "AlexNet": (torchvision.models.alexnet, 224, "61.10", 0.714e9),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", TABLES)
def test_costs_are_those_of_tables_1_and_2(name, dynamic):
    """Check the tables' counts.

    According to their digits, the tables count a multiply-accumulate once and four operations for each output of a
    batch norm. This gives 41.3M for ResNet-20, and the table has 42M; with projections it would be 41.6M.
    """
    make, side, millions, operations = TABLES[name]
    with torch.device("meta"):
        model, x = make().eval(), torch.zeros(1, 3, side, side)
    before = cost(model, x)
    layers = masked(model, dynamic)
    after = cost(model, x)
    first = next(m for m in model.modules() if isinstance(m, (GMConv2d, DynamicGMConv2d)))
    predictor = sum(p.numel() for p in first.predictor.parameters()) if dynamic else 0
    assert after.parameters == before.parameters + layers - dynamic + predictor
    assert after.macs == before.macs + (6 * 4 + 4 * 2 if dynamic else 0)
    assert f"{after.parameters / 1e6:.2f}" == millions
    if operations is not None:
        digit = 0.001e9 if operations < 1e9 else 0.01e9
        counted = after.macs + 4 * norm_outputs(model, x)
        assert abs(counted - operations) <= (0.5e6 if side == 32 else digit / 2)
    kinds = {m: m.fuse() for m in model.eval().modules() if isinstance(m, GMConv2d)}
    fused = cost(replace(model, kinds), x)
    assert fused == (before if not dynamic else type(before)(before.parameters + predictor, after.macs))


def test_resnet_20_counts_41_million_where_the_table_has_42():
    counts = {}
    for shortcut in ("pad", "project"):
        with torch.device("meta"):
            model, x = timm.create_model("resnet20_cifar", shortcut=shortcut).eval(), torch.zeros(1, 3, 32, 32)
        total = cost(model, x)
        counts[shortcut] = total.parameters, total.macs, total.macs + 4 * norm_outputs(model, x)
    assert counts == {"pad": (269_722, 40_551_040, 41_304_704), "project": (272_474, 40_813_184, 41_616_000)}


def test_fusing_a_converted_network_gives_the_plain_one_back():
    model = timm.create_model("resnet20_cifar", **TINY).eval()
    twin = timm.create_model("resnet20_cifar", **TINY).eval()
    twin.load_state_dict(model.state_dict())
    masked(twin, dynamic=True)
    x = torch.randn(2, 3, 32, 32)
    close(twin(x), model(x), NETWORK)
    fused = widefield.reparameterize(twin, x)
    close(fused(x), model(x), NETWORK)
    assert not any(isinstance(m, (GMConv2d, nn.BatchNorm2d)) for m in fused.modules())


def test_every_network_is_stated():
    assert sorted(STATED) == MODELS == timm.list_models("resnet*_cifar")


@pytest.mark.parametrize("name", MODELS)
def test_configurations_are_those_of_cifar(name):
    model = timm.create_model(name)
    config = model.pretrained_cfg
    assert config["input_size"] == (3, 32, 32)
    assert config["num_classes"] == model.num_classes == 10
    assert config["mean"] == (0.4914, 0.4822, 0.4465)
    assert model.get_submodule(config["first_conv"]).in_channels == 3
    assert model.get_submodule(config["classifier"]).out_features == 10
    assert model.forward_features(torch.zeros(1, 3, 32, 32)).shape[2:] == config["pool_size"]


@pytest.mark.parametrize("name", MODELS)
def test_behaves_as_everywhere_in_timm(name):
    model = timm.create_model(name, in_chans=1, drop_path_rate=0.1, drop_rate=0.1, num_classes=7).eval()
    x = torch.randn(2, 1, 32, 32)
    assert model(x).shape == (2, 7)
    assert model(torch.randn(1, 1, 25, 30)).shape == (1, 7)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, model.num_features)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    features = timm.create_model(name, features_only=True)
    info = features.feature_info
    assert info.reduction() == [1, 2, 4, 8][: len(info)]
    for feature, channels, stride in zip(features(torch.randn(1, 3, 25, 30)), *infos(info), strict=True):
        assert feature.shape == (1, channels, -(-25 // stride), -(-30 // stride))
    (last,) = timm.create_model(name, features_only=True, out_indices=(1,))(torch.randn(1, 3, 32, 32))
    assert last.shape[2:] == (16, 16)
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model(name, pretrained=True)


def infos(info):
    return info.channels(), info.reduction()


def test_groups_of_parameters_follow_the_depth():
    model = timm.create_model("resnet20_cifar")
    groups = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    assert groups["conv1.weight"] == groups["bn1.bias"] == 0
    assert groups["layer1.0.conv1.weight"] < groups["layer1.1.bn2.weight"] < groups["layer3.0.conv1.weight"]
    assert groups["layer3.2.conv2.weight"] < groups["head.weight"]
    coarse = timm.models.group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert coarse["layer1.0.conv1.weight"] == coarse["layer1.2.conv1.weight"]


@pytest.mark.parametrize("shortcut", ["pad", "project"])
def test_trains_and_every_parameter_gets_a_gradient(shortcut):
    model = timm.create_model("resnet20_cifar", shortcut=shortcut, **TINY)
    x = torch.randn(8, 3, 32, 32)
    grads = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        model(x).square().sum().backward()
        assert all(p.grad.abs().max() > 0 for p in model.parameters())
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        close(a, b, FLOAT32)


def test_the_padded_shortcut_is_option_a():
    x = torch.randn(2, 3, 5, 6)
    y = PaddedShortcut(2, 2)(x)
    assert torch.equal(y[:, :3], x[:, :, ::2, ::2])
    assert y.shape == (2, 5, 3, 3)
    assert not y[:, 3:].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shortcut": "zeros"}, "shortcut must be one of 'pad', 'project'; got 'zeros'"),
        ({"depths": (1, 1)}, r"one entry for each stage; got \(1, 1\) and \(16, 32, 64\)"),
        ({"widths": (16, 32, 8)}, r"must not shrink.*got \(16, 32, 8\)"),
        ({"drop_path_rate": 2.0}, "drop_path_rate must be from 0.0 to 1.0; got 2.0"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CifarResNet(**arguments)
