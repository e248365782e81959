import time

import pytest

from widefield import bench


def test_rows_hold_the_percentiles_of_interleaved_calls():
    order = []
    rows = bench.measure(
        {"short": lambda: order.append("s"), "long": lambda: (order.append("l"), time.sleep(0.005))},
        repeats=4,
        warmup=2,
    )
    assert "".join(order) == "sllslsslslls"  # each comes first as often as last, and seldom twice
    assert rows["long"].repeats == 4
    assert rows["short"].p20 <= rows["short"].p50 <= rows["short"].p80
    assert rows["long"].p50 >= 0.005
    assert rows["long"].to_dict()["name"] == "long"


def test_environment_names_what_a_reader_needs():
    environment = bench.environment()
    assert {"device", "threads", "python", "torch", "timm", "widefield", "date"} <= environment.keys()


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="candidates is empty"):
        bench.measure({})
    with pytest.raises(ValueError, match="repeats must be at least 1; got 0"):
        bench.measure({"a": lambda: None}, repeats=0)


def test_a_budget_spares_repeats_but_leaves_two():
    rows = bench.measure({"slow": lambda: time.sleep(0.02), "fast": lambda: None}, repeats=6, budget_s=0.03)
    assert rows["slow"].repeats == 2
    assert rows["fast"].repeats == 6


def test_an_untimed_call_beyond_the_budget_counts():
    calls = []
    rows = bench.measure({"slow": lambda: (calls.append(0), time.sleep(0.02))}, repeats=6, budget_s=0.01)
    assert rows["slow"].repeats == len(calls) == 2


def test_short_calls_are_repeated_within_a_timing_and_rows_stay_seconds_of_one():
    calls = []
    rows = bench.measure({"short": lambda: (calls.append(0), time.sleep(0.001))}, repeats=3, shortest_s=0.01)
    assert rows["short"].repeats == 3
    assert 1 + 3 * 2 < len(calls) <= 1 + 3 * 2 * 10
    assert 0.001 <= rows["short"].p50 < 0.01
