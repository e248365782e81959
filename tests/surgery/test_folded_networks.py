"""Whole networks: timm's and torchvision's, those with merging in their official code, and ours by official names."""

import copy

import pytest
import timm
import torch
import torchvision
from test_folding import shaken
from timm.layers import BatchNormAct2d
from torch import nn

import widefield
from tolerances import FLOAT32, NETWORK, close
from widefield.surgery.folding import is_norm
from widefield.surgery.walk import merge_method


def load(name):
    if name.startswith("seg:"):
        return torchvision.models.get_model(name[4:], weights_backbone=None, num_classes=3)
    if name.startswith("tv:"):
        options = {"aux_logits": True, "init_weights": False} if name == "tv:googlenet" else {}
        return torchvision.models.get_model(name[3:], num_classes=5, **options)
    return timm.create_model(name, num_classes=5)


FROM_A_CATENATION = "what it reads is not the output of a convolution"
NETWORKS = {
    # name: (layers fused, by kind; norms left; why)
    "resnet18": ({"convolution + BatchNorm2d": 20}, 0, None),
    "mobilenetv3_small_050": ({"convolution + BatchNormAct2d": 34}, 0, None),
    "tf_efficientnet_b0": ({"convolution + BatchNormAct2d": 49}, 0, None),
    "repvgg_a0": ({"block": 22}, 0, None),
    "mobileone_s0": ({"block": 43}, 0, None),
    "regnety_002": ({"convolution + BatchNormAct2d": 44}, 0, None),
    "densenet121": ({"convolution + BatchNormAct2d": 59}, 62, FROM_A_CATENATION),
    "fastvit_t8": ({"block": 20, "convolution + BatchNormAct2d": 10}, 0, None),
    "repvit_m0_9": ({"block": 84}, 0, None),
    "tv:resnet18": ({"convolution + BatchNorm2d": 20}, 0, None),
    "tv:mobilenet_v2": ({"convolution + BatchNorm2d": 52}, 0, None),
    "tv:googlenet": ({"convolution + BatchNorm2d": 57}, 2, "it is not reached by the example input"),
    "seg:lraspp_mobilenet_v3_large": ({"convolution + BatchNorm2d": 47}, 0, None),
    "inception_v3": ({"convolution + BatchNormAct2d": 94}, 0, None),
    "seg:fcn_resnet50": ({"convolution + BatchNorm2d": 54}, 0, None),
}
SLOW = {"inception_v3", "seg:fcn_resnet50", "fastvit_t8", "densenet121"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in NETWORKS])
def test_networks_of_timm_and_torchvision_lose_their_norms(name):
    counts, left, why = NETWORKS[name]
    model, reports = shaken_a_little(load(name)), []
    size = 96 if name == "inception_v3" else 64
    fused = widefield.reparameterize(model, torch.randn(1, 3, size, size), report=reports.append)
    (report,) = reports
    assert report.counts() == counts
    assert len(report.left) == left == sum(map(is_norm, fused.modules()))
    assert {layer.reason for layer in report.left} <= {why}
    assert all(layer.difference is not None and layer.difference.relative < FLOAT32 for layer in report.fused)
    assert widefield.compare(model, fused, torch.randn(2, 3, size, size + 32)).relative < NETWORK
    assert sum(map(is_norm, model.modules())) > left  # the original is unchanged
    with pytest.raises(ValueError, match="nothing to fuse"):
        widefield.reparameterize(fused, torch.randn(1, 3, size, size))


def shaken_a_little(model):
    """Give norms the statistics of a trained network; with those of ``shaken`` deep networks overflow."""
    with torch.no_grad():
        for module in shaken(model).modules():
            if is_norm(module):
                module.running_mean.mul_(0.1)
                module.running_var.uniform_(0.8, 1.2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.mul_(0.1)
    return model


def test_a_network_without_norms_behind_convolutions_is_an_error():
    with pytest.raises(ValueError, match=r"ConvNeXt has nothing to fuse: no module in it has a method fuse, .*no"):
        widefield.reparameterize(timm.create_model("convnext_atto").eval(), torch.randn(1, 3, 32, 32))
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)).eval()
    with pytest.raises(ValueError, match=r"1 left, the first of them 1 \(what it reads is not the output of a conv"):
        widefield.reparameterize(model)


def test_a_decoder_of_transposed_convolutions():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.ConvTranspose2d(8, 12, 4, stride=2, padding=1, groups=4, bias=False), BatchNormAct2d(12),
        nn.ConvTranspose2d(12, 3, 2, stride=2, groups=3),
    )  # fmt: skip
    fused = widefield.reparameterize(shaken(model), torch.randn(1, 3, 32, 32))
    assert not any(map(is_norm, fused.modules()))
    x = torch.randn(2, 3, 20, 28)
    close(fused(x), model(x), FLOAT32)


# Methods of official code, which work in place and return nothing


def folded(conv, norm):
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    merged = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, 1, conv.padding, groups=conv.groups)
    merged.weight.data = conv.weight * scale[:, None, None, None]
    merged.bias.data = norm.bias - norm.running_mean * scale
    return merged


class LargeKernel(nn.Module):
    """A layer with ``merge_kernel``, which fails if it is called twice."""

    def __init__(self, width=4):
        super().__init__()
        self.origin = nn.Sequential(nn.Conv2d(width, width, 5, 1, 2, bias=False), nn.BatchNorm2d(width))
        self.small = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        return self.lkb_reparam(x) if hasattr(self, "lkb_reparam") else self.origin(x) + self.small(x)

    def merge_kernel(self):
        large, small = folded(*self.origin), folded(*self.small)
        large.weight.data += nn.functional.pad(small.weight.data, (1, 1, 1, 1))
        large.bias.data += small.bias.data
        self.lkb_reparam = large
        del self.origin, self.small


class Dilated(LargeKernel):
    """A layer with ``merge_dilated_branches``: the merged kernel has the name of the large one."""

    merge_kernel = None

    def forward(self, x):
        return super().forward(x) if hasattr(self, "small") else self.origin(x)

    def merge_dilated_branches(self):
        if hasattr(self, "small"):
            LargeKernel.merge_kernel(self)
            self.origin = self.lkb_reparam
            del self.lkb_reparam


class Deployable(LargeKernel):
    merge_kernel = None

    def switch_to_deploy(self):
        if not hasattr(self, "lkb_reparam"):
            LargeKernel.merge_kernel(self)


class Gated(LargeKernel):
    """A layer that contains several layers when merged, and keeps its method."""

    merge_kernel = None

    def __init__(self):
        super().__init__()
        self.gate = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return (self.one(x) if hasattr(self, "one") else super().forward(x)) * self.gate(x)

    def reparameterize(self):
        if not hasattr(self, "one"):
            LargeKernel.merge_kernel(self)
            self.one = self.lkb_reparam
            del self.lkb_reparam


class Bands(LargeKernel):
    """Its method expects another structure and fails, as on SLaK's bands."""

    def merge_kernel(self):
        self.first = self.lkb_origin


class Official(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.blocks = nn.Sequential(kind(), kind())

    def forward(self, x):
        return self.blocks(self.stem(x))

    def structural_reparam(self):
        for module in self.modules():
            if hasattr(module, "merge_kernel"):
                module.merge_kernel()


@pytest.mark.parametrize("kind", [LargeKernel, Dilated, Deployable, Gated])
def test_methods_of_official_code_are_called_each_once(kind):
    model, reports, x = shaken(Official(kind)), [], torch.randn(2, 3, 16, 16)
    fused = widefield.reparameterize(model, x, report=reports.append)
    assert reports[0].counts() == {"block": 2, "convolution + BatchNorm2d": 1}
    assert [layer.name for layer in reports[0].fused] == ["blocks.0", "blocks.1", "stem.0"]
    assert all(0 < layer.difference.relative < FLOAT32 for layer in reports[0].fused[:2])
    assert not any(map(is_norm, fused.modules()))
    assert widefield.compare(model, fused, x).relative < FLOAT32
    with pytest.raises(ValueError, match="nothing to fuse"):
        widefield.reparameterize(fused, x)


@pytest.mark.parametrize("kind", [LargeKernel, Dilated, Deployable])
def test_what_was_merged_does_not_say_that_it_could_be(kind):
    layer = shaken(kind())
    method = merge_method(layer)
    assert method is not None
    getattr(layer, method)()
    assert merge_method(layer) is None


def test_what_official_code_merged_before_is_folded_further():
    model, x = shaken(Official(LargeKernel)), torch.randn(2, 3, 16, 16)
    half = copy.deepcopy(model)
    half.structural_reparam()
    half.eval()
    fused = widefield.reparameterize(half, x)
    assert not any(map(is_norm, fused.modules()))
    assert widefield.compare(model, fused, x).relative < FLOAT32


def test_a_method_that_fails_is_reported_and_its_norms_are_folded_all_the_same():
    model, reports, x = shaken(Official(Bands)), [], torch.randn(2, 3, 16, 16)
    fused = widefield.reparameterize(model, x, report=reports.append)
    assert reports[0].counts() == {"convolution + BatchNorm2d": 5}
    assert reports[0].left[0].name == "blocks.0"
    assert "merge_kernel() fails with AttributeError" in reports[0].left[0].reason
    assert not any(map(is_norm, fused.modules()))
    assert widefield.compare(model, fused, x).relative < FLOAT32


class Whole(LargeKernel):
    """A network with a merging method, while its parts have none."""

    merge_kernel = None

    def structural_reparam(self):
        LargeKernel.merge_kernel(self)


def test_a_method_of_the_whole_network_is_called_where_no_part_has_one():
    model, reports, x = shaken(Whole()), [], torch.randn(2, 4, 9, 9)
    fused = widefield.reparameterize(model, x, report=reports.append)
    assert reports[0].counts() == {"block": 1}
    assert isinstance(fused.lkb_reparam, nn.Conv2d)
    assert widefield.compare(model, fused, x).relative < FLOAT32
    assert widefield.reparameterize(model, x, inplace=True) is model
    assert isinstance(model.lkb_reparam, nn.Conv2d)


def norms(model):
    return sum(map(is_norm, model.modules()))


@pytest.mark.parametrize(
    ("name", "options", "method", "key", "left"),
    [
        # Only large kernels are merged, as in the authors' code; all other convolutions keep their norms.
        ("replknet_31b", {"kernel_sizes": (9, 7)}, "structural_reparam", "large_kernel.lkb_reparam.bias", 19),
        ("unireplknet_a", {}, "reparameterize_unireplknet", "dwconv.lk_origin.bias", 0),
    ],
)
def test_our_networks_answer_to_the_names_that_their_authors_gave(name, options, method, key, left):
    widths = {"depths": (1, 1), "widths": (8, 16), **options} if options else {}
    model = shaken_a_little(timm.create_model(name, num_classes=3, **widths))
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    with pytest.raises(RuntimeError, match=r"call model.eval\(\) first"):
        getattr(copy.deepcopy(model).train(), method)()
    assert not any(name.endswith(key) for name in model.state_dict())
    for _ in range(2):  # the second call has nothing to do
        assert getattr(model, method)() is None
        assert any(name.endswith(key) for name in model.state_dict())
        assert norms(model) == left
        close(model(x), expected, NETWORK)
