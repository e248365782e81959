"""A small fit on a planted truth, and its folder to change and continue."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fitting.planted import recipe_of, registered
from train.helpers import QUIET
from widefield.fitting import FitResult, fit


@pytest.fixture(scope="session", autouse=True)
def _known() -> Iterator[None]:
    with registered():
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, _known: None) -> FitResult:
    """Return a finished fit on dots that are far apart."""
    folder = tmp_path_factory.mktemp("fit")
    return fit(
        recipe_of(folder, (6, 8)), out=folder / "far", budget="macs", limit=None, probe=0.5, onnx=False, console=QUIET
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "fit"
