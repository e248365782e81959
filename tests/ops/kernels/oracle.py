"""Checks for the interpreter: a backend's functions against F.conv2d and autograd in float64."""

import contextlib
import importlib
from unittest import mock

import torch
import torch.nn.functional as F

from tolerances import FLOAT32, OF_DTYPE, close


def convolve(x, weight, bias, stride, padding, dilation):
    """Compute one F.conv2d for each sample."""
    samples = []
    for i in range(x.shape[0]):
        g = i % weight.shape[0]
        b = None if bias is None else bias[g]
        samples.append(F.conv2d(x[i : i + 1], weight[g][:, None], b, stride, padding, dilation, groups=x.shape[1]))
    return torch.cat(samples)


def like(x, channels_last, sparse):
    """Return x in a memory format, or a slice of a larger tensor in that format."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    if not sparse:
        return x.contiguous(memory_format=layout)
    wide = x.new_full((x.shape[0], x.shape[1] + 1, x.shape[2] + 1, x.shape[3] + 2), torch.nan)
    wide = wide.contiguous(memory_format=layout)
    view = wide[:, 1:, 1:, 1:-1]
    view.copy_(x)
    return view


@contextlib.contextmanager
def candidate(tune, index):
    """Launch with other block sizes than the default."""

    def run(name, key, candidates, launch, device):
        found = candidates()
        return launch(found[index % len(found)])

    with mock.patch.object(tune, "run", run):
        yield


def passes(
    backend,
    shape,
    kernel,
    *,
    stride=(1, 1),
    padding=None,
    dilation=(1, 1),
    per_sample=False,
    bias=True,
    channels_last=False,
    sparse=False,
    dtype=torch.float32,
    block=0,
):
    """Check forward, input_grad and weight_grad: numbers, dtypes, memory formats."""
    module = importlib.import_module(f"widefield.ops._triton.{backend}")
    batch, channels = shape[:2]
    groups = batch if per_sample else 1
    if padding is None:
        padding = tuple(d * (k // 2) for k, d in zip(kernel, dilation, strict=True))
    x = torch.randn(shape).to(dtype)
    weight = torch.randn(groups, channels, *kernel).to(dtype)
    shift = torch.randn(groups, channels).to(dtype) if bias else None
    exact = [x.double().requires_grad_(), weight.double().requires_grad_()]
    expected = convolve(*exact, None if shift is None else shift.double(), stride, padding, dilation)
    grad = torch.randn(expected.shape).to(dtype)
    expected_grads = torch.autograd.grad(expected, exact, grad.double())
    x, grad = like(x, channels_last, sparse), like(grad, channels_last, sparse)
    if sparse:
        weight = weight.transpose(2, 3).contiguous().transpose(2, 3)
    settings = (stride, padding, dilation)
    with candidate(module.tune, block):
        y = module.forward(x, weight, shift, *settings)
        dx = module.input_grad(grad, weight, x.shape, *settings)
        dw = module.weight_grad(grad, x, weight.shape, *settings)
    tolerance = OF_DTYPE[dtype]
    for actual, wanted in ((y, expected), (dx, expected_grads[0]), (dw, expected_grads[1])):
        assert actual.dtype == dtype
        close(actual, wanted, tolerance)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for actual in (y, dx):
        assert actual.is_contiguous(memory_format=layout)


def empty_batch(backend, per_sample):
    """Check that nothing is launched, and that the kernel's gradient is zero."""
    module = importlib.import_module(f"widefield.ops._triton.{backend}")
    x, weight = torch.zeros(0, 3, 7, 6), torch.randn(0 if per_sample else 1, 3, 5, 5)
    settings = ((1, 1), (2, 1), (1, 1))
    y = module.forward(x, weight, None, *settings)
    assert y.shape == (0, 3, 7, 4)
    assert module.input_grad(y, weight, x.shape, *settings).shape == x.shape
    dw = module.weight_grad(y, x, weight.shape, *settings)
    assert dw.shape == weight.shape
    assert dw.abs().sum() == 0


def routed(
    shape, spans, *, side=None, bias=True, channels_last=False, sparse=False, dtype=torch.float32, block=0, bank=None
):
    """Check the mixture and all its gradients against the sum of branches of eq. 6."""
    from widefield.ops._triton import routed as module

    batch, channels = shape[:2]
    side = side or max(spans)
    n = len(spans)
    x = torch.randn(shape).to(dtype)
    given = torch.randn(n, channels, side, side).to(bank or torch.float32)  # taps outside spans must be ignored
    shifts = torch.randn(n, channels) if bias else None
    weights = torch.randn(batch, n)
    live = torch.zeros(n, 1, side, side)
    for r, span in enumerate(spans):
        margin = (side - span) // 2
        live[r, :, margin : side - margin, margin : side - margin] = 1
    exact = [t.double().requires_grad_() for t in (x, given, weights, *([shifts] if bias else []))]
    kernels = exact[1] * live
    expected = sum(
        exact[2][:, r, None, None, None]
        * F.conv2d(exact[0], kernels[r][:, None], exact[3][r] if bias else None, padding=side // 2, groups=channels)
        for r in range(n)
    )
    grad = torch.randn(shape).to(dtype)
    expected_grads = torch.autograd.grad(expected, exact, grad.double())
    x, grad = like(x, channels_last, sparse), like(grad, channels_last, sparse)
    with candidate(module.tune, block):
        y = module.forward(x, given, spans, shifts, weights)
        dx, d_bank, d_bias, d_weights = module.backward(grad, x, given, spans, shifts, weights)
    tolerance = OF_DTYPE[dtype]
    close(y, expected, tolerance)
    assert y.dtype == dx.dtype == dtype
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert y.is_contiguous(memory_format=layout)
    assert dx.is_contiguous(memory_format=layout)
    close(dx, expected_grads[0], tolerance)
    close(d_bank, expected_grads[1], OF_DTYPE[given.dtype])
    assert d_bank.dtype == given.dtype
    assert (d_bank * (1 - live)).abs().sum() == 0
    close(d_weights, expected_grads[2], OF_DTYPE[given.dtype])
    assert d_weights.dtype == weights.dtype
    if bias:
        close(d_bias, expected_grads[3], FLOAT32)
    else:
        assert d_bias is None


def routed_needs():
    """Check that unneeded gradients are None, and that an empty batch gives zeros."""
    from widefield.ops._triton import routed as module

    bank, weights = torch.randn(2, 3, 5, 5), torch.randn(2, 2)
    x = torch.randn(2, 3, 6, 6)
    dx, *others = module.backward(x, x, bank, (3, 5), None, weights, need_parameters=False)
    assert dx.shape == x.shape
    assert others == [None] * 3
    dx, d_bank, _, d_weights = module.backward(x, x, bank, (3, 5), None, weights, need_x=False)
    assert dx is None
    assert d_bank.abs().max() > 0
    assert d_weights.shape == (2, 2)
    x, weights = x[:0], weights[:0]
    assert module.forward(x, bank, (3, 5), bank[:, :, 0, 0], weights).shape == x.shape
    dx, d_bank, d_bias, d_weights = module.backward(x, x, bank, (3, 5), bank[:, :, 0, 0], weights)
    assert dx.shape == x.shape
    assert d_bank.shape == bank.shape
    assert d_bank.abs().sum() + d_bias.abs().sum() == 0
    assert d_weights.shape == (0, 2)
