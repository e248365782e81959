"""The additive model, the exact front, and the choice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from widefield.fitting.choose import (
    additive,
    check_limit,
    decide,
    finalists,
    first_readings,
    front,
    pareto_front,
    relative_costs,
)
from widefield.fitting.groups import Group, Groups, Layer


def made(*sizes: tuple[int, ...], own: int = 7) -> Groups:
    return Groups(
        tuple(
            Group(f"stage {place + 1}", (Layer(f"l{place}", f"l{place}", 32, 32),), own, options)
            for place, options in enumerate(sizes)
        )
    )


@st.composite
def tables(draw: st.DrawFn) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, float]]]:
    groups = draw(st.integers(1, 6))
    number = st.integers(0, 40)
    losses, costs = {}, {}
    for place in range(groups):
        options = draw(st.integers(1, 5))
        losses[f"g{place}"] = {3 + 2 * i: draw(number) / 8 for i in range(options)}
        costs[f"g{place}"] = {3 + 2 * i: draw(number) / 8 for i in range(options)}
    return losses, costs


@settings(max_examples=40, deadline=None)
@given(tables(), st.integers(0, 200))
def test_the_front_holds_the_optimum_of_every_budget(tables: tuple[dict, dict], eighths: int) -> None:
    losses, costs = tables
    points = pareto_front(losses, costs)
    budget = eighths / 8
    values = np.array([losses[g][s] for g in losses for s in losses[g]])
    weights = np.array([costs[g][s] for g in costs for s in costs[g]])
    owner = np.repeat(np.arange(len(losses)), [len(row) for row in losses.values()])
    one_each = LinearConstraint((owner[None] == np.arange(len(losses))[:, None]).astype(float), 1, 1)
    limited = LinearConstraint(weights[None], -np.inf, budget)
    best = milp(values, constraints=[one_each, limited], integrality=np.ones(len(values)), bounds=Bounds(0, 1))
    within = [loss for _, cost, loss in points if cost <= budget]
    assert bool(within) == best.success
    if within:
        assert min(within) == pytest.approx(best.fun, abs=1e-9)
    for sizes, cost, loss in points:
        assert cost == pytest.approx(sum(costs[g][s] for g, s in zip(costs, sizes, strict=True)))
        assert loss == pytest.approx(sum(losses[g][s] for g, s in zip(losses, sizes, strict=True)))
    assert [p[1] for p in points] == sorted({p[1] for p in points})
    assert [p[2] for p in points] == sorted({p[2] for p in points}, reverse=True)


def test_many_equal_layers_have_a_short_front() -> None:
    sizes = {3: 0.3, 5: 0.2, 7: 0.15, 11: 0.1}
    table = {f"layer {i}": sizes for i in range(60)}
    costs = {name: {3: 0.001, 5: 0.0017, 7: 0.0031, 11: 0.0077} for name in table}
    points = pareto_front(table, costs)
    assert points[0][0] == (3,) * 60
    assert points[-1][0] == (11,) * 60
    assert len(points) < 5000


def test_the_additive_model_recovers_a_sum() -> None:
    groups = made((3, 5, 7), (3, 7, 11), (5, 7))
    generator = np.random.default_rng(0)
    effects = {g.name: {s: 0.0 if s == 7 else float(generator.normal()) for s in g.sizes} for g in groups}
    keys = first_readings(groups, 9, 0)
    readings = {key: 2 + sum(effects[g.name][s] for g, s in zip(groups, key, strict=True)) for key in keys}
    found = additive(readings, groups)
    assert found.unchanged == pytest.approx(2)
    assert found.explained == pytest.approx(1)
    for name, row in effects.items():
        assert found.effects[name] == pytest.approx(row)


def test_first_readings_are_all_if_there_are_few_and_seeded_if_there_are_many() -> None:
    few = made((3, 7), (5, 7))
    assert sorted(first_readings(few, 64, 0)) == sorted(itertools.product((3, 7), (5, 7)))
    many = made(*[(3, 5, 7, 11)] * 6)
    keys = first_readings(many, 40, 0)
    assert len(keys) == len(set(keys)) == 40
    assert keys[0] == (7,) * 6
    for size in (3, 5, 11):
        assert (size,) * 6 in keys
        assert (7, 7, size, 7, 7, 7) in keys
    assert keys == first_readings(many, 40, 0)
    assert keys != first_readings(many, 40, 1)


def losses(means: dict[tuple[int, ...], float], noise: float = 0.01, images: int = 400) -> dict:
    generator = np.random.default_rng(1)
    shared = generator.normal(0, 1, images)  # images differ much more than sizes do
    return {key: (mean + shared + generator.normal(0, noise, images)).tolist() for key, mean in means.items()}


COSTS = {"stage 1": {3: -0.3, 5: -0.15, 7: 0.0, 11: 0.4}}


@pytest.mark.parametrize(
    ("means", "limit", "chosen", "matters"),
    [
        ({3: 2.0, 5: 1.5, 7: 1.0, 11: 1.0}, None, 7, True),  # the cheaper of two equals
        ({3: 2.0, 5: 1.5, 7: 1.0, 11: 0.5}, None, 11, True),
        ({3: 2.0, 5: 1.5, 7: 1.0, 11: 0.5}, 1.0, 7, True),
        ({3: 0.5, 5: 0.7, 7: 1.0, 11: 1.2}, 1.0, 3, True),
        ({3: 1.0, 5: 1.0, 7: 1.0, 11: 1.0}, None, 3, False),
        ({3: 1.004, 5: 1.003, 7: 1.001, 11: 1.0}, None, 3, False),  # measurable, and too small to count
    ],
)
def test_the_choice(means: dict[int, float], limit: float | None, chosen: int, matters: bool) -> None:
    groups = made((3, 5, 7, 11))
    found = decide(losses({(size,): mean for size, mean in means.items()}), groups, COSTS, limit, untrained=5.0)
    assert found.chosen == (chosen,)
    assert found.matters == matters


def test_nothing_matters_to_a_network_that_learned_nothing() -> None:
    groups = made((3, 5, 7, 11))
    means = {(3,): 2.3, (5,): 2.0, (7,): 2.1, (11,): 2.6}
    assert decide(losses(means), groups, COSTS, None, untrained=5.0).matters
    assert not decide(losses(means), groups, COSTS, None, untrained=1.9).matters


def test_practically_equal_costs_go_to_the_smaller_loss() -> None:
    groups = made((3, 5, 7))
    costs = {"stage 1": {3: -0.304, 5: -0.3, 7: 0.0}}
    found = decide(losses({(3,): 1.01, (5,): 1.0, (7,): 1.0}, noise=0.2), groups, costs, None, untrained=5.0)
    assert found.chosen == (5,)


def test_finalists_are_within_the_limit_or_references() -> None:
    groups = made((3, 5, 7, 11), (3, 5, 7, 11))
    costs = relative_costs({g.name: {s: float(s * s) for s in g.sizes} for g in groups}, 200.0, groups)
    means = {key: float(-sum(key)) for key in first_readings(groups, 16, 0)}
    points = front(additive(means, groups), costs, groups)
    keys = finalists(points, means, groups, 1.0, costs)
    for size in (3, 5, 7, 11):
        assert (size, size) in keys
    others = [key for key in keys if len(set(key)) > 1]
    assert others
    assert all(1 + sum(costs[g.name][s] for g, s in zip(groups, key, strict=True)) <= 1 + 1e-9 for key in others)


def test_a_limit_that_nothing_meets_is_refused_with_the_smallest_cost() -> None:
    check_limit(0.71, COSTS)
    check_limit(None, COSTS)
    with pytest.raises(ValueError, match=r"limit 0\.5: the cheapest costs 0\.700"):
        check_limit(0.5, COSTS)
