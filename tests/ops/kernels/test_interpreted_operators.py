"""The operators that reach the kernels, in Triton's interpreter: dispatch by name, autograd, fake implementations."""

import pytest
import torch
import torch.nn.functional as F

from tolerances import FLOAT32, close


def depthwise(backend, channels_last):
    from widefield.ops import _triton, depthwise_conv2d

    _triton.unavailable = lambda: None  # no GPU is present, and none is needed here
    x, w, b = torch.randn(2, 3, 6, 7), torch.randn(3, 1, 5, 3), torch.randn(3)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    for t in (x, w, b):
        t.requires_grad_()
    doubles = [t.detach().double().requires_grad_() for t in (x, w, b)]
    expected = F.conv2d(*doubles, padding="same", groups=3)
    actual = depthwise_conv2d(x, w, b, backend=backend)
    close(actual, expected, FLOAT32)
    assert actual.is_contiguous(memory_format=torch.channels_last) == channels_last
    g = torch.linspace(-1, 1, actual.numel()).view_as(actual)
    grads = torch.autograd.grad(actual, (x, w, b), g, create_graph=True)
    twins = torch.autograd.grad(expected, doubles, g.double(), create_graph=True)
    for a, e in zip(grads, twins, strict=True):
        close(a, e, FLOAT32)
    again = torch.autograd.grad(grads[0].square().sum(), w)
    close(again[0], torch.autograd.grad(twins[0].square().sum(), doubles[1])[0], FLOAT32)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("backend", ["direct", "gemm"])
def test_depthwise(interpreted, backend, channels_last):
    interpreted(depthwise, backend, channels_last)


def mixture(channels_last, bias):
    from widefield.ops import _triton, mixture_conv2d

    _triton.unavailable = lambda: None
    x = torch.randn(2, 3, 5, 6)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    kernels = [torch.randn(3, 1, k, k) for k in (5, 1, 3)]  # sorted for the kernel, and back
    biases = [torch.randn(3) for _ in kernels] if bias else []
    inputs = [x, torch.rand(2, 3), *kernels, *biases]
    doubles = [t.double().requires_grad_() for t in inputs]
    for t in inputs:
        t.requires_grad_()

    def run(backend, x, a, *rest):
        return mixture_conv2d(x, rest[:3], rest[3:] or None, a, groups=3, backend=backend)

    actual, expected = run("routed", *inputs), run("branches", *doubles)
    close(actual, expected, FLOAT32)
    assert actual.is_contiguous(memory_format=torch.channels_last) == channels_last
    g = torch.linspace(-1, 1, actual.numel()).view_as(actual)
    grads = torch.autograd.grad(actual, inputs, g, create_graph=True)
    for a, e in zip(grads, torch.autograd.grad(expected, doubles, g.double()), strict=True):
        close(a, e, FLOAT32)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(grads[0].sum(), x)
    bank = torch.randn(3, 3, 5, 5)
    for layout in (x, x.detach().contiguous()):
        torch.library.opcheck(
            torch.ops.widefield.routed,
            (layout.detach().requires_grad_(), bank, torch.randn(3, 3) if bias else None, torch.rand(2, 3), [5, 1, 3]),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_mixture(interpreted, channels_last, bias):
    interpreted(mixture, channels_last, bias)
