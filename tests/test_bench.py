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
    assert order == ["s", "l"] * 6
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
