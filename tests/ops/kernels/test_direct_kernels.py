import oracle
import pytest
import torch

CASES = {
    "odd": ((2, 3, 7, 9), (3, 3), {}),
    "odd, per sample": ((2, 3, 7, 9), (3, 3), {"per_sample": True}),
    "no bias": ((2, 2, 8, 5), (5, 5), {"bias": False, "per_sample": True}),
    "7x7 on 7x7": ((2, 2, 7, 7), (7, 7), {}),
    "larger than the map": ((1, 2, 5, 4), (11, 9), {}),
    "by chunks of rows": ((2, 2, 5, 5), (19, 3), {"per_sample": True}),
    "51x5": ((1, 1, 7, 4), (51, 5), {}),
    "5x51": ((1, 1, 4, 7), (5, 51), {}),
    "even": ((2, 2, 7, 6), (4, 2), {"padding": (1, 1), "per_sample": True}),
    "1x1": ((2, 2, 3, 4), (1, 1), {}),
    "no padding": ((2, 2, 8, 9), (3, 5), {"padding": (0, 0)}),
    "more padding than kernel": ((2, 2, 4, 5), (2, 3), {"padding": (3, 4), "per_sample": True}),
    "stride 2": ((2, 3, 9, 8), (3, 3), {"stride": (2, 2)}),
    "stride 2, per sample": ((2, 3, 9, 8), (3, 3), {"stride": (2, 2), "per_sample": True}),
    "stride 2, 7x7": ((1, 2, 11, 9), (7, 7), {"stride": (2, 2)}),
    "stride (3, 2)": ((2, 2, 9, 10), (5, 3), {"stride": (3, 2), "padding": (0, 2), "per_sample": True}),
    "stride beyond the kernel": ((2, 2, 7, 7), (2, 1), {"stride": (3, 2), "padding": (0, 0)}),
    "dilation": ((2, 2, 9, 8), (3, 5), {"dilation": (2, 3), "per_sample": True}),
    "dilation and stride": ((1, 2, 11, 9), (3, 3), {"dilation": (2, 3), "stride": (2, 2), "padding": (3, 1)}),
    "two blocks": ((1, 1, 11, 70), (3, 3), {}),
    "many channels": ((1, 70, 2, 2), (3, 1), {}),
}


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("name", CASES)
def test_passes_equal_conv2d(interpreted, name, channels_last):
    shape, kernel, options = CASES[name]
    interpreted(oracle.passes, "direct", shape, kernel, channels_last=channels_last, **options)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precisions(interpreted, dtype, channels_last):
    for stride in ((1, 1), (2, 1)):
        interpreted(
            oracle.passes, "direct", (2, 2, 5, 7), (5, 3), stride=stride, dtype=dtype, channels_last=channels_last
        )


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
def test_non_contiguous(interpreted, stride, channels_last):
    interpreted(oracle.passes, "direct", (2, 3, 6, 7), (3, 5), stride=stride, sparse=True, channels_last=channels_last)


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("block", range(1, 8))
def test_every_block_size_is_right(interpreted, block, channels_last):
    options = {"block": block, "channels_last": channels_last, "per_sample": block % 2 == 0}
    interpreted(oracle.passes, "direct", (2, 2, 17, 66), (3, 3), **options)
    interpreted(oracle.passes, "direct", (2, 2, 9, 7), (17, 3), stride=(1 + block % 2, 1), **options)


@pytest.mark.parametrize("per_sample", [False, True])
def test_empty_batch(interpreted, per_sample):
    interpreted(oracle.empty_batch, "direct", per_sample)
