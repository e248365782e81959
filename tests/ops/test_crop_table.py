"""Crops with a minimum size, and the crop itself. tests/analysis/test_kernels.py checks the losses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tolerances import FLOAT64, close
from widefield.ops import fold
from widefield.ops.crop_table import crop_table


@given(
    size=st.tuples(st.integers(1, 8), st.integers(1, 7)), dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    data=st.data(),
)  # fmt: skip
def test_no_crop_goes_below_the_least_and_each_loses_what_lies_outside(size, dilation, data):
    least = tuple(data.draw(st.integers(1, side)) for side in size)
    weight = torch.randn(3, 2, *size).double()
    table = crop_table(weight, dilation, least=least)
    parity = tuple(low + (side - low) % 2 for low, side in zip(least, size, strict=True))
    assert table.sizes[0][0] >= parity[0]
    assert table.sizes[0][1] >= parity[1]
    assert parity[0] in {rows for rows, _ in table.sizes}
    assert parity[1] in {columns for _, columns in table.sizes}
    assert table.sizes[-1] == size
    assert list(table.spans) == sorted(table.spans)
    whole = weight.abs().sum((1, 2, 3))
    for index, inside in enumerate(table.sizes):
        kept = fold.crop(weight, inside)
        assert kept.shape[2:] == inside
        close(table.bound[index], (whole - kept.abs().sum((1, 2, 3))).amax(), FLOAT64)
        close(table.energy[index], 1 - kept.square().sum() / weight.square().sum(), FLOAT64)


def test_a_least_beyond_the_kernel_and_crops_off_the_center_are_refused():
    weight = torch.ones(1, 1, 5, 4)
    for least in (6, (5, 5)):
        with pytest.raises(ValueError, match="least must be at most the kernel's size"):
            crop_table(weight, least=least)
    for size in ((7, 4), (4, 4), (5, 3), (0, 4), (-1, 4)):
        with pytest.raises(ValueError, match=r"a kernel of \(5, 4\) taps has no centered crop"):
            fold.crop(weight, size)
    assert fold.crop(weight, (3, 2)).data_ptr() != weight.data_ptr()
    assert fold.crop(weight, (3, 2))._base is weight
