import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tolerances import BFLOAT16, FLOAT32, FLOAT64, close
from widefield.ops import _sparse, bank_conv2d, explain, fold, mixture_conv2d


def oracle(x, kernels, biases, weights, stride, groups, dilations):
    """Compute eq. 6 literally, one sample and one expert at a time."""
    samples = []
    for i in range(x.shape[0]):
        y = 0
        for r, (w, d) in enumerate(zip(kernels, dilations, strict=True)):
            b = None if biases is None else biases[r]
            y = y + weights[i, r] * F.conv2d(x[i : i + 1], w, b, stride, d * (w.shape[-1] // 2), d, groups)
        samples.append(y)
    return torch.cat(samples)


def case(n, groups, per_in, per_out, height, width, experts, bias, *, dtype=torch.double, zeros=False):
    c_in, c_out = groups * per_in, groups * per_out
    x = torch.randn(n, c_in, height, width, dtype=dtype, requires_grad=True)
    kernels = [torch.randn(c_out, per_in, k, k, dtype=dtype, requires_grad=True) for k, _ in experts]
    biases = [torch.randn(c_out, dtype=dtype, requires_grad=True) for _ in experts] if bias else None
    weights = torch.randn(n, len(experts), dtype=dtype)
    if zeros:
        weights = weights * (torch.rand(n, len(experts)) < 0.5)
    return x, kernels, biases, weights.requires_grad_()


def gradients(y, x, kernels, biases, weights):
    return torch.autograd.grad(
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), [x, *kernels, *(biases or []), weights]
    )


shapes = {
    "n": st.integers(1, 4),
    "groups": st.integers(1, 3),
    "per_in": st.integers(1, 3),
    "per_out": st.integers(1, 3),
    "height": st.integers(1, 9),
    "width": st.integers(1, 9),
    "experts": st.lists(st.tuples(st.sampled_from([1, 3, 5, 7, 11]), st.integers(1, 3)), min_size=1, max_size=4),
    "stride": st.integers(1, 3),
    "bias": st.booleans(),
}


@pytest.mark.parametrize("backend", ["merged", "branches", "auto"])
@pytest.mark.parametrize("channels_last", [False, True])
@settings(max_examples=40, deadline=None)
@given(**shapes)
def test_outputs_and_all_gradients_equal_the_sum_of_branches(
    backend, channels_last, n, groups, per_in, per_out, height, width, experts, stride, bias
):
    x, kernels, biases, weights = case(n, groups, per_in, per_out, height, width, experts, bias)
    dilations = [d for _, d in experts]
    expected = oracle(x, kernels, biases, weights, stride, groups, dilations)
    seen = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    actual = mixture_conv2d(
        seen, kernels, biases, weights, stride=stride, groups=groups, dilations=dilations, backend=backend
    )
    assert actual.shape[2:] == (-(-height // stride), -(-width // stride))
    close(actual, expected, FLOAT64)
    inputs = (x, kernels, biases, weights)
    for a, b in zip(gradients(actual, *inputs), gradients(expected, *inputs), strict=True):
        close(a, b, FLOAT64)


def sorting(*, is_free):
    """Make sorting samples by kernel size free, or too expensive."""
    cost = 0 if is_free else math.inf
    return mock.patch.object(_sparse, "COSTS", _sparse.Costs(move=cost, call=cost))


@pytest.mark.parametrize("way", ["sorted", "together", "branches"])
@settings(max_examples=40, deadline=None)
@given(**shapes)
def test_sparse_weights_skip_without_changing_anything(
    way, n, groups, per_in, per_out, height, width, experts, stride, bias
):
    x, kernels, biases, weights = case(n, groups, per_in, per_out, height, width, experts, bias, zeros=True)
    dilations = [d for _, d in experts]
    expected = oracle(x, kernels, biases, weights, stride, groups, dilations)
    backend = "branches" if way == "branches" else "merged"
    with sorting(is_free=way == "sorted"):
        actual = mixture_conv2d(
            x, kernels, biases, weights, stride=stride, groups=groups, dilations=dilations, backend=backend, sparse=True
        )
    close(actual, expected, FLOAT64)
    inputs = (x, kernels, biases, weights)
    *grads, of_weights = gradients(actual, *inputs)
    *expected_grads, expected_of_weights = gradients(expected, *inputs)
    for a, b in zip(grads, expected_grads, strict=True):
        close(a, b, FLOAT64)
    chosen = weights != 0
    close(of_weights[chosen], expected_of_weights[chosen], FLOAT64)
    assert not of_weights[~chosen].any()


@pytest.mark.parametrize("side", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_smallest_maps(side, stride, threads):
    """Kernels shrink to 1x1 and 3x3 there, which CPUs compute separately."""
    x, kernels, biases, weights = case(3, 4, 1, 1, side, side, [(3, 1), (7, 1)], True)
    expected = oracle(x, kernels, biases, weights, stride, 4, (1, 1))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual = mixture_conv2d(x, kernels, biases, weights, stride=stride, groups=4, backend="merged")
        inputs = (x, kernels, biases, weights)
        close(actual, expected, FLOAT64)
        for a, b in zip(gradients(actual, *inputs), gradients(expected, *inputs), strict=True):
            close(a, b, FLOAT64)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", ["merged", "branches"])
def test_an_expert_that_no_sample_chose_gets_no_gradient(backend):
    x, kernels, biases, _ = case(3, 4, 1, 1, 6, 6, [(3, 1), (5, 1), (7, 1)], True)
    weights = torch.tensor([[0.4, 0.6, 0], [1, 0, 0], [0, 0.2, 0]], dtype=torch.double)
    y = mixture_conv2d(x, kernels, biases, weights, groups=4, sparse=True, backend=backend)
    y.square().sum().backward()
    assert kernels[0].grad.abs().max() > 0
    assert kernels[2].grad.abs().max() == 0
    assert biases[2].grad.abs().max() == 0


@pytest.mark.parametrize("backend", ["merged", "branches"])
def test_skipped_experts_are_not_computed(backend):
    """Count multiplications: a sample routed to 3x3 must not pay for the 31x31 of another."""
    from torch.utils.flop_counter import FlopCounterMode

    def flops(weights, side):
        x, kernels, _, _ = case(4, 64, 1, 1, side, side, [(3, 1), (31, 1)], False, dtype=torch.float32)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            mixture_conv2d(x, kernels, None, weights, groups=64, sparse=True, backend=backend)
        return counter.get_total_flops()

    small = torch.tensor([[1.0, 0.0]] * 4)
    mixed = torch.tensor([[1.0, 0.0]] * 2 + [[0.0, 1.0]] * 2)
    both = torch.ones(4, 2)
    assert flops(small, 48) < flops(both, 48) * (9 / 961) * 1.5
    assert flops(mixed, 48) < flops(both, 48) * 0.7
    assert flops(small, 12) < flops(both, 12) * (9 / 23**2) * 1.5
    if backend == "merged":  # moving samples costs more than it saves
        assert flops(mixed, 12) == flops(both, 12)


@pytest.mark.parametrize("per", [1, 2])
@pytest.mark.parametrize("backend", ["merged", "branches"])
def test_gradcheck_and_second_derivatives(backend, per):
    x, kernels, biases, weights = case(2, 2, per, per, 4, 3, [(3, 1), (5, 1)], True)

    def f(x, k0, k1, b0, b1, a):
        return mixture_conv2d(x, [k0, k1], [b0, b1], a, groups=2, backend=backend)

    inputs = (x, *kernels, *biases, weights)
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", ["merged", "branches", "auto"])
@pytest.mark.parametrize("sparse", [False, True])
def test_empty_batch(backend, sparse):
    x, kernels, biases, weights = case(0, 4, 1, 1, 6, 5, [(3, 1), (5, 1)], True)
    y = mixture_conv2d(x, kernels, biases, weights, groups=4, stride=2, backend=backend, sparse=sparse)
    assert y.shape == (0, 4, 3, 3)
    y.sum().backward()
    assert kernels[1].grad.abs().max() == 0


def test_non_contiguous_input_and_weights():
    x, kernels, biases, _ = case(4, 6, 1, 1, 8, 8, [(3, 1), (5, 1)], True)
    wide = torch.randn(2, 4, dtype=torch.double).t()
    seen = x[:, :, ::2, 1:].transpose(2, 3)
    expected = oracle(seen, kernels, biases, wide, 1, 6, (1, 1))
    for backend in ("merged", "branches"):
        close(mixture_conv2d(seen, kernels, biases, wide, groups=6, backend=backend), expected, FLOAT64)


@pytest.mark.parametrize("backend", ["merged", "branches"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_memory_format_is_kept(backend, layout):
    x, kernels, biases, weights = case(3, 4, 1, 1, 8, 6, [(3, 1), (5, 1)], True)
    y = mixture_conv2d(x.contiguous(memory_format=layout), kernels, biases, weights, groups=4, backend=backend)
    assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("backend", ["merged", "branches"])
def test_lower_precisions_against_float64(dtype, tolerance, groups, backend):
    experts = [(3, 1), (5, 1), (7, 2)]
    x, kernels, biases, weights = case(3, groups, 4 // groups, 4 // groups, 13, 12, experts, True)
    expected = oracle(x, kernels, biases, weights, 1, groups, (1, 1, 2))
    low = [t.detach().to(dtype).requires_grad_() for t in (x, *kernels, *biases, weights)]
    y = mixture_conv2d(low[0], low[1:4], low[4:7], low[7], groups=groups, dilations=(1, 1, 2), backend=backend)
    assert y.dtype == dtype
    close(y, expected, tolerance)
    inputs = (x, kernels, biases, weights)
    grads = torch.autograd.grad((y.double() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), low)
    for a, b in zip(grads, gradients(expected, *inputs), strict=True):
        assert a.dtype == dtype
        close(a, b, tolerance)


def test_autocast_gives_the_autocast_dtype_and_float32_gradients():
    x, kernels, biases, weights = case(2, 4, 1, 1, 9, 9, [(3, 1), (5, 1)], True, dtype=torch.float32)
    expected = mixture_conv2d(x, kernels, biases, weights, groups=4, backend="branches")
    with torch.autocast("cpu", torch.bfloat16):
        y = mixture_conv2d(x, kernels, biases, weights, groups=4, backend="merged")
        again = mixture_conv2d(x.bfloat16(), kernels, biases, weights, groups=4, backend="merged")
        with pytest.raises(TypeError, match="uint8"):
            mixture_conv2d(x.byte(), kernels, biases, weights, groups=4)
    close(again, expected, BFLOAT16)
    assert y.dtype == torch.bfloat16
    close(y, expected, BFLOAT16)
    y.float().sum().backward()
    assert kernels[0].grad.dtype == torch.float32


@pytest.mark.parametrize("backend", ["merged", "branches"])
@pytest.mark.parametrize("experts", [[(3, 1), (3, 2), (7, 1)], [(3, 4), (5, 2), (3, 6)], [(5, 3), (5, 3)]])
def test_a_bank_is_the_mixture_of_its_experts(backend, experts):
    x, kernels, biases, weights = case(3, 2, 2, 3, 9, 10, experts, True)
    dilations = [d for _, d in experts]
    bank = fold.kernel_bank(kernels, dilations)
    actual = bank_conv2d(x, bank, torch.stack(biases), weights, experts=experts, stride=2, groups=2, backend=backend)
    close(actual, oracle(x, kernels, biases, weights, 2, 2, dilations), FLOAT64)


def test_a_bank_that_does_not_fit_is_refused():
    bank, x = torch.zeros(2, 4, 1, 5, 5), torch.zeros(3, 4, 8, 8)
    for weights, experts, message in (
        (torch.zeros(3, 3), [(3, 1), (5, 1)], r"weights must be \(N, n\) = \(3, 2\)"),
        (torch.zeros(3, 2), [(3, 1)], "one number per expert"),
    ):
        with pytest.raises(ValueError, match=message):
            bank_conv2d(x, bank, None, weights, experts=experts, groups=4)


def test_vmap_sees_through():
    x, kernels, _, weights = case(2, 3, 1, 1, 6, 6, [(3, 1), (5, 1)], False)
    stack = torch.stack([x, 2 * x])
    ys = torch.func.vmap(lambda x: mixture_conv2d(x, kernels, None, weights, groups=3))(stack)
    close(ys[1], mixture_conv2d(2 * x, kernels, None, weights, groups=3), FLOAT64)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float64])
@pytest.mark.parametrize("backend", ["auto", "branches"])
def test_an_input_of_another_dtype_is_refused(dtype, backend):
    kernels = [torch.zeros(4, 1, 3, 3), torch.zeros(4, 1, 5, 5)]
    with pytest.raises(TypeError, match=f"x is {dtype} and the kernels are torch.float32"):
        mixture_conv2d(torch.zeros(2, 4, 8, 8).to(dtype), kernels, None, torch.zeros(2, 2), groups=4, backend=backend)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 8, 8)}, r"x must be \(N, C, H, W\); got shape \(3, 8, 8\)"),
        ({"kernels": []}, "kernels is empty"),
        ({"weights": torch.zeros(2, 3)}, r"weights must be \(N, n\) = \(2, 2\).*got shape \(2, 3\)"),
        ({"biases": [torch.zeros(4)]}, r"one tensor per expert \(2\)"),
        ({"kernels": [torch.zeros(4, 1, 2, 2)] * 2}, "K odd"),
        ({"kernels": [torch.zeros(4, 2, 3, 3)] * 2}, "does not fit 4 input channels"),
        ({"dilations": (1,)}, "one number per expert"),
        ({"backend": "merge"}, "Did you mean 'merged'"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {
        "x": torch.zeros(2, 4, 8, 8),
        "kernels": [torch.zeros(4, 1, 3, 3), torch.zeros(4, 1, 5, 5)],
        "biases": None,
        "weights": torch.zeros(2, 2),
        "groups": 4,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        mixture_conv2d(**arguments)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_many_experts(dtype, sparse):
    experts = [(k, d) for k in (3, 5, 7, 9, 11) for d in (1, 2)] * 7
    x, kernels, biases, weights = case(3, 5, 1, 1, 9, 8, experts[:64], True, dtype=dtype, zeros=sparse)
    dilations, tolerance = [d for _, d in experts[:64]], FLOAT64 if dtype == torch.float64 else FLOAT32
    wide = [[t.detach().double().requires_grad_() for t in group] for group in ([x], kernels, biases, [weights])]
    inputs = (wide[0][0], wide[1], wide[2], wide[3][0])
    expected = oracle(*inputs, 1, 5, dilations)
    actual = mixture_conv2d(x, kernels, biases, weights, groups=5, dilations=dilations, sparse=sparse)
    close(actual, expected, tolerance)
    *grads, of_weights = gradients(actual, x, kernels, biases, weights)
    *expected_grads, expected_of_weights = gradients(expected, *inputs)
    for a, b in zip(grads, expected_grads, strict=True):
        close(a, b, tolerance)
    chosen = weights != 0 if sparse else torch.ones_like(weights, dtype=torch.bool)
    close(of_weights[chosen], expected_of_weights[chosen], tolerance)


@pytest.mark.parametrize("sizes", [(3, 7, 15), (5, 31), (31, 3, 15)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [3, 40])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kernels_of_every_sample_that_are_larger_than_the_map(dtype, stride, channels, layout, sizes):
    inputs = case(3, channels, 1, 1, 9, 11, [(k, 1) for k in sizes], True)
    expected = oracle(*inputs, stride, channels, (1,) * len(sizes))
    expected_grads = gradients(expected, *inputs)
    x, kernels, biases, weights = inputs
    x = x.detach().to(dtype).contiguous(memory_format=layout).requires_grad_()
    kernels, biases = ([t.detach().to(dtype).requires_grad_() for t in group] for group in (kernels, biases))
    weights = weights.detach().to(dtype).requires_grad_()
    actual = mixture_conv2d(x, kernels, biases, weights, stride=stride, groups=channels, backend="merged")
    tolerance = FLOAT64 if dtype == torch.float64 else FLOAT32
    assert actual.is_contiguous(memory_format=layout)
    close(actual, expected, tolerance)
    for a, b in zip(gradients(actual, x, kernels, biases, weights), expected_grads, strict=True):
        close(a, b, tolerance)


class Convolutions(TorchDispatchMode):
    """Record the dtypes of dense convolutions."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "convolution" in str(func):
            self.dtypes.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("within", [False, True], ids=["bf16", "autocast"])
def test_grouped_convolutions_in_sixteen_bits_are_computed_in_thirty_two_on_cpus(within, layout):
    """Otherwise PyTorch loops over groups."""
    x, kernels, biases, weights = case(3, 2, 2, 3, 9, 8, [(3, 1), (5, 1)], True, dtype=torch.float32)
    expected = oracle(x.double(), [k.double() for k in kernels], [b.double() for b in biases], weights, 1, 2, (1, 1))
    x = x.detach().contiguous(memory_format=layout)
    if not within:
        x, weights = x.bfloat16(), weights.bfloat16()
        kernels, biases = [k.bfloat16() for k in kernels], [b.bfloat16() for b in biases]
    with Convolutions() as seen, torch.autocast("cpu", torch.bfloat16, enabled=within):
        y = mixture_conv2d(x, kernels, biases, weights, groups=2, backend="merged")
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=layout)
    close(y, expected, BFLOAT16)
    assert seen.dtypes == {torch.float32}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("per", [1, 2])
def test_gradients_of_every_sample_in_any_layout(per, layout):
    x, kernels, _, weights = case(3, 2, per, per, 6, 7, [(3, 1), (5, 1)], False, dtype=torch.float32)
    x, weights = x.detach().contiguous(memory_format=layout), weights.detach()

    def loss(kernel, sample, a):
        mixed = mixture_conv2d(sample[None], [kernel, kernels[1].detach()], None, a[None], groups=2, backend="merged")
        return mixed.square().sum()

    kernel = kernels[0].detach()
    actual = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(kernel, x, weights)
    for i in range(3):
        close(actual[i], torch.func.grad(loss)(kernel, x[i], weights[i]), FLOAT32)


def test_an_explanation_of_a_mixture():
    x, kernels, biases, weights = case(3, 4, 1, 1, 14, 14, [(3, 1), (15, 1)], True, dtype=torch.float32)
    explanation = explain(mixture_conv2d, x, kernels, biases, weights, groups=4)
    assert [choice.step for choice in explanation.choices] == ["mixture", "forward", "input_grad", "weight_grad"]
    assert explanation["mixture"].backend == "merged"
    assert "depthwise" in explanation["mixture"].reason
    assert explanation["mixture"].others["branches"] == "it could, but is not the fastest here"
    assert "kernels per sample" in explanation["forward"].reason
    bank = explain(
        bank_conv2d, x, fold.kernel_bank(kernels, (1, 1)), torch.stack(biases), weights,
        experts=[(3, 1), (15, 1)], groups=4,
    )  # fmt: skip
    assert bank.choices == explanation.choices
    one = explain(mixture_conv2d, x, kernels[1:], None, weights[:, 1:], groups=4)
    assert (one["mixture"].backend, one["mixture"].reason) == ("branches", "there is one expert: nothing to merge")
    asked = explain(mixture_conv2d, x, kernels, biases, weights, groups=4, backend="branches")
    assert asked["mixture"].backend == "branches"
    assert asked["mixture"].reason == "asked for"
    with pytest.raises(ValueError, match="Did you mean 'merged'"):
        explain(mixture_conv2d, x, kernels, biases, weights, groups=4, backend="merge")


class Passes(TorchDispatchMode):
    """Record the number of samples and the kernel size of depthwise convolutions."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.widefield.depthwise.default:
            self.seen.append((args[0].shape[0], args[1].shape[-1]))
        return func(*args, **(kwargs or {}))


SPARSE = {
    "sorted": ([[1.0, 0, 0], [0, 0, 1.0], [0.5, 0.5, 0]], "sorted", [(1, 3), (1, 5), (1, 15)]),
    "small experts only": ([[1.0, 0, 0], [0.2, 0.8, 0], [0.5, 0.5, 0]], "sorted", [(1, 3), (2, 5)]),
    "one bucket": ([[0.0, 0, 1.0]] * 3, "together", [(3, 15)]),
}


@pytest.mark.parametrize("name", SPARSE)
def test_the_explanation_of_a_sparse_call_is_what_runs(name):
    routing, grouping, expected = SPARSE[name]
    x, kernels, _, _ = case(3, 4, 1, 1, 40, 40, [(3, 1), (5, 1), (15, 1)], False, dtype=torch.float32)
    weights, bank = torch.tensor(routing), fold.kernel_bank(kernels, (1, 1, 1))
    experts = [(3, 1), (5, 1), (15, 1)]
    with sorting(is_free=True), torch.no_grad():
        explained = explain(mixture_conv2d, x, kernels, None, weights, groups=4, sparse=True)
        of_bank = explain(bank_conv2d, x, bank, None, weights, experts=experts, groups=4, sparse=True)
        with Passes() as passes:
            mixture_conv2d(x, kernels, None, weights, groups=4, sparse=True)
    assert explained.choices == of_bank.choices
    assert explained["samples"].backend == grouping
    assert sorted(passes.seen) == sorted(expected)
    if len(expected) > 1:
        steps = [f"forward {taps}x{taps}" for _, taps in expected]
        assert [c.step for c in explained.choices if c.step.startswith("forward")] == steps
        assert ", ".join(f"{count} with {taps}x{taps}" for count, taps in expected) in explained["samples"].reason
    dense = explain(mixture_conv2d, x, kernels, None, weights, groups=4)
    assert str(dense) != str(explained)
    with pytest.raises(KeyError):
        dense["samples"]


def test_an_explanation_tells_what_sorting_would_cost_and_where_values_are_hidden():
    x, kernels, _, _ = case(3, 4, 1, 1, 9, 9, [(3, 1), (5, 1)], False, dtype=torch.float32)
    weights = torch.tensor([[1.0, 0], [0, 1.0], [1.0, 0]])
    dear = explain(mixture_conv2d, x, kernels, None, weights, groups=4, sparse=True)["samples"]
    assert (dear.backend, dear.others["sorted"]) == ("together", "it would cost more than it saves")
    hidden = explain(mixture_conv2d, x, kernels, None, weights.to("meta"), groups=4, sparse=True)["samples"]
    assert (hidden.backend, hidden.reason) == ("together", "the routing weights have no values here")
    branches = explain(mixture_conv2d, x, kernels, None, weights, groups=4, sparse=True, backend="branches")
    assert branches["samples"].reason == "experts compute 2, 1 of 3 samples"


def test_an_explanation_of_a_mixture_that_is_not_depthwise_has_no_passes():
    x, kernels, biases, weights = case(3, 2, 2, 2, 14, 14, [(3, 1), (5, 1)], True, dtype=torch.float32)
    explanation = explain(mixture_conv2d, x, kernels, biases, weights, groups=2)
    assert [choice.step for choice in explanation.choices] == ["mixture"]
    assert "numbers per input channel" in str(explanation)


def test_an_explanation_of_a_mixture_knows_autocast():
    x, kernels, biases, weights = case(3, 4, 1, 1, 14, 14, [(3, 1), (15, 1)], True, dtype=torch.float32)
    with torch.autocast("cpu", torch.float16):
        explanation = explain(mixture_conv2d, x, kernels, biases, weights, groups=4)
    assert "no torch.float16 arithmetic" in explanation["forward"].reason


@pytest.mark.parametrize("side", [2, 9])
@pytest.mark.parametrize("per_in", [1, 2])
def test_many_experts_of_few_kinds_in_any_order(side, per_in):
    """With four experts of a kind, each kind is mixed separately; spans repeat, and some exceed the map."""
    experts = [(3, 2), (5, 1), (1, 1), (3, 3)] * 4
    x, kernels, biases, weights = case(2, 3, per_in, per_in, side, side, experts, True)
    dilations = [d for _, d in experts]
    expected = oracle(x, kernels, biases, weights, 1, 3, dilations)
    actual = mixture_conv2d(x, kernels, biases, weights, groups=3, dilations=dilations, backend="merged")
    inputs = (x, kernels, biases, weights)
    close(actual, expected, FLOAT64)
    for a, b in zip(gradients(actual, *inputs), gradients(expected, *inputs), strict=True):
        close(a, b, FLOAT64)
