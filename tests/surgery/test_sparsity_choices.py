"""Which weights dynamic sparsity starts with, prunes and grows, against reference code in this file."""

import copy
import functools
import math

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sparsity import MODELS, batches, check_masked, counts, loss, make, small_cnn, tiny_slak
from torch import nn

from widefield.surgery.sparsity import DynamicSparsity, _erk, _largest, _moved


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.data())
def test_the_largest_are_exactly_as_many_and_chance_decides_among_equals(values, data):
    count = data.draw(st.integers(0, len(values)))
    mask = _largest(torch.tensor(values, dtype=torch.float32).view(1, -1), count, torch.Generator())
    chosen = mask[0].nonzero()[:, 0].tolist()
    assert sorted(values[i] for i in chosen) == sorted(values, reverse=True)[:count][::-1]
    zeros = [_largest(torch.zeros(100), 50, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(zeros[0], zeros[1])
    assert not torch.equal(zeros[0], zeros[2])
    assert 10 < int(zeros[0][:50].sum()) < 40


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 60), active=st.integers(1, 60), rate=st.floats(0, 1), seed=st.integers(0, 99))
def test_a_move_prunes_the_smallest_and_grows_the_most_promising(size, active, rate, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(size, dtype=torch.bool)
    mask[torch.randperm(size, generator=generator)[:active]] = True
    weight, promise = torch.randn(size, generator=generator) * mask, torch.rand(size, generator=generator)
    new = _moved(weight, mask, promise, rate, generator)
    alive = sorted(mask.nonzero()[:, 0].tolist(), key=lambda i: -abs(weight[i]))
    kept = alive[: len(alive) - math.ceil(rate * len(alive))]
    others = sorted(set(range(size)) - set(kept), key=lambda i: -promise[i])
    assert set(new.nonzero()[:, 0].tolist()) == {*kept, *others[: len(alive) - len(kept)]}
    assert int(new.sum()) == int(mask.sum())


@pytest.mark.parametrize("build", MODELS)
def test_snip_keeps_the_most_salient_weights_and_leaves_the_model_alone(build):
    torch.manual_seed(0)
    model = build().train()
    twin = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    sparse = DynamicSparsity(model, sparsity=0.3)  # at 0.5, SNIP may empty a tiny tensor: an error
    data = batches(3)
    sparse.start(data, loss)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    weights = [dict(twin.named_parameters())[name] for name in sparse.masks]
    total = sum(loss(twin, batch) for batch in data)
    scores = torch.cat(
        [(w * g).abs().flatten() for w, g in zip(weights, torch.autograd.grad(total, weights), strict=True)]
    )
    active = torch.cat([mask.flatten() for mask in sparse.masks.values()])
    assert int(active.sum()) == round(0.7 * len(active))
    assert scores[active].min() >= 0.999 * scores[~active].max()
    for name, value in model.state_dict().items():
        expected = before[name] * sparse.masks[name] if name in sparse.masks else before[name]
        assert torch.equal(value, expected), name


def test_snip_sees_through_a_wrapped_forward():
    def masks(wrap):
        torch.manual_seed(0)
        model = small_cnn()
        if wrap:  # like accelerate in mixed precision: a copy's forward would still call the original's
            model.forward = functools.partial(type(model).forward, model)
        model[0].weight.grad = kept = torch.ones_like(model[0].weight)
        sparse = DynamicSparsity(model)
        sparse.start(batches(2), loss)
        assert model[0].weight.grad is kept
        assert kept.sum() == kept.numel()
        return sparse.masks

    for name, mask in masks(wrap=False).items():
        assert torch.equal(masks(wrap=True)[name], mask)


def test_snip_density_keeps_as_many_of_each_tensor_as_snip_but_others():
    _, snip = make(init="snip", sparsity=0.6)
    _, like = make(init="snip_density", sparsity=0.6)
    assert counts(like) == counts(snip)
    assert any(not torch.equal(like.masks[name], mask) for name, mask in snip.masks.items())


@settings(deadline=None, max_examples=15)
@given(sparsity=st.floats(0, 0.99), init=st.sampled_from(["erk", "uniform"]), seed=st.integers(0, 9))
def test_random_choices_have_the_density_asked_for(sparsity, init, seed):
    model = small_cnn()
    sparse = DynamicSparsity(model, sparsity=sparsity, init=init, seed=seed)
    sparse.start()
    found = counts(sparse)
    total = sum(mask.numel() for mask in sparse.masks.values())
    assert abs(sum(found.values()) - (1 - sparsity) * total) <= len(found)
    assert sparse.density() == pytest.approx(sum(found.values()) / total)
    if init == "uniform":
        for name, mask in sparse.masks.items():
            assert abs(found[name] - (1 - sparsity) * mask.numel()) <= 1
    check_masked(model, sparse)


@settings(deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 30), min_size=2, max_size=4), min_size=1, max_size=6),
    density=st.floats(0.01, 1),
)
def test_erk_densities_are_in_proportion_and_add_up(shapes, density):
    named = {str(i): tuple(shape) for i, shape in enumerate(shapes)}
    densities = _erk(named, density)
    sizes = {name: math.prod(shape) for name, shape in named.items()}
    total = sum(sizes.values())
    assert sum(densities[name] * sizes[name] for name in named) == pytest.approx(density * total)
    assert all(0 < d <= 1 for d in densities.values())
    below = {name: d * sizes[name] / sum(named[name]) for name, d in densities.items() if d < 0.999}
    assert max(below.values(), default=0) == pytest.approx(min(below.values(), default=0))


def test_one_seed_one_choice():
    first, second, other = (make(init="uniform", seed=seed)[1] for seed in (0, 0, 1))
    for name, mask in first.masks.items():
        assert torch.equal(second.masks[name], mask)
    assert any(not torch.equal(other.masks[name], mask) for name, mask in first.masks.items())


def test_snip_that_would_cut_the_network_says_so():
    sparse = DynamicSparsity(tiny_slak(), sparsity=0.9)
    with pytest.raises(ValueError, match=r'keep no weight of stages\..* and \d+ other tensors, .*init="erk"'):
        sparse.start(batches(1), lambda model, batch: loss(scaled(model, 1e-6), batch))
    sparse = DynamicSparsity(sparse.model, sparsity=0.9, init="erk")
    sparse.start()
    assert sparse.density() == pytest.approx(0.1, abs=1e-2)


def scaled(model, gamma):
    for stage in model.stages:
        nn.init.constant_(stage[0].gamma, gamma)
    return model


def test_snip_where_branches_start_at_zero_lets_chance_decide():
    model = timm.create_model("resnet18", num_classes=4)  # the last norm of each branch starts at zero
    sparse = DynamicSparsity(model, sparsity=0.5)
    sparse.start(batches(1), loss)
    densities = sparse.densities()
    assert densities["layer2.0.downsample.0.weight"] > 0.95
    still = [density for name, density in densities.items() if ".conv" in name]
    assert len(still) == 16
    assert max(still) - min(still) < 0.02


# Which weights


def test_by_default_all_that_the_official_code_takes():
    model = tiny_slak()
    sparse = DynamicSparsity(model)
    sparse.start(batches(1), loss)
    assert set(sparse.masks) == {name for name, p in model.named_parameters() if p.ndim in (2, 4)}
    assert set(sparse.densities()) == set(sparse.masks)


def test_where():
    model = tiny_slak()

    def names(where):
        sparse = DynamicSparsity(model, where=where, init="uniform")
        sparse.start()
        return list(sparse.masks)

    bands = names("*.large_kernel.LoRA*")
    assert len(bands) == 8
    assert all("LoRA" in name for name in bands)
    assert names(["stages.0.0.pwconv1", "head"]) == ["stages.0.0.pwconv1.weight", "head.weight"]
    assert names(lambda module, name: isinstance(module, nn.Linear) and name.startswith("stages.1")) == [
        "stages.1.0.pwconv1.weight", "stages.1.0.pwconv2.weight"
    ]  # fmt: skip
    assert list(DynamicSparsity(nn.Linear(3, 2))._names) == ["weight"]


def test_shared_and_frozen_weights():
    model = small_cnn()
    model[6] = nn.Conv2d(16, 16, 3, padding=1)
    model.append(nn.Linear(4, 4))
    model.append(model[12])
    model.append(nn.Linear(4, 4))
    model[14].weight = model[12].weight
    model[3].weight.requires_grad_(False)
    frozen = model[3].weight.clone()
    sparse = DynamicSparsity(model, init="uniform", sparsity=0.5)
    sparse.start()
    assert list(sparse.masks) == ["0.weight", "6.weight", "11.weight", "12.weight"]
    assert torch.equal(model[3].weight, frozen)
    check_masked(model, sparse)
