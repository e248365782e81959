"""Every number of the official codes of FCMAE, SparK, SimMIM and A2MIM is met, and the script finds what differs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from masking import conformance

FOLDER = Path(__file__).parents[1] / "fixtures" / "conformance" / "mim"
FILES = sorted(FOLDER.glob("*.json"))
QUICK = ("spark_convnext_mini",)


@pytest.mark.parametrize(
    "path",
    [path if path.stem in QUICK else pytest.param(path, marks=pytest.mark.slow) for path in FILES],
    ids=lambda path: path.stem,
)
def test_every_number_agrees(path):
    differences = conformance.check(path)
    assert not differences.lines, "\n".join(differences.lines)
    assert differences.compared > 50


def test_one_run_of_fcmae_agrees(tmp_path):
    document = json.loads((FOLDER / "fcmae_convnextv2_atto.json").read_text())
    run = document["runs"][0]
    document["runs"] = [{name: value for name, value in run.items() if name not in ("grn_batch", "grn_jax")}]
    path = tmp_path / "one.json"
    path.write_text(json.dumps(document))
    differences = conformance.check(path)
    assert not differences.lines, "\n".join(differences.lines)
    assert differences.compared > 10


def test_the_script_finds_what_differs(tmp_path):
    document = json.loads((FOLDER / "spark_convnext_mini.json").read_text())
    document["runs"] = document["runs"][:1]
    document["runs"][0]["eval"]["loss"] *= 1 + 1e-7
    document["runs"][0]["train"]["grad_l2"]["mask_tokens.0"] += 1e-6
    document["runs"][0]["train"]["unknown"] = 1.0
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(document))
    lines = conformance.check(path).lines
    assert [line.split(":")[0] for line in lines] == [
        "runs[0].eval.loss", "runs[0].train.grad_l2.mask_tokens.0", "runs[0].train",
    ]  # fmt: skip


def test_the_script_refuses_unknown_files(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"method": "mae"}')
    script = Path(conformance.__file__)
    done = subprocess.run([sys.executable, script, path], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "the kind of this file is unknown; known are fcmae, spark, simmim, a2mim" in done.stdout
    assert conformance.main([]) == 2
