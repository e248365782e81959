"""The public function keeps the contract of F.conv2d, for every backend, layout, dtype and mode."""

import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from layouts import LAYOUTS, lay_out
from tolerances import BFLOAT16, FLOAT32, FLOAT64, OF_DTYPE, close
from widefield.ops import depthwise_conv2d
from widefield.ops._problem import is_channels_last

ON_CPU = ("auto", "aten", "onednn", "fft")


def pair(value):
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def oracle(x, weight, bias, stride, padding, dilation, dtype=torch.float64):
    """Compute F.conv2d in float64, with explicit padding if "same" pads one side more than the other."""
    x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if padding == "valid":
        padding = 0
    elif padding == "same":
        rows, columns = (d * (k - 1) for d, k in zip(pair(dilation), weight.shape[2:], strict=True))
        x, padding = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)), 0
    return F.conv2d(x, weight, bias, stride, padding, dilation, x.shape[1])


def able(backend, dtype, size, kernel, stride, padding, dilation):
    """Return whether the documentation excludes this call for a named backend."""
    stride, dilation = pair(stride), pair(dilation)
    extent = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    if backend == "onednn":
        wide = not isinstance(padding, str) and any(p >= e for p, e in zip(pair(padding), extent, strict=True))
        return dtype != torch.float64 and stride == (1, 1) and not wide
    if backend == "fft":
        return stride == dilation == (1, 1)
    return True


def pytorch_writes_out_of_bounds(channels, size, kernel):
    """The weight gradient of one channel, which oneDNN does not treat as depthwise, in 32 bits and for tall kernels."""
    return channels == 1 and kernel[0] > size[0]


def pytorch_reads_out_of_bounds(channels, size, kernel, options, layout):
    """One channel with channels_last strides and one output column."""
    narrow = kernel[1] > size[1] and pair(options["stride"])[1] > 1
    return channels == 1 and layout not in ("contiguous", "channels_last") and narrow


def same_layout(y, x):
    if x.shape[1] == 1 or x.shape[2] * x.shape[3] == 1:
        return True  # both at once
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return y.is_contiguous(memory_format=layout)


@st.composite
def calls(draw):
    """Draw (batch, channels, size, kernel, options)."""
    size = draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
    kernel = draw(
        st.one_of(
            st.tuples(st.integers(1, 33), st.integers(1, 33)),
            st.tuples(st.integers(1, 5), st.integers(1, 5)),
            st.sampled_from([(51, 5), (5, 51), (13, 13), (12, 12)]),
        )
    )
    dilation = draw(st.sampled_from([1, 1, 1, 2, (1, 3), [3, 2]]))
    if draw(st.booleans()):
        stride, padding = draw(st.sampled_from([1, (1, 1)])), "same"
    else:
        stride = draw(st.sampled_from([1, 1, 1, 2, 3, (1, 2), [3, 1]]))
        least = [max(0, -(-(d * (k - 1) + 1 - n) // 2)) for d, k, n in zip(pair(dilation), kernel, size, strict=True)]
        more = [draw(st.integers(0, 3 if k > 7 else d * k + 1)) for d, k in zip(pair(dilation), kernel, strict=True)]
        padding = tuple(a + b for a, b in zip(least, more, strict=True))
        form = draw(st.sampled_from(["pair", "list", "number", "valid"]))
        if form == "list":
            padding = list(padding)
        elif form == "number":
            padding = max(padding)
        elif form == "valid" and least == [0, 0]:
            padding = "valid"
    return (
        draw(st.integers(0, 3)),
        draw(st.integers(1, 5)),
        size,
        kernel,
        {"stride": stride, "padding": padding, "dilation": dilation},
    )


def check_call(call, backend, dtype, layout, with_bias):
    batch, channels, size, kernel, options = call
    if backend in ("auto", "aten") and pytorch_writes_out_of_bounds(channels, size, kernel):
        return  # a separate test checks this
    if backend in ("auto", "aten") and pytorch_reads_out_of_bounds(channels, size, kernel, options, layout):
        return  # likewise
    x = lay_out(torch.randn(batch, channels, *size).to(dtype), layout).requires_grad_()
    weight = torch.randn(channels, 1, *kernel).to(dtype).requires_grad_()
    bias = torch.randn(channels).to(dtype).requires_grad_() if with_bias else None
    inputs = [t for t in (x, weight, bias) if t is not None]
    kept = [t.detach().clone() for t in inputs]
    if not able(backend, dtype, size, kernel, **options):
        with pytest.raises(ValueError, match=f"backend='{backend}' cannot compute the .*: .*backend='auto' takes"):
            depthwise_conv2d(x, weight, bias, backend=backend, **options)
        return
    y = depthwise_conv2d(x, weight, bias, backend=backend, **options)
    # On CPUs without 16-bit arithmetic PyTorch accumulates in 16 bits, so only equality with PyTorch is required.
    own = backend == "aten" and dtype == torch.float16
    expected = oracle(x, weight, bias, **options, dtype=dtype if own else torch.float64)
    assert y.dtype == dtype
    assert same_layout(y, x) or not y.numel()
    close(y, expected, OF_DTYPE[dtype])
    grad = torch.randn(expected.shape).to(dtype)
    actual = torch.autograd.grad(y, inputs, grad)
    for a, b in zip(actual, torch.autograd.grad(expected, inputs, grad.to(expected.dtype)), strict=True):
        assert a.dtype == dtype
        close(a, b, OF_DTYPE[dtype])
    assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("backend", ON_CPU)
@settings(max_examples=40, deadline=None)
@given(call=calls(), bias=st.booleans())
def test_outputs_and_all_gradients_equal_conv2d(backend, layout, call, bias):
    check_call(call, backend, torch.float32, layout, bias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ON_CPU)
@settings(max_examples=15, deadline=None)
@given(call=calls(), bias=st.booleans(), layout=st.sampled_from(["contiguous", "channels_last"]))
def test_every_dtype(backend, dtype, call, bias, layout):
    check_call(call, backend, dtype, layout, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_a_bias_is_rounded_once(dtype):
    """The sums of the two samples, 2401 and -2400, are the same number in 16 bits."""
    x, weight = torch.randn(2, 3, 49, 49, dtype=dtype), torch.randn(3, 1, 15, 15, dtype=dtype)
    bias = torch.zeros(3, dtype=dtype, requires_grad=True)
    grad = torch.ones(2, 3, 49, 49, dtype=dtype)
    grad[1] = -1
    grad[1, :, 0, 0] = 0
    (actual,) = torch.autograd.grad(depthwise_conv2d(x, weight, bias), bias, grad)
    assert actual.tolist() == [1, 1, 1]


@pytest.mark.parametrize("layout", LAYOUTS[2:])
@settings(max_examples=30, deadline=None)
@given(call=calls(), backend=st.sampled_from(ON_CPU))
def test_inputs_that_are_views(layout, call, backend):
    check_call(call, backend, torch.float32, layout, True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("kernel", [(7, 7), (51, 5), (5, 51)])
def test_more_channels_than_are_taken_at_a_time(kernel, backend, layout):
    check_call((2, 70, (22, 21), kernel, {"stride": 1, "padding": "same", "dilation": 1}), backend, torch.float32,
               layout, True)  # fmt: skip


@pytest.mark.parametrize("backend", ON_CPU)
def test_the_kernels_that_leave_the_cache(backend):
    """31x31 for 160 channels are 153,760 taps, so channels are computed in groups with the default limits."""
    x, weight = torch.randn(1, 160, 20, 20), torch.randn(160, 1, 31, 31)
    for seen in (x, lay_out(x, "channels_last")):
        y = depthwise_conv2d(seen, weight, backend=backend)
        assert same_layout(y, seen)
        close(y, oracle(lay_out(x, "channels_last"), weight, None, 1, "same", 1), FLOAT32)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_large_kernels_on_large_maps(backend, layout):
    """Draw sizes for which auto uses spectra, with few channels, because the reference is slow."""
    check_call((2, 3, (50, 49), (27, 29), {"stride": 1, "padding": "same", "dilation": 1}), backend, torch.float32,
               layout, True)  # fmt: skip


@given(
    kernel=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    backend=st.sampled_from(["auto", "aten"]),
)
def test_same_pads_as_conv2d_does(kernel, dilation, backend):
    x, weight = torch.randn(1, 2, 6, 5, dtype=torch.double), torch.randn(2, 1, *kernel, dtype=torch.double)
    y = depthwise_conv2d(x, weight, dilation=dilation, backend=backend)
    assert y.shape == x.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning about copies for even kernels
        close(y, F.conv2d(x, weight, padding="same", dilation=dilation, groups=2), FLOAT64)


TALL = """
import torch
from widefield.ops import depthwise_conv2d

torch.set_num_threads(1)
for rows, columns, tall, wide in (
    (17, 13, 38, 1), (15, 9, 47, 1), (17, 6, 43, 3), (17, 8, 32, 3), (17, 1, 33, 1), (14, 15, 27, 1), (11, 6, 20, 1),
):
    size, kernel = (rows, columns), (tall, wide)
    for _ in range(5):
        x = torch.randn(2, 1, *size).contiguous(memory_format=torch.{layout})
        weight = torch.randn(1, 1, *kernel).requires_grad_()
        y = depthwise_conv2d(x, weight, padding=((tall - 1) // 2, wide // 2))
        grad = torch.randn(y.shape)
        actual, = torch.autograd.grad(y, weight, grad)
        exact = weight.detach().double().requires_grad_()
        expected, = torch.autograd.grad(
            depthwise_conv2d(x.double(), exact, padding=((tall - 1) // 2, wide // 2)), exact, grad.double()
        )
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
"""


@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
def test_kernels_that_tower_over_the_map_of_one_channel(layout):
    """PyTorch's own weight gradient writes out of bounds there (2.14, CPU), so this runs in a separate process."""
    done = subprocess.run([sys.executable, "-c", TALL.format(layout=layout)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


@pytest.mark.parametrize("layout", LAYOUTS[2:4])
@pytest.mark.parametrize(
    ("size", "kernel"), [((2, 1), (4, 3)), ((11, 1), (9, 7)), ((4, 2), (10, 11)), ((2, 13), (1, 14))]
)
def test_kernels_wider_than_the_map_of_one_channel_with_a_stride(size, kernel, layout):
    """PyTorch's own forward reads out of bounds in channels_last strides (2.14, CPU): numbers around 1e30."""
    padding = (kernel[0] // 2, (kernel[1] - size[1] + 1) // 2)
    weight = torch.randn(1, 1, *kernel)
    for _ in range(10):
        x = lay_out(torch.randn(2, 1, *size), layout)
        y = depthwise_conv2d(x, weight, stride=(1, 2), padding=padding)
        close(y, oracle(x, weight, None, (1, 2), padding, 1), FLOAT32)


@pytest.mark.parametrize(
    ("size", "kernel", "padding"), [((9, 1), (2, 7), (0, 6)), ((9, 1), (3, 2), (1, 2)), ((5, 1), (3, 3), (1, 1))]
)
def test_weight_gradients_of_maps_narrower_than_the_stride_in_16_bits(size, kernel, padding):
    """PyTorch's own reads out of bounds in channels_last (2.14, CPUs that multiply in bfloat16): freed memory."""
    for _ in range(20):
        x = lay_out(torch.randn(5, 16, *size).bfloat16(), "channels_last")
        weight = torch.randn(16, 1, *kernel).bfloat16().requires_grad_()
        y = depthwise_conv2d(x, weight, stride=(1, 2), padding=padding)
        exact = weight.detach().double().requires_grad_()
        grad = torch.randn_like(y)
        (expected,) = torch.autograd.grad(
            F.conv2d(x.double(), exact, None, (1, 2), padding, groups=16), exact, grad.double()
        )
        freed = [torch.full((count,), float("nan")) for count in (8, 16, 64, 256, 1024)]
        del freed
        (actual,) = torch.autograd.grad(y, weight, grad)
        close(actual, expected, OF_DTYPE[torch.bfloat16])


@pytest.mark.parametrize("backend", ["auto", "onednn", "fft"])
@pytest.mark.parametrize("size", [3, 7, 15])
def test_gradients_keep_the_layout_where_the_output_is_one_pixel(size, backend):
    """The strides of one pixel do not determine the layout, but those of x do."""
    x = lay_out(torch.randn(2, 3, size, size), "channels_last").requires_grad_()
    weight = torch.randn(3, 1, size, size)
    depthwise_conv2d(x, weight, padding="valid", backend=backend).sum().backward()
    assert same_layout(x.grad, x)
    close(x.grad, weight[None, :, 0].expand_as(x).double(), FLOAT32)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_a_gradient_of_one_input_alone(backend, wanted):
    inputs = {"x": torch.randn(2, 3, 9, 8), "weight": torch.randn(3, 1, 15, 15), "bias": torch.randn(3)}
    expected = {k: v.double() for k, v in inputs.items()}
    inputs[wanted].requires_grad_()
    expected[wanted].requires_grad_()
    depthwise_conv2d(**inputs, backend=backend).square().sum().backward()
    oracle(**expected, stride=1, padding="same", dilation=1).square().sum().backward()
    close(inputs[wanted].grad, expected[wanted].grad, FLOAT32)


@pytest.mark.parametrize("backend", ["auto", "onednn", "fft"])
def test_no_gradient_without_need(backend):
    x, weight = torch.randn(2, 3, 9, 8), torch.randn(3, 1, 15, 15).requires_grad_()
    with torch.no_grad():
        assert not depthwise_conv2d(x, weight, backend=backend).requires_grad
    with torch.inference_mode():
        y = depthwise_conv2d(x, weight, backend=backend)
    close(y, oracle(x, weight, None, 1, "same", 1), FLOAT32)


def test_a_channels_last_weight_does_not_change_the_layout_of_the_output():
    """module.to(memory_format=channels_last) converts parameters, independently of the layout of images."""
    for size in (1, 3, 5, 7, 15):
        weight = torch.empty(3, 1, size, size, memory_format=torch.channels_last).normal_()
        for seen in (torch.randn(2, 3, 12, 11), lay_out(torch.randn(2, 3, 12, 11), "channels_last")):
            for backend in ON_CPU:
                y = depthwise_conv2d(seen, weight, backend=backend)
                assert same_layout(y, seen), (size, backend)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("size", [5, 15])
@pytest.mark.parametrize("form", ["channels_last", "transposed", "expanded", "slice"])
def test_weights_of_any_layout(backend, size, form):
    x, weight, bias = torch.randn(2, 3, 12, 11), torch.randn(3, 1, size, size), torch.randn(6)[::2]
    weight = {
        "channels_last": torch.empty(weight.shape, memory_format=torch.channels_last).copy_(weight),
        "transposed": weight.transpose(2, 3),
        "expanded": weight[:1].expand(3, 1, size, size),
        "slice": F.pad(weight, (1, 2, 2, 1))[..., 2:-1, 1:-2],
    }[form].requires_grad_()
    y, expected = depthwise_conv2d(x, weight, bias, backend=backend), oracle(x, weight, bias, 1, "same", 1)
    close(y, expected, FLOAT32)
    grad = torch.randn_like(y)
    actual = torch.autograd.grad(y, weight, grad)
    close(*actual, *torch.autograd.grad(expected, weight, grad.double()), FLOAT32)


# Autocast


@pytest.mark.parametrize("size", [3, 7, 15])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ON_CPU)
def test_autocast_gives_its_dtype_and_gradients_of_the_parameters(backend, low, size):
    x, weight = torch.randn(2, 3, 14, 13).requires_grad_(), torch.randn(3, 1, size, size).requires_grad_()
    bias = torch.randn(3).requires_grad_()
    expected = oracle(x, weight, bias, 1, "same", 1)
    with torch.autocast("cpu", low):
        y = depthwise_conv2d(x, weight, bias, backend=backend)
        mixed = depthwise_conv2d(x.to(low), weight, bias, backend=backend)
    assert y.dtype == mixed.dtype == low
    close(y, expected, BFLOAT16)
    close(mixed, expected, BFLOAT16)
    grad = torch.randn_like(expected)
    actual = torch.autograd.grad(y, [x, weight, bias], grad.to(low))
    for a, b in zip(actual, torch.autograd.grad(expected, [x, weight, bias], grad), strict=True):
        assert a.dtype == torch.float32
        close(a, b, BFLOAT16)


def test_autocast_leaves_float64_alone_as_it_does_for_conv2d():
    x, weight = torch.randn(2, 3, 9, 8).double(), torch.randn(3, 1, 5, 5).double()
    with torch.autocast("cpu", torch.bfloat16):
        assert F.conv2d(x, weight, groups=3).dtype == torch.float64
        y = depthwise_conv2d(x, weight)
    assert y.dtype == torch.float64
    close(y, oracle(x, weight, None, 1, "same", 1), FLOAT64)


@pytest.mark.parametrize("size", [7, 15])
@pytest.mark.parametrize("backend", ON_CPU)
def test_a_backward_pass_within_autocast_is_as_exact_as_outside(backend, size):
    """The backward pass of a float32 forward pass is in float32, as for F.conv2d."""
    x, weight = torch.randn(3, 4, 12, 11).requires_grad_(), torch.randn(4, 1, size, size).requires_grad_()
    y, expected = depthwise_conv2d(x, weight, backend=backend), oracle(x, weight, None, 1, "same", 1)
    grad = torch.randn_like(y)
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.autograd.grad(y, [x, weight], grad)
    for a, b in zip(actual, torch.autograd.grad(expected, [x, weight], grad.double()), strict=True):
        assert a.dtype == torch.float32
        close(a, b, FLOAT32)


# Symbolic shapes, and counts


FAKES = [
    {"x": (2, 3, 14, 13), "weight": (3, 1, 7, 7)},
    {"x": (2, 3, 14, 13), "weight": (3, 1, 31, 30)},
    {"x": (0, 3, 14, 13), "weight": (3, 1, 15, 15)},
    {"x": (2, 3, 14, 13), "weight": (3, 1, 15, 5), "stride": (2, 3), "padding": (7, 1)},
    {"x": (2, 3, 40, 41), "weight": (3, 1, 13, 13), "dilation": 2, "padding": "valid"},
    {"x": (1, 1, 15, 15), "weight": (1, 1, 15, 15), "padding": 0},
    {"x": (2, 3, 15, 15), "weight": (3, 1, 15, 15), "padding": 0},
]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("backend", ["auto", "aten", "fft", "onednn"])
@pytest.mark.parametrize("case", FAKES, ids=lambda case: " ".join(str(v) for v in case.values()))
def test_shapes_and_layouts_without_numbers(case, backend, layout):
    shape, kernel, *_ = case.values()
    options = {k: v for k, v in case.items() if k not in ("x", "weight")}
    plain = {"stride": 1, "padding": "same", "dilation": 1, **options}
    if not able(backend, torch.float32, shape[2:], kernel[2:], **plain):
        return
    x, weight = lay_out(torch.randn(shape), layout), torch.randn(kernel)
    y = depthwise_conv2d(x, weight, backend=backend, **options)
    if backend != "onednn":  # onednn exists on CPUs only
        meta = depthwise_conv2d(x.to("meta"), weight.to("meta"), backend=backend, **options)
        assert meta.is_meta
        assert meta.shape == y.shape
        assert same_layout(meta, x) or backend == "aten" or not meta.numel()  # conv2d loses the layout on meta tensors
    with FakeTensorMode() as mode:
        seen, kernels = (mode.from_tensor(t).requires_grad_() for t in (x, weight))
        fake = depthwise_conv2d(seen, kernels, backend=backend, **options)
        gradients = torch.autograd.grad(fake, [seen, kernels], torch.empty_like(fake))
    assert fake.shape == y.shape
    if y.numel():
        assert fake.stride() == y.stride() or 1 in y.shape
    assert [g.shape for g in gradients] == [x.shape, weight.shape]


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("size", [3, 7, 31])
def test_flops_are_counted(backend, size):
    x, weight = torch.randn(2, 4, 10, 9).requires_grad_(), torch.randn(4, 1, size, size).requires_grad_()
    once = 2 * 2 * 4 * 10 * 9 * size * size
    with FlopCounterMode(display=False) as counter:
        y = depthwise_conv2d(x, weight, backend=backend)
        assert counter.get_total_flops() == once
        y.sum().backward()
    if backend in ("onednn", "fft") or (backend, size) == ("auto", 31):  # PyTorch miscounts its own weight gradient
        assert counter.get_total_flops() == 3 * once
