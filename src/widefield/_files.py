"""Write files and folders atomically."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def check_place(path: Path, *, folder: bool = False) -> None:
    """Raise OSError if a file or folder could not be written, so that hours of work are not lost; leaves no trace.

    Args:
        path: the file, or the folder for files.
        folder: whether it is a folder.
    """
    if not folder and path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, and a file must be written there: give the name of a file.")
    if folder and path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file, and a folder must be created there: give the name of a folder.")
    place = path if folder else path.parent
    missing = [parent for parent in (place, *place.parents) if not parent.exists()]
    try:
        place.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise type(error)(f"{path} cannot be written: {error.strerror or error}. Choose another place.") from error
    finally:
        for parent in missing:
            with suppress(OSError):  # not created, or in use by now
                parent.rmdir()


def cache_folder() -> Path:
    """Return the folder of files that can be made again, ``$XDG_CACHE_HOME/widefield``; it may not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "widefield"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically, even if several processes do so at once; raises OSError."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yield an empty folder whose content moves into ``folder`` after the block, all of it or nothing.

    It is created inside ``folder``, so that a place that cannot be written is found at once and files move without
    being copied. Files with the same names are replaced, and restored if a later move fails.

    Raises OSError if ``folder`` cannot be written.
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
                raise IsADirectoryError(f"{target} is a folder, and a file must be written there.")
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
