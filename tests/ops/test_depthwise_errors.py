"""depthwise_conv2d rejects invalid arguments before any computation."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tolerances import FLOAT32, close
from widefield.ops import depthwise_conv2d

# Errors


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


X, WEIGHT = torch.zeros(2, 4, 8, 8), torch.zeros(4, 1, 3, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 8, 8)}, r"x must be \(N, C, H, W\); got shape \(4, 8, 8\)"),
        ({"weight": torch.zeros(4, 3, 3)}, r"\(4, 1, KH, KW\).*got shape \(4, 3, 3\)"),
        ({"weight": torch.zeros(4, 2, 3, 3)}, r"\(4, 1, KH, KW\).*got shape \(4, 2, 3, 3\)"),
        ({"weight": torch.zeros(8, 1, 3, 3)}, r"one kernel for each channel of x.*got shape \(8, 1, 3, 3\)"),
        ({"bias": torch.zeros(5)}, r"bias must be \(C,\) = \(4,\) or None; got shape \(5,\)"),
        ({"bias": torch.zeros(1, 4)}, r"bias must be \(C,\)"),
        ({"stride": 0}, "stride must be at least 1; got 0"),
        ({"stride": (1, 0), "padding": 1}, "stride must be at least 1; got 0"),
        ({"stride": (1, 1, 1)}, r"stride must be one integer or two \(rows, columns\); got \(1, 1, 1\)"),
        ({"dilation": 0}, "dilation must be at least 1; got 0"),
        ({"dilation": ()}, r"dilation must be one integer or two .*got \(\)"),
        ({"padding": -1}, "padding must be at least 0; got -1"),
        ({"padding": [1, 2, 3]}, r"padding must be one integer or two .*got \(1, 2, 3\)"),
        ({"padding": "full"}, "padding must be numbers, 'same' or 'valid'; got 'full'"),
        ({"stride": 2}, r"'same' is defined for stride 1; got stride=2. Give numbers, such as padding=\(1, 1\)"),
        ({"stride": (1, 2), "dilation": (1, 3)}, r"defined for stride 1; got stride=\(1, 2\).*padding=\(1, 3\)"),
        (
            {"weight": torch.zeros(4, 1, 9, 3), "padding": "valid"},
            r"9x3 kernel with dilation \(1, 1\) does not fit on a map of 8x8 pixels with padding \(0, 0\).*'same' fits",
        ),
        ({"dilation": 5, "padding": 1}, r"with dilation \(5, 5\) does not fit"),
        ({"weight": torch.zeros(4, 1, 0, 3)}, r"0, 3|0x3"),
        ({"weight": torch.zeros(4, 1, 0, 3), "padding": "valid"}, r"0, 3|0x3"),
        ({"backend": "triton"}, "backend must be one of 'auto', 'aten', 'onednn', 'fft', 'direct', 'gemm'"),
        ({"backend": "one_dnn"}, r"got 'one_dnn'. Did you mean 'onednn'\?"),
        ({"backend": None}, "got None"),
        ({"backend": "fft", "stride": 2, "padding": 1}, r"'fft' cannot compute the forward.*stride \(2, 2\).*'auto'"),
        ({"backend": "fft", "dilation": 2}, r"'fft' cannot compute the forward.*dilation \(2, 2\).*'auto'"),
        ({"backend": "onednn", "stride": 2, "padding": 1}, r"cannot compute the input_grad.*stride \(2, 2\).*'auto'"),
        ({"backend": "onednn", "padding": 3}, r"cannot compute the input_grad.*padding \(3, 3\) is wider.*'auto'"),
        ({"backend": "gemm"}, r"'gemm' cannot compute the forward.*(CUDA|triton|NVIDIA|GPU|cpu).*'auto' takes one"),
        ({"backend": "direct"}, r"'direct' cannot compute the forward.*(CUDA|triton|NVIDIA|GPU|cpu).*'auto' takes"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_computed(change, message):
    arguments = {"x": X, "weight": WEIGHT, "bias": None, **change}
    with Watch() as watch, pytest.raises(ValueError, match=message):
        depthwise_conv2d(**arguments)
    assert set(watch.seen) <= {"aten.transpose.int"}  # a view


def test_onednn_refuses_float64():
    with pytest.raises(ValueError, match=r"the forward.*does not compute in torch.float64.*'auto' takes"):
        depthwise_conv2d(X.double(), WEIGHT.double(), backend="onednn")


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_spectra_of_other_than_real_floating_point_numbers_are_refused(dtype):
    with pytest.raises(ValueError, match=f"'fft' cannot compute the forward.*{dtype}.*'auto' takes"):
        depthwise_conv2d(X.to(dtype), WEIGHT.to(dtype), backend="fft")


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.complex128])
def test_auto_computes_whatever_dtype_conv2d_does(dtype):
    parts = [torch.randint(-9, 9, (*s, 2)).double() for s in ((2, 3, 9, 8), (3, 1, 5, 5))]
    x, weight = (torch.view_as_complex(t).to(dtype) if dtype.is_complex else t[..., 0].to(dtype) for t in parts)
    y = depthwise_conv2d(x, weight)
    assert torch.equal(y, F.conv2d(x, weight, padding=2, groups=3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": WEIGHT.double()}, "x is torch.float32 and weight is torch.float64: convert one.*or use autocast"),
        ({"x": X.bfloat16()}, "x is torch.bfloat16 and weight is torch.float32"),
        ({"bias": torch.zeros(4).half()}, "x is torch.float32 and bias is torch.float16"),
        ({"stride": 1.5}, "stride must be an integer; got 1.5 of type float"),
        ({"padding": None}, "padding must be an integer; got None"),
        ({"padding": 1.0}, "padding must be an integer; got 1.0 of type float"),
        ({"padding": (1, True)}, "padding must be an integer; got True of type bool"),
        ({"dilation": "2"}, "dilation must be an integer; got '2'"),
    ],
)
def test_other_types_are_refused(change, message):
    depthwise_conv2d(X, WEIGHT, stride=1, padding=1, dilation=1)  # cached for 1, not for 1.0
    depthwise_conv2d(X, WEIGHT, stride=(1, 1), padding=(1, 1), dilation=(1, 1))
    with Watch() as watch, pytest.raises(TypeError, match=message):
        depthwise_conv2d(**{"x": X, "weight": WEIGHT, "bias": None, **change})
    assert not watch.seen


def test_threads_change_results_by_rounding_only():
    x, weight = torch.randn(2, 40, 21, 20).requires_grad_(), torch.randn(40, 1, 31, 31).requires_grad_()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y = depthwise_conv2d(x, weight)
            results.append([y, *torch.autograd.grad(y.square().mean(), [x, weight])])
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        close(one, two, FLOAT32)
