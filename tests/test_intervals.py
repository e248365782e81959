"""Intervals and the test of equality, against known distributions."""

from __future__ import annotations

import numpy as np
import pytest

from widefield._intervals import bootstrap_means, equality, interval, paired


def test_the_interval_is_that_of_a_normal_mean() -> None:
    values = np.random.default_rng(0).normal(3, 2, 4000)
    found = interval(values)
    half = 1.96 * values.std() / 4000**0.5
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(found.mean - half, abs=0.06 * half)
    assert found.high == pytest.approx(found.mean + half, abs=0.06 * half)
    assert found.images == 4000
    assert found.excludes_zero


def test_intervals_cover_as_often_as_they_say() -> None:
    generator = np.random.default_rng(1)
    covered = [(lambda i: i.low <= 0 <= i.high)(interval(generator.normal(0, 1, 60), seed)) for seed in range(150)]
    assert 0.90 <= np.mean(covered) <= 0.98


def test_pairing_removes_what_images_share() -> None:
    generator = np.random.default_rng(2)
    shared = generator.normal(0, 10, 500)
    found = paired(shared + 0.1 + generator.normal(0, 0.1, 500), shared)
    assert 0.08 < found.low < 0.1 < found.high < 0.12


def test_missing_values_are_left_out_and_none_is_an_error() -> None:
    assert interval([1.0, np.nan, 3.0]).images == 2
    with pytest.raises(ValueError, match="at least one finite value"):
        interval([np.nan])


def test_resamples_are_the_same_for_all_rows() -> None:
    values = np.random.default_rng(3).normal(size=(2, 40))
    means = bootstrap_means(values, draws=500)
    assert means.shape == (2, 500)
    np.testing.assert_allclose(bootstrap_means(values[1], draws=500), means[1])


def test_equality_rejects_as_often_as_it_should_and_sees_a_difference() -> None:
    generator = np.random.default_rng(4)
    rejected = []
    for seed in range(60):
        shared = generator.normal(0, 3, 100)
        rejected.append(equality(shared + generator.normal(0, 1, (4, 100)), seed) < 0.05)
    assert np.mean(rejected) <= 0.15
    shared = generator.normal(0, 3, 100)
    rows = shared + generator.normal(0, 1, (4, 100)) + np.array([[0], [0], [0], [0.8]])
    assert equality(rows) < 0.01
    assert equality(rows[:1]) == 1.0
