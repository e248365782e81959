"""The sweep over other libraries' models: it separates refusals from failures, enforces limits, and continues."""

import json

import pytest
import sweep
import torch
from checks import FRESH, KEEPING, TOLERANCE, WrongError, run
from subjects import Subject, subject
from torch import nn

NOT_TRIM = (*(f"convert {name}" for name in KEEPING | FRESH), "class activation", "stability", "export", "quantize")
"""Verbs to skip where trimming alone is tested."""


class Stubborn(nn.Module):
    """A network that every verb rejects, for a specific reason."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise KeyError("not an error of ours")


def verdicts(tested: Subject, skip: tuple[str, ...] = ()) -> dict[str, tuple[str, str]]:
    return {row["verb"]: (row["status"], row["detail"]) for row in run(tested, skip)}


def test_a_small_network_passes_every_verb_or_is_refused_with_a_reason():
    found = verdicts(subject("timm:test_byobnet"))
    assert found["convert MoRF"][0] == found["gradients MoRF"][0] == found["reparameterize MoRF"][0] == "pass"
    assert found["convert FastDepthwise"] == ("refused", found["convert FastDepthwise"][1])
    assert "is not depthwise" in found["convert FastDepthwise"][1]
    assert not [verb for verb, (status, _) in found.items() if status == "failed"]


def test_what_is_not_a_sentence_of_ours_is_a_failure():
    found = verdicts(Subject("stubborn", Stubborn().eval(), torch.ones(1, 3, 8, 8), lambda model: model(torch.ones(1))))
    assert found["convert MoRF"][0] == "refused"  # it has no convolution
    assert found["count"] == ("failed", found["count"][1])
    assert "not an error of ours" in found["count"][1]


def test_a_wrong_result_is_a_failure(monkeypatch):
    tested = subject("timm:test_byobnet")
    monkeypatch.setattr("widefield.trim", lambda model, *rest, **options: nn.Sequential(model, nn.Softmax(1)))
    status, detail = verdicts(tested, NOT_TRIM)["trim"]
    assert status == "failed"
    assert WrongError.__name__ in detail
    assert 0 < TOLERANCE <= 1e-4


def test_a_model_that_takes_too_long_or_too_much_is_ended(tmp_path):
    late = sweep.measure("timm:test_byobnet", seconds=0.5, gib=8)
    assert [check["status"] for check in late["checks"]][-1] == "timeout"
    large = sweep.measure("timm:test_byobnet", seconds=60, gib=0.01)
    assert [check["status"] for check in large["checks"]] == ["memory"]


def test_it_goes_on_where_it_stopped_and_prints_a_table(tmp_path, capsys):
    results = tmp_path / "results.jsonl"
    checks = [
        {"verb": "trim", "status": "pass", "detail": "0e+00", "seconds": 1.0},
        {"verb": "export", "status": "refused", "detail": "ValueError: VGG has 3 layers.x: too many", "seconds": 1.0},
        {"verb": "after export", "status": "timeout", "detail": ""},
    ]
    row = {
        "model": "timm:vgg11",
        "commit": "0",
        "date": "2026-01-01",
        "machine": "-",
        "seconds": 60.0,
        "checks": checks,
    }
    results.write_text(json.dumps(row) + "\n")
    assert sweep.main(["timm:vgg11", "--results", str(results)]) == 1  # nothing to run, and one failure
    printed = capsys.readouterr()
    assert "1 models, 0 to run" in printed.err
    assert "| trim | 1 |" in printed.out
    assert "| export | refused | … has # … | 1: timm:vgg11 |" in printed.out
    assert "| timm:vgg11 | after export | timeout:" in printed.out
    assert sweep.read(results)["timm:vgg11"] == row


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["timm:test_vit", "timm:test_efficientnet", "torchvision:fasterrcnn_mobilenet_v3_large_320_fpn",
     "torchvision:lraspp_mobilenet_v3_large", "torchvision:mc3_18"],
)  # fmt: skip
def test_one_of_each_kind_has_no_failure(name):
    row = sweep.measure(name, seconds=600, gib=10)
    assert not [check for check in row["checks"] if check["status"] in sweep.BAD]
