"""The script of the table of whole networks: rows, bars, what is kept of an earlier run, and the stock networks."""

import copy
import os
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import widefield.models  # noqa: F401
from tolerances import NETWORK, close
from widefield.nn import DCNv3, DepthwiseConv2d

SCRIPTS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import whole_models

    return whole_models


@pytest.fixture
def children(script):
    return sys.modules["whole_children"]


SECONDS = {
    "timm, channels_last": [1.0, 1.1, 1.2],
    "timm, NCHW": [3.0],
    "torchvision, channels_last": [2.0, 2.0, 2.0],
    "torchvision, NCHW": [0.9, 1.0, 1.1],
    "ours, channels_last": [1.0, 1.0, 1.0],
    "ours, NCHW": [0.5, 0.5, 0.5],
}


MADE = {"took_s": 60.0, "date": "2026-11-30 08:00", "commit": "abc"}


def part(ratio, stock=100, ours=100):
    names = {"stock": "timm, NCHW", "ours": "ours, channels_last"}
    times = {f"{name}, {layout}": 20.0 for name in ("timm", "ours") for layout in ("NCHW", "channels_last")}
    memory = {"stock": stock * 2**20, "ours": ours * 2**20}
    return {**names, "ratio": ratio, "ms": times, "rounds": dict.fromkeys(times, 3), "memory": memory, **MADE}


def row(title, **parts):
    return {"label": title, "batch": 2, "size": 32, **parts}


def test_the_better_layout_counts_on_both_sides(script):
    found = script.compared(SECONDS)
    assert (found["stock"], found["ours"]) == ("torchvision, NCHW", "ours, NCHW")
    assert found["ratio"] == pytest.approx(2.0)
    assert found["rounds"]["timm, NCHW"] == 1


def test_bars_take_the_worst_row_that_was_measured(script):
    rows = [
        row("VAN-B2", inference=part(1.2, ours=80), step=part(0.9)),
        row("SLaK-T", inference=part(0.97, ours=120), step={"missing": "it failed", **MADE}),
    ]
    speed, memory, step, step_memory = script.bars_of(rows)
    assert (speed.measured, speed.verdict, speed.where) == (0.97, "met", "SLaK-T")
    assert (memory.measured, memory.verdict, memory.where) == (pytest.approx(1.2), "not met", "SLaK-T")
    assert (step.measured, step.verdict, step.where) == (0.9, "not met", "VAN-B2")
    assert step_memory.verdict == "met"
    assert {bar.verdict for bar in script.bars_of([])} == {"not measured"}


def test_tables_say_what_failed_and_what_was_not_run(script):
    rows = [
        row(
            "VAN-B2",
            inference=part(1.234),
            **{
                "onnxruntime": {"missing": "no such operator", **MADE},
                "OpenVINO": {"ratio": 0.8, "memory": 2**20, **MADE},
            },
        )
    ]
    cells = script.speeds(rows[0])
    assert cells["eager"] == "1.23 (timm)"
    assert (cells["onnxruntime"], cells["OpenVINO"], cells["torch.compile, ours"]) == ("failed", "0.80", "not run")
    assert cells["step: eager"] == "-"
    assert script.memories(rows[0])["OpenVINO"] == "1"
    text = script.text_of(rows)
    assert "- VAN-B2, onnxruntime: no such operator" in text
    assert "| VAN-B2 | inference | ours | 20 | 20 |" in text
    assert "From 2026-11-30 08:00 to 2026-11-30 08:00 UTC, 3 minutes in all, at abc" in text


def test_a_run_keeps_what_it_does_not_measure(script, children, monkeypatch, tmp_path):
    kept = row("ConvNeXt-T", inference=part(1.1))
    script.write(tmp_path, "before", [row("VAN-B2", inference=part(1.0), step=part(1.0)), kept])
    answers = iter([{"seconds": SECONDS, "difference": None, "parameters": 5}, 100, 200])
    monkeypatch.setattr(children, "in_child", lambda *_, **__: next(answers))
    words = ["--models", "VAN-B2", "--parts", "step", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["whole_models.py", *words])
    script.main()
    first, second = script.read(tmp_path / "whole_models_cpu.json")  # in the order of the table
    assert first == kept
    assert second["inference"] == part(1.0)
    assert second["step"]["ratio"] == pytest.approx(2.0)
    assert second["step"]["memory"] == {"stock": 100, "ours": 200}


def test_what_fails_becomes_a_row_with_its_reason(script, children, monkeypatch):
    def fails(*_, **__):
        raise children.FailedError("not done within 3 s")

    monkeypatch.setattr(children, "in_child", fails)
    limits = script.Limits(1.0, 3.0, 3.0)
    found = script.measured(0, "OpenVINO", limits, row("ConvNeXt-T", inference=part(1.0)), "folder")
    assert found["OpenVINO"]["missing"] == "not done within 3 s"
    assert "was not measured" in script.measured(0, "OpenVINO", limits, None, "folder")["OpenVINO"]["missing"]


def test_a_layout_that_is_hopeless_is_called_once(children, monkeypatch):
    now, counts = [0.0], dict.fromkeys(("timm, NCHW", "timm, channels_last", "ours, NCHW"), 0)
    monkeypatch.setattr(time, "process_time", lambda: now[0])
    seconds = {"timm, NCHW": 9.0, "timm, channels_last": 4.0, "ours, NCHW": 15.0}

    def call(name):
        now[0] += seconds[name]
        counts[name] += 1

    calls = {name: (lambda name=name: call(name)) for name in seconds}
    found = children.measured(calls, 1.0, pairs=True)
    assert counts == {"timm, NCHW": 1, "timm, channels_last": 4, "ours, NCHW": 4}
    assert found == {name: [seconds[name]] * max(1, counts[name] - 1) for name in seconds}


def test_stock_networks_compute_the_same_without_our_operators(script):
    networks = sys.modules["whole_networks"]
    x = torch.randn(1, 3, 64, 64)
    for name in ("van_b0", "internimage_t"):
        model = timm.create_model(name, depths=(1, 1, 1, 1)).eval()
        for layer in model.modules():
            if isinstance(layer, DCNv3):
                nn.init.normal_(layer.offset.weight, std=0.1)
        stock = networks.plain(copy.deepcopy(model))
        assert not any(isinstance(layer, DepthwiseConv2d) for layer in stock.modules())
        assert {layer.backend for layer in stock.modules() if isinstance(layer, DCNv3)} <= {"grid"}
        with torch.no_grad():
            close(stock(x), model(x), NETWORK)


@pytest.mark.slow
def test_a_child_that_fails_says_why(children):
    with pytest.raises(children.FailedError, match="ValueError: invalid literal"):
        children.in_child(int, "x", timeout_s=300)
    with pytest.raises(children.FailedError, match="ended with code 3"):
        children.in_child(os._exit, 3, timeout_s=300)
    with pytest.raises(children.FailedError, match="not done within"):
        children.in_child(time.sleep, 60, timeout_s=0.1)
    assert children.in_child(int, "5", timeout_s=300) == 5
