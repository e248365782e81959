"""``widefield bench mixers`` on a map of a few pixels."""

import json

import pytest

from widefield import cli


def test_bench_mixers_compares_with_the_convolution(tmp_path, capsys):
    words = "bench mixers --mixers lka pooling --size 32 --batch-size 1 --repeats 2 --budget 0.01 --out"
    assert cli.main([*words.split(), str(tmp_path)]) == 0
    result = json.loads((tmp_path / "mixers_cpu.json").read_text())
    rows = result["tables"]["Token mixers"]
    assert [row["mixer"] for row in rows] == ["conv", "lka", "pooling"]
    for row in rows:
        assert row["inference_ratio"] == pytest.approx(rows[0]["inference"]["p50"] / row["inference"]["p50"])
        assert row["images_per_s"] == pytest.approx(1 / row["inference"]["p50"])
    assert rows[0]["step_ratio"] == 1
    assert rows[2]["parameters"] < rows[0]["parameters"] < rows[1]["parameters"]
    assert "conv / this, step" in (tmp_path / "mixers_cpu.md").read_text()
    assert "pooling" in capsys.readouterr().out


def test_unknown_mixers_are_refused(capsys):
    assert cli.main(["bench", "mixers", "--mixers", "lca"]) == 1
    assert "Did you mean 'lka'" in capsys.readouterr().err
