"""The table of all bars is that of the committed results."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from scripts import load_script
from widefield import report
from widefield.benchmarks.record import bar, publish


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("benchmarks/bars.py")


def test_the_table_of_bars_is_that_of_the_results(script: ModuleType) -> None:
    """If it fails, results were measured again: run python benchmarks/bars.py."""
    rows = script.rows_of(script.RESULTS)
    assert (script.RESULTS / "bars.md").read_text(encoding="utf-8") == report.markdown(rows)


def test_bars_are_those_that_scripts_write_but_not_of_earlier_versions(script: ModuleType, tmp_path: Path) -> None:
    rows = [{"label": "a", "x": 2.0}, {"label": "b", "x": 3.0}]
    bars = [bar("least", rows, lambda row: row["x"], at_least=1), bar("most", rows, lambda row: row["x"], at_most=2.5)]
    publish(tmp_path / "new_cpu", "python x.py", {"rows": rows}, "text", bars=bars)
    publish(tmp_path / "new_cpu_before", "python x.py", {"rows": rows}, "text", bars=bars)
    publish(tmp_path / "plain_cpu", "python x.py", {"rows": rows}, "text")
    found = script.rows_of(tmp_path)
    assert [(row["results"], row["bar"], row["limit"], row["measured"], row["verdict"]) for row in found] == [
        ("new_cpu", "least", ">= 1", "2", "met"),
        ("new_cpu", "most", "<= 2.5", "3", "not met"),
    ]
    document = json.loads((tmp_path / "new_cpu.json").read_text(encoding="utf-8"))
    assert found[0]["date"] == document["environment"]["date"]
    assert report.markdown([each.formatted() for each in bars]) in (tmp_path / "new_cpu.md").read_text(encoding="utf-8")
