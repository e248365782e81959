"""Tensors that a mixture keeps between its forward and its backward pass, and after it."""

import pytest
import torch

from widefield.ops import depthwise_conv2d, mixture_conv2d


def kept(compute, leaves):
    """Return the numbers that autograd keeps for the backward pass of ``compute``, without those of ``leaves``."""
    known = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    found = {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in known:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        compute().sum()
    return sum(found.values())


def experts(kinds, channels=6):
    kernels = [torch.randn(channels, 1, size, size, requires_grad=True) for size, _ in kinds]
    biases = [torch.randn(channels, requires_grad=True) for _ in kinds]
    return kernels, biases, [dilation for _, dilation in kinds]


DISTINCT = [(3, 1), (5, 1), (7, 1), (9, 1), (11, 1)]
CASES = {"distinct": DISTINCT, "dilated": [(3, 1), (3, 2), (5, 3)], "many": [(3, 1), (5, 1)] * 6}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("side", [4, 9])
@pytest.mark.parametrize("kinds", CASES.values(), ids=CASES)
def test_neither_the_mix_nor_its_bank_is_kept(kinds, side, autocast):
    kernels, biases, dilations = experts(kinds)
    x, weights = torch.randn(5, 6, side, side, requires_grad=True), torch.rand(5, len(kinds), requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain = kept(lambda: depthwise_conv2d(x, kernels[-1], biases[-1], padding="same"), [x, kernels[-1]])
        mine = kept(
            lambda: mixture_conv2d(x, kernels, biases, weights, groups=6, dilations=dilations),
            [x, weights, *kernels, *biases],
        )
    assert mine <= plain + 12 * len(kinds)  # stacked biases, and routing weights in the order of the plan
    assert 12 * len(kinds) < 5 * 6 * 9  # even the mix of the smallest kernels would show


@pytest.mark.parametrize("kinds", CASES.values(), ids=CASES)
def test_no_gradient_of_a_kernel_lives_in_a_larger_tensor(kinds):
    kernels, biases, dilations = experts(kinds)
    x, weights = torch.randn(5, 6, 8, 8), torch.rand(5, len(kinds))
    mixture_conv2d(x, kernels, biases, weights, groups=6, dilations=dilations).sum().backward()
    storages = {k.grad.untyped_storage().data_ptr(): k.grad.untyped_storage().nbytes() for k in kernels}
    assert sum(storages.values()) == sum(k.nbytes for k in kernels)


@pytest.mark.parametrize("needed", ["x", "weights", "kernels", "biases"])
@pytest.mark.parametrize("kinds", CASES.values(), ids=CASES)
def test_each_gradient_alone_is_the_one_among_all(kinds, needed):
    kernels, biases, dilations = experts(kinds)
    x, weights = torch.randn(3, 6, 5, 5, requires_grad=True), torch.rand(3, len(kinds), requires_grad=True)
    groups = {"x": [x], "weights": [weights], "kernels": kernels, "biases": biases}

    def gradients(leaves):
        y = mixture_conv2d(x, kernels, biases, weights, groups=6, dilations=dilations)
        return torch.autograd.grad(y.square().sum(), leaves)

    together = iter(gradients([leaf for leaves in groups.values() for leaf in leaves]))
    of_group = {name: [next(together) for _ in leaves] for name, leaves in groups.items()}
    for alone, among in zip(gradients(groups[needed]), of_group[needed], strict=True):
        assert torch.equal(alone, among)
