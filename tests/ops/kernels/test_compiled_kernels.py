"""Kernels compile for GPUs that are not present, and keep their operands in registers."""

import itertools

import pytest
import torch

from widefield.ops._triton import direct, gemm
from widefield.ops._triton.ahead import Build, builds, depthwise, mixture

# Bytes that threads may spill, of a default and of a candidate that is only timed. Ideally zero, but
# compiler versions differ by a few bytes.
DEFAULT, CANDIDATE = 64, 128

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


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


PRODUCTS = {80: ("mma.sync",), 90: ("wgmma.mma_async", "mma.sync"), 100: ("tcgen05.mma", "mma.sync")}


@pytest.mark.parametrize(
    ("step", "dtype", "arch"),
    [*itertools.product(("forward", "weight_grad"), (FLOAT32, BFLOAT16), (80, 90)), ("forward", BFLOAT16, 100)],
    ids=str,
)
def test_band_kernels_use_tensor_cores_and_wide_loads(step, dtype, arch):
    (build,) = builds(depthwise(gemm, (64, 384, 32, 32), 31, dtype=dtype)[step], arch)
    hold([build], DEFAULT)
    assert any(name in build.ptx for name in PRODUCTS[arch])
    assert "ld.global.v4" in build.ptx
    assert "cp.async" not in build.ptx.replace("cp.async.bulk", "")


@pytest.mark.parametrize(
    ("warps", "registers", "shared", "arch", "blocks"),
    [
        (4, 32, 0, 80, 16),  # all 64 warps
        (4, 146, 20480, 90, 3),  # 152 registers a thread are allocated: 19456 a block of 65536
        (4, 128, 65536, 80, 2),  # 65 KiB a block of 164
        (4, 128, 65536, 90, 3),  # of 228
        (1, 16, 0, 100, 32),  # no more than 32 blocks
    ],
)
def test_occupancy(warps, registers, shared, arch, blocks):
    assert Build("", arch, {}, warps, registers, 0, shared, "").occupancy == blocks * warps / 64


def test_float32_is_one_product_where_tf32_is_allowed():
    call = depthwise(gemm, (64, 384, 32, 32), 31)["forward"]
    (three,) = builds(call)
    with torch.backends.cudnn.flags(allow_tf32=True):
        (one,) = builds(call)
    assert three.ptx.count("wgmma.mma_async") == 3 * one.ptx.count("wgmma.mma_async") > 0


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize(("step", "stride"), [("forward", 1), ("input_grad", 2), ("weight_grad", 1)])
def test_direct_kernels(step, stride, channels_last):
    size = 5 if step == "weight_grad" else 7  # compiling takes one second per 16 taps
    shape = (64, 96, 56, 56)
    (build,) = builds(depthwise(direct, shape, size, stride=stride, channels_last=channels_last)[step])
    hold([build], DEFAULT)
    assert build.shared <= 1024  # lanes exchange only the sums at the end of a weight gradient
    if channels_last and step != "weight_grad":
        assert "ld.global.v4" in build.ptx


def test_direct_forward_on_the_oldest():
    hold(builds(depthwise(direct, (64, 96, 56, 56), 7, dtype=BFLOAT16)["forward"], 80), DEFAULT)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
def test_mixture_forward(channels_last):
    hold(builds(mixture((64, 384, 14, 14), (3, 5, 7, 9, 11), channels_last=channels_last)["forward"]), DEFAULT)


def test_sizes_of_one_compile():
    """Triton makes constants of them, which have no methods."""
    shape = (1, 1, 2, 1)
    for backend, stride in ((direct, 1), (direct, 2), (gemm, 1)):
        for call in depthwise(backend, shape, 1, stride=stride).values():
            hold(builds(call), DEFAULT)
    for call in mixture(shape, (1,)).values():
        hold(builds(call), DEFAULT)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "arch"), [(FLOAT32, 90), (BFLOAT16, 90), (FLOAT32, 80), (FLOAT32, 100)], ids=str)
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
    for call in depthwise(direct, shape, size, **options).values():
        hold(builds(call, arch), DEFAULT)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "arch"), [(FLOAT32, 90), (BFLOAT16, 90), (FLOAT32, 80), (FLOAT32, 100)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("spans", [(3, 5, 7, 9, 11), (3, 9, 15, 21, 27)], ids=str)
def test_mixture_defaults_of_every_class_of_shapes(spans, channels_last, dtype, arch):
    for shape in ((64, 96, 56, 56), (64, 384, 14, 14), (64, 768, 7, 7)):
        for call in mixture(shape, spans, dtype=dtype, channels_last=channels_last).values():
            hold(builds(call, arch), DEFAULT)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, torch.float16], ids=str)
def test_band_defaults_of_every_class_of_shapes(dtype, arch):
    for width in (7, 14, 28, 56, 64, 112):
        for size in (13, 31, (51, 5), (5, 51)):
            passes = depthwise(gemm, (64, 384, width, width), size, dtype=dtype)
            hold(builds(passes["forward"], arch), DEFAULT)
            hold(builds(passes["weight_grad"], arch), DEFAULT)
    for call in depthwise(gemm, (64, 384, 28, 28), 31, groups=64, dtype=dtype).values():
        hold(builds(call, arch), DEFAULT)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("width", [16, 32, 64])
def test_no_candidate_spills_much(width, dtype, arch):
    for call in depthwise(gemm, (64, 384, width, width), 31, dtype=dtype).values():
        hold(builds(call, arch, candidates=slice(None)), CANDIDATE)


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("size", [7, 11])
def test_no_direct_candidate_spills_much(size, channels_last):
    for call in depthwise(direct, (64, 96, 56, 56), size, channels_last=channels_last).values():
        hold(builds(call, candidates=slice(None)), CANDIDATE)
