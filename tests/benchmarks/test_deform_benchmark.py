import json

import pytest
import torch

from tolerances import BFLOAT16, FLOAT32, NETWORK, close
from widefield.bench import Row
from widefield.benchmarks import Settings, deform

CASE = deform.Case(batch=2, channels=32, side=6)


@pytest.mark.parametrize("step", deform.STEPS)
def test_peers_compute_the_same(step):
    found = {name: call() for name, call in deform.calls(CASE, step).items()}
    assert set(found) == {"ours", "gather", "grid_sample", "deform_conv2d"}
    if step == "forward":
        for y in found.values():
            close(y, found["gather"], FLOAT32)
    else:
        for gradients in found.values():
            for actual, expected in zip(gradients, found["gather"], strict=True):
                close(actual, expected, NETWORK)  # grid_sample rounds positions twice


def test_peers_in_16_bits():
    case = deform.Case(2, 32, 6, torch.bfloat16)
    found = {name: call() for name, call in deform.calls(case, "forward").items()}
    for y in found.values():
        assert y.dtype == torch.bfloat16
        close(y, found["gather"], BFLOAT16)


def test_memory_is_counted_where_it_is_held():
    def call():
        large = torch.ones(1000, 1000)
        return (large + 1)[0].clone()

    peak, left = deform.held(call, "cpu")
    assert 8_000_000 <= peak < 8_100_000
    assert 4000 <= left < 5000
    rows = {step: deform.memory_row(CASE, step) for step in ("forward", "kept", "backward")}
    assert rows["kept"]["bytes"]["ours"] == 0  # except for its inputs, which existed before
    assert rows["kept"]["ratios"]["gather"] is None
    assert deform.MEMORY["gather / ours"](rows["kept"]) == "-"
    assert rows["kept"]["bytes"]["gather"] > rows["kept"]["bytes"]["grid_sample"] > 0
    output = 2 * 6 * 6 * 32 * 4
    assert all(count >= output for row in rows.values() if row["step"] != "kept" for count in row["bytes"].values())


def test_ratios_are_a_peers_over_ours(monkeypatch):
    times = {"ours": 2.0, "gather": 8.0, "grid_sample": 1.0, "deform_conv2d": 3.0}
    rows = {name: Row(name, p50, p50, p50, 2) for name, p50 in times.items()}
    monkeypatch.setattr(Settings, "measure", lambda *_, **__: rows)
    row = deform.time_row(CASE, "forward", Settings("test"))
    assert row["ratios"] == {"gather": 4, "grid_sample": 0.5, "deform_conv2d": 1.5}
    assert deform.TIME["gather / ours"](row) == "4.00"
    assert (row["groups"], row["label"]) == (2, "2 x 6x6 x 32, forward")


def test_a_run_measures_every_stage_and_writes_its_rows(tmp_path, capsys):
    bars = deform.run(Settings("bench deform", repeats=1, out=tmp_path), batch_size=1, side=8, width=16, stages=(1, 3))
    found = json.loads((tmp_path / "deform_cpu.json").read_text())["tables"]
    shapes = [(r["side"], r["channels"], r["step"]) for r in found["Time"]]
    assert shapes == [(8, 16, "forward"), (8, 16, "backward"), (2, 64, "forward"), (2, 64, "backward")]
    assert [r["step"] for r in found["Memory"]] == 2 * ["forward", "kept", "backward"]
    assert len(bars) == 8
    assert all(b.measured is not None for b in bars)
    assert "deform_conv2d / ours" in (tmp_path / "deform_cpu.md").read_text()
    assert "1 x 8x8 x 16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 24}, "multiple of 16.*; got 24"),
        ({"stages": (0,)}, "every entry of stages must be from 1 to 8; got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"side": 4}, "side must be at least 8; got 4"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        deform.run(Settings("test"), **arguments)
