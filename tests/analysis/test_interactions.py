import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tolerances import FLOAT64, close
from widefield.analysis import save
from widefield.analysis.interactions import Interactions, forward_passes, interactions

ALL = {"grid": 3, "pairs": 36, "contexts": 35, "reach": None, "orders": tuple(m / 7 for m in range(8))}
"""All pairs, contexts and orders of a 3x3 grid."""


class OfPatches(nn.Module):
    """Compute logits from the means of 3x3 patches (N, 9), in float64."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.register_buffer("place", torch.zeros(1, dtype=torch.float64))

    def forward(self, images):
        return self.function(nn.functional.adaptive_avg_pool2d(images, 3).mean(1).flatten(1))


def network(classes=4, width=24):
    """Return a strongly non-additive network with structure, the same for all tests."""
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((9, width), (width, classes)))
    return OfPatches(lambda p: torch.tanh(2 * p @ first) @ second)


def random_images(count=2, side=6, seed=0):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def enumerated(model, image, target):
    """Compute |I(m)(i, j)| for all pairs (i < j) and all m of a 3x3 grid by the definition: (36, 8)."""

    def value(shown):
        mask = torch.zeros(9, dtype=torch.float64)
        mask[list(shown)] = 1
        pixels = mask.view(3, 3).repeat_interleave(image.shape[1] // 3, 0).repeat_interleave(image.shape[2] // 3, 1)
        p = model(image[None] * pixels).softmax(1)[0, target].item()
        return math.log(p / (1 - p))

    values = {frozenset(s): value(s) for size in range(10) for s in itertools.combinations(range(9), size)}
    table = []
    for i, j in itertools.combinations(range(9), 2):
        others = [k for k in range(9) if k not in (i, j)]
        row = []
        for m in range(8):
            deltas = []
            for context in itertools.combinations(others, m):
                s = frozenset(context)
                deltas.append(values[s | {i, j}] - values[s | {i}] - values[s | {j}] + values[s])
            row.append(abs(sum(deltas) / len(deltas)))
        table.append(row)
    return np.array(table)


def test_complete_enumeration_equals_the_definition():
    model, images = network(), random_images()
    found = interactions(model, images, **ALL)
    targets = model(images).argmax(1).tolist()
    truth = np.stack([enumerated(model, image, target).mean(0) for image, target in zip(images, targets, strict=True)])
    assert found.orders.tolist() == list(range(8))
    assert found.contexts.tolist() == [math.comb(7, m) for m in range(8)]
    for ours in (found.lower, found.upper):
        close(torch.tensor(ours), torch.tensor(truth.mean(0)), FLOAT64)
    close(torch.tensor(found.samples[:, 0]), torch.tensor(truth), FLOAT64)
    close(torch.tensor(found.strength), torch.tensor(truth.mean(0) / truth.mean()), FLOAT64)
    close(torch.tensor(found.published), torch.tensor(found.strength), FLOAT64)
    assert found.about["forward passes"] == forward_passes(2, **ALL) == 2 * (1 + 36 * 4 * 2**7)
    assert found.about["images"] == 2
    assert found.about["class"] == "predicted"


def test_sampled_contexts_bracket_the_definition_and_errors_are_of_the_right_size():
    model, image = network(), random_images(1)
    truth = enumerated(model, image[0], model(image).argmax(1).item()).mean(0)
    few = {**ALL, "contexts": 4}
    runs = [interactions(model, image, **few, seed=seed, batch_size=4096) for seed in range(24)]
    lower, upper = (np.array([getattr(run, side) for run in runs]) for side in ("lower", "upper"))
    for side, sign in ((lower, 1), (upper, -1)):
        room = 4 * side.std(0, ddof=1) / math.sqrt(len(runs))
        assert (sign * (truth - side.mean(0)) >= -room - 1e-12).all()
    # With sampled contexts both biases are large at all orders, and nearly cancel in their geometric mean.
    sampled = runs[0].contexts < np.array([math.comb(7, m) for m in range(8)])
    assert sampled.tolist() == [False, True, True, True, True, True, True, False]
    biases = [abs(side - truth)[sampled].sum() for side in (lower.mean(0), upper.mean(0))]
    middle = np.sqrt(lower.mean(0) * upper.mean(0))
    assert min(biases) > 0.04 * truth[sampled].sum()
    assert abs(middle - truth)[sampled].sum() < min(biases) / 2
    (one,) = runs[:1]
    middle = np.sqrt(one.lower * one.upper)
    close(torch.tensor(one.strength), torch.tensor(middle / middle.mean()), FLOAT64)
    close(torch.tensor(one.published), torch.tensor(one.upper / one.upper.mean()), FLOAT64)


def test_the_standard_error_is_the_spread_between_independent_runs():
    model = network()
    options = {**ALL, "pairs": 3, "contexts": 5, "orders": (0, 0.5, 1)}
    runs = [interactions(model, random_images(8, seed=k), **options, seed=k, batch_size=4096) for k in range(50)]
    spread = np.std([run.strength for run in runs], axis=0, ddof=1)
    stated = np.sqrt(np.mean([run.strength_error**2 for run in runs], axis=0))
    assert (abs(np.log(stated / spread)) < math.log(1.5)).all()


@settings(max_examples=8, deadline=None)
@given(st.lists(st.floats(-9, 9), min_size=9, max_size=9), st.integers(0, 99))
def test_a_sum_over_patches_has_no_interaction_at_any_order(weights, seed):
    weight = torch.tensor(weights, dtype=torch.float64)
    model = OfPatches(lambda p: (p.sin() * weight).sum(1, keepdim=True))
    found = interactions(model, random_images(seed=seed), **{**ALL, "contexts": 3}, seed=seed)
    assert found.upper.max() <= 1e-12
    assert np.isnan(found.strength).all()
    assert {row["J"] for row in found.rows()} == {"within rounding"}


@pytest.mark.parametrize("contexts", [35, 6])
def test_a_product_of_two_patches_interacts_alike_at_all_orders(contexts):
    model = OfPatches(lambda p: 5 * p[:, :1] * p[:, 1:2])
    image = random_images(1)
    patches = nn.functional.adaptive_avg_pool2d(image, 3).mean(1).flatten()
    found = interactions(model, image, **{**ALL, "contexts": contexts})
    expected = torch.full((8,), abs(5 * patches[0] * patches[1]).item() / 36, dtype=torch.float64)
    close(torch.tensor(found.lower), expected, FLOAT64)
    close(torch.tensor(found.upper), expected, FLOAT64)
    close(torch.tensor(found.strength), torch.ones(8, dtype=torch.float64), FLOAT64)
    assert np.isfinite(found.strength_error).all()  # the error over pairs, because there is only one image


def test_a_product_of_three_patches_interacts_the_more_the_larger_the_context():
    model = OfPatches(lambda p: p[:, [0, 4, 8]].prod(1, keepdim=True))
    image = random_images(1)
    patches = nn.functional.adaptive_avg_pool2d(image, 3).mean(1).flatten()
    found = interactions(model, image, **ALL)
    share = torch.arange(8, dtype=torch.float64) / 7  # share of contexts with the third patch
    close(torch.tensor(found.upper), 3 * abs(patches[[0, 4, 8]].prod()) * share / 36, FLOAT64)
    near = interactions(model, image, **{**ALL, "reach": 1})
    assert near.about["pairs"] == 20  # 12 side by side, 8 diagonal
    close(torch.tensor(near.upper), 2 * abs(patches[[0, 4, 8]].prod()) * share / 20, FLOAT64)


def test_log_odds_of_extreme_logits_are_exact():
    # p rounds to 1 here, so log(p / (1 - p)) from probabilities would be infinite.
    model = OfPatches(lambda p: torch.stack([400 * p[:, 0] * p[:, 1], torch.zeros(len(p)).double()], 1))
    image = torch.ones(1, 3, 3, 3, dtype=torch.float64)
    found = interactions(model, image, **ALL, targets=[0])
    close(torch.tensor(found.upper), torch.full((8,), 400 / 36, dtype=torch.float64), FLOAT64)
    assert found.about["class"] == "given"
    assert 0 < found.resolution < 1e-12


def test_hidden_patches_become_the_baseline_and_patches_need_not_divide_the_image():
    seen = []

    def watch(images):
        seen.append(images.clone())
        return images.mean((2, 3))

    model = nn.Module()
    model.forward = watch
    image = torch.rand(1, 3, 7, 8) + 1
    for baseline, value in (("zero", torch.zeros(3)), ("mean", image[0].mean((1, 2)))):
        seen.clear()
        interactions(model, image, grid=3, pairs=1, contexts=2, orders=(0,), baseline=baseline)
        *_, nothing = torch.cat(seen)
        assert torch.allclose(nothing, value[:, None, None].expand(3, 7, 8))
        both, first, second, _ = (seen[1] != value[:, None, None]).any(1)
        assert torch.equal(both, first | second)
        assert not (first & second).any()
        rows, columns = torch.arange(7) * 3 // 7, torch.arange(8) * 3 // 8
        for patch in (first, second):
            cells = {(rows[y].item(), columns[x].item()) for y, x in patch.nonzero().tolist()}
            assert len(cells) == 1  # one patch, and the whole image
            row, column = cells.pop()
            assert patch.sum() == (rows == row).sum() * (columns == column).sum()


def test_batches_and_the_way_the_images_come_do_not_matter_and_seeds_do():
    model, images = network(), random_images(3)
    options = {"grid": 3, "pairs": 5, "contexts": 6, "seed": 3}
    plain = interactions(model, images, **options)
    state = torch.get_rng_state()
    for other in (
        interactions(model, images, **options, batch_size=7),
        interactions(model, [images[:1], (images[1:], torch.zeros(2))], **options),
        interactions(model, [{"image": images}], **options, batch_size=1000),
    ):
        close(torch.tensor(other.samples), torch.tensor(plain.samples), FLOAT64)
    assert torch.equal(torch.get_rng_state(), state)
    moved = interactions(model, images, **{**options, "seed": 4})
    assert abs(moved.samples - plain.samples).max() > 1e-3


def test_the_model_is_left_as_it_was_also_after_an_exception():
    model = timm.create_model("test_convnext", num_classes=5, drop_path_rate=0.5)
    model.train()
    model.stem.eval()
    model.head.fc.weight.requires_grad_(False)
    model.head.fc.bias.grad = torch.ones(5)

    def state():
        return (
            [m.training for m in model.modules()],
            [p.requires_grad for p in model.parameters()],
            [None if p.grad is None else p.grad.clone() for p in model.parameters()][-1],
            [len(m._forward_hooks) for m in model.modules()],
        )

    before = state()
    images = torch.randn(2, 3, 32, 32)
    interactions(model, images, grid=2, pairs=1, contexts=2)
    calls = []
    handle = model.register_forward_pre_hook(lambda module, args: calls.append(1))
    model.head.fc.register_forward_hook(lambda *_: None if len(calls) < 2 else calls[99])
    hooked = [len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(IndexError):
        interactions(model, images, grid=2, pairs=1, contexts=2)
    handle.remove()
    after = state()
    assert after[:2] == before[:2]
    assert torch.equal(after[2], before[2])
    assert after[3] == hooked


def test_arguments_that_cannot_be_are_refused_with_the_way_out():
    model, images = network(), random_images()
    for error, match, options in (
        (ValueError, "grid of at most 6", {"grid": 7}),
        (ValueError, "grid must be from 2 to 32; got 1", {"grid": 1}),
        (ValueError, "contexts must be at least 2; got 1", {"contexts": 1}),
        (ValueError, "every entry of orders must be from 0.0 to 1; got 2", {"orders": (0, 2)}),
        (ValueError, "orders must be shares", {"orders": ()}),
        (ValueError, "baseline must be one of 'zero', 'mean'; got 'blur'", {"baseline": "blur"}),
        (ValueError, "reach must be at least 1", {"reach": 0}),
        (ValueError, "got 3 for 2 images", {"targets": [0, 0, 0]}),
        (ValueError, "targets must be below 4, the model's outputs; got 4", {"targets": [0, 4]}),
        (ValueError, "every target must be at least 0; got -1", {"targets": torch.tensor([0, -1])}),
        (TypeError, "every target must be an integer; got 0.5", {"targets": torch.tensor([0.5, 1])}),
    ):
        with pytest.raises(error, match=match):
            interactions(model, images, **{"grid": 3, **options})
    for targets, match in (([0], "there are 1, and more images"), ([0, 1, 2], "got 3 for 2 images")):
        with pytest.raises(ValueError, match=match):
            interactions(model, iter([images[:1], images[1:]]), grid=3, targets=targets)
    with pytest.raises(ValueError, match="images is empty"):
        interactions(model, [], grid=3)
    with pytest.raises(ValueError, match=r"Conv2d is a segmentation model: .* one score per class"):
        interactions(nn.Conv2d(3, 2, 1).double(), images, grid=3)
    with pytest.raises(ValueError, match="not finite"):
        interactions(OfPatches(lambda p: p[:, :2] / p[:, 2:3].sign().abs()), images, grid=3, targets=[0, 0])


def test_results_are_drawn_on_one_scale_and_saved(tmp_path):
    results = {
        f"model {seed}": interactions(
            network(), random_images(seed=seed), **{**ALL, "contexts": 4}, name=f"model {seed}"
        )
        for seed in range(2)
    }
    (axis,) = Interactions.draw(results).axes
    assert axis.get_ylim()[0] == 0
    assert len(axis.collections) == 2  # the bands
    lines = {line.get_label(): line for line in axis.lines}
    first = results["model 0"]
    assert lines["model 0"].get_xdata().tolist() == (first.orders / 7).tolist()
    assert lines["model 0"].get_ydata().tolist() == first.strength.tolist()
    with pytest.raises(TypeError, match="takes no options"):
        first.plot(log=True)
    for suffix in ("png", "json", "html"):
        assert save(results, tmp_path / f"i.{suffix}").stat().st_size > 1000
    assert first.to_dict()["strength"] == first.strength.tolist()
    assert len(first.rows()) == 8
    single = interactions(network(), random_images(1), grid=3, pairs=1, orders=(0, 1))
    assert np.isnan(single.strength_error).all()
    assert "±" not in single.rows()[0]["J"]
    assert single.to_dict()["strength_error"] == [None, None]
    single.plot()


def test_words_hold_the_orders_and_what_the_sampling_leaves_open():
    found = interactions(network(), random_images(), **ALL, name="net")
    order = found.strength.argsort()
    named = {
        0: "none of the 7 other patches",
        7: "all 7 other patches",
        **{m: f"{m} of 7 other patches" for m in range(1, 7)},
    }
    least, most = int(order[0]), int(order[-1])
    words = Interactions.reading({"net": found})
    strong, weak = (found.rows()[order]["J"] for order in (most, least))
    assert words.startswith(
        f"net: two patches interact the most with {named[most]} as context (J {strong}), and the least with "
        f"{named[least]} as context (J {weak})."
    )
    assert "contexts would narrow them" not in words  # all contexts were seen
    apart = replace(found, lower=np.where(np.arange(8) < 3, -1.0, found.lower))
    assert "For 3 of 8 sizes of context the bounds of |I| are more than 3 times apart" in apart.summary()
    close_ones = replace(found, strength=np.linspace(1, 1.1, 8), strength_error=np.full(8, 0.05))
    assert "The two differ by no more than twice their error, so this may be chance." in close_ones.summary()
    clear = replace(close_ones, strength=np.linspace(1, 2, 8))
    assert "chance" not in clear.summary()


def test_words_on_nothing_one_order_and_one_pair():
    nothing = interactions(
        OfPatches(lambda p: p.sum(1, keepdim=True)), random_images(1), **{**ALL, "contexts": 3}, name="sum"
    )
    assert nothing.summary().splitlines()[0] == (
        "sum: no interaction between two patches exceeds the rounding of the model's outputs."
    )
    one = interactions(network(), random_images(1), grid=3, pairs=2, orders=(0.5,))
    assert "J is 1 there by definition." in one.summary()
    pair = interactions(network(), random_images(1), grid=3, pairs=1, orders=(0, 1))
    assert "One pair of patches gives no error: the order may be chance." in pair.summary()
