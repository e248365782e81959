import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tolerances import FLOAT64, close
from widefield.ops import fold


@given(k=st.sampled_from([1, 3, 5, 7]), d=st.integers(1, 4))
def test_dilated_kernel_is_the_dilated_convolution(k, d):
    x, w = torch.randn(2, 4, 13, 11).double(), torch.randn(6, 2, k, k).double()
    plain = fold.dilate(w, d)
    assert plain.shape[-1] == fold.effective_size(k, d)
    expected = F.conv2d(x, w, padding=d * (k // 2), dilation=d, groups=2)
    close(F.conv2d(x, plain, padding=plain.shape[-1] // 2, groups=2), expected, FLOAT64)


@given(k=st.sampled_from([1, 3, 5]), more=st.integers(0, 4))
def test_padding_keeps_the_convolution_and_cropping_undoes_it(k, more):
    x, w = torch.randn(1, 3, 6, 7).double(), torch.randn(3, 1, k, k).double()
    size = k + 2 * more
    padded = fold.pad(w, size)
    close(F.conv2d(x, padded, padding=size // 2, groups=3), F.conv2d(x, w, padding=k // 2, groups=3), FLOAT64)
    assert torch.equal(fold.crop(padded, k), w)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (4, 2), (1, 5)])
def test_taps_that_never_meet_the_map_can_be_cropped(height, width):
    x, w = torch.randn(2, 3, height, width).double(), torch.randn(3, 1, 15, 15).double()
    cropped = fold.crop(w, 2 * max(height, width) - 1)
    assert cropped.shape[-1] < 15
    actual = F.conv2d(x, cropped, padding=cropped.shape[-1] // 2, groups=3)
    close(actual, F.conv2d(x, w, padding=7, groups=3), FLOAT64)


def test_kernel_bank_has_gradients_to_every_kernel():
    kernels = [torch.randn(2, 1, k, k).double().requires_grad_() for k in (3, 1, 3)]
    assert fold.kernel_bank(kernels, (1, 1, 2)).shape == (3, 2, 1, 5, 5)
    assert torch.autograd.gradcheck(lambda *ks: fold.kernel_bank(ks, (1, 1, 2)), kernels)


def test_a_bank_lies_on_the_common_grid_and_gives_its_experts_back():
    experts = [(3, 36), (11, 36), (5, 72)]
    kernels = [torch.randn(2, 1, k, k) for k, _ in experts]
    dilations = [d for _, d in experts]
    bank = fold.kernel_bank(kernels, dilations)
    assert fold.common_dilation(dilations) == 36
    assert bank.shape == (3, 2, 1, 11, 11)  # and not 361 x 361
    for r, (k, d) in enumerate(experts):
        assert torch.equal(fold.expert(bank, r, k, d, 36), kernels[r])


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_affine_is_batch_norm(affine):
    norm = torch.nn.BatchNorm2d(5, affine=affine, eps=1e-3).double().eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    if affine:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    y = torch.randn(3, 5, 4, 4).double()
    scale, shift = fold.batch_norm_affine(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
    close(y * scale[:, None, None] + shift[:, None, None], norm(y), FLOAT64)


@pytest.mark.parametrize("shape", [(40, 64, 7, 7), (300, 500), (2, 70000, 1, 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_parts_of_large_kernels_are_scaled_as_the_whole_is(shape, layout):
    """Without gradients part by part, with them at once: the same to the bit, in the same memory format."""
    kernel = torch.randn(shape)
    kernel = kernel.to(memory_format=layout) if kernel.ndim == 4 else kernel
    scale, shift = torch.rand(shape[0]).double(), torch.rand(shape[0]).double()
    with torch.no_grad():
        parts = fold.scale_outputs(kernel, None, scale, shift)
    whole = fold.scale_outputs(kernel, None, scale, shift)
    assert torch.equal(parts[0], whole[0])
    assert torch.equal(parts[1], whole[1])
    assert parts[0].stride() == whole[0].stride()


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_outputs_of_transposed_convolutions_are_scaled_group_by_group(groups):
    kernel, bias = torch.randn(6, 12 // groups, 3, 2).double(), torch.randn(12).double()
    scale, shift = torch.randn(12).double(), torch.randn(12).double()
    x = torch.randn(2, 6, 5, 4).double()
    y = torch.conv_transpose2d(x, kernel, bias, stride=2, groups=groups)
    merged = fold.scale_outputs(kernel, bias, scale, shift, transposed=groups)
    expected = y * scale[:, None, None] + shift[:, None, None]
    close(torch.conv_transpose2d(x, *merged, stride=2, groups=groups), expected, FLOAT64)
