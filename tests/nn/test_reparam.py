import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from conformance import array, check_operator, loaded, operators
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import widefield
from tolerances import BFLOAT16, FLOAT32, FLOAT64, close
from widefield.nn import reparam
from widefield.nn.depthwise import DepthwiseConv2d
from widefield.nn.fusing import fold_norm
from widefield.nn.large_kernel import DILATED_BRANCHES, DecomposedConv2d, DilatedReparamConv2d, LargeKernelConv2d
from widefield.nn.reparam import ConvNorm, ReparamConv2d, merged

ODD = st.integers(0, 8).map(lambda n: 2 * n + 1)


def settled(module):
    """Set statistics and affine parameters of batch norms like in a trained network."""
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            if norm.affine:
                nn.init.normal_(norm.weight)
                nn.init.normal_(norm.bias)
    return module.double().eval()


def layers():
    return [
        LargeKernelConv2d(4, 4, 9, small=3),
        LargeKernelConv2d(4, 4, (5, 11), stride=2, small=None),
        LargeKernelConv2d(4, 4, 7, norm=False),
        DilatedReparamConv2d(4, 4, 7),
        DecomposedConv2d(4, 4, 9, small=3),
        DecomposedConv2d(4, 4, 3, small=5),
    ]


def named(layer):
    return f"{type(layer).__name__}({layer.extra_repr()})"


def large(case, kind=LargeKernelConv2d):
    return kind(case["dim"], case["dim"], case["large_kernel"], small=case["small_kernel"])


CASES = {
    "replknet_large_kernel": lambda c: large(c),
    "slak_undecomposed_depthwise": lambda c: large(c),
    "slak_decomposed_depthwise": lambda c: large(c, DecomposedConv2d),
    **{
        f"unireplknet_dilated_k{k}": lambda c: DilatedReparamConv2d(c["dim"], c["dim"], c["kernel"])
        for k in DILATED_BRANCHES
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_papers_code_computes_the_same_with_the_same_keys(name):
    case = operators()[name]
    layer = CASES[name](case["config"])
    assert {key: list(value.shape) for key, value in layer.state_dict().items()} == {
        key: entry["shape"] for key, entry in case["state_dict"].items()
    }
    fused = loaded(layer, case).fuse()
    check_operator(layer, case)
    check_operator(fused, case)
    if "merged_state_dict" in case:
        assert list(fused.state_dict()) == list(case["merged_state_dict"])
        for key, entry in case["merged_state_dict"].items():
            close(fused.state_dict()[key], array(entry), FLOAT64)


@pytest.mark.parametrize("k", DILATED_BRANCHES)
def test_default_branches_are_the_papers(k):
    case = operators()[f"unireplknet_dilated_k{k}"]
    assert [list(branch) for branch in DILATED_BRANCHES[k]] == case["config"]["branches"]


@settings(max_examples=60, deadline=None)
@given(
    rows=ODD, columns=ODD, small=st.none() | ODD, stride=st.integers(1, 3) | st.just((2, 1)), norm=st.booleans(),
    outer=st.booleans(), n=st.integers(1, 2), height=st.integers(1, 12), width=st.integers(1, 12),
)  # fmt: skip
def test_a_fused_large_kernel_is_exact(rows, columns, small, stride, norm, outer, n, height, width):
    if small is not None:
        small = min(small, max(rows, columns))
    layer = settled(LargeKernelConv2d(3, 3, (rows, columns), stride, small=small, norm=norm))
    x = torch.randn(n, 3, height, width).double()
    expected = layer(x)
    steps = (stride, stride) if isinstance(stride, int) else stride
    assert expected.shape == (n, 3, -(-height // steps[0]), -(-width // steps[1]))
    close(layer.fuse()(x), expected, FLOAT64)
    if outer:
        after = settled(nn.BatchNorm2d(3))
        close(layer.fuse(after)(x), after(expected), FLOAT64)


@settings(max_examples=40, deadline=None)
@given(
    branches=st.lists(st.tuples(st.sampled_from([1, 3, 5]), st.integers(1, 3)), unique=True, max_size=4),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
)
def test_fused_dilated_branches_are_exact(branches, height, width):
    layer = settled(DilatedReparamConv2d(2, 2, 13, branches=branches))
    x = torch.randn(2, 2, height, width).double()
    expected = layer.origin_bn(layer.lk_origin(x))
    for k, d in branches:
        conv, norm = getattr(layer, f"dil_conv_k{k}_{d}"), getattr(layer, f"dil_bn_k{k}_{d}")
        expected = expected + norm(F.conv2d(x, conv.weight, padding=d * (k // 2), dilation=d, groups=2))
    close(layer(x), expected, FLOAT64)
    close(layer.fuse()(x), expected, FLOAT64)


@settings(max_examples=40, deadline=None)
@given(long=ODD, short=ODD, height=st.integers(1, 12), width=st.integers(1, 12))
def test_fused_bands_are_exact_and_so_is_one_square_kernel(long, short, height, width):
    layer = settled(DecomposedConv2d(2, 2, long, small=short))
    assert hasattr(layer, "small_conv") is (short < long)
    x = torch.randn(2, 2, height, width).double()
    expected = sum(part.bn(part.conv(x)) for part in layer.children())
    close(layer(x), expected, FLOAT64)
    fused = layer.fuse()
    close(fused(x), expected, FLOAT64)
    assert {key.split(".")[0] for key in fused.state_dict()} == {"LoRA1", "LoRA2"}


@pytest.mark.parametrize("activation", [None, nn.ReLU()])
@pytest.mark.parametrize(
    "conv",
    [nn.Conv2d(4, 6, 3, 2, 1, bias=False), nn.Conv2d(4, 6, 1, groups=2), DepthwiseConv2d(6, 6, 3, padding="same")],
)
def test_a_convolution_and_its_norm_fuse_exactly(conv, activation):
    layer = settled(ConvNorm(copy.deepcopy(conv), activation))
    fused = layer.fuse()
    assert type(fused.conv) is type(conv)
    assert list(fused._modules) == ["conv"] + ["nonlinear"] * (activation is not None)
    x = torch.randn(2, conv.in_channels, 7, 5).double()
    close(fused(x), layer(x), FLOAT64)


@pytest.mark.parametrize("layer", layers(), ids=named)
def test_gradients_reach_every_parameter_and_are_right(layer):
    layer = settled(copy.deepcopy(layer))
    x = torch.randn(2, 4, 6, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(layer, x)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def run(*values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x.detach())

    assert torch.autograd.gradcheck(run, parameters, fast_mode=True)
    layer.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())


@pytest.mark.parametrize("layer", [*layers(), ConvNorm(nn.Conv2d(4, 4, 3, padding=1))], ids=str)
def test_fused_layers_are_finished_and_may_train_on(layer):
    layer = copy.deepcopy(layer)
    with pytest.raises(RuntimeError, match=r"call model.eval\(\) first"):
        layer.fuse()
    before = copy.deepcopy(layer.eval().state_dict())
    fused = layer.fuse()
    assert not fused.training
    assert all(p.requires_grad for p in fused.parameters())
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())  # nothing is shared
    assert not any(p.requires_grad for p in layer.requires_grad_(False).fuse().parameters())


@pytest.mark.parametrize("name", ["merge_kernel", "merge_dilated_branches", "switch_to_deploy"])
@pytest.mark.parametrize("layer", layers(), ids=named)
def test_the_authors_scripts_merge_in_place(layer, name):
    net = settled(nn.Sequential(nn.Conv2d(4, 4, 1), copy.deepcopy(layer)))
    x, alone = torch.randn(2, 4, 13, 12).double(), net[1]
    y, fused = net(x), alone.fuse()
    assert getattr(alone, name)() is None
    assert net[1] is alone
    assert type(alone) is type(fused)
    assert net[1].state_dict().keys() == fused.state_dict().keys()
    close(net(x), y, FLOAT64)
    close(copy.deepcopy(net)(x), y, FLOAT64)
    with pytest.raises(RuntimeError, match=r"call model\.eval"):
        copy.deepcopy(layer).train().merge_kernel()
    hooked = copy.deepcopy(layer).eval()
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="has hooks, which merging would lose"):
        hooked.merge_kernel()


def test_one_part_in_training_mode_is_enough_to_refuse():
    layer = LargeKernelConv2d(4, 4, 7).eval()
    layer.small_conv.bn.train()
    with pytest.raises(RuntimeError, match=r"call model.eval\(\) first"):
        layer.fuse()
    with pytest.raises(RuntimeError, match=r"call model.eval\(\) first"):
        merged(LargeKernelConv2d(4, 4, 7))


@pytest.mark.parametrize("layer", layers(), ids=named)
@pytest.mark.parametrize("kind", ["sync", "plain", "deepcopy"])
def test_norms_of_other_kinds_are_folded_too(layer, kind):
    layer = settled(copy.deepcopy(layer))
    if kind == "sync":
        layer = nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    if kind == "plain":
        for conv_norm in list(layer.modules()):
            for name, part in list(conv_norm.named_children()):
                if isinstance(part, nn.BatchNorm2d):
                    setattr(conv_norm, name, settled(nn.BatchNorm2d(4, eps=1e-3, affine=False)))
    if kind == "deepcopy":
        layer = copy.deepcopy(layer)
    x = torch.randn(2, 4, 7, 6).double()
    close(layer.fuse()(x), layer(x), FLOAT64)


def test_what_cannot_be_folded_is_refused():
    conv = nn.Conv2d(4, 4, 3).eval()
    with pytest.raises(ValueError, match="without running statistics"):
        fold_norm(conv, nn.BatchNorm2d(4, track_running_stats=False).eval())
    with pytest.raises(ValueError, match="a batch norm of 6 channels into 4 outputs"):
        fold_norm(conv, nn.BatchNorm2d(6).eval())
    with pytest.raises(ValueError, match="no branches to sum"):
        type("Empty", (ReparamConv2d,), {"branches": lambda self: []})()(torch.zeros(1))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: LargeKernelConv2d(4, 4, 8), ValueError, "kernel_size must be odd.*; got 8"),
        (lambda: LargeKernelConv2d(4, 4, (7, 6)), ValueError, "kernel_size must be odd.*; got 6"),
        (lambda: LargeKernelConv2d(4, 4, (7, 7, 7)), ValueError, r"two \(rows, columns\); got \(7, 7, 7\)"),
        (lambda: LargeKernelConv2d(4, 4, 7.0), TypeError, "kernel_size must be an integer; got 7.0"),
        (lambda: LargeKernelConv2d(4, 4, 7, small=4), ValueError, "small must be odd.*; got 4"),
        (lambda: LargeKernelConv2d(4, 4, 7, small=9), ValueError, "small must not exceed the kernel of 7x7; got 9"),
        (lambda: LargeKernelConv2d(4, 4, 7, 0), ValueError, "stride must be at least 1; got 0"),
        (lambda: LargeKernelConv2d(4, 4, 7, backend="atan"), ValueError, "Did you mean 'aten'"),
        (lambda: DilatedReparamConv2d(4, 4, 19), ValueError, "5, 7, 9, 11, 13, 15, 17; got 19: give branches="),
        (lambda: DilatedReparamConv2d(4, 4, (7, 9)), ValueError, r"one integer or two equal ones; got \(7, 9\)"),
        (lambda: DilatedReparamConv2d(4, 4, 7, branches=[(3, 4)]), ValueError, "spans 9 pixels, more than"),
        (lambda: DilatedReparamConv2d(4, 4, 7, branches=[(3, 2), (3, 2)]), ValueError, "dilation 2 more than once"),
        (lambda: DilatedReparamConv2d(4, 4, 7, branches=[(4, 1)]), ValueError, "must be odd.*; got 4"),
        (lambda: DecomposedConv2d(4, 4, 50), ValueError, "kernel_size must be odd.*; got 50"),
        (lambda: DecomposedConv2d(4, 4, 51, small=0), ValueError, "small must be at least 1; got 0"),
    ],
)  # fmt: skip
def test_bad_sizes_are_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize("layer", layers(), ids=named)
def test_layouts_half_precision_and_empty_batches(layer):
    layer = copy.deepcopy(layer)
    x = torch.randn(2, 4, 9, 8)
    expected = layer.eval()(x)
    seen = layer(x.contiguous(memory_format=torch.channels_last))
    close(seen, expected, FLOAT32)
    assert seen.is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    close(y, expected, BFLOAT16)
    assert layer(x[:0]).shape == (0, *expected.shape[1:])
    with pytest.raises(ValueError, match=r"the input must be \(N, 4, H, W\)"):
        layer(torch.randn(2, 5, 9, 8))


def test_kernels_of_63_taps():
    layer = settled(LargeKernelConv2d(2, 2, 63))
    x = torch.randn(1, 2, 40, 33).double()
    close(layer.fuse()(x), layer(x), FLOAT64)
    assert "63x63 + 5x5" in repr(layer)


def test_networks_of_these_layers_re_parameterise():
    model = settled(nn.Sequential(ConvNorm(nn.Conv2d(3, 4, 1), nn.ReLU()), *layers()[:2], nn.BatchNorm2d(4)))
    fused = widefield.reparameterize(model, torch.randn(2, 3, 9, 9).double())
    assert not any(isinstance(m, (ReparamConv2d, nn.BatchNorm2d)) for m in fused.modules())
    x = torch.randn(2, 3, 8, 12).double()
    close(fused(x), model(x), FLOAT64)


# As a replacement for convolutions

TAKEN = [
    {"kernel_size": 7, "padding": 3},
    {"kernel_size": 3, "padding": 1, "stride": 2, "bias": False},
    {"kernel_size": (5, 3), "padding": "same"},
    {"kernel_size": 1, "stride": (2, 1)},
]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("small", [None, 5])
@pytest.mark.parametrize("options", TAKEN, ids=str)
def test_a_larger_kernel_computes_what_the_old_one_did(options, small, norm):
    conv = nn.Conv2d(6, 6, groups=6, **options).double()
    layer = LargeKernelConv2d.from_conv2d(conv, (13, 9), small=small, norm=norm)
    assert layer.training
    x = torch.randn(2, 6, 11, 10).double()
    if not norm:
        close(layer(x), conv(x), FLOAT64)
    close(layer.eval()(x), conv(x), FLOAT64)
    close(layer.fuse()(x), conv(x), FLOAT64)
    single = LargeKernelConv2d.from_conv2d(conv.float(), 13, small=small, norm=norm).eval()
    assert next(single.parameters()).dtype == torch.float32
    close(single(x.float()), conv(x.float()), FLOAT32)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("size", [7, 31])
@pytest.mark.parametrize("old", ["weights", "zeros"])
def test_every_branch_learns_from_the_first_step(norm, size, old):
    conv = nn.Conv2d(4, 4, 7, padding=3, groups=4)
    if old == "zeros":
        nn.init.zeros_(conv.weight)
    layer = LargeKernelConv2d.from_conv2d(conv, size, small=7, norm=norm)
    start = [part.weight.detach().clone() for part, _ in layer.branches()]
    assert all(weight.abs().amax((1, 2, 3)).min() > 0 for weight in start)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        layer(torch.randn(4, 4, 33, 33)).mul(torch.randn(4, 4, 33, 33)).sum().backward()
        optimizer.step()
    for (part, _), weight in zip(layer.branches(), start, strict=True):
        assert ((part.weight - weight).abs() > 0).all()  # including the padded taps
    if size == 7:  # equal branches would stay equal
        large, small = (part.weight for part, _ in layer.branches())
        assert not torch.allclose(large, small)


def test_a_fresh_start_and_what_is_taken_over():
    conv = DepthwiseConv2d(4, 4, 7, padding="same", backend="aten", dtype=torch.double).eval().requires_grad_(False)
    torch.manual_seed(1)
    layer = LargeKernelConv2d.from_conv2d(conv, 5, small=3, init="random")
    assert [part.backend for part, _ in layer.branches()] == ["aten", "aten"]
    assert not layer.training
    assert not any(p.requires_grad for p in layer.parameters())
    torch.manual_seed(1)
    for (ours, _), (fresh, _) in zip(
        layer.branches(), LargeKernelConv2d(4, 4, 5, small=3, dtype=torch.double).branches(), strict=True
    ):
        close(ours.weight, fresh.weight, FLOAT64)
    planned = LargeKernelConv2d.from_conv2d(nn.Conv2d(4, 4, 7, padding=3, groups=4, device="meta"), 31)
    assert all(p.is_meta for p in planned.parameters())


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(4, 8, 3, padding=1, groups=4), "not depthwise: 4 input channels, 8 output channels, groups=4"),
        (nn.Conv2d(4, 4, 4, padding=2, groups=4), r"kernel size is even \(4x4\)"),
        (nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4), r"its dilation is \(2, 2\)"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", groups=4), "its padding mode is 'reflect'"),
        (nn.Conv2d(4, 4, 5, padding=1, groups=4), r"its padding is \(1, 1\), and \(2, 2\) would center"),
        (nn.Conv1d(4, 4, 3, groups=4), "it is a Conv1d"),
        (nn.Linear(4, 4), "it is a Linear"),
        (nn.ConvTranspose2d(4, 4, 3, groups=4), "it is a ConvTranspose2d"),
    ],
)
def test_convolutions_that_cannot_be_replaced_are_refused_with_the_reason(conv, reason):
    with pytest.raises(ValueError, match=f"cannot become a LargeKernelConv2d: .*{reason}"):
        LargeKernelConv2d.from_conv2d(conv, 13)


@pytest.mark.parametrize(("name", "millions", "giga"), [("tiny", 32, 6.1), ("small", 58, 11.3)])
def test_a_convnext_with_large_kernels_has_the_size_that_the_slides_state_once_merged(name, millions, giga):
    with torch.device("meta"):
        model = timm.create_model(f"convnext_{name}").eval()
    for stage, size in zip(model.stages, (31, 29, 27, 13), strict=True):
        for block in stage.blocks:
            block.conv_dw = LargeKernelConv2d.from_conv2d(block.conv_dw, size).fuse()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
    assert round(counter.get_total_flops() / 2e9, 1) == giga


def test_a_kernel_that_does_not_fit_is_refused_unless_nothing_is_kept():
    conv = nn.Conv2d(4, 4, 7, padding=3, groups=4)
    assert reparam.why_not(conv) is None
    assert reparam.lacks_room(conv, (7, 9)) is None
    with pytest.raises(ValueError, match="its 7x7 kernel does not fit into one of 5x31"):
        LargeKernelConv2d.from_conv2d(conv, (5, 31))
    with pytest.raises(ValueError, match="its 7x7 kernel does not fit into one of 5x5"):
        LargeKernelConv2d(4, 4, 5).absorb(conv)
    assert LargeKernelConv2d.from_conv2d(conv, 5, small=3, init="random").lkb_origin.conv.kernel_size == (5, 5)
    with pytest.raises(ValueError, match=r"init must be one of .* Did you mean 'random'"):
        LargeKernelConv2d.from_conv2d(conv, 13, init="randon")


@pytest.mark.parametrize("layer", [nn.Linear(3, 5, bias=False), nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False)])
def test_folding_nothing_gives_a_bias_of_zeros(layer):
    twin = fold_norm(layer.eval(), None)
    assert type(twin) is type(layer)
    assert torch.equal(twin.weight, layer.weight)
    assert torch.equal(twin.bias, torch.zeros(5 if isinstance(layer, nn.Linear) else 6))
