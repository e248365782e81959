"""Trimmed kernels against float64 references: bounds, exact crops, budgets."""

from types import MethodType

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_convert import unsettled
from timm.layers import StdConv2d
from timm.models.byobnet import RepVggBlock
from torch import nn

import widefield.models  # noqa: F401  # registers networks
from tolerances import FLOAT32, FLOAT64, NETWORK, close
from widefield.nn import (
    DepthwiseConv2d,
    DynamicGMConv2d,
    FusedMoRFConv2d,
    GMConv2d,
    LargeKernelConv2d,
    MoRFConv2d,
)
from widefield.nn.gmconv import gaussian_mask
from widefield.ops import fold
from widefield.ops.crop_table import crop_table
from widefield.surgery.compare import compare
from widefield.surgery.reparameterize import reparameterize
from widefield.surgery.trim import trim

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 8))
TOLERANCES = st.floats(0, 0.6)


def reported(model, *args, **options):
    """Trim, and return the model and the report."""
    reports = []
    trimmed = trim(model, *args, report=reports.append, **options)
    (report,) = reports
    return trimmed, report


def masked(conv, sigma):
    """Return the convolution with its kernel under a Gaussian mask, so that its outer taps are small."""
    with torch.no_grad():
        conv.weight.mul_(gaussian_mask(conv.kernel_size, torch.tensor(sigma).double()))
    return conv.double().eval()


def oracle(conv, x):
    """Compute a convolution tap by tap."""
    rows, columns = conv.kernel_size
    (sy, sx), (dy, dx) = conv.stride, conv.dilation
    before = conv._reversed_padding_repeated_twice
    padded = F.pad(x, before, "constant" if conv.padding_mode == "zeros" else conv.padding_mode)
    high = (padded.shape[2] - dy * (rows - 1) - 1) // sy + 1
    wide = (padded.shape[3] - dx * (columns - 1) - 1) // sx + 1
    y = x.new_zeros(len(x), conv.out_channels, high, wide)
    groups = conv.groups
    for i in range(rows):
        for j in range(columns):
            part = padded[:, :, i * dy : i * dy + sy * high : sy, j * dx : j * dx + sx * wide : sx][:, :, :high, :wide]
            part = part.unflatten(1, (groups, -1))
            tap = conv.weight[:, :, i, j].unflatten(0, (groups, -1))
            y += torch.einsum("ngihw,goi->ngohw", part, tap).flatten(1, 2)
    return y if conv.bias is None else y + conv.bias[:, None, None]


def stack(*layers):
    return nn.Sequential(*layers).eval()


# The guarantee


@given(
    size=SIZES, dilation=st.tuples(st.integers(1, 2), st.integers(1, 3)), stride=st.integers(1, 3),
    spare=st.tuples(st.integers(0, 9), st.integers(0, 9)), groups=st.sampled_from([1, 2, 4]),
    mode=st.sampled_from(["zeros", "circular", "replicate", "reflect"]), sigma=st.floats(0.3, 4), tolerance=TOLERANCES,
    data=st.data(),
)  # fmt: skip
@settings(max_examples=60)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even")  # a warning of torch, with or without cropping
def test_no_output_of_a_layer_moves_by_more_than_the_guarantee(
    size, dilation, stride, spare, groups, mode, sigma, tolerance, data
):
    assume(size != (1, 1))
    padding = data.draw(st.sampled_from(["same", spare])) if stride == 1 else spare
    conv = masked(nn.Conv2d(4, 4, size, stride, padding, dilation, groups, padding_mode=mode), sigma)
    trimmed, report = reported(conv, tolerance)
    reach = [d * (k - 1) + 1 for k, d in zip(size, dilation, strict=True)]
    shape = [max(r, 10) for r in reach]  # a map large enough for this padding in every mode
    mass = conv.weight.abs().sum((1, 2, 3))
    with torch.no_grad():
        gone = conv.weight.clone()
        fold.crop(gone, trimmed.kernel_size).zero_()
        x = torch.randn(2, 4, *shape).double()
        signs = torch.zeros(4, 4, *shape).double()  # worst case: one image for each output channel
        for channel in range(4):
            first = channel // (4 // groups) * (4 // groups)
            taps = gone[channel].sign()
            signs[channel, first : first + 4 // groups, : reach[0] : dilation[0], : reach[1] : dilation[1]] = taps
        x = torch.cat((x, signs))
        whole, less = conv(x), trimmed(x)
        close(less, oracle(trimmed, x), FLOAT64)
        change = (whole - less).abs().amax((2, 3)) / x.abs().amax((1, 2, 3)).clamp(min=1e-12)[:, None]
    assert (change <= tolerance * mass * (1 + FLOAT64) + FLOAT64).all()
    assert report.kernels[0].l1 <= tolerance
    assert type(trimmed) is nn.Conv2d
    table = crop_table(conv.weight, dilation)
    widest = table.sizes[table.within(tolerance)]
    if padding == "same":  # without other constraints, the crop is as small as the table allows
        assert trimmed.kernel_size[0] <= widest[0]
        assert trimmed.kernel_size[1] <= widest[1]


def test_the_guarantee_is_tight():
    conv = masked(nn.Conv2d(1, 1, 15, padding=7, bias=False), 2.0)
    trimmed, report = reported(conv, 0.05)
    gone = conv.weight.detach().clone()
    fold.crop(gone, trimmed.kernel_size).zero_()
    with torch.no_grad():
        change = (conv(gone.sign()) - trimmed(gone.sign()))[0, 0, 7, 7]
    close(change / conv.weight.abs().sum(), torch.tensor(report.kernels[0].l1, dtype=torch.double), FLOAT64)
    assert 0 < report.kernels[0].l1 <= 0.05
    assert 1 < trimmed.kernel_size[0] < 15


@given(
    size=SIZES, stride=st.integers(1, 3), padding=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    dilation=st.integers(1, 2), groups=st.sampled_from([1, 2]), tolerance=TOLERANCES, fixed=st.booleans(),
)  # fmt: skip
@settings(deadline=None)  # a busy machine takes longer than 0.2 s
def test_transposed_convolutions_keep_the_guarantee(size, stride, padding, dilation, groups, tolerance, fixed):
    assume(size != (1, 1))
    conv = nn.ConvTranspose2d(4, 6, size, stride, padding, stride - 1, groups, dilation=dilation)
    assume(
        all(6 * stride - stride - 2 * p + dilation * (k - 1) + stride > 0 for k, p in zip(size, padding, strict=True))
    )
    conv = masked(conv, 1.5)
    trimmed, report = reported(conv, tolerance, example_input=6 if fixed else None)
    x = torch.randn(3, 4, 6, 6).double()
    x[0] = x[0].sign()
    with torch.no_grad():
        change = (conv(x) - trimmed(x)).abs().amax((2, 3)) / x.abs().amax((1, 2, 3))[:, None]
    mass = conv.weight.unflatten(0, (groups, -1)).abs().sum((1, 3, 4)).flatten()
    assert (change <= tolerance * mass + FLOAT64).all()
    assert report.kernels[0].after == trimmed.kernel_size


@given(
    weights=st.lists(st.floats(-3, 3), min_size=3, max_size=3), tolerance=TOLERANCES, sigma=st.floats(0.4, 3),
    groups=st.sampled_from([1, 2, 4]), stride=st.integers(1, 2),
)  # fmt: skip
@settings(max_examples=30)
def test_a_mixture_is_bounded_by_its_routing_weights(weights, tolerance, sigma, groups, stride):
    mixture = MoRFConv2d(4, 4, (3, 7, (5, 2)), stride, groups=groups).double().eval()
    with torch.no_grad():
        for kernel in mixture.expert_weights:
            kernel.mul_(gaussian_mask(kernel.shape[2:], torch.tensor(sigma).double()))
    fused = mixture.fuse()
    routed = torch.tensor(weights).double()
    fused.router.forward = MethodType(lambda self, x: routed.expand(len(x), -1), fused.router)
    trimmed, report = reported(fused, tolerance)
    assert isinstance(trimmed, FusedMoRFConv2d)
    assert [k.after[0] for k in report.kernels] == list(trimmed.kernel_sizes)
    x = torch.randn(3, 4, 12, 12).double()
    x[0] = x[0].sign()
    with torch.no_grad():
        change = (fused(x) - trimmed(x)).abs().amax((2, 3)) / x.abs().amax((1, 2, 3))[:, None]
        masses = torch.stack([kernel.abs().sum((1, 2, 3)) for kernel in mixture.expert_weights])
    assert (change <= tolerance * (routed.abs() @ masses) + FLOAT64).all()


def test_zeros_are_cut_off_exactly_on_each_axis():
    conv = nn.Conv2d(3, 4, (9, 8), padding=(4, 6), dilation=(1, 2), stride=2).double().eval()
    with torch.no_grad():
        kept = fold.crop(conv.weight.clone(), (7, 4))
        conv.weight.zero_()
        fold.crop(conv.weight, (7, 4)).copy_(kept)
    trimmed, report = reported(conv, 0)
    assert trimmed.kernel_size == (7, 4)
    assert trimmed.padding == (3, 2)
    x = torch.randn(2, 3, 20, 21).double()
    close(trimmed(x), conv(x), FLOAT64)
    assert report.kernels[0].l1 == report.kernels[0].energy == 0
    assert reported(nn.Conv2d(2, 2, 3, padding=1).eval(), 0)[1].trimmed() == ()


# Maps of one size


@given(
    size=st.tuples(st.integers(1, 13), st.integers(1, 12)), image=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)), dilation=st.integers(1, 3), depthwise=st.booleans(),
    spare=st.integers(0, 3),
)  # fmt: skip
@settings(max_examples=60)
def test_taps_that_never_meet_the_map_are_cut_off_exactly(size, image, stride, dilation, depthwise, spare):
    assume(size != (1, 1))
    padding = tuple(dilation * (k // 2) + spare for k in size)
    arguments = (size, stride, padding, dilation)
    conv = DepthwiseConv2d(4, 4, *arguments) if depthwise else nn.Conv2d(4, 3, *arguments)
    conv = conv.double().eval()
    trimmed, report = reported(conv, 0, example_input=image)
    x = torch.randn(2, 4, *image).double()
    with torch.no_grad():
        close(trimmed(x), conv(x), FLOAT64)
        # A tap is live if the outputs depend on it. The reference tests every tap by gradients.
        weight = conv.weight.detach().abs().requires_grad_()
    with torch.enable_grad():
        (live,) = torch.autograd.grad(
            F.conv2d(x.abs() + 1, weight, None, stride, padding, dilation, conv.groups).sum(), weight
        )
    rows, columns = (live.abs().sum((0, 1)) > 0).any(1), (live.abs().sum((0, 1)) > 0).any(0)
    for axis, used in enumerate((rows, columns)):
        taps = used.nonzero().flatten()
        ends = min(int(taps[0]), len(used) - 1 - int(taps[-1])) if len(taps) else (size[axis] - 1) // 2
        assert trimmed.kernel_size[axis] == size[axis] - 2 * ends
    assert report.input_size == image


def test_31x31_on_7x7_keeps_13x13_but_not_where_padding_wraps_around():
    def net(mode):
        return stack(nn.Conv2d(2, 2, 31, padding=15, padding_mode=mode))

    assert reported(net("zeros"), 0, example_input=(2, 7, 7))[1].kernels[0].after == (13, 13)
    image = (3, 2, 17, 17)
    trimmed, report = reported(net("circular"), 0, example_input=image)
    assert report.trimmed() == ()
    same = stack(nn.Conv2d(2, 2, 31, padding="same"))
    trimmed, report = reported(same, 0, example_input=7)
    assert (trimmed[0].kernel_size, trimmed[0].padding) == ((13, 13), "same")
    assert "Only for images of 7x7 pixels" in str(report)
    assert report.verified <= NETWORK
    mixture = stack(MoRFConv2d(4, 4, (3, 15, (5, 3)), groups=4)).eval()
    mixture = reparameterize(mixture, torch.randn(1, 4, 5, 5))
    trimmed, report = reported(mixture, 0, example_input=5)
    assert trimmed[0].kernel_sizes == (3, 9, 3)
    assert trimmed[0].bank.shape[-1] == 9
    x = torch.randn(2, 4, 5, 5)
    close(trimmed(x), mixture(x), FLOAT32)


REGISTRY = {
    "replknet_31b": {"kernel_sizes": (31, 29, 27, 13), "widths": (4, 8, 8, 16), "depths": (1, 1, 1, 1)},
    "slak_tiny": {"depths": (1, 1, 1, 1), "widths": (4, 4, 8, 8), "kernel_sizes": (51, 49, 47, 13)},
    "unireplknet_t": {"depths": (1, 1, 2, 1), "widths": (8, 8, 16, 16)},
    "morf_convnext_tiny": {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)},
    "van_b0": {"depths": (1, 1, 1, 1), "widths": (8, 8, 16, 16)},
    "moganet_xtiny": {"depths": (1, 1, 1, 1), "widths": (8, 8, 16, 16)},
}


@pytest.mark.parametrize("name", REGISTRY)
def test_networks_of_the_registry_stay_what_they_are_at_tolerance_0(name):
    model = unsettled(timm.create_model(name, num_classes=10, **REGISTRY[name]))
    x = torch.randn(2, 3, 64, 64)
    fused = reparameterize(model, x)
    trimmed, report = reported(fused, 0, example_input=64)
    assert compare(fused, trimmed, x).relative < NETWORK
    assert report.macs_after <= report.macs_before
    assert len(report.trimmed()) > 0
    assert report.parameters_after == sum(p.numel() for p in trimmed.parameters()) < report.parameters_before
    smaller = trim(fused, 0.3)
    assert smaller(x).shape == (2, 10)


# A budget


def network():
    """Return masked depthwise kernels and dense ones, on small maps, with classes that depend on the images."""
    layers = [nn.Conv2d(3, 8, 4, 2, 1), nn.GELU(), *[masked(nn.Conv2d(8, 8, 13, padding=6, groups=8), 2.5)]]
    layers += [nn.GELU(), nn.Conv2d(8, 12, 5, padding=2), nn.GELU(), nn.Flatten(), nn.Linear(12 * 36, 5)]
    return stack(*layers).float()


@pytest.mark.parametrize("budget", [0.0, 0.003, 0.03, 0.3])
def test_a_budget_is_kept_and_used(budget):
    model = network()
    x = torch.randn(48, 3, 12, 12)
    loader = [(part, model(part).argmax(1).detach()) for part in x.split(20)]
    trimmed, report = reported(model, budget, loader=loader)
    change = compare(model, trimmed, loader)
    assert change == report.change
    assert change.rms <= budget
    assert change.accuracy_before == 1.0
    if budget == 0.3:
        assert report.macs_after < 0.6 * report.macs_before
        assert change.rms > 0.05  # not below the budget by chance
    if not budget:
        assert report.trimmed() == ()
    words = str(report)
    assert "48 images" in words
    assert "Other images may change more" in words


def test_a_larger_budget_never_saves_less():
    model = network()
    loader = [torch.randn(16, 3, 12, 12)]
    macs = [reported(model, budget, loader=loader)[1].macs_after for budget in (0.0, 0.01, 0.1, 0.5, 1.0)]
    assert macs == sorted(macs, reverse=True)
    assert macs[-1] < macs[0]


def test_a_budget_over_mixtures_and_a_size():
    model = stack(MoRFConv2d(4, 4, (3, 5, 9), groups=4), nn.GELU(), MoRFConv2d(4, 6, (3, 7)), nn.Flatten())
    for mixture in (model[0], model[2]):
        with torch.no_grad():
            for kernel in mixture.expert_weights:
                kernel.mul_(gaussian_mask(kernel.shape[2:], torch.tensor(1.2)))
    fused = reparameterize(unsettled(model), torch.randn(2, 4, 8, 8))
    loader = [torch.randn(9, 4, 8, 8)]
    trimmed, report = reported(fused, 0.05, loader=loader, example_input=8)
    assert 0 < report.change.rms <= 0.05
    assert trimmed[0].bank.shape[-1] == max(trimmed[0].kernel_sizes) < 9
    assert report.input_size == (8, 8)
    assert compare(fused, trimmed, loader).rms <= 0.05


# Kernels that a device supports


def test_a_limit_is_met_whatever_it_costs_and_the_cost_is_told(caplog):
    model = stack(
        nn.Conv2d(3, 6, 11, 2, 5),
        nn.Conv2d(6, 6, 5, padding=8, dilation=4),
        nn.Conv2d(6, 6, 7, padding="same"),
        nn.Conv2d(6, 6, 3, padding=1),
        nn.Conv2d(6, 6, 12, 4, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    x = torch.randn(6, 3, 48, 48)
    trimmed, report = reported(model, 0, limit=9, loader=[{"image": x, "label": torch.zeros(6, dtype=torch.long)}])
    assert [k.after for k in report.kernels] == [(9, 9), (3, 3), (7, 7), (3, 3), (12, 12)]
    assert [k.span for k in report.kernels] == [9, 9, 7, 3, 12]
    assert [k.name for k in report.beyond()] == ["4"]
    assert "its padding is used up" in report.kernels[4].left
    assert "Still larger than 9x9: 4" in caplog.text
    assert report.change == compare(model, trimmed, [(x, torch.zeros(6, dtype=torch.long))])
    assert report.change.rms > 0
    assert report.change.accuracy_before is not None
    _, told = reported(model, 0.0, limit=9)
    assert [k.after for k in told.kernels] == [k.after for k in report.kernels]
    assert (told.change, told.macs_before) == (None, None)
    mixture = MoRFConv2d(4, 4, (3, (5, 3), 11)).eval().fuse()
    fitted, told = reported(mixture, 0, limit=9)
    assert fitted.kernel_sizes == (3, 3, 9)
    assert not told.beyond()


# Layers that are not trimmed, and attributes that are kept


def test_what_cannot_be_cropped_is_left_with_the_reason():
    shared, tied = nn.Conv2d(4, 4, 7, padding=3), nn.Conv2d(4, 4, 7, padding=3)
    tied.weight = shared.weight
    hooked = nn.Conv2d(4, 4, 5, padding=2)
    hooked.register_forward_hook(lambda *args: None)
    model = stack(
        nn.Conv2d(4, 4, 5), shared, tied, hooked, StdConv2d(4, 4, 5, padding=2),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 5, padding=2)),
        DynamicGMConv2d(4, 4, 5, padding=2), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 5, padding="valid"),
    )  # fmt: skip
    x = torch.randn(2, 4, 20, 20)
    trimmed, report = reported(model, 1.0, example_input=20)
    words = [
        "padding of",
        "shared",
        "shared",
        "hooks",
        "a StdConv2d",
        "parametrization",
        "depends on the image",
        "valid",
    ]
    assert len(report.kernels) == len(words)
    for kernel, word in zip(report.kernels, words, strict=True):
        assert word in kernel.left
    close(trimmed(x), model(x), 0.0)


class Reads(nn.Module):
    """Reads a convolution's weight with padding of its own, and never calls another convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 3, 7, padding=3), nn.Conv2d(3, 3, 5, padding=2)

    def forward(self, x):
        y = F.conv2d(x, self.other.weight, None, padding=2)
        return self.conv(y)[..., : -self.conv.kernel_size[0] // 2 * 2 or None]


def test_modules_that_read_convolutions_by_themselves_are_found_out():
    model = Reads().eval()
    for options in ({"example_input": 20}, {"loader": [torch.randn(2, 3, 20, 20)]}):
        with pytest.raises(RuntimeError, match="reads a convolution's kernel size"):
            trim(model, 0.0, limit=5, **options)
    model.conv.requires_grad_(False)
    _, report = reported(model, 0.0, example_input=20)
    assert "did not call it" in report.kernels[1].left


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_layers_keep_their_type_and_all_that_belongs_to_it(dtype):
    depthwise = DepthwiseConv2d(4, 4, 9, stride=2, padding=5, backend="aten")
    dense = nn.Conv2d(4, 6, 9, padding=4, bias=False).requires_grad_(False)
    model = stack(depthwise, dense, nn.ConvTranspose2d(6, 4, 6, 2, 2, groups=2)).to(dtype)
    model[1].to(memory_format=torch.channels_last)
    stored = {name: value.clone() for name, value in model.state_dict().items()}
    trimmed, report = reported(model, 0.5, limit=5, example_input=(4, 16, 16))
    first, second, third = trimmed
    assert (type(first), first.backend, first.stride, first.kernel_size[0]) == (DepthwiseConv2d, "aten", (2, 2), 5)
    assert first.padding[0] == 3
    assert type(second) is nn.Conv2d
    assert second.bias is None
    assert not second.weight.requires_grad
    assert second.weight.is_contiguous(memory_format=torch.channels_last)
    assert (type(third), third.kernel_size, third.padding, third.groups) == (nn.ConvTranspose2d, (4, 4), (1, 1), 2)
    assert all(p.dtype == dtype for p in trimmed.parameters())
    assert not any(module.training for module in trimmed.modules())
    assert trimmed(torch.randn(1, 4, 16, 16, dtype=dtype)).shape == model(torch.randn(1, 4, 16, 16, dtype=dtype)).shape
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    assert not {id(p) for p in model.parameters()} & {id(p) for p in trimmed.parameters()}
    assert [k.after for k in report.kernels] == [m.kernel_size for m in trimmed]
    _, told = reported(trimmed, 0)  # trimmed models can be trimmed again
    assert told.trimmed() == ()
    twice = nn.Conv2d(4, 4, 9, padding=4)
    doubled = trim(stack(twice, twice), 0.5)
    assert doubled[0] is doubled[1]


# Errors


@pytest.mark.parametrize(
    "layer", [GMConv2d(4, 4, 5, padding=2), MoRFConv2d(4, 4, (3, 5)), LargeKernelConv2d(4, 4, 9, small=3)],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_what_is_not_merged_is_sent_to_be_merged(layer):
    model = stack(nn.Conv2d(4, 4, 3, padding=1), layer)
    with pytest.raises(ValueError, match=r"^1 must be merged first, .* call widefield.reparameterize"):
        trim(model)
    assert trim(reparameterize(model, torch.randn(1, 4, 16, 16)))(torch.randn(1, 4, 16, 16)).shape == (1, 4, 16, 16)


def test_timms_blocks_that_merge_in_place_are_known_once_they_are_merged():
    model = unsettled(stack(nn.Conv2d(3, 4, 3, padding=1), RepVggBlock(4, 4, 3, group_size=1)))
    with pytest.raises(ValueError, match=r"^1 must be merged first, .* call widefield.reparameterize"):
        trim(model)
    merged = reparameterize(model, torch.randn(1, 3, 8, 8)).eval()
    assert [kernel.name for kernel in reported(merged, 0.0)[1].kernels] == ["0", "1.reparam_conv"]


def test_errors_name_what_was_given():
    model = network()
    with pytest.raises(RuntimeError, match=r"Sequential is in training mode: call model.eval\(\)"):
        trim(network().train())
    for options, message in (
        ({"tolerance": -0.1}, "-0.1"),
        ({"tolerance": 1.5}, "1.5"),
        ({"limit": 0}, "limit must be at least 1; got 0"),
        ({"example_input": ()}, r"example_input must be .* got \(\)"),
        ({"example_input": 20}, r"does not run on example_input of size \(3, 20, 20\)"),
        ({"example_input": 12, "loader": [torch.randn(2, 3, 13, 13)]}, r"loader's images have size \(3, 13, 13\)"),
        ({"loader": []}, "no images"),
    ):
        with pytest.raises(ValueError, match=message):
            trim(model, **options)
    with pytest.raises(TypeError, match=r"pass \[tensor\]"):
        trim(model, loader=torch.randn(2, 3, 12, 12))
    with pytest.raises(ValueError, match="Sequential has no convolution with more than one tap"):
        trim(stack(nn.Conv2d(3, 3, 1), nn.Linear(2, 2)))
    with torch.no_grad():
        model[2].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^2: weight must be finite"):
        trim(model)
    with pytest.raises(ValueError, match=r"pass example_input=\(C, H, W\)"):
        trim(stack(nn.Identity()), example_input=8)
