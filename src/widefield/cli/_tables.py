"""Print what a command found: tables for people, or one JSON document for programs."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, str]]


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json."""
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document with full numbers on stdout, all else on stderr"
    )


class Printer:
    """Prints the tables of a command or, with ``--json``, collects its document.

    Args:
        as_json: whether to print one JSON document.
        head: first entries of the document.
    """

    def __init__(self, *, as_json: bool, head: Mapping[str, Any]) -> None:
        self._as_json = as_json
        self._head = dict(head)
        self._found: dict[str, Any] = {}

    def table(self, rows: Rows, right: Collection[str] | None = None, *, caption: str = "", title: str = "") -> None:
        """Print rows as :func:`widefield._tabular.print_table` does, if there are any; not with ``--json``."""
        if rows and not self._as_json:
            from widefield._tabular import print_table

            print_table(rows, right, caption=caption, title=title)

    def text(self, words: str) -> None:
        """Print a paragraph, if it is not empty; not with ``--json``."""
        if words and not self._as_json:
            from widefield._tabular import print_text

            print_text(words)

    def add(self, **found: Any) -> None:
        """Add entries to the JSON document: anything that :func:`plain` takes, in full precision."""
        self._found |= found

    @contextlib.contextmanager
    def printing(self) -> Iterator[None]:
        """With ``--json``, send what the block prints to stderr, and at its end the document to stdout.

        Of several processes the first one prints it. A block that raises prints none.
        """
        if not self._as_json:
            yield
            return
        with contextlib.redirect_stdout(sys.stderr):
            yield
        if self._found and os.environ.get("RANK", "0") == "0":
            print(json.dumps(plain({**self._head, **self._found}), allow_nan=False, ensure_ascii=False))


def plain(value: Any) -> Any:
    """Return a value in JSON's types: arrays as lists, records as mappings, paths as text, NaN as None.

    Raises TypeError for values without such a form.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)  # signals, too
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (Sequence, set, frozenset)):
        return [plain(entry) for entry in value]
    if hasattr(value, "tolist"):  # tensors, arrays and their scalars
        return plain(value.tolist())
    raise TypeError(f"a document is made of numbers, texts, lists and mappings; got {value!r}.")
