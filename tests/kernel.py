"""Run code in the kernel of a notebook."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest


def execute(notebook: Any, folder: Path, seconds: int = 300) -> Any:
    """Run all cells of a notebook in a fresh kernel, and return it with its outputs; an error raises."""
    nbclient = pytest.importorskip("nbclient")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the client's sockets and event loops
        client = nbclient.NotebookClient(
            notebook, timeout=seconds, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
        )
        return client.execute()


def run_cells(cells: Sequence[str], folder: Path) -> list[list[Any]]:
    """Run cells, and return the outputs of each."""
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    return [cell.outputs for cell in execute(notebook, folder).cells]


def shown(outputs: Sequence[Any], kind: str) -> list[str]:
    """Return the displayed data of one kind, such as "text/html"."""
    return [output.data[kind] for output in outputs if "data" in output and kind in output.data]


def printed(outputs: Sequence[Any]) -> str:
    """Return what cells printed, with stderr."""
    return "".join(output.text for output in outputs if output.output_type == "stream")
