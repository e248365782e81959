"""Masks of patches: their number, their distribution, and sizes that do not fit."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from widefield.masking import PatchMask
from widefield.masking.patches import ROUNDINGS, stretched


@pytest.mark.parametrize(("rounding", "masked"), [("keep_floor", 30), ("keep_round", 29), ("mask_ceil", 30)])
def test_counts_of_49_patches_are_the_published_ones(rounding, masked):
    mask = PatchMask(rounding=rounding).draw(3, 224, 224)
    assert mask.shape == (3, 7, 7)
    assert mask.flatten(1).sum(1).tolist() == [masked] * 3


@given(
    rows=st.integers(1, 6), columns=st.integers(2, 6), ratio=st.floats(0.2, 0.8),
    rounding=st.sampled_from(sorted(ROUNDINGS)), shape=st.sampled_from(["random", "blocks"]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_every_image_has_as_many_masked_patches(rows, columns, ratio, rounding, shape, seed):
    drawn = PatchMask(8, ratio, rounding, shape)
    masked = ROUNDINGS[rounding](rows * columns, ratio)
    if not 0 < masked < rows * columns:
        with pytest.raises(ValueError, match="at least one must be masked and one visible"):
            drawn.count(rows, columns)
        return
    mask = drawn.draw(4, 8 * rows, 8 * columns, torch.Generator().manual_seed(seed))
    assert mask.dtype == torch.bool
    assert mask.shape == (4, rows, columns)
    assert mask.flatten(1).sum(1).tolist() == [masked] * 4
    again = drawn.draw(4, 8 * rows, 8 * columns, torch.Generator().manual_seed(seed))
    assert torch.equal(mask, again)


def test_random_masks_hide_every_patch_equally_often():
    mask = PatchMask(8, 0.5).draw(4000, 24, 32, torch.Generator().manual_seed(0))
    share = mask.float().mean(0)
    assert ((share - 0.5).abs() < 0.04).all()  # five standard deviations of a share of 4000


def test_blocks_hang_together():
    generator = torch.Generator().manual_seed(0)

    def edges(shape):
        mask = PatchMask(8, 0.5, shape=shape).draw(200, 64, 64, generator)
        return (mask[:, 1:] != mask[:, :-1]).float().mean() + (mask[..., 1:] != mask[..., :-1]).float().mean()

    assert edges("blocks") < 0.6 * edges("random")


def test_masks_are_stretched_to_maps():
    mask = torch.tensor([[[True, False], [False, True]]])
    expected = [[1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1]]
    assert stretched(mask, 4, 6)[0].int().tolist() == expected
    with pytest.raises(ValueError, match="a map of 3x6 cannot be divided into the 2x2 patches of the mask"):
        stretched(mask, 3, 6)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"ratio must be above 0 and below 1, the share of masked patches; got 1.0"):
        PatchMask(ratio=1.0)
    with pytest.raises(ValueError, match=r"rounding must be one of 'keep_floor', 'keep_round', 'mask_ceil'"):
        PatchMask(rounding="floor")
    with pytest.raises(ValueError, match=r"images of 224x230 pixels .* patches of 32: .* such as 224x224"):
        PatchMask().draw(1, 224, 230)
    with pytest.raises(ValueError, match=r"a ratio of 0.6 masks 1 of 1 patches \(1x1\)"):
        PatchMask().draw(1, 32, 32)
