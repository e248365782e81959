"""Keep tables that took long to make in files that are rebuilt when they are missing, damaged or outdated."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from widefield._files import cache_folder, write_whole


def folder_for(index: str | Path | None, root: Path | None) -> Path:
    """Return the folder for such files: ``index``, or else ``root``, or else one for this user.

    Raises FileNotFoundError if ``index`` is not a folder.
    """
    if index is not None:
        folder = Path(index).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(f"index is not a folder: {str(folder)!r}.")
        return folder
    return root or cache_folder() / "data"


def read_arrays(path: Path, names: Sequence[str]) -> dict[str, NDArray[Any]] | None:
    """Return the arrays of a file by name, or None if it is missing or damaged."""
    try:
        # np.load rejects pickled objects by default, but does not close damaged files that it opened itself.
        with path.open("rb") as file, np.load(file) as arrays:
            return {name: arrays[name] for name in names}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays atomically, since several processes may do so at once; raises OSError."""
    content = io.BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]  # numpy's stubs take the first for `allow_pickle`
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content.getvalue())
