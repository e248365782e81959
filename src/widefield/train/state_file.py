"""Store the state of a run in two files without a pickle: tensors as safetensors, everything else as JSON.

Nested mappings with any keys, lists, tuples, numbers, strings and tensors are restored exactly. Floats are exact to the
bit: JSON stores their shortest decimal form, from which Python reads the same number.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

TENSORS, REST = "state.safetensors", "state.json"


def save_state(folder: Path, state: Any) -> None:
    """Write ``state.safetensors`` and ``state.json`` into a folder.

    Raises TypeError for a value of another type, with its place.
    """
    tensors: dict[str, Tensor] = {}
    rest = _taken_apart(state, tensors, "state")
    save_file(tensors, folder / TENSORS)
    (folder / REST).write_text(json.dumps(rest) + "\n", encoding="utf-8")


def load_state(folder: Path) -> Any:
    """Read what :func:`save_state` wrote, onto the CPU."""
    return _put_together(json.loads((folder / REST).read_text(encoding="utf-8")), load_file(folder / TENSORS))


def _taken_apart(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    """Return ``value`` in JSON's types. Other types become a mapping with one key that names the type."""
    if isinstance(value, Tensor):
        # A copy: optimizers share storage between steps, and safetensors needs contiguous tensors of their own.
        tensors[where] = value.detach().cpu().contiguous().clone()
        return {"tensor": where}
    if isinstance(value, dict):
        return {"dict": [[key, _taken_apart(entry, tensors, f"{where}.{key}")] for key, entry in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_taken_apart(entry, tensors, f"{where}.{i}") for i, entry in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{where} is a {type(value).__name__}, which a checkpoint cannot hold.")


def _put_together(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _put_together(entry, tensors) for key, entry in content}
    entries = [_put_together(entry, tensors) for entry in content]
    return entries if kind == "list" else tuple(entries)
