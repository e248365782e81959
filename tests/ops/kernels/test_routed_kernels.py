import oracle
import pytest
import torch

CASES = {
    "3, 5, 7": ((2, 3, 5, 6), (3, 5, 7), {}),
    "larger bank": ((3, 2, 5, 4), (3, 5), {"side": 7, "bias": False}),
    "by chunks of rows": ((1, 2, 5, 4), (3, 19), {}),
    "one expert": ((2, 1, 18, 3), (3,), {}),
    "1x1 among them": ((2, 2, 5, 17), (1, 5), {}),
    "many planes": ((3, 11, 3, 3), (3, 1, 3), {}),
    "two blocks": ((1, 1, 2, 70), (3, 1), {}),
}


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("name", CASES)
def test_mixture_and_gradients_equal_the_sum_of_branches(interpreted, name, channels_last):
    shape, spans, options = CASES[name]
    interpreted(oracle.routed, shape, spans, channels_last=channels_last, **options)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precisions(interpreted, dtype, channels_last):
    interpreted(oracle.routed, (2, 2, 4, 5), (1, 5), dtype=dtype, channels_last=channels_last)
    interpreted(oracle.routed, (2, 2, 4, 5), (3, 5), dtype=dtype, bank=dtype, channels_last=channels_last)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
def test_non_contiguous(interpreted, channels_last):
    interpreted(oracle.routed, (2, 3, 4, 5), (1, 3), sparse=True, channels_last=channels_last)


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("block", range(1, 6))
def test_every_block_size_is_right(interpreted, block, channels_last):
    interpreted(oracle.routed, (2, 2, 17, 35), (1, 3), block=block, channels_last=channels_last)


def test_what_is_not_needed_and_empty_batches(interpreted):
    interpreted(oracle.routed_needs)
