"""Fused mixtures in inference, where a kind of call that came up before is no longer checked and planned."""

import pytest
import torch
import torch.nn.functional as F

from tolerances import FLOAT32, close
from widefield.ops import bank_conv2d, fold


def oracle(x, kernels, biases, weights, dilations):
    """Compute eq. 6 literally, one sample and one expert at a time."""
    samples = []
    for i in range(len(x)):
        terms = (
            weights[i, r] * F.conv2d(x[i : i + 1], w, biases[r], 1, d * (w.shape[-1] // 2), d, x.shape[1])
            for r, (w, d) in enumerate(zip(kernels, dilations, strict=True))
        )
        samples.append(sum(terms))
    return torch.cat(samples)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("size", "experts"),
    [
        ((1, 16, 15, 14), ((3, 1), (7, 1), (11, 1))),  # channels_last: padded to 15 columns
        ((3, 128, 29, 28), ((5, 1), (11, 1))),  # large enough for a loop over samples
        ((3, 16, 5, 4), ((3, 1), (9, 1), (11, 1))),  # taps that never meet the map, cropped after the mix
        ((2, 16, 4, 4), ((3, 1), (31, 1))),  # and before it
        ((2, 8, 12, 12), ((3, 1), (3, 2), (7, 2))),
    ],
)
def test_shapes_that_came_up_before(size, experts, bias, layout):
    channels, dilations = size[1], [d for _, d in experts]
    bank = bias_bank = None
    for _ in range(3):  # the first call decides, further ones take its decision
        x, weights = torch.randn(size, dtype=torch.double), torch.randn(size[0], len(experts), dtype=torch.double)
        kernels = [torch.randn(channels, 1, k, k, dtype=torch.double) for k, _ in experts]
        biases = [torch.randn(channels, dtype=torch.double) * bias for _ in experts]
        expected = oracle(x, kernels, biases, weights, dilations).float()
        new = fold.kernel_bank(kernels, dilations).float()
        if bank is None:
            bank, bias_bank = new, torch.stack(biases).float() if bias else None
        else:  # in place: nothing computed from the old values may be left
            bank.copy_(new)
            if bias:
                bias_bank.copy_(torch.stack(biases))
        x = x.float().contiguous(memory_format=layout)
        with torch.no_grad():
            y = bank_conv2d(x, bank, bias_bank, weights.float(), experts=experts, groups=channels)
        assert y.is_contiguous(memory_format=layout)
        close(y, expected, FLOAT32)
        y.mul_(torch.ones((), requires_grad=True))  # an ordinary tensor, not a view made under no_grad


def test_what_the_first_call_refuses_is_refused_later():
    x, bank, experts = torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 1, 5, 5), ((3, 1), (5, 1))
    with torch.no_grad():
        bank_conv2d(x, bank, None, torch.zeros(2, 2), experts=experts, groups=4)
        with pytest.raises(ValueError, match=r"weights must be \(N, n\) = \(2, 2\)"):
            bank_conv2d(x, bank, None, torch.zeros(1, 2), experts=experts, groups=4)
        with pytest.raises(TypeError, match=r"x is torch\.float64"):
            bank_conv2d(x.double(), bank, None, torch.zeros(2, 2), experts=experts, groups=4)
