"""Find the images of a segmentation set and the label image of each."""

from __future__ import annotations

import csv
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from widefield.data.class_map import listed
from widefield.data.listing import Skipped, images_in


@dataclass(frozen=True)
class Pairs:
    """The images of a split and their label images, in the same order; paths are relative to ``root`` or absolute."""

    root: Path
    images: Sequence[str]
    labels: Sequence[str]
    skipped: Skipped


def root_of(root: str | Path, usual: str, part: str, layout: str) -> Path:
    """Return the folder of a published set: ``root``, or the folder ``usual`` in it.

    Args:
        root: what the user gave.
        usual: path of the set's folder as its archive has it.
        part: a folder that the set must have.
        layout: sentence about the layout, for the message.

    Raises:
        FileNotFoundError: neither has ``part``.
    """
    root = Path(root).expanduser()
    for folder in (root, root / usual):
        if (folder / part).is_dir():
            return folder
    found = "it has no such folder" if root.is_dir() else "there is no such folder as root"
    raise FileNotFoundError(f"{str(root)!r} holds no folder {part!r}: {found}. {layout}")


def pair_up(
    root: Path, images: str, labels: str, *, image_suffix: str = "", label_suffix: str = "", layout: str = ""
) -> Pairs:
    """Match the images of two folders by their paths without suffix and ending.

    Args:
        root: folder of the set.
        images, labels: the two folders, relative to ``root``. Files may be at any depth.
        image_suffix, label_suffix: what the names of the files end in before the ending, such as ``"_leftImg8bit"``;
            other files are left out.
        layout: sentence about the layout, for messages.

    Raises:
        FileNotFoundError: a folder, an image or a label image is missing.
        ValueError: two files in a folder differ only in their ending.
    """
    skipped = Skipped()
    found = _stems(root / images, image_suffix, skipped, layout)
    known = _stems(root / labels, label_suffix, skipped, layout)
    if not found:
        raise FileNotFoundError(f"{str(root / images)!r} holds no images.{skipped.sentence()} {layout}".rstrip())
    missing = [stem for stem in found if stem not in known]
    if missing:
        example = root / labels / _label_of(missing[0], known, label_suffix)
        raise FileNotFoundError(
            f"{len(missing):,} of {len(found):,} images have no label image; the first is "
            f"{str(root / images / found[missing[0]])!r}, without {str(example)!r}. Add the label images, or remove "
            f"these images."
        )
    for stem, name in known.items():
        if stem not in found:
            skipped.add("label images without an image", str(root / labels / name))
    return Pairs(
        root,
        [os.path.join(images, name) for name in found.values()],  # noqa: PTH118 (a Path takes minutes for a million)
        [os.path.join(labels, known[stem]) for stem in found],  # noqa: PTH118
        skipped,
    )


def _stems(directory: Path, suffix: str, skipped: Skipped, layout: str) -> dict[str, str]:
    """Return path without suffix and ending -> path, for all images in ``directory``, relative to it."""
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no folder {str(directory)!r}. {layout}".rstrip())
    start = len(os.path.join(directory, ""))  # noqa: PTH118 (a Path drops the separator)
    found: dict[str, str] = {}
    for path in images_in(directory, skipped):
        name = path[start:]
        bare = os.path.splitext(name)[0]  # noqa: PTH122 (a Path takes minutes for a million)
        if not bare.endswith(suffix):
            skipped.add(f"without {suffix!r} in their names", path)
            continue
        stem = bare.removesuffix(suffix)
        if stem in found:
            raise ValueError(
                f"{str(directory)!r} has two files named {stem!r}: {found[stem]!r} and {name!r}. Remove one of them."
            )
        found[stem] = name
    return found


def _label_of(stem: str, known: Mapping[str, str], suffix: str) -> str:
    """Return the name that the label image of ``stem`` should have; its ending is that of another one."""
    ending = os.path.splitext(next(iter(known.values()), ".png"))[1]  # noqa: PTH122
    return stem + suffix + (ending or ".png")


def part_of(names: Sequence[str], split: str, fraction: float) -> list[int]:
    """Return the places of the images of a split, for data without splits; each split gets at least one.

    Args:
        names: of all images; the choice depends on nothing else.
        split: ``"train"`` or ``"val"``.
        fraction: of the images, for val.

    Raises ValueError for fewer than two images.
    """
    count = len(names)
    if count < 2:
        raise ValueError(f"val_fraction needs at least 2 images to make two splits; there is {count}.")
    order = sorted(range(count), key=lambda place: hashlib.sha256(os.fsencode(names[place])).digest())
    held_out = set(order[: min(count - 1, max(1, math.floor(fraction * count + 0.5)))])
    return [place for place in range(count) if (place in held_out) == (split == "val")]


def csv_rows(path: Path, needed: Sequence[str], columns: str) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the columns and the rows of a CSV file.

    Args:
        path: of the file; its first line names the columns.
        needed: columns that it must have.
        columns: those that it may have, for the message.

    Raises:
        ValueError: one is missing.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        found = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = found
        rows = list(reader)
    for name in needed:
        if name not in found:
            raise ValueError(
                f"{str(path)!r} has no column {name!r}; it has {listed(found) or 'none'}. Its first line must name the "
                f"columns: {columns}."
            )
    return found, rows


def check_files(root: Path, paths: Sequence[str], what: str, hint: str) -> None:
    """Raise FileNotFoundError naming the first of the files, relative to ``root``, that are missing."""
    missing = [path for path in paths if not os.path.isfile(os.path.join(root, path))]  # noqa: PTH113, PTH118
    if missing:
        raise FileNotFoundError(
            f"{len(missing):,} of {len(paths):,} {what} are missing; the first is {str(root / missing[0])!r}. {hint}"
        )
