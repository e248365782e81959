"""Folding of batch norms into layers, with unchanged outputs."""

import copy
import re
import weakref

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import BatchNormAct2d, StdConv2d
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import FrozenBatchNormAct2d, SyncBatchNormAct
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import widefield
from tolerances import FLOAT64, close
from widefield.nn import DepthwiseConv2d, DynamicGMConv2d, MoRFConv2d
from widefield.surgery.folding import is_norm


def shaken(model):
    """Give every norm statistics like after training: those of new norms hide errors."""
    with torch.no_grad():
        for module in model.modules():
            if is_norm(module) and module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.3, 3.0)
                if module.weight is not None:
                    module.weight.uniform_(-1.5, 1.5)
                    module.bias.normal_()
    return model.eval()


def fold(model, x, **options):
    """Return the model in float64, its reparameterized form and the report."""
    reports = []
    model = shaken(model).double()
    return (
        model,
        widefield.reparameterize(model, x.double(), tolerance=1e-9, report=reports.append, **options),
        *reports,
    )


CONVOLUTIONS = {
    "dense": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "no bias, reflected": lambda: nn.Conv2d(4, 6, 3, padding=1, bias=False, padding_mode="reflect"),
    "grouped, dilated": lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2),
    "depthwise": lambda: DepthwiseConv2d(4, 4, 5, padding="same", bias=False),
    "TensorFlow's padding": lambda: Conv2dSame(4, 6, 3, stride=2),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, bias=False),
    "transposed, grouped": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2),
    "transposed, depthwise": lambda: nn.ConvTranspose2d(4, 4, 4, stride=2, groups=4),
}
NORMS = {
    "plain": nn.BatchNorm2d,
    "not affine": lambda c: nn.BatchNorm2d(c, affine=False, eps=0.1),
    "of several processes": nn.SyncBatchNorm,
    "with activation": lambda c: BatchNormAct2d(c, act_layer="leaky_relu"),
    "frozen": FrozenBatchNorm2d,
    "frozen, with activation": FrozenBatchNormAct2d,
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("conv", CONVOLUTIONS)
def test_every_kind_of_norm_goes_into_every_kind_of_convolution(conv, norm):
    layer = CONVOLUTIONS[conv]()
    x = torch.randn(2, 4, 9, 8)
    model, fused, report = fold(nn.Sequential(layer, NORMS[norm](layer.out_channels)), x)
    assert not any(is_norm(m) for m in fused.modules())
    assert (torch.relu(fused[1](x)) == torch.relu(x)).all()  # only the activation remains
    assert isinstance(fused[0], nn.Conv2d if isinstance(layer, DepthwiseConv2d) else type(layer))
    assert (report.fused[0].name, report.fused[0].norm, report.left) == ("0", "1", ())
    assert 0 <= report.fused[0].difference.relative < FLOAT64
    y = torch.randn(3, 4, 7, 12).double()
    close(fused(y), model(y), FLOAT64)


@settings(max_examples=40, deadline=None)
@given(
    groups=st.sampled_from([1, 2, 3]), inputs=st.integers(1, 3), outputs=st.integers(1, 3), bias=st.booleans(),
    transposed=st.booleans(), affine=st.booleans(), dimensions=st.sampled_from([1, 2, 3]),
)  # fmt: skip
def test_channels_meet_their_norm_whatever_the_groups(groups, inputs, outputs, bias, transposed, affine, dimensions):
    name = f"Conv{'Transpose' if transposed else ''}{dimensions}d"
    conv = getattr(nn, name)(groups * inputs, groups * outputs, 2, groups=groups, bias=bias)
    norm = getattr(nn, f"BatchNorm{dimensions}d")(groups * outputs, affine=affine)
    x = torch.randn(2, groups * inputs, *(4,) * dimensions)
    model, fused, _ = fold(nn.Sequential(conv, norm), x)
    assert isinstance(fused[1], nn.Identity)
    close(fused(x.double()), model(x.double()), FLOAT64)


def test_linear_layers_too_but_not_over_pixels():
    x = torch.randn(5, 4)
    model, fused, report = fold(nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3)), x)
    assert report.counts() == {"linear layer + BatchNorm1d": 1}
    close(fused(x.double()), model(x.double()), FLOAT64)
    with pytest.raises(ValueError, match="0: its output has 3 dimensions"):  # the norm's channels are the rows
        widefield.reparameterize(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(6)).eval(), torch.randn(2, 6, 4))


def test_a_norm_of_several_processes_with_activation():
    norm = SyncBatchNormAct(4)
    norm.act = nn.ReLU()
    x = torch.randn(2, 4, 5, 5)
    model, fused, _ = fold(nn.Sequential(nn.Conv2d(4, 4, 1), norm), x)
    assert not any(is_norm(m) for m in fused.modules())
    close(fused(x.double()), model(x.double()), FLOAT64)


class Net(nn.Module):
    """A convolution and a norm, connected by the given function."""

    def __init__(self, conv=None, norm=None, **others):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1) if conv is None else conv
        self.norm = nn.BatchNorm2d(4) if norm is None else norm
        for name, part in others.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.norm(self.conv(x))


def using(forward, **parts):
    return type("Used", (Net,), {"forward": forward})(**parts)


def residual(self, x):
    y = self.conv(x)
    return self.norm(y) + y


def in_place(self, x):
    return self.norm(self.conv(x).relu_())


def two_norms(self, x):
    y = self.conv(x)
    return self.norm(y) + self.other(y)


def kept(self, x):
    self.feature = self.conv(x)
    return self.norm(self.feature)


def weight_elsewhere(self, x):
    return self.norm(self.conv(x)) + nn.functional.conv2d(x, self.conv.weight, padding=1)


def statistics_elsewhere(self, x):
    return self.norm(self.conv(x)) + self.norm.running_mean[:, None, None]


def unhooked(self, x):
    return self.norm(self.conv.forward(x))


def concatenated(self, x):
    a, b = self.conv(x).chunk(2, 1)
    return self.norm(torch.cat([b, a], 1))


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Absolute(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).abs()


def hooked(conv):
    conv.register_forward_hook(lambda *a: None)
    return conv


CASES = {
    "another reader": (lambda: using(residual), "conv: its output is also read by add"),
    "something between": (lambda: using(in_place), "what it reads|conv: its output is also read by relu_"),
    "another norm": (lambda: using(two_norms, other=nn.BatchNorm2d(4)), "conv: its output is also read by another"),
    "kept": (lambda: using(kept), "conv: its output is kept by other code"),
    "weight read": (lambda: using(weight_elsewhere), "conv: its parameters are also read by conv2d"),
    "statistics read": (lambda: using(statistics_elsewhere), "its parameters are also read by __getitem__"),
    "not called": (lambda: using(unhooked), "what it reads is not the output of a convolution"),
    "not its output": (lambda: using(concatenated), "what it reads is not the output of a convolution"),
    "twice": (lambda: using(lambda self, x: self.norm(self.conv(self.conv(x)))), "conv: is called 2 times"),
    "norm twice": (lambda: using(lambda self, x: self.norm(self.norm(self.conv(x)))), "it is called 2 times"),
    "not reached": (lambda: using(lambda self, x: self.conv(x)), "it is not reached by the example input"),
    "no statistics": (lambda: Net(norm=nn.BatchNorm2d(4, track_running_stats=False)), "it has no running statistics"),
    "standardized": (lambda: Net(StdConv2d(4, 4, 3, padding=1)), "conv: is a StdConv2d, which may not convolve as"),
    "hooks": (lambda: Net(hooked(nn.Conv2d(4, 4, 1))), "conv: has hooks"),
    "hooks on the norm": (lambda: Net(norm=hooked(nn.BatchNorm2d(4))), "it has hooks"),
    "weight norm": (
        lambda: Net(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))), "conv: its weight is parametrized"
    ),
    "own class": (
        lambda: Net(Doubled(4, 4, 1)),
        "conv: is a Doubled, which may not convolve as torch's layer does",
    ),
    "own norm": (
        lambda: Net(norm=Absolute(4)),
        "it is a Absolute, which may not normalize as torch's layer does",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_alone_or_not_plain_is_left_and_the_reason_given(case):
    build, reason = CASES[case]
    net = nn.Sequential(build(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    x = torch.randn(2, 4, 6, 6)
    model, fused, report = fold(net, x)
    assert [layer.name for layer in report.fused] == ["1"]  # the tested norm is not folded
    assert {layer.name for layer in report.left} >= {"0.norm"}
    why = next(layer.reason for layer in report.left if layer.name == "0.norm")
    assert re.match(f"(0.)?({reason})", why), why
    close(fused(x.double()), model(x.double()), FLOAT64)


def test_looking_at_a_shape_is_no_reading():
    x = torch.randn(2, 4, 6, 6)
    looked = using(lambda self, x: (y := self.conv(x), y.shape[1] == y.size(1), self.norm(y))[2])
    model, fused, report = fold(looked, x)
    assert not report.left
    close(fused(x.double()), model(x.double()), FLOAT64)


def test_shared_layers_and_shared_weights_are_left():
    shared, x = nn.Conv2d(4, 4, 1), torch.randn(2, 4, 6, 6)
    tied = Net()
    tied.twin = nn.Conv2d(4, 4, 3)
    tied.twin.weight = tied.conv.weight
    _, fused, report = fold(nn.Sequential(tied, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), x)
    assert [(layer.name, layer.reason) for layer in report.left] == [
        ("0.norm", "0.conv: shares its weight with another layer")
    ]
    assert fused[0].twin.weight is fused[0].conv.weight
    aside = using(lambda self, x: self.norm(self.conv(x)), conv=shared, aside=shared)
    _, _, report = fold(nn.Sequential(aside, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), x)
    assert report.left[0].reason.endswith("is used in several places")


def test_a_class_of_ones_own_that_changes_nothing_is_a_convolution():
    class Named(nn.Conv2d):
        def __init__(self, width):
            super().__init__(width, width, 3)
            self.label = ["kept"]

    x = torch.randn(2, 4, 6, 6)
    model, fused, _ = fold(Net(Named(4)), x)
    assert type(fused.conv) is Named
    assert fused.conv.label == ["kept"]
    close(fused(x.double()), model(x.double()), FLOAT64)


def test_an_input_that_changes_before_the_norm_is_not_compared():
    def forward(self, x):
        x = x + 0
        y = self.conv(x)
        x.zero_()
        return self.norm(y)

    x = torch.randn(2, 4, 6, 6)
    model, fused, report = fold(using(forward), x)
    assert report.fused[0].difference is None
    assert report.rows()[0]["difference"] == "not measured"
    close(fused(x.double()), model(x.double()), FLOAT64)


def test_activations_do_not_outlive_their_time():
    """In a chain of a hundred convolutions, two activations are alive at a time, as in the model itself."""
    alive, most = set(), []

    class Counted(nn.Module):
        def forward(self, x):
            alive.add(key := id(x))
            weakref.finalize(x, alive.discard, key)
            most.append(len(alive))
            return x

    parts = [nn.Conv2d(2, 2, 1), Counted(), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)]
    net = nn.Sequential(*(copy.deepcopy(part) for _ in range(30) for part in parts)).eval()
    widefield.reparameterize(net, torch.randn(1, 2, 3, 3))
    assert max(most) <= 2


def test_parameters_keep_their_layout_place_and_whether_they_learn():
    x = torch.randn(2, 8, 9, 9).to(memory_format=torch.channels_last)
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 8, 3, groups=2), nn.BatchNorm2d(8))
    net = shaken(net).to(memory_format=torch.channels_last)
    net[0].requires_grad_(False)
    fused = widefield.reparameterize(net, x)
    assert fused[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert fused[2].weight.is_contiguous(memory_format=torch.channels_last)
    assert fused(x).is_contiguous(memory_format=torch.channels_last)
    assert [p.requires_grad for p in fused.parameters()] == [False, False, True, True]


def test_kernels_are_rounded_once():
    """In float32 the scale itself would have one or two rounding errors."""
    conv, norm = nn.Conv2d(4, 64, 3), nn.BatchNorm2d(64)
    net = shaken(nn.Sequential(conv, norm))
    fused = widefield.reparameterize(net, torch.randn(1, 4, 8, 8))
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    assert torch.equal(fused[0].weight, (conv.weight.double() * scale[:, None, None, None]).float())


def test_half_precision_asks_for_more_room_and_says_so():
    net = shaken(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU())).bfloat16()
    x = torch.randn(2, 4, 8, 8).bfloat16()
    with pytest.raises(RuntimeError, match=r"torch.bfloat16, .*reparameterize in float32"):
        widefield.reparameterize(net, x, tolerance=1e-6)
    fused = widefield.reparameterize(net, x, tolerance=0.05)
    assert {p.dtype for p in fused.parameters()} == {torch.bfloat16}


def test_a_mixture_and_a_convolution_in_one_model():
    net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), MoRFConv2d(4, 4, (3, 5)), BatchNormAct2d(4))
    model, fused, report = fold(net, torch.randn(2, 4, 8, 8))
    assert report.counts() == {"mixture + BatchNormAct2d": 1, "convolution + BatchNorm2d": 1}
    x = torch.randn(2, 4, 7, 9).double()
    close(fused(x), model(x), FLOAT64)


ROUTED = {
    "mixture": lambda: MoRFConv2d(4, 4, (3, 5)),
    "depthwise, no bias": lambda: MoRFConv2d(4, 4, (3,), groups=4, bias=False),
    "masked": lambda: DynamicGMConv2d(4, 4, 5, padding=2),
}


@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, FrozenBatchNormAct2d])
@pytest.mark.parametrize("layer", ROUTED)
def test_a_frozen_norm_is_folded_into_a_routed_layer(layer, norm):
    model = nn.Sequential(ROUTED[layer](), norm(4))
    model, fused, report = fold(model, torch.randn(2, 4, 8, 8))
    assert not any(is_norm(module) for module in fused.modules())
    assert report.left == ()
    x = torch.randn(3, 4, 9, 7).double()
    close(fused(x), model(x), FLOAT64)


def test_the_folded_state_loads_into_a_folded_twin():
    net, x = timm.create_model("resnet18", num_classes=5), torch.randn(1, 3, 32, 32)
    source = widefield.reparameterize(shaken(net), x)
    target = widefield.reparameterize(timm.create_model("resnet18", num_classes=5).eval(), x)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(x), source(x))
