"""Record the files that export and quantize write; they return the record and save it as JSON next to the files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from widefield.deploy.info import ModelInfo
from widefield.report import Report


@dataclass(frozen=True, kw_only=True)
class Deployed(Report):
    """A model written to files.

    ``str()`` and notebooks show a summary and a table; :meth:`to_dict` is what the JSON file next to the model holds.

    Attributes:
        path: name of the file to load, relative to the folder of the JSON file.
        files: name of every file -> its SHA-256.
        bytes: total size of the files.
        input: name, dtype, shape of the example input, which sizes are dynamic; and size, mean and std as in
            :class:`widefield.deploy.ModelInfo`, None if unknown.
        outputs: names of the outputs in order: keys of the model's dictionaries, or "output"; empty for archives of
            PyTorch.
        classes: class names in the order of the scores; None if unknown.
        environment: machine, versions, date.
    """

    path: str
    files: Mapping[str, str]
    bytes: int
    input: Mapping[str, Any]
    outputs: tuple[str, ...]
    classes: tuple[str, ...] | None
    environment: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields in JSON's types."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self), allow_nan=False))
        return found

    def write(self, folder: Path) -> None:
        """Write ``PATH.json`` to a folder."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
        (folder / f"{self.path}.json").write_text(text, encoding="utf-8")


def input_of(shape: Sequence[int], dynamic: Sequence[str], info: ModelInfo) -> dict[str, Any]:
    """Return the ``input`` of a record."""
    known = info.to_dict()
    about = {name: known[name] for name in ("size", "mean", "std")}
    return {"name": "images", "dtype": "float32", "shape": list(shape), "dynamic": list(dynamic), **about}
