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
    """Yield an empty folder; what is in it at the end of the block moves into ``folder``, all of it or nothing.

    It stands inside ``folder``, which is made if need be, so that a place that cannot be written to is known at once,
    and files move without being copied. Files of the same names are replaced; they come back if a later one cannot be.

    Raises OSError where ``folder`` cannot be written to.
    """
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder))
    done = False
    try:
        yield stage
        _move(stage, folder)
        done = True
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        for parent in () if done else made:
            parent.rmdir()


def _move(stage: Path, folder: Path) -> None:
    kept = Path(tempfile.mkdtemp(prefix=".replaced-", dir=stage.parent))
    moved: list[Path] = []
    try:
        for part in sorted(stage.iterdir()):
            target = folder / part.name
            if target.is_dir():
                raise IsADirectoryError(f"{target} is a folder, and a file is to stand there.")
            if target.exists():
                target.replace(kept / part.name)
            part.replace(target)
            moved.append(target)
    except BaseException:
        for target in moved:
            target.unlink(missing_ok=True)
        for old in kept.iterdir():
            old.replace(folder / old.name)
        raise
    finally:
        shutil.rmtree(kept, ignore_errors=True)


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
