import copy
import json
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_convert import unsettled
from torch import nn

import widefield
from tolerances import BFLOAT16, FLOAT32, FLOAT64, NETWORK, close
from widefield.nn import DepthwiseConv2d, DynamicGMConv2d, FusedMoRFConv2d, GMConv2d, MoRFConv2d
from widefield.surgery.compare import compare
from widefield.surgery.specialize import Routed, specialize


def shaken(model, std=0.3):
    """Make all routing depend on the image."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (MoRFConv2d, FusedMoRFConv2d)):
                module.router.gate.weight.add_(std * torch.randn_like(module.router.gate.weight))
            elif isinstance(module, DynamicGMConv2d):
                nn.init.normal_(module.predictor.out.weight, std=std)
                nn.init.uniform_(module.predictor.out.bias, 1, 2)
    return model


def settled(model):
    """Give all images the same, random routing."""
    for module in model.modules():
        if isinstance(module, (MoRFConv2d, FusedMoRFConv2d)):
            nn.init.zeros_(module.router.gate.weight)
            nn.init.normal_(module.router.gate.bias)
        elif isinstance(module, DynamicGMConv2d):
            nn.init.zeros_(module.predictor.out.weight)
            nn.init.uniform_(module.predictor.out.bias, 1, 2)
    return model


def classifier(layers=4, channels=6, classes=5, std=1.0):
    """Return residual blocks with a mixture each, in float64."""

    class Block(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.mix = layer

        def forward(self, x):
            return x + F.gelu(self.mix(x))

    kinds = [
        lambda: MoRFConv2d(channels, channels, (3, 5), groups=channels),
        lambda: MoRFConv2d(channels, channels, (1, (3, 2)), attention="softmax"),
        lambda: MoRFConv2d(channels, channels, (3, 5, 7), groups=2, routing="hard"),
        lambda: DynamicGMConv2d(channels, channels, 5, padding=2, groups=channels),
    ]
    blocks = [Block(kinds[i % len(kinds)]()) for i in range(layers)]
    model = nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(4 * channels, classes),
    )  # fmt: skip
    return shaken(model.double().eval(), std)


def loader(sizes=(5, 2), channels=3, side=9, dtype=torch.double, labels=True):
    scales = torch.linspace(0.2, 3, sum(sizes), dtype=dtype)[:, None, None, None]
    images = (scales * torch.randn(sum(sizes), channels, side, side).to(dtype)).split(sizes)
    if not labels:
        return list(images)
    return [{"image": x, "label": torch.arange(len(x)) % 5} for x in images]


def images_of(batches):
    return torch.cat([batch["image"] if isinstance(batch, dict) else batch for batch in batches])


def routed(model):
    return [name for name, module in model.named_modules() if isinstance(module, Routed)]


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 3),
    per=st.integers(1, 2),
    experts=st.lists(
        st.one_of(st.sampled_from([1, 3, 5, 7]), st.tuples(st.sampled_from([3, 5]), st.integers(1, 2))),
        min_size=1,
        max_size=4,
    ),
    stride=st.integers(1, 2),
    bias=st.booleans(),
    how=st.sampled_from(["none", "softmax", "sigmoid", "hard"]),
    form=st.sampled_from(["trained", "fused", "with its norm"]),
)
def test_a_constant_router_is_exact(groups, per, experts, stride, bias, how, form):
    options = {"routing": "hard", "top_k": 1} if how == "hard" else {"attention": how}
    channels = groups * per
    mixture = MoRFConv2d(channels, channels, experts, stride, groups=groups, bias=bias, **options).double().eval()
    norm = nn.BatchNorm2d(channels).double().eval()
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    model = settled(nn.Sequential(mixture, norm, nn.GELU()).eval())
    if form == "fused":
        model[0] = mixture.fuse()
    elif form == "with its norm":
        model[0], model[1] = mixture.fuse(norm), nn.Identity().eval()
        assert model[0].shift is not None
    reports = []
    batches = loader((3, 2), channels, side=7, labels=False)
    static = specialize(model, batches, report=reports.append)
    assert type(static[0]) is (DepthwiseConv2d if per == 1 else nn.Conv2d)
    x = 5 * images_of(batches)  # not the images used to specialize it
    close(static(x), model(x), FLOAT64)
    assert reports[0].layers[0].variation == 0
    assert max(reports[0].measured.relative, reports[0].predicted.relative, reports[0].layers[0].own) < FLOAT64


@settings(max_examples=20, deadline=None)
@given(
    groups=st.sampled_from([1, 2, 4]),
    predict=st.sampled_from(["sigma", "sigma1_sigma2", "sigma1_ratio"]),
    padding_mode=st.sampled_from(["zeros", "reflect"]),
    stride=st.integers(1, 2),
)
def test_a_constant_mask_is_exact(groups, predict, padding_mode, stride):
    layer = DynamicGMConv2d(
        4, 4, (3, 5), stride, (1, 2), groups=groups, padding_mode=padding_mode, predict=predict
    )  # fmt: skip
    model = settled(nn.Sequential(layer, nn.ReLU()).double().eval())
    static = specialize(model, loader((3, 2), 4, labels=False))
    x = 5 * images_of(loader((4,), 4, labels=False))
    assert type(static[0]) is (DepthwiseConv2d if groups == 4 else nn.Conv2d)
    close(static(x), model(x), FLOAT64)


@pytest.mark.parametrize("form", ["trained", "fused", "with its norm"])
@pytest.mark.parametrize("options", [{}, {"attention": "softmax"}, {"routing": "hard", "top_k": 2}], ids=str)
def test_the_kernel_is_the_mean_of_the_images_kernels(options, form):
    mixture = shaken(MoRFConv2d(4, 6, (3, (3, 2), 5), groups=2, **options).double().eval(), 2.0)
    norm = nn.BatchNorm2d(6).double().eval()
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.weight, 0.5, 2)
    fused = {"trained": mixture, "fused": mixture.fuse(), "with its norm": mixture.fuse(norm)}[form]
    batches = loader((5, 2), 4, labels=False)
    x = images_of(batches)
    alpha = mixture.route(x)
    # One image's kernel after another, in the stored layout: a dilated 3x3 has every other tap of a 5x5.
    spread = [F.pad(mixture.kernels()[0], (1,) * 4), torch.zeros(6, 2, 5, 5).double(), mixture.kernels()[2]]
    spread[1][..., ::2, ::2] = mixture.kernels()[1]
    kernels = [sum(a * w for a, w in zip(row, spread, strict=True)) for row in alpha]
    biases = [sum(a * b for a, b in zip(row, mixture.biases(), strict=True)) for row in alpha]
    kernel, bias = torch.stack(kernels).mean(0), torch.stack(biases).mean(0)
    if form == "with its norm":
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        kernel, bias = kernel * scale[:, None, None, None], (bias - norm.running_mean) * scale + norm.bias
    static = specialize(nn.Sequential(fused).eval(), batches)[0]
    close(static.weight, kernel, FLOAT64)
    close(static.bias, bias, FLOAT64)
    uneven = torch.stack([alpha[:5].mean(0), alpha[5:].mean(0)]).mean(0)
    assert (uneven - alpha.mean(0)).abs().max() > 1e-3  # a mean over batches would differ


def test_the_mask_is_the_mean_mask_and_not_the_mask_of_the_mean_sigma():
    layer = shaken(DynamicGMConv2d(4, 4, 5, padding=2).double().eval(), 1.0)
    batches = loader((5, 2), 4, labels=False)
    x = images_of(batches)
    static = specialize(nn.Sequential(layer).eval(), batches)[0]
    one_by_one = [layer.weight * layer.masks(x[i : i + 1])[0] for i in range(len(x))]
    close(static.weight, torch.stack(one_by_one).mean(0), FLOAT64)
    # Convolution is linear: for one image, this is the mean of the outputs of all kernels.
    image = x[:1]
    outputs = [F.conv2d(image, kernel, layer.bias, padding=2) for kernel in one_by_one]
    close(static(image), torch.stack(outputs).mean(0), FLOAT64)
    mean_sigma = layer.sigmas(x).mean(0)
    assert (static.weight - layer.weight * gaussian(mean_sigma)).abs().max() > 1e-3


def gaussian(sigma):
    offsets = torch.arange(5).double() - 2
    x, y = (torch.exp(-offsets.square() / (2 * s**2)) for s in sigma)
    return y[:, None] * x


def test_the_means_are_of_the_original_model():
    """The second router gets other inputs once the first layer is static. Its mean weights stay those of the
    original."""
    model = shaken(nn.Sequential(MoRFConv2d(3, 3, (1, 3)), MoRFConv2d(3, 3, (1, 3))).double().eval(), 3.0)
    batches = loader((6,), labels=False)
    static = specialize(model, batches)
    x = images_of(batches)
    weights = model[1].route(model[0](x)).mean(0)
    close(static[1].weight, model[1].collapse(weights).weight, FLOAT64)
    assert (model[1].route(static[0](x)).mean(0) - weights).abs().max() > 1e-4


def test_nothing_routed_is_left_and_the_original_is_as_it_was():
    model = classifier()
    batches = loader()
    x = images_of(batches)
    before, y = copy.deepcopy(model.state_dict()), model(x)
    kinds = [type(module) for module in model.modules()]
    static = specialize(model, batches)
    assert len(routed(model)) == 4
    assert not routed(static)
    assert not any("router" in key or "predictor" in key for key in static.state_dict())
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(x), y)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*model.modules(), *static.modules()))
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in static.parameters()}
    assert not any(module.training for module in static.modules())
    assert all(parameter.requires_grad for parameter in static.parameters())
    twin = copy.deepcopy(static)
    for parameter in twin.parameters():
        nn.init.normal_(parameter)
    twin.load_state_dict(static.state_dict())
    assert torch.equal(twin(x), static(x))


def test_the_root_itself_may_be_routed():
    layer, reports = shaken(MoRFConv2d(3, 3, (3, 5)).double().eval()), []
    static = specialize(layer, loader(), report=reports.append)
    assert type(static) is nn.Conv2d
    assert reports[0].static == ("MoRFConv2d",)
    assert reports[0].predicted.rms == pytest.approx(reports[0].measured.rms, rel=FLOAT64)
    assert reports[0].measured.rms > 1e-3


class Shared(nn.Module):
    """One mixture registered under two names, both of them called."""

    def __init__(self):
        super().__init__()
        self.first = shaken(MoRFConv2d(3, 3, (3, 5)), 2.0)
        self.second = self.first

    def forward(self, x):
        return self.second(F.relu(self.first(x)))


def test_a_layer_that_is_called_twice_gets_the_mean_over_its_calls():
    model = Shared().double().eval()
    batches = loader(labels=False)
    static = specialize(model, batches)
    assert static.first is static.second
    x = images_of(batches)
    weights = torch.cat([model.first.route(x), model.first.route(F.relu(model.first(x)))])
    close(static.first.weight, model.first.collapse(weights.mean(0)).weight, FLOAT64)
    assert (weights[:7].mean(0) - weights[7:].mean(0)).abs().max() > 1e-3


class Auxiliary(nn.Module):
    """A branch that runs only in training."""

    def __init__(self, always=True):
        super().__init__()
        self.always = always
        self.body, self.aside = shaken(MoRFConv2d(3, 3, (3, 5))), MoRFConv2d(3, 3, (3, 5))

    def forward(self, x):
        y = self.body(x) if self.always else x
        return y + self.aside(x) if self.training else y


def test_a_layer_that_the_data_never_reach_stays_and_is_named(caplog):
    reports = []
    static = specialize(Auxiliary().double().eval(), loader(), report=reports.append)
    assert routed(static) == ["aside"]
    assert reports[0].static == ("body",)
    assert reports[0].layers[1].change is None
    assert reports[0].rows()[1]["static"] == "no: the data never reach it"
    json.dumps(reports[0].to_dict())
    assert "left routed, as the data never reach them: aside" in caplog.text
    with pytest.raises(ValueError, match="the data never reach a routed layer of Auxiliary: body, aside"):
        specialize(Auxiliary(always=False).double().eval(), loader())


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.mask = MoRFConv2d(3, 3, (3, 5)), DynamicGMConv2d(3, 3, 3, padding=1)

    def forward(self, x):
        y = self.mix(x)
        return {"maps": (y, torch.stack([self.mask(image) for image in y])), "pooled": y.mean((2, 3))}


def test_models_with_several_outputs_and_layers_called_without_a_batch():
    model, batches, reports = shaken(Several().double().eval()), loader(), []
    static = specialize(model, batches, report=reports.append)
    x = images_of(batches)
    assert not routed(static)
    assert reports[0].measured == compare(model, static, batches)
    assert reports[0].layers[0].change.rms > 1e-3
    mask = model.mask.masks(model.mix(x)).mean(0)
    close(static.mask.weight, model.mask.collapse(mask).weight, FLOAT64)


def test_half_precision_keeps_its_dtype_and_its_function():
    model = settled(nn.Sequential(MoRFConv2d(4, 4, (3, 5)), nn.GELU(), MoRFConv2d(4, 4, (3, 5), groups=4)))
    model = model.bfloat16().eval()
    batches = loader(channels=4, dtype=torch.float32, labels=False)
    static = specialize(model, batches)
    assert {parameter.dtype for parameter in static.parameters()} == {torch.bfloat16}
    x = images_of(batches).bfloat16()
    close(static(x), model(x), BFLOAT16)


def test_trained_and_reparameterized_forms_give_the_same_and_norms_are_folded_afterwards():
    model = shaken(
        nn.Sequential(
            MoRFConv2d(3, 8, (3, 5), stride=2), nn.BatchNorm2d(8), nn.GELU(),
            DynamicGMConv2d(8, 8, 5, padding=2, groups=8), nn.BatchNorm2d(8), nn.GELU(),
            GMConv2d(8, 8, 3, padding=1),
        ).double().eval()
    )  # fmt: skip
    for index in (1, 4):
        nn.init.normal_(model[index].running_mean)
        nn.init.uniform_(model[index].running_var, 0.5, 2)
    batches = loader(labels=False)
    x = images_of(batches)
    static = specialize(model, batches)
    fused = widefield.reparameterize(model, x)
    assert isinstance(fused[0], FusedMoRFConv2d)
    assert fused[0].shift is not None
    static_fused = specialize(fused, batches)
    assert not routed(static) + routed(static_fused)
    close(static_fused(x), static(x), FLOAT64)
    close(widefield.reparameterize(static, x)(x), static(x), FLOAT64)
    assert widefield.compare(model, static, x).relative > 1e-3


@pytest.mark.parametrize("routing", ["soft", "hard"])
def test_a_timm_network(routing):
    model = timm.create_model("convnext_atto", depths=(1, 1, 2, 1), num_classes=10)
    model = shaken(unsettled(widefield.convert(model, widefield.MoRF(routing=routing))), 0.05)
    batches = [torch.randn(4, 3, 64, 64), torch.randn(2, 3, 64, 64)]
    reports = []
    static = specialize(model, batches, report=reports.append)
    (done,) = reports
    assert not routed(static)
    assert sum(isinstance(module, DepthwiseConv2d) for module in static.modules()) == 5
    assert done.together.rms > 1e-4  # the routing matters
    assert done.predicted.rms == pytest.approx(done.together.rms, rel=0.2)
    x = images_of(batches)
    assert widefield.compare(static, specialize(widefield.reparameterize(model, x), batches), x).relative < NETWORK
    # The result is the plain network with a larger kernel, key by key.
    plain = timm.create_model("convnext_atto", depths=(1, 1, 2, 1), num_classes=10, kernel_sizes=11).eval()
    plain.load_state_dict(static.state_dict())
    close(plain(x), static(x), FLOAT32)


def test_what_cannot_be_done_is_refused_with_the_mend():
    model, batches = classifier(2), loader()
    with pytest.raises(ValueError, match=r"policy must be one of 'mean', 'auto'; got 'man'. Did you mean 'mean'"):
        specialize(model, batches, policy="man")
    with pytest.raises(TypeError, match="tolerance must be a number; got 'small'"):
        specialize(model, batches, tolerance="small")
    with pytest.raises(TypeError, match=r"report must be callable, .* got True"):
        specialize(model, batches, report=True)
    with pytest.raises(ValueError, match=r"Sequential has no routed layer: no MoRFConv2d, .*convert\(\)"):
        specialize(nn.Sequential(nn.Conv2d(3, 3, 3), GMConv2d(3, 3, 3)).eval(), batches)
    model[1].train()
    with pytest.raises(RuntimeError, match=r"1 is in training mode: call model.eval\(\)"):
        specialize(model, batches)
    model.eval()
    with pytest.raises(TypeError, match=r"one tensor of \(7, 3, 9, 9\): pass \[tensor\]"):
        specialize(model, images_of(batches))
    with pytest.raises(TypeError, match="pass a list"):
        specialize(model, iter(batches))
    with pytest.raises(ValueError, match="the loader gave no images"):
        specialize(model, [])
    for module in (model[2].mix, model[2].mix.router):
        for register in (module.register_forward_hook, module.register_full_backward_hook):
            handle = register(lambda *a: None)
            with pytest.raises(ValueError, match=r"2\.mix has hooks, which specializing would lose"):
                specialize(model, batches)
            handle.remove()
    with torch.no_grad():
        model[2].mix.router.gate.bias.fill_(math.nan)
    with pytest.raises(ValueError, match=r"the routing of 2\.mix is not finite"):
        specialize(model, batches)


class ByName(nn.Module):
    """Calls its layer with keyword arguments."""

    def __init__(self):
        super().__init__()
        self.mix = MoRFConv2d(3, 4, (3, 5))

    def forward(self, x):
        return self.mix(x=x)


def test_a_layer_called_by_keyword_is_refused_as_convolutions_have_other_names():
    with pytest.raises(ValueError, match=r"mix is called by keyword \(x=\), .* pass its input by position"):
        specialize(ByName().double().eval(), loader(labels=False))


def test_kernels_keep_their_memory_format():
    model = settled(nn.Sequential(MoRFConv2d(3, 4, (3, (3, 2)))).eval()).to(memory_format=torch.channels_last)
    static = specialize(model, loader(dtype=torch.float, labels=False))[0]
    assert static.weight.is_contiguous(memory_format=torch.channels_last)
    assert not static.weight.is_contiguous()


def test_a_loader_there_must_be():
    with pytest.raises(TypeError, match=r"loader must give batches of normalized images .* got None"):
        specialize(classifier(1), None)
