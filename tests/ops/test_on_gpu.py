"""The operators on a CUDA device against the float64 reference on the CPU; skipped without a device.

The rest of the suite runs without a device, with the kernels in Triton's interpreter.
"""

import contextlib
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from tolerances import OF_DTYPE, TF32, close
from widefield.ops import depthwise_conv2d, mixture_conv2d

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# (N, C, H, W), (KH, KW), stride, padding, dilation
SHAPES = {
    "3x3": ((2, 33, 17, 19), (3, 3), 1, "same", 1),
    "7x7": ((2, 40, 28, 28), (7, 7), 1, "same", 1),
    "7x7, stride 2": ((2, 24, 15, 18), (7, 7), 2, 3, 1),
    "5x5, dilation 3": ((2, 24, 20, 21), (5, 5), 1, "same", 3),
    "13x13": ((3, 32, 32, 32), (13, 13), 1, "same", 1),
    "31x31": ((2, 24, 32, 32), (31, 31), 1, "same", 1),
    "31x31 on 14x14": ((2, 24, 14, 14), (31, 31), 1, "same", 1),
    "51x5": ((2, 8, 40, 24), (51, 5), 1, "same", 1),
    "4x6, valid": ((2, 8, 20, 24), (4, 6), 1, "valid", 1),
}


@pytest.fixture(autouse=True)
def _exact(request):
    """Use full float32, and the first block sizes instead of the fastest.

    PyTorch's own convolutions do not use full float32 by default. Compiling and timing all block sizes takes minutes,
    and the benchmarks do it.
    """
    tune = pytest.importorskip("widefield.ops._triton.tune")
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.backends.cudnn.flags(enabled=True, allow_tf32=False))
        if "tuned" not in request.node.name:
            first = lambda name, key, candidates, launch, device: launch(candidates()[0])  # noqa: E731
            stack.enter_context(mock.patch.object(tune, "run", first))
        yield


def on_device(tensor, dtype, layout=torch.contiguous_format):
    return tensor.to("cuda", dtype).contiguous(memory_format=layout).requires_grad_()


def rounded(dtype, *shape):
    """Return float64 numbers that the dtype can represent, so that reference and device get the same input."""
    return torch.randn(shape).to(dtype).double()


def check(expected, actual, leaves, exact, grad, dtype, layout, tolerance=None):
    tolerance = OF_DTYPE[dtype] if tolerance is None else tolerance
    assert actual.dtype == dtype
    assert actual.is_contiguous(memory_format=layout)
    close(actual.cpu(), expected, tolerance)
    wanted = torch.autograd.grad(expected, exact, grad)
    found = torch.autograd.grad(actual, leaves, grad.to("cuda", dtype).contiguous(memory_format=layout))
    for got, want in zip(found, wanted, strict=True):
        close(got.cpu(), want, tolerance)


CASES = [(name, torch.float32) for name in SHAPES]
CASES += [(name, dtype) for name in ("7x7", "31x31", "51x5") for dtype in (torch.bfloat16, torch.float16)]


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_depthwise_and_gradients(name, layout, dtype):
    shape, kernel, stride, padding, dilation = SHAPES[name]
    layout = LAYOUTS[layout]
    x, weight, bias = rounded(dtype, *shape), rounded(dtype, shape[1], 1, *kernel), rounded(dtype, shape[1])
    exact = [t.requires_grad_() for t in (x, weight, bias)]
    expected = F.conv2d(x, weight, bias, stride, padding, dilation, groups=shape[1])
    leaves = [on_device(x.detach(), dtype, layout), *(on_device(t.detach(), dtype) for t in (weight, bias))]
    actual = depthwise_conv2d(*leaves, stride=stride, padding=padding, dilation=dilation)
    check(expected, actual, leaves, exact, rounded(dtype, *expected.shape), dtype, layout)


def test_tuned_block_sizes():
    x, weight = rounded(torch.float32, 2, 24, 32, 32), rounded(torch.float32, 24, 1, 13, 13)
    exact = [x.requires_grad_(), weight.requires_grad_()]
    expected = F.conv2d(x, weight, padding=6, groups=24)
    leaves = [on_device(t.detach(), torch.float32) for t in exact]
    grad = rounded(torch.float32, *expected.shape)
    check(expected, depthwise_conv2d(*leaves), leaves, exact, grad, torch.float32, torch.contiguous_format)


@pytest.mark.parametrize("backend", ["direct", "gemm"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_backend_by_name(dtype, layout, backend):
    layout = LAYOUTS[layout]
    x, weight = rounded(dtype, 2, 24, 33, 30), rounded(dtype, 24, 1, 13, 13)
    exact = [x.requires_grad_(), weight.requires_grad_()]
    expected = F.conv2d(x, weight, padding=6, groups=24)
    leaves = [on_device(x.detach(), dtype, layout), on_device(weight.detach(), dtype)]
    actual = depthwise_conv2d(*leaves, backend=backend)
    check(expected, actual, leaves, exact, rounded(dtype, *expected.shape), dtype, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tf32_is_taken_where_it_is_allowed_and_stays_within_its_bits(layout):
    layout = LAYOUTS[layout]
    x, weight = rounded(torch.float32, 2, 24, 32, 32), rounded(torch.float32, 24, 1, 31, 31)
    exact = [x.requires_grad_(), weight.requires_grad_()]
    expected = F.conv2d(x, weight, padding=15, groups=24)
    leaves = [on_device(x.detach(), torch.float32, layout), on_device(weight.detach(), torch.float32)]
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        actual = depthwise_conv2d(*leaves, backend="gemm")
        grad = rounded(torch.float32, *expected.shape)
        check(expected, actual, leaves, exact, grad, torch.float32, layout, TF32)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mixture_and_gradients(layout, dtype, sparse):
    layout, sizes, channels = LAYOUTS[layout], (3, 5, 7, 9, 11), 24
    x, weights = rounded(dtype, 3, channels, 14, 15), rounded(dtype, 3, len(sizes)).abs() + 0.5
    if sparse:
        weights[:, 3:] = 0
        weights[0, 1:] = 0
    kernels, biases = [rounded(dtype, channels, 1, k, k) for k in sizes], [rounded(dtype, channels) for _ in sizes]
    exact = [t.requires_grad_() for t in (x, *kernels, *biases, weights)]
    n = len(sizes)
    # Without `sparse` a weight of 0 has a gradient; with it, only chosen experts have one.
    live = (weights.detach() != 0) if sparse else torch.ones_like(weights, dtype=torch.bool)
    expected = sum(
        (weights[:, r] * live[:, r])[:, None, None, None]
        * F.conv2d(x, kernels[r], biases[r], padding=k // 2, groups=channels)
        for r, k in enumerate(sizes)
    )
    leaves = [on_device(x.detach(), dtype, layout), *(on_device(t.detach(), dtype) for t in exact[1:])]
    actual = mixture_conv2d(
        leaves[0], leaves[1 : n + 1], leaves[n + 1 : -1], leaves[-1], groups=channels, sparse=sparse, backend="merged"
    )
    assert actual.is_contiguous(memory_format=layout)
    close(actual.cpu(), expected, OF_DTYPE[dtype])
    grad = rounded(dtype, *expected.shape)
    wanted = torch.autograd.grad(expected, exact, grad)
    found = torch.autograd.grad(actual, leaves, grad.to("cuda", dtype).contiguous(memory_format=layout))
    *found, of_weights = found
    *wanted, of_exact_weights = wanted
    for got, want in zip(found, wanted, strict=True):
        close(got.cpu(), want, OF_DTYPE[dtype])
    close(of_weights.cpu() * live, of_exact_weights * live, OF_DTYPE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", [3, 7, 31])
def test_the_weight_gradient_is_the_same_to_the_bit_on_every_run(kernel, layout, dtype):
    x = on_device(torch.randn(16, 32, 32, 32), dtype, LAYOUTS[layout])
    weight = on_device(torch.randn(32, 1, kernel, kernel), dtype)
    grad = torch.randn_like(x)

    def run():
        return torch.autograd.grad(depthwise_conv2d(x, weight), weight, grad)[0]

    first = run()
    assert all(torch.equal(first, run()) for _ in range(2))
