"""Files that appear whole or not at all."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all; raises OSError where it cannot."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yield an empty folder; what is in it at the end of the block moves into ``folder``, after an exception nothing.

    It stands inside ``folder``, which is made if need be, so that a place that cannot be written to is known at once,
    and files move without being copied. Files of the same names are replaced.

    Raises OSError where ``folder`` cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder))
    try:
        yield stage
        for part in sorted(stage.iterdir()):
            part.replace(folder / part.name)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
