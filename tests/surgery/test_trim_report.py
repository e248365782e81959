"""The report of trim: rows, totals, and JSON."""

import json

import torch
from test_trim import masked, reported, stack
from torch import nn


def test_the_report_is_rows_and_numbers():
    model = stack(masked(nn.Conv2d(3, 4, 9, padding=4), 0.7), nn.Conv2d(4, 4, 4, 4)).float()
    trimmed, report = reported(model, 0.01, example_input=(16, 18))
    found = json.loads(json.dumps(report.to_dict()))
    assert found["input_size"] == [16, 18]
    assert found["kernels"][0]["before"] == [9, 9]
    assert found["kernels"][0]["after"] == list(report.kernels[0].after)
    rows = report.rows()
    assert rows[0]["kernel"].startswith("9x9 -> ")
    assert rows[1]["left because"].startswith("its padding of (0, 0)")
    assert rows[0]["layer"] in str(report)
    assert "1 of 2 kernels cropped" in report.summary()
    parameters = [sum(p.numel() for p in each.parameters()) for each in (model, trimmed)]
    totals = report.totals()
    assert (totals["cropped"], totals["still larger"]) == ("1 of 2", "0")
    assert totals["parameters"] == f"{parameters[0]:,} -> {parameters[1]:,}"
    assert totals["MACs"] == f"{report.macs_before / 1e6:.4g}M -> {report.macs_after / 1e6:.4g}M"
    assert "top-1" not in totals
    _, report = reported(model, 0.0, loader=[torch.randn(2, 3, 16, 16)], limit=3)
    totals = report.totals()
    assert totals["cropped to 3"] == "1 of 2"
    assert totals["still larger"] == "1"
    assert totals["change (RMS)"] == f"{report.change.rms:.2g}"
