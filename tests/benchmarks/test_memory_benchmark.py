"""``widefield bench memory`` on small images."""

import json

import pytest
import torch

from widefield import cli
from widefield.benchmarks.memory import Case, Step, bars_of, build, row_of
from widefield.nn import DepthwiseConv2d, MoRFConv2d

MIB = 2**20


def test_networks_of_cases():
    plain = build(Case("convnext_tiny", 1, 32, "11x11, ours"))
    layers = [m for m in plain.modules() if isinstance(m, DepthwiseConv2d)]
    assert len(layers) == 18
    assert {m.kernel_size for m in layers} == {(11, 11)}
    branches = build(Case("morf_convnext_tiny", 1, 32, "mixture as branches", recomputes=True))
    assert {m.backend for m in branches.modules() if isinstance(m, MoRFConv2d)} == {"branches"}
    assert all(stage.grad_checkpointing for stage in branches.stages)


def test_bars_take_the_worst_mixture_and_the_worst_family():
    base = Step(100 * MIB, 300 * MIB, 50 * MIB)
    mixed = [
        row_of(Case("n", 8, side, "mixture"), Step(0, peak * MIB, 0), base) for side, peak in ((32, 210), (64, 230))
    ]
    other = row_of(Case("n", 8, 32, "mixture as branches"), Step(0, 900 * MIB, 0), base)
    again = row_of(Case("n", 8, 32, recomputes=True), Step(0, 100 * MIB, None), base)
    met, recomputed = bars_of([*mixed, other], [row_of(Case("n", 8, 32), base, base), again])
    assert (met.measured, met.verdict, met.where) == (pytest.approx(1.15), "not met", "mixture, 64x64")
    assert (recomputed.measured, recomputed.verdict) == (pytest.approx(0.5), "met")


@pytest.mark.slow
def test_each_row_is_a_process_of_its_own(tmp_path):
    threads = torch.get_num_threads()
    words = ["bench", "memory", "--sizes", "64", "--batch-size", "2", "--layers", "--families", "van_b0"]
    assert cli.main([*words, "--out", str(tmp_path)]) == 0
    assert torch.get_num_threads() == threads
    result = json.loads((tmp_path / "memory_cpu.json").read_text())
    plain, again = result["tables"]["Gradient checkpointing"]
    assert 0 < again["added"] < plain["added"] < plain["peak"]
    assert plain["kept"] > 0
    assert again["kept"] is None
    assert result["summary"][1]["verdict"] in ("met", "not met")


def test_what_it_cannot_measure_is_refused(capsys):
    assert cli.main(["bench", "memory", "--dtype", "bfloat16"]) == 1
    assert "resident memory in float32" in capsys.readouterr().err
    assert cli.main(["bench", "memory", "--families", "van_b9"]) == 1
    assert "no model is called 'van_b9'" in capsys.readouterr().err
