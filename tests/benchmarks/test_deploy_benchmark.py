"""``widefield bench deploy`` on images of a few pixels."""

import json

import pytest

from widefield import cli
from widefield.benchmarks import deploy


@pytest.fixture
def small_networks(monkeypatch):
    create = deploy.timm.create_model
    small = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
    monkeypatch.setattr(deploy.timm, "create_model", lambda name: create(name, num_classes=5, **small))


@pytest.mark.slow
def test_bench_deploy_compares_with_the_plain_network(tmp_path, capsys, small_networks):
    words = "bench deploy --size 32 --batch-size 2 --repeats 2 --budget 0.01 --out"
    assert cli.main([*words.split(), str(tmp_path)]) == 0
    result = json.loads((tmp_path / "deploy_cpu.json").read_text())
    rows = {row["form"]: row for row in result["tables"]["In onnxruntime and eager"]}
    assert list(rows) == ["plain", "branches", "per-sample", "specialized"]
    for row in rows.values():
        ratio = rows["plain"]["onnxruntime"]["p50"] / row["onnxruntime"]["p50"]
        assert row["onnxruntime_ratio"] == pytest.approx(ratio)
        assert row["difference"] <= 1e-4
    assert rows["plain"]["parameters"] < rows["specialized"]["parameters"] < rows["branches"]["parameters"]
    assert [bar["text"] for bar in result["summary"]] == ["plain / specialized, onnxruntime"]
    assert "specialized" in capsys.readouterr().out


def test_what_it_cannot_measure_is_refused(capsys):
    assert cli.main(["bench", "deploy", "--names", "morf_convnet_tiny"]) == 1
    assert "Did you mean 'morf_convnext_tiny'" in capsys.readouterr().err
    assert cli.main(["bench", "deploy", "--dtype", "bfloat16"]) == 1
    assert "exports are measured on the CPU in float32" in capsys.readouterr().err
