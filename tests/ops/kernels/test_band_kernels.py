import oracle
import pytest
import torch

CASES = {
    "odd": ((2, 3, 7, 9), (3, 3), {}),
    "no bias": ((2, 2, 13, 11), (5, 5), {"bias": False}),
    "larger than the map": ((1, 2, 7, 7), (31, 31), {}),
    "51x5": ((2, 1, 19, 8), (51, 5), {}),
    "5x51": ((2, 1, 6, 21), (5, 51), {}),
    "even": ((2, 2, 6, 7), (4, 6), {"padding": (1, 3)}),
    "1x1": ((2, 2, 3, 4), (1, 1), {}),
    "no padding": ((2, 2, 8, 19), (3, 7), {"padding": (0, 0)}),
    "more padding than kernel": ((2, 2, 4, 5), (2, 6), {"padding": (3, 9)}),
    "two blocks of columns": ((1, 1, 3, 70), (3, 9), {}),
    "wide kernel on a wide map": ((1, 1, 5, 40), (3, 31), {}),
    "many rows": ((3, 1, 50, 5), (5, 3), {}),
    "W = 16": ((2, 2, 16, 16), (13, 13), {}),
}


@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per_sample"])
@pytest.mark.parametrize("name", CASES)
def test_passes_equal_conv2d(interpreted, name, per_sample):
    shape, kernel, options = CASES[name]
    interpreted(oracle.passes, "gemm", shape, kernel, per_sample=per_sample, **options)


@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per_sample"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precisions(interpreted, dtype, per_sample):
    interpreted(oracle.passes, "gemm", (2, 2, 9, 7), (7, 5), dtype=dtype, per_sample=per_sample)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
def test_memory_formats(interpreted, channels_last, sparse):
    interpreted(oracle.passes, "gemm", (2, 3, 6, 7), (3, 5), sparse=sparse, channels_last=channels_last)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(1, 10))
def test_every_block_size_is_right(interpreted, block):
    interpreted(oracle.passes, "gemm", (2, 1, 17, 70), (5, 21), block=block, per_sample=block % 2 == 0)
    interpreted(oracle.passes, "gemm", (3, 2, 14, 14), (7, 7), block=block)


@pytest.mark.parametrize("per_sample", [False, True])
def test_empty_batch(interpreted, per_sample):
    interpreted(oracle.empty_batch, "gemm", per_sample)
