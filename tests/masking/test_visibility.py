"""Masked patches cannot change what is computed at visible ones; networks where they would are refused by name."""

import copy
from dataclasses import replace

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from tolerances import FLOAT32, FLOAT64, close
from widefield.dense import feature_maps
from widefield.masking import METHODS, MaskedAutoencoder, Visibility, leak, leaking_pixels, plan, release, treat
from widefield.masking.patches import stretched
from widefield.masking.plan import leak_of
from widefield.masking.rules import rule_of
from widefield.masking.token import token_place
from widefield.nn import GRN, DCNv3, Router
from widefield.nn.gmconv import SigmaPredictor
from widefield.surgery import MoRF, convert

SMALL = {
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
    "convnextv2_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
    "resnet18": {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)},
    "resnet26d": {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)},
    "regnety_002": {},
    "mobilenetv3_small_050": {},
    "repvgg_a0": {},
    "resnet50_gn": {"layers": (1, 1, 1, 1)},
    "van_b0": {"depths": (1, 1, 1, 1)},
    "moganet_xtiny": {"depths": (1, 1, 1, 1)},
    "unireplknet_a": {"depths": (1, 1, 1, 1)},
}
SLOW = (
    "focalnet_tiny_srf", "inception_next_atto", "efficientnet_b0", "poolformer_s12",
    "hornet_tiny_7x7", "hornet_tiny_gf", "internimage_t", "slak_tiny", "replknet_31b", "nfnet_f0", "convmixer_768_32",
)  # fmt: skip


@pytest.mark.parametrize("name", [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_masked_patches_do_not_leak(name):
    maps = feature_maps(name, levels=1, stage_norms="none", **SMALL.get(name, {}))
    assert leak_of(maps, maps.strides[-1]) is None


@pytest.mark.parametrize("routing", ["soft", "hard"])
def test_mixtures_do_not_leak(routing):
    network = timm.create_model("convnext_atto", **SMALL["convnext_atto"])
    maps = feature_maps(convert(network, MoRF(kernel_sizes=(3, 7), routing=routing)), levels=1, stage_norms="none")
    assert leak_of(maps, 32) is None


@pytest.mark.parametrize("name", ["resnet18", "convnextv2_atto", "regnety_002", "resnet50_gn"])
def test_without_rules_they_leak(name):
    maps = feature_maps(name, levels=1, stage_norms="none", **SMALL[name])
    found = leak(maps, lambda network: Visibility(), maps.strides[-1])
    assert found is not None


@pytest.mark.parametrize(
    ("name", "module"),
    [("edgenext_xx_small", "xca"), ("resnest14d", "layer1.0.conv2"), ("ecaresnet26t", "layer1.0.se")],
)
def test_networks_without_a_rule_are_refused_by_name(name, module):
    found = plan(name)
    assert module in found.leak.name
    assert found.summary().splitlines()[-1].startswith("in evaluation mode, visible positions depend on masked ones")


def test_operations_without_a_module_are_found():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 4, stride=4)
            self.last = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            y = self.conv(x)
            return [self.last(y - y.mean((2, 3), keepdim=True))]

    maps = feature_maps(Pooled(), levels=1)
    found = leak_of(maps, 4)
    assert (found.name, found.module) == ("body.last", "Conv2d")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["convnextv2_atto", "resnet18", "regnety_002", "moganet_xtiny"])
def test_features_depend_on_visible_pixels_alone(name, training):
    torch.manual_seed(0)
    model = MaskedAutoencoder(name, "fcmae", **SMALL[name]).double().train(training)
    images = torch.randn(2, 3, 96, 128, dtype=torch.float64)
    mask = model.method.mask.draw(2, 96, 128)
    hidden = stretched(mask, 96, 128)
    state = copy.deepcopy(model.state_dict())
    (features,) = model.encode(images, mask)
    with model.visibility.of(mask):
        assert not features.masked_select(~model.visibility.positions(features)).any()

    model.load_state_dict(state)
    noisy = torch.where(hidden[:, None], 1e6 * torch.randn_like(images), images)
    assert torch.equal(model.encode(noisy, mask)[0], features)

    model.load_state_dict(state)
    assert not leaking_pixels(lambda x: model.encode(x, mask)[0], images, hidden).any()
    model.load_state_dict(state)
    changed = images.clone()
    place = (~hidden[0]).nonzero()[0]
    changed[0, :, place[0], place[1]] += 1
    assert not torch.equal(model.encode(changed, mask)[0], features)


@pytest.mark.parametrize("grn", ["image", "batch", "jax"])
def test_images_do_not_meet_unless_the_norm_is_of_the_batch(grn):
    torch.manual_seed(0)
    method = replace(METHODS["fcmae"], grn=grn)
    model = MaskedAutoencoder("convnextv2_atto", method, **SMALL["convnextv2_atto"]).double().eval()
    for module in model.encoder.modules():
        if type(module).__name__ == "GlobalResponseNorm":
            nn.init.normal_(module.weight)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    mask = model.method.mask.draw(2, 64, 64)
    together = model.encode(images, mask)[0]
    alone = torch.cat([model.encode(images[i : i + 1], mask[i : i + 1])[0] for i in range(2)])
    assert torch.allclose(together, alone, rtol=0, atol=1e-9) == (grn != "batch")


def test_simmim_on_an_overlapping_stem_shows_the_encoder_masked_pixels():
    model = MaskedAutoencoder("resnet18", "simmim").double().eval()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    mask = model.method.mask.draw(2, 64, 64)
    hidden = stretched(mask, 64, 64)
    leaking = leaking_pixels(lambda x: model.encode(x, mask)[0], images, hidden)
    assert 0 < leaking.sum() < 0.2 * hidden.sum()
    patchify = MaskedAutoencoder("convnext_atto", "simmim", **SMALL["convnext_atto"]).double().eval()
    assert not leaking_pixels(lambda x: patchify.encode(x, mask)[0], images, hidden).any()


@pytest.mark.parametrize(("patch_size", "side"), [(4, 64), (1, 16)])
def test_stages_of_networks_for_small_images_count_as_those_for_large_ones(patch_size, side):
    network = timm.create_model("convnextv2_atto", patch_size=patch_size, **SMALL["convnextv2_atto"])
    for stage in range(4):
        assert token_place(network, stage).module is network.stages[stage].blocks
    with pytest.raises(ValueError, match=r"no stage 4 .* 4 stages"):
        token_place(network, 4)
    method = replace(METHODS["simmim"], mask=replace(METHODS["simmim"].mask, patch=8 * patch_size))
    model = MaskedAutoencoder(network, method).double().eval()
    images = torch.randn(2, 3, side, side, dtype=torch.float64)
    mask = method.mask.draw(2, side, side)
    assert not leaking_pixels(lambda x: model.encode(x, mask)[0], images, stretched(mask, side, side)).any()


def _visibility(mask):
    visibility = Visibility()
    visibility.mask, visibility.visible = mask, int((~mask[0]).sum())
    return visibility


MASK = torch.tensor([[[True, False, False], [False, True, True]], [[False, True, False], [True, False, True]]])


def _seen_rows(x):
    seen = ~stretched(MASK, *x.shape[2:])
    return [one[:, where] for one, where in zip(x, seen, strict=True)]


BATCH_NORMS = {
    "plain": ({}, nn.BatchNorm2d),
    "without weights": ({"affine": False}, nn.BatchNorm2d),
    "cumulative average": ({"momentum": None}, nn.BatchNorm2d),
    "without running statistics": ({"track_running_stats": False}, nn.BatchNorm2d),
    "large eps": ({"eps": 0.5}, nn.BatchNorm2d),
    "with an activation": ({}, BatchNormAct2d),
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("options", "kind"), BATCH_NORMS.values(), ids=BATCH_NORMS)
def test_statistics_of_batch_norms_are_of_visible_rows(options, kind, memory_format):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 4, 6, dtype=torch.float64).add(3).contiguous(memory_format=memory_format).requires_grad_()
    norm, plain = kind(5, **options).double(), nn.BatchNorm1d(5, **options).double()
    for parameter, other in zip(norm.parameters(), plain.parameters(), strict=True):
        other.data.copy_(nn.init.normal_(parameter))
    treat(norm, _visibility(MASK), rule_of)
    for _ in range(2):  # the second time, a cumulative average has another share
        y, expected = norm(x), plain(torch.cat(_seen_rows(x), 1).t())
    if kind is BatchNormAct2d:
        expected = expected.relu()
    close(torch.cat(_seen_rows(y), 1).t(), expected, FLOAT64)
    for (name, buffer), other in zip(norm.named_buffers(), plain.buffers(), strict=True):
        assert torch.allclose(buffer, other, rtol=FLOAT64), name
    weights = torch.randn_like(y)
    found = torch.autograd.grad((y * weights).sum(), [x, *norm.parameters()])
    wanted = torch.autograd.grad((expected * torch.cat(_seen_rows(weights), 1).t()).sum(), [x, *plain.parameters()])
    for gradient, other in zip(found, wanted, strict=True):
        close(gradient, other, FLOAT64)


def test_statistics_of_half_precision_are_sums_in_single_precision():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 32, 48).add(30).bfloat16()
    norm = nn.BatchNorm2d(5)
    treat(norm, _visibility(MASK), rule_of)
    norm(x)
    rows = torch.cat(_seen_rows(x), 1).float()
    close(norm.running_mean, 0.1 * rows.mean(1), FLOAT32)
    close(norm.running_var, 0.9 + 0.1 * rows.var(1), 1e-3)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_rules_keep_the_memory_format(memory_format):
    x = torch.randn(2, 5, 4, 6).contiguous(memory_format=memory_format)
    for layer in (nn.BatchNorm2d(5), nn.Conv2d(5, 5, 3, padding=1), nn.MaxPool2d(3, 1, 1), nn.GroupNorm(1, 5)):
        treat(layer, _visibility(MASK), rule_of)
        assert layer(x).is_contiguous(memory_format=memory_format), layer


def test_group_norms_and_pools_see_visible_positions():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 4, 6, dtype=torch.float64)
    visibility = _visibility(MASK)
    norm = nn.GroupNorm(2, 6).double()
    nn.init.normal_(norm.weight)
    treat(norm, visibility, rule_of)
    for found, rows in zip(_seen_rows(norm(x)), _seen_rows(x), strict=True):
        expected = nn.functional.group_norm(rows[None], 2, norm.weight, norm.bias)[0]
        close(found, expected, FLOAT64)
    pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
    treat(pool, visibility, rule_of)
    seen = (~stretched(MASK, 4, 6)).double()[:, None]
    window = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    summed = nn.functional.conv2d((x * seen).flatten(0, 1)[:, None], window, padding=1).view_as(x)
    count = nn.functional.conv2d(seen, window, padding=1)
    for found, wanted in zip(_seen_rows(pool(x)), _seen_rows(summed / count), strict=True):
        close(found, wanted, FLOAT64)
    largest = nn.MaxPool2d(4, 2, 1)
    treat(largest, visibility, rule_of)
    assert largest(x).isfinite().all()


def test_routers_and_sigmas_see_visible_positions():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 4, 6, dtype=torch.float64)
    for layer in (Router(4, 3).double(), SigmaPredictor(4, (1.0, 2.0)).double()):
        nn.init.normal_(getattr(layer, "out", nn.Linear(1, 1)).weight)
        alone = [layer(rows[None, :, :, None]) for rows in _seen_rows(x)]
        treat(layer, _visibility(MASK), rule_of)
        close(layer(x), torch.cat(alone), FLOAT64)


def test_response_norms_see_visible_positions():
    torch.manual_seed(0)
    grn = GRN(4).double()
    nn.init.normal_(grn.gamma)
    x = torch.randn(2, 4, 6, 4, dtype=torch.float64)
    first = x.permute(0, 3, 1, 2)
    alone = [grn(rows.t()[None, None])[0, 0].t() for rows in _seen_rows(first)]
    treat(grn, _visibility(MASK), rule_of)
    for found, wanted in zip(_seen_rows(grn(x).permute(0, 3, 1, 2)), alone, strict=True):
        close(found, wanted, FLOAT64)


def test_deformable_sampling_finds_zeros():
    torch.manual_seed(0)
    layer = DCNv3(16, groups=2).double()
    visibility = _visibility(MASK)
    treat(layer, visibility, rule_of)
    x = torch.randn(2, 4, 6, 16, dtype=torch.float64)
    other = torch.where(visibility.positions(x, channels_last=True), x, torch.randn_like(x))
    first, second = layer(x), layer(other)
    seen = visibility.positions(first, channels_last=True)
    assert torch.equal(torch.where(seen, first, 0.0), torch.where(seen, second, 0.0))


def test_the_network_stays_itself():
    network = timm.create_model("resnet18", **SMALL["resnet18"]).eval()
    images = torch.randn(1, 3, 64, 64)
    before, keys = network(images), list(network.state_dict())
    visibility = Visibility()
    names = treat(network, visibility, rule_of)
    assert "conv1" in names
    assert torch.equal(network(images), before)  # no mask is set
    assert list(network.state_dict()) == keys
    twin = copy.deepcopy(network)
    assert twin.conv1.forward.module is twin.conv1
    assert twin.conv1.forward.visibility is twin.bn1.forward.visibility is not visibility
    release(network)
    assert not any("forward" in vars(module) for module in network.modules())
    assert torch.equal(network(images), before)


class Tiny(nn.Module):
    """Convolutions, batch norms and a pool; two steps of 2."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.pool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x):
        return [self.pool(self.stem(x))]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "name", ["", *(pytest.param(n, marks=pytest.mark.slow) for n in ("resnet18", "convnextv2_atto"))]
)
def test_a_masked_step_is_one_graph(name, memory_format):
    torch.manual_seed(0)
    network = timm.create_model(name, **SMALL[name]) if name else Tiny()
    method = METHODS["fcmae"] if name else replace(METHODS["simmim"], visible=True, token_stage=None)
    model = MaskedAutoencoder(network, method).to(memory_format=memory_format)
    twin = copy.deepcopy(model)
    images = torch.randn(2, 3, 64, 64).to(memory_format=memory_format)
    mask = model.method.mask.draw(2, 64, 64)
    visible = 4 - model.method.mask.count(2, 2)
    expected = twin(images, mask, visible)["reconstruction"]
    expected.backward()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(images, mask, visible)["reconstruction"]
    close(loss, expected, FLOAT32)
    loss.backward()
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        if other.grad is not None:
            close(parameter.grad, other.grad, FLOAT32)
