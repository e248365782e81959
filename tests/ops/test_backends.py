"""Each backend against the reference, and the choice between them."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from layouts import LAYOUTS, lay_out
from tolerances import FLOAT32, OF_DTYPE, close
from widefield.ops import _aten, _backend, _fft, _limits, _onednn, _operators, depthwise, depthwise_conv2d, explain
from widefield.ops._limits import Limits
from widefield.ops._problem import (
    STEPS,
    Problem,
    fold,
    idle_taps,
    is_channels_last,
    memory_format,
    output_size,
    problem_of,
)

MODULES = {"aten": _aten, "onednn": _onednn, "fft": _fft}


def limits(changed):
    """Change the limits of the backends, so that small shapes reach every branch."""
    return mock.patch.object(_limits, "LIMITS", changed)


SMALL = Limits(cached=64, slab=64, few=1, each=1, at_once=1, pixels=1, transformed=1500, spectra=0.05)
BY_THREES = dataclasses.replace(SMALL, threes=1, threes_of_few=1)
AS_THEY_ARE = Limits()
WAYS = pytest.mark.parametrize(
    "changed", [AS_THEY_ARE, SMALL, BY_THREES], ids=["limits as they are", "small limits", "columns by threes"]
)


def geometry(size, kernel, stride=(1, 1), dilation=(1, 1), padding=(0, 0), batch=2, channels=3):
    return batch, channels, size, kernel, stride, dilation, padding


@st.composite
def geometries(draw):
    """Draw (batch, channels, size, kernel, stride, dilation, padding) with a non-empty output."""
    many = draw(st.booleans())
    channels = draw(st.sampled_from([17, 33, 37])) if many else draw(st.integers(1, 5))
    size, kernel, stride, dilation, padding = [], [], [], [], []
    plain = draw(st.booleans())
    for _ in range(2):
        s = draw(st.integers(1, 7 if many else 20))
        k = draw(st.integers(1, 17 if many else 33))
        d = 1 if plain else draw(st.integers(1, 3))
        least = max(0, -(-(d * (k - 1) + 1 - s) // 2))
        more = draw(st.integers(0, 3 if k > 7 else d * k + 1))  # also wider than the kernel
        size.append(s)
        kernel.append(k)
        dilation.append(d)
        stride.append(1 if plain else draw(st.integers(1, 3)))
        padding.append(least + more)
    pairs = (tuple(v) for v in (size, kernel, stride, dilation, padding))
    return (draw(st.integers(1, 2 if many else 3)), channels, *pairs)


NOTABLE = [
    geometry((20, 19), (51, 5), padding=(25, 2)),
    geometry((19, 20), (5, 51), padding=(2, 25)),
    geometry((7, 9), (33, 33), padding=(16, 16)),
    geometry((14, 14), (1, 14), padding=(0, 7)),
    geometry((1, 1), (1, 1)),
    geometry((1, 1), (1, 3), dilation=(1, 2), padding=(0, 3)),  # one tap remains, and padding beyond it
    geometry((5, 6), (1, 1), stride=(2, 3)),
    geometry((5, 6), (1, 1), padding=(1, 0)),
    geometry((6, 5), (3, 3), padding=(1, 1), batch=1),
    geometry((6, 5), (3, 3), padding=(5, 4)),
    geometry((3, 30), (2, 9), dilation=(1, 3), padding=(1, 12)),
    geometry((30, 3), (9, 2), dilation=(3, 2), padding=(13, 2)),
    geometry((17, 4), (7, 9), dilation=(2, 4), padding=(6, 15)),  # one column for each interleaved map
    geometry((16, 13), (9, 11), stride=(3, 2), padding=(4, 5)),
    geometry((2, 2), (5, 7), stride=(3, 3), padding=(9, 3)),
    geometry((12, 12), (31, 13), padding=(15, 6), channels=40),
    geometry((9, 8), (15, 15), padding=(7, 7), channels=37, batch=3),
    *(geometry((6, 15), (3, width), padding=(1, width // 2)) for width in range(10, 17)),
]


def with_notable_geometries(test):
    for notable in NOTABLE:
        test = example(notable)(test)
    return given(geometries())(test)


def tensors(case, per_sample, dtype, layout="contiguous"):
    batch, channels, size, kernel, stride, dilation, padding = case
    groups = batch if per_sample else 1
    x = lay_out(torch.randn(batch, channels, *size).to(dtype), layout)
    weight, bias = torch.randn(groups, channels, *kernel).to(dtype), torch.randn(groups, channels).to(dtype)
    out = output_size(size, kernel, stride, padding, dilation)
    return x, weight, bias, torch.randn(batch, channels, *out).to(dtype)


def oracle(x, weight, bias, grad, stride, padding, dilation):
    """Return output and gradients with respect to x and weight, in float64 and one sample at a time."""
    x, weight = x.detach().double().contiguous().requires_grad_(), weight.detach().double().requires_grad_()
    bias = None if bias is None else bias.detach().double()
    samples = []
    for i in range(len(x)):
        g = i if weight.shape[0] > 1 else 0
        kernel, b = weight[g].unsqueeze(1), None if bias is None else bias[g]
        samples.append(F.conv2d(x[i : i + 1], kernel, b, stride, padding, dilation, x.shape[1]))
    y = torch.cat(samples)
    return y.detach(), *torch.autograd.grad(y, [x, weight], grad.double())


def pytorch_reads_out_of_bounds(case, layout):
    """One channel, which oneDNN does not treat as depthwise, with channels_last strides and one output column."""
    _, channels, size, kernel, stride, _, _ = case
    return channels == 1 and layout != "contiguous" and stride[1] > 1 and kernel[1] > size[1]


def check_all_passes(name, case, per_sample, dtype, layout):
    if name != "fft" and pytorch_reads_out_of_bounds(case, layout):
        return  # see test_depthwise.py
    module, tolerance = MODULES[name], OF_DTYPE[dtype]
    x, weight, bias, grad = tensors(case, per_sample, dtype, layout)
    steps = case[4], case[6], case[5]
    kept = [t.clone() for t in (x, weight, bias, grad)]
    y, dx, dw = oracle(x, weight, bias, grad, *steps)
    given_grad = grad if "expanded" in layout else lay_out(grad, layout)
    ways = {
        "forward": (lambda: module.forward(x, weight, bias, *steps), y),
        "input_grad": (lambda: module.input_grad(given_grad, weight, tuple(x.shape), *steps), dx),
        "weight_grad": (lambda: module.weight_grad(given_grad, x, tuple(weight.shape), *steps), dw),
    }
    if name == "aten" and case[1] == 1 and case[3][0] > case[2][0]:  # PyTorch writes out of bounds: test_depthwise.py
        del ways["weight_grad"]
    for step, (run, expected) in ways.items():
        problem = problem_of(step, x, tuple(x.shape), tuple(weight.shape), *steps)
        if module.why_not(problem) is None:
            actual = run()
            assert actual.dtype == dtype
            close(actual, expected, tolerance)
    assert all(torch.equal(a, b) for a, b in zip((x, weight, bias, grad), kept, strict=True))


@WAYS
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize(("name", "dtype"), [("onednn", torch.float32), ("fft", torch.float32), ("fft", torch.float64)])
@settings(max_examples=40, deadline=None)
@with_notable_geometries
def test_all_three_passes_of_every_backend_equal_the_oracle(name, dtype, per_sample, changed, case):
    with limits(changed):
        for layout in ("contiguous", "channels_last"):
            check_all_passes(name, case, per_sample, dtype, layout)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("per_sample", [False, True])
@settings(max_examples=15, deadline=None)
@with_notable_geometries
def test_the_oracles_own_backend_folds_batches_and_layouts_right(per_sample, dtype, case):
    for layout in ("contiguous", "channels_last"):
        check_all_passes("aten", case, per_sample, dtype, layout)


@WAYS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", list(MODULES))
@settings(max_examples=10, deadline=None)
@given(case=geometries(), per_sample=st.booleans())
def test_any_layout_may_come_in(name, layout, changed, case, per_sample):
    with limits(changed):
        check_all_passes(name, case, per_sample, torch.float32, layout)


@pytest.mark.parametrize(
    ("name", "dtype"), [("onednn", torch.bfloat16), ("fft", torch.bfloat16), ("fft", torch.float16)]
)
@pytest.mark.parametrize("changed", [AS_THEY_ARE, BY_THREES], ids=["limits as they are", "columns by threes"])
@settings(max_examples=15, deadline=None)
@given(case=geometries(), per_sample=st.booleans(), layout=st.sampled_from(LAYOUTS))
def test_sixteen_bits(name, dtype, changed, case, per_sample, layout):
    with limits(changed):
        check_all_passes(name, case, per_sample, dtype, layout)


@pytest.mark.parametrize(("columns", "widths"), _onednn._WIDTHS.items())
def test_columns_are_divided_by_threes(columns, widths):
    assert sum(widths) == columns
    assert set(widths) <= {1, 2, 3}
    assert len(widths) == -(-columns // 3)


@pytest.mark.parametrize(
    ("batch", "channels", "size", "kernel"), [(4, 50, 24, (7, 7)), (4, 33, 30, (4, 5)), (5, 170, 11, (13, 9))]
)
def test_weight_gradients_of_many_numbers_go_by_threes(batch, channels, size, kernel):
    case = geometry((size, size), kernel, padding=(kernel[0] // 2, kernel[1] // 2), batch=batch, channels=channels)
    for layout, widest in (("channels_last", 3), ("contiguous", kernel[1])):
        x, weight, _, grad = tensors(case, False, torch.float32, layout)
        with WeightGradients() as gradients:
            module = MODULES["onednn"]
            module.weight_grad(grad, x, tuple(weight.shape), case[4], case[6], case[5])
        assert (max(gradients.columns, default=kernel[1])) == widest
        check_all_passes("onednn", case, False, torch.float32, layout)


class WeightGradients(TorchDispatchMode):
    """Record the columns of the kernels for which PyTorch computes gradients."""

    def __init__(self):
        super().__init__()
        self.columns = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.columns.append(args[2].shape[-1])
        return func(*args, **(kwargs or {}))


def forget_choices():
    depthwise._calls.clear()
    for ways in _operators.ways_of.values():
        ways.clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@settings(max_examples=25, deadline=None)
@given(case=geometries().filter(lambda case: case[1] > 1), channels_last=st.booleans())
def test_without_arithmetic_of_its_own_a_cpu_computes_in_32_bits(dtype, case, channels_last):
    """Every pass equals the rounded float32 call, bit by bit."""
    x, weight, bias, grad = tensors(case, False, dtype, "channels_last" if channels_last else "contiguous")
    options = {"stride": case[4], "dilation": case[5], "padding": case[6]}
    inputs = [x, weight.transpose(0, 1).contiguous(), bias[0]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_backend, "computes_in", lambda d: d == torch.float32)
        forget_choices()
        results = []
        for wide in (False, True):
            leaves = [(t.float() if wide else t).requires_grad_() for t in (t.clone() for t in inputs)]
            y = depthwise_conv2d(*leaves, **options)
            results.append([y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))])
    forget_choices()
    (y, dx, dw, _), wide = results[0], results[1]
    assert all(torch.equal(a, b.to(dtype)) for a, b in zip((y, dx, dw), wide, strict=False))


WIDE_AND_FEW = """
import torch, torch.nn.functional as F
from widefield.ops import depthwise_conv2d
for channels in (2, 16, 40):
    for layout in (torch.contiguous_format, torch.channels_last):
        for width in (12, 15):
            x = torch.randn(1, channels, 8, 40).bfloat16().contiguous(memory_format=layout)
            weight = torch.randn(channels, 1, 15, width).bfloat16()
            y = depthwise_conv2d(x, weight, padding=(7, 7))
            expected = F.conv2d(x.double(), weight.double(), padding=(7, 7), groups=channels)
            assert (y - expected).abs().max() <= 0.03 * expected.abs().max()
            assert y.is_contiguous(memory_format=layout)
"""


def test_kernels_that_pytorch_never_returns_from():
    """PyTorch (2.14) hangs for bfloat16, channels_last, 2 to 16 channels, 15 columns and maps of 31 and more.

    It does so on CPUs with bfloat16 arithmetic. A separate process can be stopped.
    """
    subprocess.run([sys.executable, "-c", WIDE_AND_FEW], check=True, timeout=120)
    x = torch.zeros(1, 16, 40, 40, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    if _onednn.computes_in(torch.bfloat16):
        found = explain(depthwise_conv2d, x, torch.zeros(16, 1, 15, 15, dtype=torch.bfloat16))["forward"]
        assert found.backend == "onednn"
        assert "never returns" in found.reason


@pytest.mark.parametrize("name", list(MODULES))
@pytest.mark.parametrize("per_sample", [False, True])
def test_results_depend_on_the_number_of_threads_by_rounding_only(name, per_sample):
    before = torch.get_num_threads()
    try:
        for case in NOTABLE:
            x, weight, bias, grad = tensors(case, per_sample, torch.float32)
            steps, results = (case[4], case[6], case[5]), []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                passes = {
                    "forward": (MODULES[name].forward, (x, weight, bias)),
                    "input_grad": (MODULES[name].input_grad, (grad, weight, tuple(x.shape))),
                    "weight_grad": (MODULES[name].weight_grad, (grad, x, tuple(weight.shape))),
                }
                results.append([])
                for step, (run, args) in passes.items():
                    problem = problem_of(step, x, tuple(x.shape), tuple(weight.shape), *steps)
                    if MODULES[name].why_not(problem) is None:
                        results[-1].append(run(*args, *steps))
            for one, two in zip(*results, strict=True):
                close(one, two, FLOAT32)
    finally:
        torch.set_num_threads(before)


@settings(max_examples=300, deadline=None)
@given(geometries())
def test_idle_taps_never_meet_the_map_and_no_more_could_be_cut(case):
    _, _, size, kernel, stride, dilation, padding = case
    cuts = idle_taps(size, kernel, stride, padding, dilation)
    out = output_size(size, kernel, stride, padding, dilation)
    for n, k, s, d, p, rows, cut in zip(size, kernel, stride, dilation, padding, out, cuts, strict=True):
        meets = [any(0 <= s * i + d * tap - p < n for i in range(rows)) for tap in range(k)]
        assert not any(meets[:cut])
        assert not any(meets[k - cut :])
        assert p - d * cut >= 0
        assert k - 2 * cut >= 1
        if s == 1:  # a stride may skip a small map, which idle_taps does not detect
            stuck = p < d * (cut + 1) or k < 2 * cut + 3
            assert stuck or meets[cut] or meets[k - 1 - cut]


@given(geometries())
def test_output_sizes_are_those_of_conv2d(case):
    batch, channels, size, kernel, stride, dilation, padding = case
    x, weight = torch.empty(batch, channels, *size, device="meta"), torch.empty(channels, 1, *kernel, device="meta")
    y = F.conv2d(x, weight, None, stride, padding, dilation, channels)
    assert output_size(size, kernel, stride, padding, dilation) == tuple(y.shape[2:])


def test_layouts_are_told_apart_by_strides():
    x = torch.randn(2, 3, 4, 5)
    assert [is_channels_last(lay_out(x, layout)) for layout in LAYOUTS] == [False, True, True, False, False, False]
    assert not is_channels_last(torch.randn(2, 1, 4, 5).contiguous(memory_format=torch.channels_last))
    assert not is_channels_last(torch.randn(2, 3, 1, 1).contiguous(memory_format=torch.channels_last))
    assert memory_format(True) == torch.channels_last
    assert memory_format(False) == torch.contiguous_format
    assert fold(x).shape == (1, 6, 4, 5)


# why_not, check and choose


def problem(step="forward", **changed):
    plain = Problem(
        step, 2, 8, 14, 14, (7, 7), (1, 1), (3, 3), (1, 1), False, torch.float32, torch.device("cpu"), False
    )  # fmt: skip
    return plain._replace(**changed)


@pytest.mark.parametrize(
    ("backend", "posed", "reason"),
    [
        ("onednn", problem(dtype=torch.float64), "does not compute in torch.float64"),
        ("onednn", problem(device=torch.device("cuda")), "on CPUs, not on cuda"),
        ("onednn", problem("input_grad", stride=(2, 1)), r"stride \(2, 1\)"),
        ("onednn", problem("input_grad", padding=(7, 0)), "wider than the kernel"),
        ("onednn", problem("weight_grad", stride=(1, 2), dilation=(2, 1)), "interleave"),
        ("fft", problem(stride=(2, 2)), "do not support stride or dilation"),
        ("fft", problem("weight_grad", dilation=(1, 2)), "do not support stride or dilation"),
    ],
)
def test_a_backend_says_what_it_cannot_do(backend, posed, reason):
    with pytest.raises(
        ValueError, match=f"backend='{backend}' cannot compute the {posed.step}.*{reason}.*'auto' takes"
    ):
        _backend.check(backend, posed)
    _backend.check("auto", posed)
    _backend.check("aten", posed)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_spectra_are_of_real_floating_point_numbers(dtype):
    assert _fft.why_not(problem(dtype=dtype)) is not None


def test_triton_backends_say_that_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for backend in ("direct", "gemm"):
        assert "triton is not installed" in _backend.why_not(backend, problem()) or "no CUDA device" in (
            _backend.why_not(backend, problem())
        )


@pytest.mark.parametrize("changed", [AS_THEY_ARE, SMALL], ids=["limits as they are", "small limits"])
@settings(max_examples=200, deadline=None)
@given(
    case=geometries(),
    step=st.sampled_from(STEPS),
    per_sample=st.booleans(),
    channels_last=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    larger=st.integers(0, 60),
)
def test_auto_takes_what_can_compute_it_and_says_why(changed, case, step, per_sample, channels_last, dtype, larger):
    batch, channels, (height, width), kernel, stride, dilation, padding = case
    posed = Problem(
        step, batch, channels, height + larger, width + larger, kernel, stride, padding, dilation,
        per_sample, dtype, torch.device("cpu"), channels_last,
    )  # fmt: skip
    with limits(changed):
        name, reason = _backend.choose(posed)
        assert name in ("aten", "onednn", "fft")
        assert _backend.why_not(name, posed) is None
        assert reason
        assert _backend.choose(posed) == (name, reason)
        assert _backend.is_stock([posed]) == (name == "aten" and not _backend.widens("auto", posed))


def test_the_measured_table():
    """Some rows of benchmarks/results/depthwise_cpu.md."""

    def stage(**changed):
        third = {"batch": 8, "channels": 384, "height": 14, "width": 14, "kernel": (7, 7), "padding": (3, 3)}
        return problem("input_grad", **{**third, **changed})

    table = {
        problem(kernel=(31, 31), padding=(15, 15)): "onednn",
        problem(kernel=(7, 7)): "aten",
        problem("weight_grad", batch=16, kernel=(7, 7)): "onednn",
        problem("weight_grad", batch=1, kernel=(7, 7)): "aten",
        problem("weight_grad", kernel=(3, 3), padding=(1, 1)): "aten",
        problem("weight_grad", batch=8, kernel=(5, 2), padding=(2, 1)): "aten",
        problem("weight_grad", batch=8, kernel=(5, 2), padding=(2, 2)): "onednn",
        problem("weight_grad", batch=8, channels=48, kernel=(3, 3), padding=(2, 2), channels_last=True): "onednn",
        problem(kernel=(9, 9), padding=(8, 8), dilation=(2, 2), stride=(2, 2), channels_last=True): "aten",
        problem("weight_grad", batch=8, kernel=(1, 11), padding=(0, 5), channels_last=True): "aten",
        problem("weight_grad", batch=8, kernel=(1, 11), padding=(0, 5)): "onednn",
        problem("weight_grad", batch=8, channels=384, kernel=(5, 5), padding=(2, 2), stride=(3, 3)): "aten",
        problem("weight_grad", batch=8, channels=384, kernel=(9, 9), padding=(4, 4), stride=(2, 2)): "onednn",
        problem("input_grad", batch=8, channels=384, kernel=(1, 21), padding=(0, 10)): "aten",
        problem("input_grad", dilation=(2, 2)): "onednn",
        problem("input_grad", stride=(2, 2)): "aten",
        stage(): "aten",
        stage(kernel=(9, 9), padding=(4, 4)): "onednn",
        stage(channels_last=True): "onednn",
        stage(channels_last=True, batch=1): "aten",
        stage(channels_last=True, height=56, width=56): "aten",
        stage(channels_last=True, dtype=torch.bfloat16): "aten" if _onednn.computes_in(torch.bfloat16) else "onednn",
        stage(channels_last=True, kernel=(3, 3), padding=(1, 1)): "aten",
        stage(channels_last=True, height=28, width=28, kernel=(11, 11), padding=(5, 5)): "aten",
        problem(height=64, width=64, kernel=(31, 31), padding=(15, 15)): "fft",
        problem(dtype=torch.float16, kernel=(31, 31)): "onednn",
        problem(dtype=torch.float64, kernel=(31, 31)): "aten",
        problem(device=torch.device("meta")): "aten",
    }
    assert {posed: _backend.choose(posed)[0] for posed in table} == table


def test_a_name_is_one_of_the_backends():
    assert _backend.names("gemm") == "gemm"
    with pytest.raises(ValueError, match=r"backend must be one of 'auto', 'aten'.*got 'onedn'.*Did you mean 'onednn'"):
        _backend.names("onedn")
    with pytest.raises(ValueError, match="got None"):
        _backend.names(None)


# explain


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@settings(max_examples=25, deadline=None)
@example(geometry((7, 7), (7, 7)), True)  # one output pixel, whose strides do not determine the layout
@example(geometry((1, 10), (1, 10)), True)
@given(case=geometries().filter(lambda case: case[1] > 1 or case[3][0] <= case[2][0]), channels_last=st.booleans())
def test_what_is_explained_is_what_runs(dtype, case, channels_last):
    x, weight, _, _ = tensors(case, False, dtype, "channels_last" if channels_last else "contiguous")
    options = {"stride": case[4], "dilation": case[5], "padding": case[6]}
    kernel = weight.transpose(0, 1).contiguous().requires_grad_()
    explained = [choice.backend for choice in explain(depthwise_conv2d, x, kernel, **options).choices]
    ran = []

    def watch(frame, event, _):
        file, name = Path(frame.f_code.co_filename), frame.f_code.co_name
        if event == "call" and name in STEPS and file.stem.removeprefix("_") in MODULES:
            ran.append((name, file.stem.removeprefix("_"), frame.f_back.f_code.co_filename))

    sys.setprofile(watch)
    try:
        depthwise_conv2d(x.requires_grad_(), kernel, **options).sum().backward()
    finally:
        sys.setprofile(None)
    called = [(step, backend) for step, backend, caller in ran if Path(caller).stem == "_operators"]
    if called:
        assert sorted(called) == sorted(zip(STEPS, explained, strict=True))
    else:  # F.conv2d itself
        assert explained == ["aten"] * 3
