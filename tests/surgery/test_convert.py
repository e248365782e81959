import copy

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations

import widefield
from tolerances import NETWORK
from widefield.nn import MoRFConv2d
from widefield.surgery import walk


def unsettled(model):
    """Give norms, layer scales and weights random values: initial values hide most of a network's blocks.

    Mixtures keep theirs: unnormalized routing weights grow with the activations, block by block.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name or "expert" in name:
                continue
            if parameter.ndim in (1, 3):  # (C, 1, 1): torchvision's layer scale
                nn.init.normal_(parameter, 0.0 if name.endswith("bias") else 0.6, 0.1)
            else:
                nn.init.normal_(parameter, std=(2 / parameter[0].numel()) ** 0.5)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.1)
                nn.init.uniform_(module.running_var, 0.8, 1.2)
    return model.eval()


ARCHITECTURES = ["convnext_atto", "resnet18", "mobilenetv2_100", "efficientnet_b0", "tv:resnet50", "tv:convnext_tiny"]


def create(name):
    model = torchvision.models.get_model(name[3:]) if name.startswith("tv:") else timm.create_model(name)
    return unsettled(model)


SLOW = {("tv:resnet50", "soft"), ("tv:resnet50", "hard"), ("resnet18", "hard")}
"""Networks whose dense convolutions are large as mixtures; one of these cases is enough for every day."""


@pytest.mark.parametrize(
    ("name", "routing"),
    [
        pytest.param(name, routing, marks=[pytest.mark.slow] * ((name, routing) in SLOW))
        for name in ARCHITECTURES
        for routing in ("soft", "hard")
    ],
)
def test_conversion_keeps_the_logits_of_real_models(name, routing):
    model = create(name)
    x = torch.randn(2, 3, 64, 64)
    converted = widefield.convert(model, widefield.MoRF(routing=routing))
    mixtures = [m for m in converted.modules() if isinstance(m, MoRFConv2d)]
    assert len(mixtures) >= 12
    assert not converted.training
    assert widefield.compare(model, converted, x).relative < NETWORK
    # The compared network depends on its convolutions.
    for kernel in (kernel for layer in mixtures for kernel in layer.kernels()):
        nn.init.zeros_(kernel)
    assert widefield.compare(model, converted, x).relative > 100 * NETWORK


def test_the_original_is_left_alone_unless_asked():
    model = timm.create_model("resnet18")
    before = copy.deepcopy(model.state_dict())
    widefield.convert(model, widefield.MoRF((3, 5)))
    assert not any(isinstance(m, MoRFConv2d) for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert widefield.convert(model, widefield.MoRF((3, 5)), inplace=True) is model
    assert any(isinstance(m, MoRFConv2d) for m in model.modules())


def test_default_takes_every_spatial_convolution_but_the_one_that_reads_the_image():
    model = timm.create_model("resnet18")
    names = {s.name for s in widefield.plan(model, widefield.MoRF((3, 5))).replaced}
    assert names == {f"layer{s}.{b}.conv{c}" for s in (1, 2, 3, 4) for b in (0, 1) for c in (1, 2)}


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("layer4.*", 4),
        (["layer1.0.*", "layer4.1.conv2"], 3),
        (lambda module, name: module.in_channels == 64 and name.endswith("conv1"), 3),
    ],
)
def test_where_selects(where, expected):
    model = timm.create_model("resnet18")
    steps = widefield.plan(model, widefield.MoRF((3, 5)), where=where).replaced
    assert len(steps) == expected
    converted = widefield.convert(model, widefield.MoRF((3, 5)), where=where)
    assert [n for n, m in converted.named_modules() if isinstance(m, MoRFConv2d)] == [s.name for s in steps]


def test_where_may_name_the_stem():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
    with pytest.raises(ValueError, match="These could match: 0"):
        widefield.convert(model, widefield.MoRF((3, 5)))
    assert isinstance(widefield.convert(model, widefield.MoRF((3, 5)), where="0")[0], MoRFConv2d)


def test_the_root_itself_can_be_converted():
    conv = nn.Conv2d(8, 8, 3, padding=1)
    assert isinstance(widefield.convert(conv, widefield.MoRF((3, 5))), MoRFConv2d)


def test_a_shared_convolution_stays_shared():
    conv = nn.Conv2d(8, 8, 3, padding=1)
    model = nn.Sequential(conv, nn.ReLU(), conv)
    converted = widefield.convert(model, widefield.MoRF((3, 5)))
    assert isinstance(converted[0], MoRFConv2d)
    assert converted[0] is converted[2]


def test_walk_replaces_in_containers_and_attributes():
    model = nn.ModuleDict({"a": nn.Sequential(nn.ReLU()), "b": nn.ModuleList([nn.ReLU()])})
    a, b = model["a"][0], model["b"][0]
    walk.replace(model, {a: nn.GELU(), b: nn.SiLU()})
    assert isinstance(model["a"][0], nn.GELU)
    assert isinstance(model["b"][0], nn.SiLU)


def test_plan_gives_a_reason_for_every_convolution_passed_over_and_prints_a_table():
    hooked = nn.Conv2d(8, 8, 3, padding=1)
    hooked.register_forward_hook(lambda *a: None)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Conv2d(8, 8, 1),
        nn.Conv2d(8, 8, 2, stride=2),
        parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1)),
        hooked,
        nn.Conv2d(8, 8, 9, padding=4),
        nn.ConvTranspose2d(8, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, padding=1),
    )
    model[9].weight = model[8].weight
    plan = widefield.plan(model, widefield.MoRF((3, 5)))
    assert [s.name for s in plan.replaced] == ["1"]
    reasons = {s.name: s.reason for s in plan.passed_over}
    for name, words in {
        "0": "reads the image",
        "2": "kernel size is 1",
        "3": "even",
        "4": "parametrized",
        "5": "hooks",
        "6": "9x9",
        "7": "ConvTranspose2d",
        "8": "shares its weight with 9",
        "9": "shares its weight with 8",
    }.items():
        assert words in reasons[name]
    table = str(plan)
    assert "1 replaced, 9 passed over" in table
    assert "MoRFConv2d(8, 8" in table
    assert isinstance(model[1], nn.Conv2d)


def test_plan_is_what_convert_does_also_for_subclassed_and_same_padded_convolutions():
    model = timm.create_model("tf_efficientnet_b0")  # TensorFlow's asymmetric padding for stride 2
    plan = widefield.plan(model, widefield.MoRF())
    assert sum("SameAligned(MoRFConv2d(" in s.after for s in plan.replaced) == 4
    converted = widefield.convert(model, widefield.MoRF())
    mixtures = {n.removesuffix(".layer") for n, m in converted.named_modules() if isinstance(m, MoRFConv2d)}
    assert mixtures == {s.name for s in plan.replaced}


@pytest.mark.parametrize(
    ("model", "where", "message"),
    [
        (lambda: timm.create_model("resnet18"), "layer9.*", r"where='layer9.\*' matches no.*layer1.0.conv1"),
        (lambda: nn.Sequential(nn.Linear(3, 3)), None, "has no convolution"),
        (lambda: nn.Sequential(nn.Conv2d(8, 8, 2)), None, "even"),
    ],
)
def test_converting_nothing_is_an_error_that_says_what_could_match(model, where, message):
    with pytest.raises(ValueError, match=message):
        widefield.convert(model(), widefield.MoRF((3, 5)), where=where)


def test_where_of_a_wrong_type_is_refused():
    with pytest.raises(TypeError, match="where must be a glob"):
        widefield.plan(nn.Sequential(), widefield.MoRF(), where=3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kernel_sizes": (4,)}, ValueError, "odd"),
        ({"kernel_sizes": (3, 5), "routing": "hard", "top_k": 3}, ValueError, "top_k=3 of 2"),
        ({"init": "keep"}, ValueError, "init must be one of 'preserve', 'random'"),
        ({"attention": "softmx"}, ValueError, "Did you mean 'softmax'"),
    ],
)
def test_a_config_refuses_bad_arguments_at_once(arguments, error, message):
    with pytest.raises(error, match=message):
        widefield.MoRF(**arguments)


def test_random_init_starts_afresh_and_inherits_dilation():
    conv = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
    layer = widefield.convert(conv, widefield.MoRF((3, 5), init="random"))
    assert layer.dilations == (2, 2)
    x = torch.randn(2, 8, 9, 9)
    assert widefield.compare(conv.eval(), layer.eval(), x).relative > 0.1


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0", "fastvit_t8", "repvit_m0_9", "levit_conv_128s"])
def test_blocks_that_merge_their_convolutions_themselves_are_passed_over(name):
    model = unsettled(timm.create_model(name, num_classes=5))
    plan = widefield.plan(model, widefield.MoRF((3, 5, 7)), where="*")
    assert any("reparameterize before converting" in s.reason for s in plan.passed_over)
    if plan.replaced:
        converted = widefield.convert(model, widefield.MoRF((3, 5, 7)), where="*")
        x = torch.randn(2, *model.pretrained_cfg["input_size"])
        assert widefield.compare(model, widefield.reparameterize(converted, x), x).relative < NETWORK


def test_dilated_networks_convert_and_fuse_at_the_size_of_their_experts():
    model = torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None).eval()
    converted = widefield.convert(model, widefield.MoRF((3, 5)), where="classifier.0.convs.*")
    before = sum(p.numel() for p in converted.parameters())
    x = torch.randn(1, 3, 64, 64)
    fused = widefield.reparameterize(converted, x)
    assert sum(p.numel() for p in fused.parameters()) < 2 * before
    assert widefield.compare(model, fused, x).relative < NETWORK


def test_configs_are_values():
    assert widefield.MoRF([3, [3, 2]]) == widefield.MoRF((3, (3, 2)))
    assert len({widefield.MoRF([3, 5]), widefield.MoRF((3, 5))}) == 1


def test_conversion_works_on_the_meta_device():
    model = timm.create_model("convnext_atto").to("meta")
    converted = widefield.convert(model, widefield.MoRF())
    assert all(p.is_meta for p in converted.parameters())
