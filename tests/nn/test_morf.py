import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import widefield
from tolerances import FLOAT32, FLOAT64, close
from widefield.nn import DepthwiseConv2d, MoRFConv2d
from widefield.ops import fold


def branches(layer, x):
    """Compute eq. 6 literally, with the layer's own routing weights."""
    alpha, total = layer.route(x), 0
    for r, (w, d) in enumerate(zip(layer.kernels(), layer.dilations, strict=True)):
        b = None if layer.biases() is None else layer.biases()[r]
        y = F.conv2d(x, w, b, layer.stride, d * (w.shape[-1] // 2), d, layer.groups)
        total = total + alpha[:, r, None, None, None] * y
    return total


layers = {
    "groups": st.integers(1, 3),
    "per_in": st.integers(1, 2),
    "per_out": st.integers(1, 2),
    "experts": st.lists(
        st.one_of(st.sampled_from([1, 3, 5, 7, 9]), st.tuples(st.sampled_from([3, 5]), st.integers(1, 2))),
        min_size=1,
        max_size=4,
    ),
    "stride": st.integers(1, 2),
    "bias": st.booleans(),
    "attention": st.sampled_from(["none", "softmax", "sigmoid"]),
    "routing": st.sampled_from(["soft", "hard"]),
    "n": st.integers(1, 4),
    "height": st.integers(1, 8),
    "width": st.integers(1, 8),
}


@settings(max_examples=80, deadline=None)
@given(train=st.booleans(), **layers)
def test_outputs_and_all_gradients_equal_the_branches(
    groups, per_in, per_out, experts, stride, bias, attention, routing, n, height, width, train
):
    layer = MoRFConv2d(
        groups * per_in, groups * per_out, experts, stride, groups=groups, bias=bias,
        routing=routing, attention=attention, top_k=min(2, len(experts)),
    ).double().train(train)  # fmt: skip
    x = torch.randn(n, groups * per_in, height, width).double().requires_grad_()
    results = []
    for forward in (layer, lambda x: branches(layer, x)):
        torch.manual_seed(1)  # the same noise
        y = forward(x)
        loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()
        inputs = [x, *layer.parameters()]
        results.append([y, *torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)])
    for actual, expected in zip(*results, strict=True):
        close(actual, expected, FLOAT64)


@settings(max_examples=40, deadline=None)
@given(**layers)
def test_fused_equals_unfused_with_and_without_batch_norm(
    groups, per_in, per_out, experts, stride, bias, attention, routing, n, height, width
):
    layer = MoRFConv2d(
        groups * per_in, groups * per_out, experts, stride, groups=groups, bias=bias,
        routing=routing, attention=attention, top_k=min(2, len(experts)),
    ).double().eval()  # fmt: skip
    norm = nn.BatchNorm2d(layer.out_channels).double().eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    x = torch.randn(n, layer.in_channels, height, width).double()
    close(layer.fuse()(x), layer(x), FLOAT64)
    close(layer.fuse(norm)(x), norm(layer(x)), FLOAT64)


@settings(max_examples=40, deadline=None)
@given(**layers)
def test_a_collapsed_mixture_is_the_mixture_of_fixed_weights(
    groups, per_in, per_out, experts, stride, bias, attention, routing, n, height, width
):
    layer = MoRFConv2d(
        groups * per_in, groups * per_out, experts, stride, groups=groups, bias=bias, routing=routing, top_k=1
    ).double().eval()  # fmt: skip
    norm = nn.BatchNorm2d(layer.out_channels).double().eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(tensor)
    weights = torch.randn(len(experts)).double()
    fused, folded = layer.fuse(), layer.fuse(norm)
    layer.route = lambda x: weights.expand(len(x), -1)  # branches() calls it
    x = torch.randn(n, layer.in_channels, height, width).double()
    y = branches(layer, x)
    for conv, expected in (
        (layer.collapse(weights), y),
        (fused.collapse(weights), y),
        (folded.collapse(weights), norm(y)),
    ):
        close(conv(x), expected, FLOAT64)
        assert type(conv) is (DepthwiseConv2d if per_in == per_out == 1 else nn.Conv2d)


def test_a_collapsed_mixture_is_finished_and_keeps_dtype_and_what_is_frozen():
    layer = MoRFConv2d(4, 6, (3, 5)).bfloat16()
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    conv = layer.collapse(weights)
    assert not conv.training
    assert {p.dtype for p in conv.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad and p.is_leaf for p in conv.parameters())
    exact = 0.3 * F.pad(layer.kernels()[0].double(), (1,) * 4) + 0.7 * layer.kernels()[1].double()
    assert torch.equal(conv.weight, exact.bfloat16())  # rounded once
    layer.expert_biases.requires_grad_(False)
    assert [p.requires_grad for p in layer.collapse(weights).parameters()] == [True, False]
    fused = layer.eval().fuse()
    assert [p.requires_grad for p in fused.collapse(weights).parameters()] == [True, False]
    with torch.no_grad():
        conv.weight.zero_()  # it shares nothing with the mixture
    assert all(kernel.abs().min() > 0 for kernel in layer.kernels())


@pytest.mark.parametrize("fused", [False, True])
def test_collapse_refuses_weights_that_are_none(fused):
    layer = MoRFConv2d(4, 4, (3, 5, 7)).eval()
    layer = layer.fuse() if fused else layer
    with pytest.raises(ValueError, match=r"weights must be \(3,\), one for each expert; got shape \(2, 3\)"):
        layer.collapse(torch.ones(2, 3))
    with pytest.raises(ValueError, match="weights must be finite; got"):
        layer.collapse(torch.tensor([1.0, float("nan"), 1.0]))


def test_defaults_are_the_papers():
    layer = widefield.nn.MoRFConv2d(8, 8, groups=8)
    assert layer.kernel_sizes == (3, 5, 7, 9, 11)
    assert [tuple(k.shape) for k in layer.kernels()] == [(8, 1, k, k) for k in (3, 5, 7, 9, 11)]
    assert [tuple(b.shape) for b in layer.biases()] == [(8,)] * 5
    assert (layer.router.routing, layer.router.attention) == ("soft", "none")
    assert layer.route(torch.randn(3, 8, 5, 5)).shape == (3, 5)
    assert MoRFConv2d(8, 8, bias=False).biases() is None


def test_dynamic_convolution_is_a_mixture_of_equal_sizes():
    """Chen et al. 2020: kernels are averaged with softmax attention, then one convolution follows."""
    layer = MoRFConv2d(3, 5, (3, 3, 3, 3), attention="softmax").double()
    x = torch.randn(2, 3, 7, 8).double()
    attention = layer.route(x)
    close(attention.sum(1), torch.ones(2).double(), FLOAT64)
    for i in range(2):
        kernel = sum(a * w for a, w in zip(attention[i], layer.kernels(), strict=True))
        bias = sum(a * b for a, b in zip(attention[i], layer.biases(), strict=True))
        close(layer(x)[i : i + 1], F.conv2d(x[i : i + 1], kernel, bias, padding=1), FLOAT64)


def test_sknet_pair_is_a_plain_and_a_dilated_kernel():
    layer = MoRFConv2d(4, 4, (3, (3, 2)), groups=4).double()
    assert (layer.kernel_sizes, layer.dilations) == ((3, 3), (1, 2))
    x = torch.randn(2, 4, 9, 9).double()
    alpha = layer.route(x)[:, :, None, None, None]
    (w0, w1), (b0, b1) = layer.kernels(), layer.biases()
    y = alpha[:, 0] * F.conv2d(x, w0, b0, padding=1, groups=4)
    y = y + alpha[:, 1] * F.conv2d(x, w1, b1, padding=2, dilation=2, groups=4)
    close(layer(x), y, FLOAT64)


def test_hard_routing_leaves_experts_that_are_not_chosen_without_gradient():
    layer = MoRFConv2d(4, 4, (3, 5, 7, 9), groups=4, routing="hard", top_k=1).eval()
    with torch.no_grad():
        layer.router.settle(1)
    layer(torch.randn(3, 4, 8, 8)).square().sum().backward()
    sizes = [k.grad.abs().max().item() for k in layer.kernels()]
    assert sizes[1] > 0
    assert sizes[0] == sizes[2] == sizes[3] == 0


CONVOLUTIONS = {
    "depthwise 7x7": (lambda: nn.Conv2d(6, 6, 7, padding=3, groups=6), (3, 5, 7, 9, 11)),
    "dense strided, no bias": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), (3, 3, 3, 3)),
    "padding 'same'": (lambda: nn.Conv2d(4, 6, 3, padding="same"), (3, (3, 2))),
    "grouped 5x5": (lambda: nn.Conv2d(4, 6, 5, padding=2, groups=2), (3, 5, 7)),
    "centered in the next larger": (lambda: nn.Conv2d(4, 4, 5, padding=2), (3, 7, 9)),
    "dilated": (lambda: nn.Conv2d(4, 4, 3, padding=2, dilation=2), (3, 5, (3, 2))),
    "one expert": (lambda: nn.Conv2d(4, 4, 3, padding=1), (3,)),
    "zero kernel": (lambda: nn.init.zeros_((c := nn.Conv2d(4, 4, 3, padding=1)).weight) is None or c, (3, 5)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("attention", ["none", "softmax", "sigmoid"])
@pytest.mark.parametrize("routing", ["soft", "hard"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_from_conv2d_preserves_the_function_and_every_expert_learns_from_the_first_step(
    name, attention, routing, top_k
):
    make, sizes = CONVOLUTIONS[name]
    conv = make()
    layer = MoRFConv2d.from_conv2d(
        conv, sizes, routing=routing, attention=attention, top_k=min(top_k, len(sizes))
    ).eval()
    x = torch.randn(64, conv.in_channels, 12, 11)
    close(layer(x), conv(x), FLOAT32)
    layer.train()(x).square().sum().backward()
    if name == "zero kernel":
        return  # its output is zero, and so is the gradient of this loss
    assert all(k.grad.abs().max() > 0 for k in layer.kernels())
    # A softmax over one expert is always 1.
    alone = min(top_k, len(sizes)) == 1 if routing == "hard" else len(sizes) == 1 and attention == "softmax"
    assert (layer.router.gate.weight.grad.abs().max() > 0) != alone


def test_equal_experts_do_not_stay_equal():
    layer = MoRFConv2d.from_conv2d(nn.Conv2d(4, 4, 3, padding=1), (3, 3, 3), attention="softmax")
    x = torch.randn(8, 4, 9, 9)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (layer(x) - x).square().mean().backward()
        optimizer.step()
    assert layer.route(x).std(1).max() > 1e-4
    kernels = layer.kernels()
    assert (kernels[0] - kernels[1]).abs().max() > 1e-3


def test_from_conv2d_keeps_dtype_mode_and_the_original():
    conv = nn.Conv2d(4, 4, 3, padding=1).double().eval()
    before = copy.deepcopy(conv.state_dict())
    layer = MoRFConv2d.from_conv2d(conv, (3, 5))
    assert layer.kernels()[0].dtype == torch.double
    assert not layer.training
    layer.kernels()[0].data.zero_()
    for key, value in conv.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize(
    ("conv", "message"),
    [
        (nn.Conv2d(4, 4, 2), "even"),
        (nn.Conv2d(4, 4, (1, 7), padding=(0, 3)), "not square"),
        (nn.Conv2d(4, 4, 3), r"padding is \(0, 0\), and 1 would center"),
        (nn.Conv2d(4, 4, 3, padding=1, stride=(1, 2)), "differs between the axes"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "'reflect'"),
        (nn.Conv2d(4, 4, 13, padding=6), r"no expert of \(3, 5, 7, 9, 11\) can hold its 13x13 kernel"),
        (nn.ConvTranspose2d(4, 4, 3, padding=1), "ConvTranspose2d, not a plain"),
    ],
)
def test_convolutions_that_cannot_become_a_mixture_say_why(conv, message):
    with pytest.raises(ValueError, match=message):
        MoRFConv2d.from_conv2d(conv)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kernel_sizes": (3, 4)}, ValueError, "must be odd.*got 4. Use 3 or 5"),
        ({"kernel_sizes": ()}, ValueError, "kernel_sizes is empty"),
        ({"kernel_sizes": 7}, TypeError, "one entry per expert"),
        ({"kernel_sizes": "357"}, TypeError, "one entry per expert"),
        ({"kernel_sizes": (3, -5)}, ValueError, "at least 1; got -5"),
        ({"kernel_sizes": ((3, 1, 2),)}, ValueError, r"a pair \(kernel size, dilation\)"),
        ({"kernel_sizes": ((3, 0),)}, ValueError, "dilation of an expert must be at least 1"),
        ({"kernel_sizes": (3.0,)}, TypeError, "must be an integer; got 3.0"),
        ({"kernel_sizes": (3, 5), "routing": "hard", "top_k": 3}, ValueError, "top_k=3 of 2 experts"),
        ({"routing": "hrad"}, ValueError, "Did you mean 'hard'"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
        ({"groups": 3}, ValueError, "divisible by groups; got in_channels=8 and groups=3"),
        ({"stride": (1, 2)}, ValueError, "two equal ones"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        MoRFConv2d(8, 8, **arguments)


@pytest.mark.parametrize("fused", [False, True])
def test_inputs_of_another_shape_are_refused(fused):
    layer = MoRFConv2d(4, 4, (3, 5)).eval()
    layer = layer.fuse() if fused else layer
    with pytest.raises(ValueError, match=r"must be \(N, 4, H, W\); got shape \(2, 5, 6, 6\)"):
        layer(torch.zeros(2, 5, 6, 6))
    with pytest.raises(ValueError, match=r"x\[None\]"):
        layer(torch.zeros(4, 6, 6))


def test_what_only_a_single_kernel_has_is_refused_with_the_mend():
    layer = MoRFConv2d(4, 4, (3, 5))
    assert not hasattr(layer, "weight")
    with pytest.raises(AttributeError, match=r"no single 'weight': it has layer.kernels\(\).*where="):
        _ = layer.weight
    with pytest.raises(AttributeError, match="no attribute 'wieght'"):
        _ = layer.wieght


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_convolutions_stay_frozen_when_they_are_fused(frozen):
    layer = MoRFConv2d.from_conv2d(nn.Conv2d(4, 4, 3, padding=1).requires_grad_(not frozen), (3, 5))
    assert all(p.requires_grad != frozen for p in layer.parameters())
    assert all(p.requires_grad != frozen for p in layer.eval().fuse().parameters())


def test_a_fused_layer_learns_and_its_padding_stays_zero():
    layer = MoRFConv2d(4, 4, (3, (3, 2), 7), groups=4).eval()
    fused, x = layer.fuse(), torch.randn(3, 4, 9, 8)
    y = (layer(x).square().sum(), fused(x).square().sum())
    expected = torch.autograd.grad(y[0], [*layer.kernels(), *layer.biases()])
    of_bank, of_biases = torch.autograd.grad(y[1], [fused.bank, fused.bias_bank])
    close(of_bank, fold.kernel_bank(expected[:3], layer.dilations), FLOAT32)
    close(of_biases, torch.stack(expected[3:]), FLOAT32)
    torch.optim.SGD(fused.parameters(), 0.1, weight_decay=0.1).step()
    assert torch.equal(of_bank != 0, fused.bank != 0)


def test_fusing_keeps_the_dtype_of_the_layer():
    layer, norm = MoRFConv2d(4, 4, (3, 5)).bfloat16().eval(), nn.BatchNorm2d(4).eval()
    fused = layer.fuse(norm)
    assert {p.dtype for p in fused.parameters()} == {torch.bfloat16}
    assert fused(torch.randn(2, 4, 6, 6).bfloat16()).dtype == torch.bfloat16


def test_a_router_with_one_place_learns_from_the_balance_alone():
    layer = MoRFConv2d(4, 4, (3, 5, 7), routing="hard", top_k=1)
    x = torch.randn(8, 4, 6, 6)
    layer(x).square().sum().backward()
    assert layer.router.gate.weight.grad.abs().max() == 0
    with widefield.nn.load_balancing(layer) as balance:
        layer(x)
        balance().backward()
    assert layer.router.gate.weight.grad.abs().max() > 0


def test_fuse_refuses_what_it_cannot_fold():
    layer = MoRFConv2d(4, 4, (3, 5))
    with pytest.raises(RuntimeError, match=r"model.eval\(\)"):
        layer.fuse()
    layer.eval()
    with pytest.raises(RuntimeError, match=r"model.eval\(\)"):
        layer.fuse(nn.BatchNorm2d(4).train())
    with pytest.raises(ValueError, match="without running statistics"):
        layer.fuse(nn.BatchNorm2d(4, track_running_stats=False).eval())
    with pytest.raises(ValueError, match="5 channels into 4"):
        layer.fuse(nn.BatchNorm2d(5).eval())


@pytest.mark.parametrize("routing", ["soft", "hard"])
@pytest.mark.parametrize("fused", [False, True])
def test_lives_like_any_module(routing, fused):
    layer = MoRFConv2d(4, 4, (3, 5), groups=4, routing=routing).eval()
    twin = MoRFConv2d(4, 4, (3, 5), groups=4, routing=routing).eval()
    if fused:
        layer, twin = layer.fuse(), twin.fuse()
    x = torch.randn(2, 4, 6, 6)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    close(layer.double()(x.double()), twin(x), FLOAT32)
    assert "routing" in repr(layer)
    if fused:
        assert "noise" not in " ".join(layer.state_dict())
