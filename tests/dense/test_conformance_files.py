"""Every published number in the fixtures is met, and the script that checks files finds what does not fit."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dense import conformance, segmentation_checks
from dense.rules import Differences

FOLDER = Path(__file__).parents[1] / "fixtures" / "conformance" / "dense"
FILES = sorted(FOLDER.glob("*.json"))
WHOLE = ("upernet_convnext_tiny",)
"""Files of whole models, which take minutes."""


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow) if path.stem in WHOLE else path for path in FILES],
    ids=lambda path: path.stem,
)
def test_every_number_agrees(path):
    differences = conformance.check(path)
    assert not differences.lines, "\n".join(differences.lines)
    assert differences.compared > 5


def test_counts_of_a_whole_model():
    document = json.loads((FOLDER / f"{WHOLE[0]}.json").read_text())
    with torch.device("meta"):
        model = segmentation_checks.built_upernet(document)
    assert sum(p.numel() for p in model.parameters()) == document["params"]
    differences = Differences()
    segmentation_checks.check_macs("macs_512x2048", model.double().eval(), document["macs_512x2048"], differences)
    assert not differences.lines
    assert differences.compared == 3


def _values(entry, path=()):
    """Yield (path, value) of the numbers and texts of a fixture."""
    pairs = entry.items() if isinstance(entry, dict) else enumerate(entry) if isinstance(entry, list) else ()
    if not isinstance(entry, (dict, list)):
        yield path, entry
    for key, value in pairs:
        yield from _values(value, (*path, key))


def _changed(document, path, value):
    twin = copy.deepcopy(document)
    place = twin
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return twin


def _results(name, *skipped):
    """Return a fixture and the paths of the results in it."""
    document = json.loads((FOLDER / f"{name}.json").read_text())
    paths = [
        path
        for path, value in _values(document)
        if isinstance(value, (int, float)) and not {"config", "fp32_max_abs_diff", *skipped} & set(path)
    ]
    return document, paths


def _found(document, tmp_path):
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(document))
    return conformance.check(path).lines


@pytest.mark.parametrize("name", ["fcn_head_aux", "uper_head"])
def test_a_changed_number_is_found(name, tmp_path):
    document, paths = _results(name, "feature_shapes", "label_size")
    for path in paths[:: max(1, len(paths) // 12)]:
        value = document
        for key in path:
            value = value[key]
        lines = _found(_changed(document, path, value + (1 if isinstance(value, int) else 1e-6)), tmp_path)
        assert len(lines) >= 1, f"a change of {path} went unseen"


def test_unknown_fields_and_files_are_errors(tmp_path):
    document, _ = _results("fcn_head_aux")
    assert "'surprise' is unknown" in _found({**document, "surprise": 3}, tmp_path)[0]
    twin = copy.deepcopy(document)
    twin["runs"][0]["losses"]["loss_new"] = 1.0
    assert "'loss_new' is unknown" in _found(twin, tmp_path)[0]
    twin = copy.deepcopy(document)
    twin["config"]["type"] = "NewHead"
    assert "kind of this file is unknown" in _found(twin, tmp_path)[0]


def test_the_script_reports_and_exits(tmp_path, capsys):
    good = FOLDER / "fcn_head_aux.json"
    bad = tmp_path / "bad.json"
    bad.write_text('{"model": "something_else"}')
    assert conformance.main([str(good)]) == 0
    assert "fcn_head_aux.json: ok" in capsys.readouterr().out
    command = [sys.executable, conformance.__file__, bad, tmp_path / "absent.json", good]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1, result.stderr
    assert "bad.json: FAILED" in result.stdout
    assert "the kind of this file is unknown" in result.stdout
    assert "absent.json: FAILED" in result.stdout
    assert "fcn_head_aux.json: ok" in result.stdout
