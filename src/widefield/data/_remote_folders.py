"""Find the images in class folders at a URL, from one list of files that is kept on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from widefield.data._class_folders import LAYOUT, FolderSplit, check_none_empty, no_split
from widefield.data._kept import folder_for, read_arrays, write_arrays
from widefield.data._stores import RemoteFiles, is_url
from widefield.data.base import SPLITS
from widefield.data.listing import HIDDEN, Skipped, is_hidden, is_image, why_no_image

_FORMAT = 1  # version of the stored file; increase it when the content changes


class Listed:
    """The folders and files below a URL, from the store or from a text file.

    Args:
        files: the files.
        listing: see `Folder`.
        index: folder of the kept list; None means that of this user.
        refresh: list anew even if the list is kept.

    Raises:
        ValueError: the URL cannot be listed and there is no ``listing``, or a line of it is no path below the root.
        OSError: ``listing`` cannot be read.
    """

    def __init__(self, files: RemoteFiles, listing: str | None, index: str | Path | None, refresh: bool) -> None:
        self.files = files
        self._refresh = refresh
        self._store = folder_for(index, None)
        self._lines: list[str] | None = None
        self._entries: dict[str, list[tuple[str, bool, list[Any]]]] = {}
        if listing is not None:
            self._lines = _lines(files, listing)
        elif not files.is_listed:
            raise ValueError(
                f"{files.place} cannot be listed, as http has no folders: give listing, a text file with the path of "
                f"an image per line, relative to root. In the folder itself, this writes it: find train val -type f > "
                f"listing.txt"
            )

    def folders(self, folder: str) -> list[str]:
        """Return the names of the folders in a folder, without hidden ones, in sorted order."""
        if self._lines is not None:
            start = f"{folder}/" if folder else ""
            inside = (line.removeprefix(start) for line in self._lines if line.startswith(start))
            found = {name.partition("/")[0] for name in inside if "/" in name}
        else:
            found = {PurePosixPath(name).name for name, is_folder, _ in self._inside(folder) if is_folder}
        return sorted(name for name in found if not is_hidden(name))

    def _inside(self, folder: str) -> list[tuple[str, bool, list[Any]]]:
        if folder not in self._entries:
            self._entries[folder] = self.files.entries(folder)
        return self._entries[folder]

    def paths(self, folder: str) -> tuple[NDArray[np.bytes_], Skipped]:
        """Return the images below a folder, in torchvision's order within each class, and what was left out."""
        start = f"{folder}/" if folder else ""
        if self._lines is not None:
            return _sorted(self.files.of(folder), (line for line in self._lines if line.startswith(start)), start)
        told = json.dumps([_FORMAT, [[name, mark] for name, _, mark in self._inside(folder)]])
        key = hashlib.sha256(self.files.of(folder).encode()).hexdigest()[:16]
        kept = self._store / f".widefield-folder-index-{key}.npz"
        if not self._refresh:
            arrays = read_arrays(kept, ("told", "paths", "skipped"))
            if arrays is not None and str(arrays["told"]) == told:
                rows = arrays["skipped"].reshape(-1, 3).tolist()
                return arrays["paths"], Skipped({reason: (int(count), first) for reason, count, first in rows})
        found, skipped = _sorted(self.files.of(folder), self.files.below(folder), start)
        left_out = np.array(
            [(why, str(count), first) for why, (count, first) in skipped.reasons.items()], dtype=np.str_
        )
        try:
            write_arrays(kept, {"told": np.array(told), "paths": found, "skipped": left_out})
        except OSError as error:
            warnings.warn(
                f"the list of the files in {self.files.of(folder)} cannot be kept in {str(self._store)!r} "
                f"({error.strerror}), so every process lists them. The option index may name another folder.",
                stacklevel=4,
            )
        return found, skipped


def remote_split(listed: Listed, split: str) -> FolderSplit:
    """Return the images of a split at a URL; raises FileNotFoundError or another OSError."""
    place = listed.files.place
    try:
        tops = listed.folders("")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"root is not a folder: {place!r}. {LAYOUT}") from error
    there = [name for name in SPLITS if name in tops]
    directory = "" if split == "val" and tops and not there else split
    if directory and directory not in tops:
        raise no_split(place, split, tops)
    paths, skipped = listed.paths(directory)
    names = {name: set(listed.folders(name)) for name in there}
    classes = names[directory] if directory else set(tops)
    if not classes:
        raise FileNotFoundError(f"{listed.files.of(directory)!r} holds no class folders. {LAYOUT}")
    if not directory and not len(paths):
        raise no_split(place, split, tops)
    found = Counter(os.fsdecode(path.partition(b"/")[0]) for path in paths.tolist())
    counts = {name: found[name] for name in sorted(classes | set(found))}
    check_none_empty(listed.files.of(directory), counts)
    return FolderSplit(directory, counts, paths, names, skipped)


def _sorted(place: str, paths: Iterable[str], start: str) -> tuple[NDArray[np.bytes_], Skipped]:
    """Return the images among paths, relative to ``start``, and what was left out."""
    skipped, hidden = Skipped(), set()
    keyed = []
    for path in paths:
        name = path.removeprefix(start)
        parts = name.split("/")
        above = next((place for place, part in enumerate(parts) if is_hidden(part)), None)
        if above is not None:
            top = "/".join(parts[: above + 1])
            if top not in hidden:
                skipped.add(HIDDEN, f"{place}/{top}")
            hidden.add(top)
        elif len(parts) < 2:
            skipped.add("outside the class folders", f"{place}/{name}")
        elif not is_image(name):
            skipped.add(why_no_image(name), f"{place}/{name}")
        else:
            keyed.append((parts[0], "/".join(parts[:-1]), parts[-1]))
    return np.array([os.fsencode(f"{folder}/{name}") for _, folder, name in sorted(keyed)], dtype=np.bytes_), skipped


def _lines(files: RemoteFiles, listing: str) -> list[str]:
    if not isinstance(listing, str) or not listing:
        raise TypeError(f"listing must be the name of a text file, relative to root, or a URL; got {listing!r}.")
    if is_url(listing):
        folder, _, name = listing.rpartition("/")
        where = files.at(folder)
    else:
        where, name = files, listing
    try:
        text = where.whole(name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the listing {where.of(name)} is not a text file in UTF-8: {error}.") from error
    return list(dict.fromkeys(_checked(text.splitlines(), where.of(name))))


def _checked(lines: Iterable[Any], place: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        path = str(line).strip().removeprefix("./")
        if path.startswith("/") or "://" in path or ".." in path.split("/"):
            raise ValueError(
                f"line {number} of the listing {place} is {path!r}, and must be a path below root such as "
                f"'train/cat/1.jpg'."
            )
        if path:
            yield path
