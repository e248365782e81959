"""Kernels compile for GPUs that are not present, and keep their operands in registers."""

from functools import partial

import aot
import pytest
import torch

from widefield.ops._triton import direct, gemm, routed

# Bytes that threads may spill, of a default and of a candidate that is only timed. Ideally zero, but
# compiler versions differ by a few bytes.
DEFAULT, CANDIDATE = 64, 128

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


def calls(backend, shape, size, *, stride=1, groups=1, dtype=FLOAT32, channels_last=False):
    """Return the three passes of a backend on meta tensors."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    kernel = (size, size) if isinstance(size, int) else size
    padding = (kernel[0] // 2, kernel[1] // 2)
    out = [(s + 2 * p - k) // stride + 1 for s, p, k in zip(shape[2:], padding, kernel, strict=True)]
    x = torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=layout)
    grad = torch.empty((*shape[:2], *out), dtype=dtype, device="meta").contiguous(memory_format=layout)
    weight = torch.empty((groups, shape[1], *kernel), dtype=dtype, device="meta")
    bias = torch.empty((groups, shape[1]), dtype=dtype, device="meta")
    rest = ((stride, stride), padding, (1, 1))
    return {
        "forward": partial(backend.forward, x, weight, bias, *rest),
        "input_grad": partial(backend.input_grad, grad, weight, x.shape, *rest),
        "weight_grad": partial(backend.weight_grad, grad, x, weight.shape, *rest),
    }


def mixture(shape, spans, *, dtype=FLOAT32, channels_last=False):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    side = max(spans)
    x = torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=layout)
    bank = torch.empty((len(spans), shape[1], side, side), device="meta")
    bias = torch.empty((len(spans), shape[1]), device="meta")
    weights = torch.empty((shape[0], len(spans)), device="meta")
    return {
        "forward": partial(routed.forward, x, bank, spans, bias, weights),
        "backward": partial(routed.backward, x, x, bank, spans, bias, weights),
    }


def hold(found, limit):
    for build in found:
        print(build)
    assert found
    assert max(build.spill for build in found) <= limit


@pytest.fixture(autouse=True)
def _three_products():
    """Compile float32 for three TF32 products, the form that needs the most registers."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("step", ["forward", "weight_grad"])
def test_band_kernels_use_tensor_cores_and_wide_loads(step, dtype, arch):
    (build,) = aot.builds(calls(gemm, (64, 384, 32, 32), 31, dtype=dtype)[step], arch)
    hold([build], DEFAULT)
    assert "wgmma.mma_async" in build.ptx or "mma.sync" in build.ptx
    assert "ld.global.v4" in build.ptx
    assert "cp.async" not in build.ptx.replace("cp.async.bulk", "")


def test_float32_is_one_product_where_tf32_is_allowed():
    call = calls(gemm, (64, 384, 32, 32), 31)["forward"]
    (three,) = aot.builds(call)
    with torch.backends.cudnn.flags(allow_tf32=True):
        (one,) = aot.builds(call)
    assert three.ptx.count("wgmma.mma_async") == 3 * one.ptx.count("wgmma.mma_async") > 0


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize(("step", "stride"), [("forward", 1), ("input_grad", 2), ("weight_grad", 1)])
def test_direct_kernels(step, stride, channels_last):
    size = 5 if step == "weight_grad" else 7  # compiling takes one second per 16 taps
    shape = (64, 96, 56, 56)
    (build,) = aot.builds(calls(direct, shape, size, stride=stride, channels_last=channels_last)[step])
    hold([build], DEFAULT)
    assert build.shared <= 1024  # lanes exchange only the sums at the end of a weight gradient
    if channels_last and step != "weight_grad":
        assert "ld.global.v4" in build.ptx


def test_direct_forward_on_the_oldest():
    hold(aot.builds(calls(direct, (64, 96, 56, 56), 7, dtype=BFLOAT16)["forward"], 80), DEFAULT)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
def test_mixture_forward(channels_last):
    hold(aot.builds(mixture((64, 384, 14, 14), (3, 5, 7, 9, 11), channels_last=channels_last)["forward"]), DEFAULT)


def test_sizes_of_one_compile():
    """Triton makes constants of them, which have no methods."""
    shape = (1, 1, 2, 1)
    for backend, stride in ((direct, 1), (direct, 2), (gemm, 1)):
        for call in calls(backend, shape, 1, stride=stride).values():
            hold(aot.builds(call), DEFAULT)
    for call in mixture(shape, (1,)).values():
        hold(aot.builds(call), DEFAULT)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "arch"), [(FLOAT32, 90), (BFLOAT16, 90), (FLOAT32, 80)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "size", "stride", "groups"),
    [
        ((64, 96, 56, 56), 3, 1, 1),
        ((64, 96, 56, 56), 7, 1, 1),
        ((64, 96, 56, 56), 7, 2, 1),
        ((64, 384, 14, 14), 7, 1, 64),
        ((64, 384, 14, 14), 11, 1, 1),
        ((64, 768, 7, 7), 13, 1, 1),
    ],
)
def test_direct_defaults_of_every_class_of_shapes(shape, size, stride, groups, channels_last, dtype, arch):
    options = {"stride": stride, "groups": groups, "dtype": dtype, "channels_last": channels_last}
    for call in calls(direct, shape, size, **options).values():
        hold(aot.builds(call, arch), DEFAULT)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "arch"), [(FLOAT32, 90), (BFLOAT16, 90), (FLOAT32, 80)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("spans", [(3, 5, 7, 9, 11), (3, 9, 15, 21, 27)], ids=str)
def test_mixture_defaults_of_every_class_of_shapes(spans, channels_last, dtype, arch):
    for shape in ((64, 96, 56, 56), (64, 384, 14, 14), (64, 768, 7, 7)):
        for call in mixture(shape, spans, dtype=dtype, channels_last=channels_last).values():
            hold(aot.builds(call, arch), DEFAULT)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, torch.float16], ids=str)
def test_band_defaults_of_every_class_of_shapes(dtype, arch):
    for width in (7, 14, 28, 56, 64, 112):
        for size in (13, 31, (51, 5), (5, 51)):
            passes = calls(gemm, (64, 384, width, width), size, dtype=dtype)
            hold(aot.builds(passes["forward"], arch), DEFAULT)
            hold(aot.builds(passes["weight_grad"], arch), DEFAULT)
    for call in calls(gemm, (64, 384, 28, 28), 31, groups=64, dtype=dtype).values():
        hold(aot.builds(call, arch), DEFAULT)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("width", [16, 32, 64])
def test_no_candidate_spills_much(width, dtype, arch):
    for call in calls(gemm, (64, 384, width, width), 31, dtype=dtype).values():
        hold(aot.builds(call, arch, candidates=slice(None)), CANDIDATE)


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("size", [7, 11])
def test_no_direct_candidate_spills_much(size, channels_last):
    for call in calls(direct, (64, 96, 56, 56), size, channels_last=channels_last).values():
        hold(aot.builds(call, candidates=slice(None)), CANDIDATE)
