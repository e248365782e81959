"""Losses of cropped kernels, against brute force and the outputs of convolutions; and the kernels of models."""

import json

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import StdConv2d
from timm.models.byobnet import RepVggBlock
from torch import nn

from tolerances import FLOAT32, FLOAT64, close
from widefield import surgery
from widefield.analysis import _stages
from widefield.analysis.kernels import crop_table, kernel_energy
from widefield.nn import (
    LKA,
    ConvNorm,
    DecomposedConv2d,
    DepthwiseConv2d,
    DilatedReparamConv2d,
    DynamicGMConv2d,
    GMConv2d,
    LargeKernelConv2d,
    MoRFConv2d,
)

SIZES = st.tuples(st.integers(1, 7), st.integers(1, 6))
STEPS = st.tuples(st.integers(1, 3), st.integers(1, 3))


def inside(size, dilation, side):
    """Return a mask (rows, columns) of the taps in a window of side x side pixels, by distance from the center."""
    axes = []
    for taps, step in zip(size, dilation, strict=True):
        reach = [abs(2 * i - (taps - 1)) * step + 1 for i in range(taps)]  # smallest window with tap i
        axes.append(torch.tensor([r <= max(side, min(reach)) for r in reach]))
    return axes[0][:, None] & axes[1]


def windows(size, dilation):
    """Return the different windows, smallest first."""
    found = []
    for side in range(1, max(_stages.span(size, dilation)) + 1):
        mask = inside(size, dilation, side)
        if not found or not torch.equal(mask, found[-1]):
            found.append(mask)
    return found


def impulse_response(layer, channels, size):
    """Return the kernels of a depthwise layer that keeps the size of its map: (C, 1, size, size), without biases."""
    x = torch.zeros(channels, channels, size, size, dtype=torch.double)
    x[range(channels), range(channels), size // 2, size // 2] = 1
    with torch.no_grad():
        y = layer(x) - layer(torch.zeros_like(x[:1]))
    return y[range(channels), range(channels)].flip(-1, -2)[:, None]


def same(one, other, tolerance=FLOAT64):
    """Assert that two tables are equal to a tolerance."""
    assert (one.sizes, one.spans) == (other.sizes, other.spans)
    for name in ("energy", "l1", "bound"):
        close(getattr(one, name), getattr(other, name), tolerance)


def repvgg():
    """Return a block of timm's that merges itself, without its activation."""
    block = RepVggBlock(4, 4, 3, group_size=1)
    block.act = nn.Identity()
    return block


def lived(layer):
    """Return a layer with batch norm statistics like after training, in double precision and evaluation mode."""
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
    return layer.double().eval()


# One kernel


@given(size=SIZES, dilation=STEPS, channels=st.tuples(st.integers(1, 3), st.integers(1, 3)))
def test_every_crop_against_brute_force(size, dilation, channels):
    weight = torch.randn(*channels, *size).double()
    table = crop_table(weight, dilation)
    kept = windows(size, dilation)
    assert len(table.sizes) == len(table.spans) == len(kept)
    for index, mask in enumerate(kept):
        out = weight * ~mask
        rows, columns = mask.any(1).sum(), mask.any(0).sum()
        assert table.sizes[index] == (rows, columns)
        assert table.spans[index] == max(_stages.span((rows, columns), dilation))
        mass = out.abs().sum((1, 2, 3))
        expected = (out.square().sum() / weight.square().sum(), (mass / weight.abs().sum((1, 2, 3))).max(), mass.max())
        for actual, value in zip((table.energy[index], table.l1[index], table.bound[index]), expected, strict=True):
            close(actual, value, FLOAT64)
    assert table.sizes[-1] == size
    assert table.energy[-1] == table.l1[-1] == table.bound[-1] == 0


@given(
    size=SIZES, dilation=STEPS, stride=st.integers(1, 2), padding=st.integers(0, 3), groups=st.sampled_from([1, 2]),
    fraction=st.floats(0, 1),
)  # fmt: skip
def test_no_output_moves_by_more_than_the_bound(size, dilation, stride, padding, groups, fraction):
    weight = torch.randn(4, 4 // groups, *size).double()
    table = crop_table(weight, dilation)
    index = round(fraction * (len(table.sizes) - 1))
    out = weight * ~windows(size, dilation)[index]
    high, wide = _stages.span(size, dilation)
    x = 3 * (2 * torch.rand(2, 4, high + 2, wide + 3).double() - 1)
    change = F.conv2d(x, out, None, stride, padding, dilation, groups)
    assert change.abs().max() <= table.bound[index] * 3 * (1 + FLOAT64)
    worst = int(out.abs().sum((1, 2, 3)).argmax())
    first = worst // (4 // groups) * (4 // groups)
    x = torch.zeros(1, 4, high, wide).double()
    x[0, first : first + 4 // groups, :: dilation[0], :: dilation[1]] = out[worst].sign()
    close(F.conv2d(x, out, None, 1, 0, dilation, groups).abs().max(), table.bound[index], FLOAT64)


def test_a_planted_support_is_found_and_nothing_is_lost_beyond_it():
    weight = torch.zeros(5, 2, 9, 9)
    weight[..., 3:6, 3:6] = torch.randn(5, 2, 3, 3)
    table = crop_table(weight)
    for share in (0.9999, 1.0):
        assert table.sizes[table.keeping(share)] == (3, 3)
    assert table.sizes[table.within(0.0)] == (3, 3)
    assert (table.energy[1:] == 0).all()
    assert (table.bound[1:] == 0).all()


def test_uniform_kernels_keep_the_share_of_their_area():
    table = crop_table(torch.full((3, 2, 11, 11), -0.25))
    areas = torch.arange(1, 12, 2).double().square() / 121
    close(1 - table.energy, areas, FLOAT64)
    close(1 - table.l1, areas, FLOAT64)
    assert [table.keeping(float(area)) for area in areas] == list(range(6))
    assert [table.within(1 - float(area) + 1e-12) for area in areas] == list(range(6))
    assert table.keeping(0.5) == 4  # 9x9 keeps 81 of 121, 7x7 only 49
    assert [table.fitting(side) for side in (1, 2, 3, 10, 11, 99)] == [0, 0, 1, 4, 5, 5]


def test_even_sides_and_rectangles_stay_centered():
    assert crop_table(torch.ones(1, 1, 4, 4)).sizes == ((2, 2), (4, 4))
    assert crop_table(torch.ones(1, 1, 7, 3)).sizes == ((1, 1), (3, 3), (5, 3), (7, 3))
    mixed = crop_table(torch.ones(1, 1, 4, 7))
    assert mixed.sizes == ((2, 1), (2, 3), (4, 3), (4, 5), (4, 7))
    assert mixed.spans == (2, 3, 4, 5, 7)
    assert mixed.fitting(1) is None
    dilated = crop_table(torch.ones(1, 1, 7, 7), 3)
    assert dilated.sizes == ((1, 1), (3, 3), (5, 5), (7, 7))
    assert dilated.spans == (1, 7, 13, 19)
    assert dilated.sizes[dilated.fitting(9)] == (3, 3)
    uneven = crop_table(torch.ones(1, 1, 3, 3), (1, 2))
    assert uneven.sizes == ((1, 1), (3, 1), (3, 3))
    assert uneven.spans == (1, 3, 5)


def test_zeros_tiny_numbers_half_precision_and_chunks(monkeypatch):
    zero = crop_table(torch.zeros(2, 2, 5, 5))
    assert zero.keeping(1.0) == zero.within(0.0) == 0
    silent = torch.randn(2, 2, 5, 5).double()
    silent[0] = 0
    close(crop_table(silent).l1, crop_table(silent[1:]).l1, FLOAT64)
    weight = torch.randn(7, 3, 5, 6).double()
    whole = crop_table(weight)
    close(crop_table(weight * 1e-200).energy, whole.energy, FLOAT64)  # their squares underflow to 0
    close(crop_table(weight * 1e200).bound / 1e200, whole.bound, FLOAT64)
    same(crop_table(weight.half()), crop_table(weight.half().double()))
    monkeypatch.setattr("widefield.ops.crop_table._CHUNK", 1)
    same(crop_table(weight), whole)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.ones(3, 3), ValueError, r"\(C_out, C_in/groups, rows, columns\); got \(3, 3\)"),
        (torch.ones(2, 0, 3, 3), ValueError, "got"),
        (torch.full((1, 1, 3, 3), torch.nan), ValueError, "must be finite; its largest absolute value is nan"),
        (torch.ones(1, 1, 3, 3, device="meta"), ValueError, "meta device"),
        (torch.ones(1, 1, 3, 3, dtype=torch.int64), TypeError, "int64"),
        ([[1.0]], TypeError, "list"),
    ],
)
def test_what_is_no_kernel_is_refused(weight, error, message):
    with pytest.raises(error, match=message):
        crop_table(weight)


def test_questions_out_of_range_are_refused():
    table = crop_table(torch.ones(1, 1, 3, 3))
    for ask, value in ((table.keeping, 1.1), (table.within, -0.1), (table.fitting, 0)):
        with pytest.raises(ValueError, match=str(value)):
            ask(value)


# The kernels of a model


@pytest.mark.parametrize(
    "layer",
    [
        LargeKernelConv2d(4, 4, 9, small=3),
        LargeKernelConv2d(4, 4, (9, 5), small=3, norm=False),
        DilatedReparamConv2d(4, 4, 9),
        ConvNorm(DepthwiseConv2d(4, 4, 5, padding="same", bias=False)),
        GMConv2d(4, 4, 7, padding=3, groups=4, sigma=1.3),
        StdConv2d(4, 4, 5, padding=2, groups=4),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 5, padding=2, groups=4)),
        nn.Conv2d(4, 4, (3, 5), padding=(1, 2), groups=4),
        repvgg(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_kernels_are_those_that_the_layer_convolves_with(layer):
    layer = lived(layer)
    (found,) = kernel_energy(nn.Sequential(layer)).layers
    response = impulse_response(layer, 4, 11)
    down, right = (11 - found.size[0]) // 2, (11 - found.size[1]) // 2
    kernel = response[..., down : 11 - down, right : 11 - right]
    close(kernel.abs().sum(), response.abs().sum(), FLOAT64)  # the whole kernel
    close(torch.from_numpy(found.magnitude), kernel.abs().mean((0, 1)), FLOAT64)
    same(found.table, crop_table(kernel))


def test_bands_stay_two_kernels_whose_sum_is_the_layer():
    layer = lived(DecomposedConv2d(3, 3, 9, small=3))
    found = kernel_energy(nn.Sequential(layer)).layers
    assert [(x.name, x.size) for x in found] == [("0.LoRA1", (9, 3)), ("0.LoRA2", (3, 9))]
    merged = layer.fuse()
    total = torch.zeros(3, 1, 9, 9).double()
    total[..., 3:6] += merged.LoRA1.weight.detach()
    total[..., 3:6, :] += merged.LoRA2.weight.detach()
    close(total, impulse_response(layer, 3, 9), FLOAT64)
    for one, band in zip(found, (merged.LoRA1, merged.LoRA2), strict=True):
        same(one.table, crop_table(band.weight))


def test_transposed_convolutions_count_by_their_outputs():
    layer = nn.ConvTranspose2d(4, 6, (3, 4), stride=2, groups=2).double()
    (found,) = kernel_energy(layer).layers
    assert (found.kind, found.size, found.stride, found.groups) == ("transposed", (3, 4), (2, 2), 2)
    with torch.no_grad():
        x = 2 * torch.rand(8, 4, 5, 5).double() - 1
        whole, mask = layer(x), windows((3, 4), (1, 1))[1]
        layer.weight.mul_(mask)
        change = (layer(x) - whole).abs().max()
    assert 0 < change <= found.table.bound[1]
    one = nn.ConvTranspose2d(1, 2, 3).double()
    (found,) = kernel_energy(one).layers
    same(found.table, crop_table(one.weight.transpose(0, 1)))


def test_a_mixture_has_a_bank_and_its_experts_before_and_after_merging():
    layer = MoRFConv2d(4, 6, (3, 5, (3, 3)), groups=2).eval()
    model = nn.Sequential(layer).eval()
    result = kernel_energy(model)
    bank, *experts = result.layers
    assert (bank.kind, bank.name, bank.size) == ("bank", "0", (7, 7))
    assert [(x.name, x.size, x.span) for x in experts] == [
        ("0[0]", (3, 3), (3, 3)), ("0[1]", (5, 5), (5, 5)), ("0[2]", (3, 3), (7, 7))
    ]  # fmt: skip
    for one, weight, dilation in zip(experts, layer.kernels(), (1, 1, 3), strict=True):
        same(one.table, crop_table(weight, dilation))
    energies = [weight.detach().double().square() for weight in layer.kernels()]
    outside = sum(e.sum() for e in energies) - energies[0].sum() - energies[1][..., 1:4, 1:4].sum()
    outside -= energies[2][..., 1, 1].sum()
    close(bank.table.energy[1], outside / sum(e.sum() for e in energies), FLOAT64)
    again = kernel_energy(surgery.reparameterize(model, torch.randn(1, 4, 16, 16))).layers
    for one, other in zip(result.layers, again, strict=True):
        assert (one.name, one.kind) == (other.name, other.kind)
        same(one.table, other.table)


def test_a_mask_that_waits_for_an_image_and_a_dilated_kernel():
    layer = DynamicGMConv2d(3, 4, 5, sigma=0.8)
    (found,) = kernel_energy(layer).layers
    assert (found.kind, found.name) == ("masked", "")
    same(found.table, crop_table(layer.weight * layer.mask()), FLOAT32)
    conv0, spatial = kernel_energy(LKA(4)).layers
    assert (conv0.size, spatial.size, spatial.dilation, spatial.span) == ((5, 5), (7, 7), (3, 3), (19, 19))


def test_shares_and_a_limit():
    model = nn.Sequential(nn.Conv2d(3, 8, 11, padding=5), nn.Conv2d(8, 8, 3, dilation=4), nn.Conv2d(8, 8, 1))
    nn.init.constant_(model[0].weight, 1.0)
    result = kernel_energy(model, shares=(1.0, 0.5), limit=5, name="two", about={"weights": "planted"})
    assert result.shares == (0.5, 1.0)
    assert result.about["weights"] == "planted"
    first, second = result.layers
    assert first.smallest == ((9, 9), (11, 11))
    assert first.lost == pytest.approx(1 - 25 / 121)
    assert first.lost_l1 == pytest.approx(1 - 25 / 121)
    center = model[1].weight.detach().square()
    assert second.lost == pytest.approx(1 - float(center[..., 1, 1].sum() / center.sum()))  # taps are 4 pixels apart
    assert result.beyond() == (first, second)
    rows = result.rows()
    assert rows[0]["layers"] == "0"
    assert rows[0]["50 %"] == "9"
    assert rows[0]["energy lost at 5"] == "79 %"
    assert rows[1]["kernels"] == "1 3x3, dilation 4"
    roomy = kernel_energy(model, limit=11)
    assert roomy.beyond() == ()
    assert roomy.layers[0].lost == 0
    assert roomy.rows()[0]["L1 lost at 11"] == "-"
    assert kernel_energy(model).layers[0].lost is None
    narrow = kernel_energy(nn.Conv2d(3, 8, 4, 4), limit=1).layers[0]
    assert (narrow.lost, narrow.lost_l1) == (1, 1)


def test_stages_and_rows_of_a_network():
    result = kernel_energy(timm.create_model("test_convnext"))
    assert [x.stage for x in result.layers] == sorted(x.stage for x in result.layers)
    assert {x.stage for x in result.layers} == {0, 1, 2, 3}
    rows = result.rows()
    assert sum(int(row["kernels"].split()[0]) for row in rows) == len(result.layers)
    assert "stages.1.blocks.*.conv_dw" in [row["layers"] for row in rows]
    repvit = timm.create_model("repvit_m0_9")  # it merges itself as a whole
    assert len({x.stage for x in kernel_energy(repvit).layers}) == 4
    converted = surgery.convert(torchvision.models.squeezenet1_1(), surgery.MoRF((3, 5)))  # without feature_info
    kinds = [x.kind for x in kernel_energy(converted).layers]
    assert kinds.count("expert") == 2 * kinds.count("bank") > 0


def test_the_model_is_only_read():
    model = nn.Sequential(LargeKernelConv2d(4, 4, 7, small=3), StdConv2d(4, 4, 3), MoRFConv2d(4, 4, (3, 5)), repvgg())
    model.train()
    model[1].eval()
    model[0].lkb_origin.conv.weight.requires_grad_(False)
    calls = []
    model[1].register_forward_hook(lambda *args: calls.append(args))
    stored = {key: value.clone() for key, value in model.state_dict().items()}
    modes, names = [m.training for m in model.modules()], [n for n, _ in model.named_modules()]
    learns, random = [p.requires_grad for p in model.parameters()], torch.get_rng_state()

    def unchanged():
        assert all(torch.equal(value, stored[key]) for key, value in model.state_dict().items())
        assert [m.training for m in model.modules()] == modes
        assert [n for n, _ in model.named_modules()] == names
        assert [p.requires_grad for p in model.parameters()] == learns
        assert all(p.grad is None for p in model.parameters())
        assert torch.equal(torch.get_rng_state(), random)
        assert not calls

    assert kernel_energy(model).layers
    unchanged()
    model.append(nn.Conv2d(1, 1, 3))
    with torch.no_grad():
        model[4].weight[0, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"^4: weight must be finite"):
        kernel_energy(model)
    del model[4]
    torch.set_rng_state(random)
    unchanged()


def test_what_cannot_be_measured_says_why():
    with pytest.raises(ValueError, match="Linear has no convolution with more than one tap"):
        kernel_energy(nn.Linear(2, 2))
    norm = nn.Sequential(ConvNorm(nn.Conv2d(2, 2, 3, bias=False)))
    norm[0].bn = nn.BatchNorm2d(2, track_running_stats=False)
    with pytest.raises(ValueError, match=r"0 \(ConvNorm\) cannot be merged: .* without running statistics"):
        kernel_energy(norm)
    for wrong, message in (((), r"got \(\)"), ((0.0, 0.5), "above 0"), ((1.5,), "1.5")):
        with pytest.raises(ValueError, match=message):
            kernel_energy(nn.Conv2d(1, 1, 3), shares=wrong)
    with pytest.raises(ValueError, match="limit must be at least 1; got 0"):
        kernel_energy(nn.Conv2d(1, 1, 3), limit=0)


# Files and figures


def test_numbers_become_json_and_pictures(tmp_path):
    result = kernel_energy(nn.Sequential(nn.Conv2d(3, 4, 5), nn.Conv2d(4, 4, 3, dilation=2)), limit=3)
    found = json.loads(result.save(tmp_path / "a.json").read_text())["results"]["Sequential"]
    assert found["kind"] == "KernelMaps"
    assert found["layers"][1]["table"]["spans"] == [1, 5]
    assert found["layers"][0]["table"]["energy"] == result.layers[0].table.energy.tolist()
    assert np.allclose(found["layers"][0]["magnitude"], result.layers[0].magnitude)
    assert result.save(tmp_path / "a.png").stat().st_size > 10_000


def test_the_figure_shows_the_widest_kernels_of_each_stage():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 7), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 6, 3))
    result = kernel_energy(model, limit=5)
    curves, depth, *maps, bar = result.plot().axes
    assert [line.get_label() for line in curves.lines] == ["stage 1", "stage 2"]
    assert np.allclose(curves.lines[0].get_ydata(), 1 - result.layers[1].table.energy)
    assert list(curves.lines[0].get_xdata()) == [1, 3, 5, 7]
    shown = maps[0].images[0].get_array()
    assert shown.shape == (14, 14)
    assert np.allclose(shown[::2, ::2], result.layers[1].magnitude / result.layers[1].magnitude.max())
    assert maps[1].images[0].get_array().mask.mean() == pytest.approx(1 - 9 / 49)
    assert "limit 5" in [text.get_text() for text in depth.texts]
    assert bar.get_ylabel() == "mean |weight|"
    both = type(result).draw({"a": result, "b": kernel_energy(nn.Conv2d(3, 4, 9))})
    assert [line.get_label() for line in both.axes[0].lines] == ["a", "b"]
    assert {axis.images[0].get_extent()[1] for axis in both.axes if axis.images} == {4.5}  # one scale for all pixels
    marks = [
        [len(line.get_xdata()) for line in axis.lines if line.get_linestyle() == "None"] for axis in both.axes[1:3]
    ]
    assert marks == [[3], [1]]  # the smallest crops of each model in a strip of its own


def test_a_layer_that_learns_while_it_is_read_is_left_alone():
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 8, 5))).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kernel_energy(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
