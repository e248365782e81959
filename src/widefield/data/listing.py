"""Decide for all readers which files of a folder or tar file are images, and record what is left out and why."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_BESIDE = ("__MACOSX", "@eaDir")
"""Folders that macOS and Synology create when they pack or index files; their files look like images but are not."""

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Endings of image files: those of torchvision, whose module is slow to import."""

HIDDEN = "hidden"


@dataclass
class Skipped:
    """Files and folders that a reader left out: their number and the first name, for each reason."""

    reasons: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Count one file or folder."""
        count, first = self.reasons.get(reason, (0, name))
        self.reasons[reason] = count + 1, first

    def include(self, other: Skipped) -> None:
        """Count the files and folders that another reader left out."""
        for reason, (count, first) in other.reasons.items():
            before, earliest = self.reasons.get(reason, (0, first))
            self.reasons[reason] = before + count, earliest

    def __bool__(self) -> bool:
        return bool(self.reasons)

    def __str__(self) -> str:
        """Return the reasons in words, such as ``2 hidden ('.ipynb_checkpoints', ...)``."""
        return ", ".join(
            f"{count:,} {reason} ({first!r}{', ...' if count > 1 else ''})"
            for reason, (count, first) in self.reasons.items()
        )

    def clause(self, what: str = "left out") -> str:
        """Return the reasons as the end of a line, such as ``; left out: 2 hidden (...)``; empty if there are none."""
        return f"; {what}: {self}" if self else ""

    def sentence(self) -> str:
        """Return the reasons as a further sentence of an error; empty if there are none."""
        return f" Left out: {self}." if self else ""


def counted(number: int, one: str, many: str | None = None) -> str:
    """Return a number and a noun, such as ``1 image`` and ``1,200 images``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is hidden, such as ``.ipynb_checkpoints``, ``._x.jpg`` and ``__MACOSX``."""
    return name.startswith(".") or name in _BESIDE


def is_image(name: str) -> bool:
    """Return whether a file is an image by its ending."""
    return name.lower().endswith(IMAGE_ENDINGS)


def why_no_image(name: str) -> str:
    """Return the reason to leave out a file that is not an image."""
    ending = os.path.splitext(name)[1].lower()  # noqa: PTH122 (as in the loops that call it)
    return f"not images by their ending, {ending}" if ending else "not images, without an ending"


def folders_in(directory: Path, skipped: Skipped | None = None) -> list[str]:
    """Return the sorted names of the folders in ``directory``, links included.

    Files, hidden folders, and links to ``directory`` or to folders above it are left out.
    """
    skipped = Skipped() if skipped is None else skipped
    folders, files = _entries(str(directory), _above(directory), skipped)
    for name in files:
        skipped.add("outside the class folders", str(directory / name))
    return [Path(folder).name for folder in folders]


def images_in(directory: Path, skipped: Skipped) -> list[str]:
    """Return the paths of all images in ``directory``, at any depth, in torchvision's order.

    Links are followed, except those to a folder above them. Raises OSError for a folder that cannot be read.
    """
    found = []
    for folder, names in sorted(_walked(str(directory), _above(directory.parent), skipped)):
        for name in names:
            path = os.path.join(folder, name)  # noqa: PTH118 (a Path for each of a million takes minutes)
            if is_image(name):
                found.append(path)
            else:
                skipped.add(why_no_image(name) if os.path.exists(path) else "broken links", path)  # noqa: PTH110
    return found


_Identity = tuple[int, int]


def _identity(folder: str | Path) -> _Identity:
    status = os.stat(folder)  # noqa: PTH116
    return status.st_dev, status.st_ino


def _above(directory: Path) -> frozenset[_Identity]:
    real = directory.resolve()
    return frozenset(map(_identity, (real, *real.parents)))


def _walked(folder: str, above: frozenset[_Identity], skipped: Skipped) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder and the names of its files in sorted order."""
    above = above | {_identity(folder)}
    folders, names = _entries(folder, above, skipped)
    yield folder, names
    for inner in folders:
        yield from _walked(inner, above, skipped)


def _entries(folder: str, above: frozenset[_Identity], skipped: Skipped) -> tuple[list[str], list[str]]:
    """Return the paths of the folders, and the names of the files, in ``folder``, each in sorted order."""
    folders, names = [], []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if is_hidden(entry.name):
                skipped.add(HIDDEN, entry.path)
            elif not os.path.isdir(entry.path) if entry.is_symlink() else not entry.is_dir():  # noqa: PTH112
                names.append(entry.name)
            elif _identity(entry.path) in above:
                skipped.add("links to a folder that they lie in", entry.path)
            else:
                folders.append(entry.path)
    return folders, names
