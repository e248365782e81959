"""Index the images in tar files by reading their headers once.

The index stores the offset and length of each image in arrays, so that reading an image takes one seek.

Existing readers do not fit. Streaming readers (webdataset's, and timm's wrapper of it) return samples in file order,
shuffled in a buffer. They cannot resume in the middle of an epoch, and the number of samples per process is unknown.
timm's ``ReaderImageInTar`` has random access, but does not read webdataset's layout. It also reads every byte to find
the headers, shares an open file with forked workers, and stores its table as a pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import tarfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from widefield._progress import ProgressLine, progress_console
from widefield.data._kept import read_arrays, write_arrays
from widefield.data._stores import Files, LocalFiles
from widefield.data.class_map import is_index
from widefield.data.listing import HIDDEN, IMAGE_ENDINGS, Skipped, counted, is_hidden, why_no_image

_FORMAT = 2  # version of the stored file; increase it when the content changes
_STEP = 10**6
"""Bytes between two states of the progress line, which shows this unit."""


@dataclass(frozen=True)
class TarIndex:
    """Images in tar files, in file order: arrays of length N, and the class names."""

    names: NDArray[np.bytes_]
    """Path inside the tar file, in UTF-8; for an inner tar file, prefixed with that file's path without ``.tar``."""
    tars: NDArray[np.int32]
    """Index of the tar file."""
    offsets: NDArray[np.int64]
    """Offset of the first byte."""
    sizes: NDArray[np.int64]
    """Length in bytes."""
    labels: NDArray[np.int64]
    """Index into ``classes``, or the label in the tar file if there are no classes."""
    classes: NDArray[np.str_]
    """Sorted folder names, (M,); (0,) if labels are stored next to the images."""
    skipped: NDArray[np.str_]
    """Reason, count and first name of the files that were left out, (R, 3)."""


def tar_index(files: Files, tars: Sequence[str], label_key: str, store: Path) -> TarIndex:
    """Return the index of ``tars`` from ``store``, or build it and store it there, with a progress line.

    Args:
        files: where the tar files are.
        tars: paths of uncompressed tar files.
        label_key: where to find the label in ``.json`` files.
        store: folder of the stored file, which is identified by the tar files' names, lengths and modification times,
            or for a URL by its address and what the store knows of each file, such as a checksum.

    Raises:
        OSError: a file cannot be read or is not a tar file; the message names it.
        ValueError: an image lacks a label while others have one, or a label is not an integer.

    Warns if the index cannot be stored.
    """
    # A folder may move with its files, so that only their own names count.
    named = [PurePosixPath(tar).name if isinstance(files, LocalFiles) else files.of(tar) for tar in tars]
    identities = files.identities(tars)
    told = [(name, *identity) for name, identity in zip(named, identities, strict=True)]
    digest = hashlib.sha256(json.dumps([_FORMAT, label_key, told]).encode()).hexdigest()
    kept = store / f".widefield-tar-index-{digest[:16]}.npz"
    names = [field.name for field in fields(TarIndex)]
    if arrays := read_arrays(kept, names):
        return TarIndex(**arrays)
    index = _made(files, tars, label_key, sum(map(_length, identities)))
    try:
        write_arrays(kept, {name: getattr(index, name) for name in names})
    except OSError as error:
        warnings.warn(
            f"the index of {len(tars)} tar files cannot be kept in {str(store)!r} ({error.strerror}), so every process "
            f"reads their headers. The option index may name another folder.",
            stacklevel=3,
        )
    return index


def _length(identity: Sequence[Any]) -> int:
    """Return the bytes of a file from what a store knows of it; 0 if it does not know."""
    known = [mark for mark in identity if isinstance(mark, int) or mark[0] == "size"]
    return 0 if not known else known[0] if isinstance(known[0], int) else int(known[0][1])


def _made(files: Files, tars: Sequence[str], label_key: str, length: int) -> TarIndex:
    folders: dict[str, int] = {}
    skipped = Skipped()
    first = os.environ.get("RANK", "0") == "0"
    with ProgressLine(progress_console(), visible=first) as bar:
        task = bar.add_task(f"index of {counted(len(tars), 'tar file')}, MB", total=length / _STEP or None)
        scans = files.map(
            lambda tar: _scanned(files, tar, label_key, lambda read: bar.update(task, advance=read / _STEP)), tars
        )
        parts = [_columns(number, scan, folders, skipped) for number, scan in enumerate(scans)]
    names, numbers, offsets, sizes, labels, folder = (np.concatenate(column) for column in zip(*parts, strict=True))
    rows = [(reason, str(count), first) for reason, (count, first) in skipped.reasons.items()]
    left_out = _texts(rows).reshape(-1, 3)
    lacking = labels < 0
    if lacking.all():
        places = np.argsort(np.argsort(list(folders)))  # ranks of the folders; numbers are in the order of discovery
        return TarIndex(
            names, numbers, offsets, sizes, places[folder], np.array(sorted(folders), dtype=np.str_), left_out
        )
    if lacking.any():
        without, beside = (
            f"{files.of(tars[numbers[i]])}/{names[i].decode('utf-8', 'replace')}"
            for i in (lacking.argmax(), lacking.argmin())
        )
        raise ValueError(f"{without} has no label next to it (.cls or .json), but {beside} has.")
    return TarIndex(names, numbers, offsets, sizes, labels, _texts([]), left_out)


def _texts(texts: Sequence[Any]) -> NDArray[np.str_]:
    return np.array(texts, dtype=np.str_)


@dataclass
class _Scan:
    """The images in one tar file; a missing label is None."""

    tar: str
    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[int | None] = field(default_factory=list)
    skipped: Skipped = field(default_factory=Skipped)


def _columns(number: int, scan: _Scan, folders: dict[str, int], skipped: Skipped) -> tuple[NDArray[Any], ...]:
    """Return names, tar files, offsets, sizes, labels (-1: none) and folders of the images in one tar file.

    Whether labels or folders define the classes is known only after all files. ``folders`` numbers the folders in the
    order of discovery.
    """
    skipped.include(scan.skipped)
    return (
        np.array([name.encode("utf-8", "surrogateescape") for name in scan.names], dtype=np.bytes_),
        np.full(len(scan.names), number, np.int32),
        np.array(scan.offsets, np.int64),
        np.array(scan.sizes, np.int64),
        np.array([-1 if label is None else label for label in scan.labels], np.int64),
        np.array([folders.setdefault(_folder(name, scan.tar), len(folders)) for name in scan.names], np.int64),
    )


def _folder(name: str, tar: str) -> str:
    """Return the class of an image: its folder, or the tar file if it is not in a folder."""
    return name.split("/")[-2] if "/" in name else PurePosixPath(tar).stem


def _scanned(files: Files, tar: str, label_key: str, show: Callable[[int], None]) -> _Scan:
    """Return the images in one tar file; ``show`` gets the bytes that were passed since the last call."""
    scan, path = _Scan(tar), files.of(tar)
    links: dict[str, str] = {}
    beside: dict[str, dict[str, bytes]] = {".cls": {}, ".json": {}}
    shown = 0
    with files.open(tar) as file:
        try:
            for name, offset, size, target in _members(file, file, 0, ""):
                if offset + size >= shown + _STEP:
                    show(offset + size - shown)
                    shown = offset + size
                ending = os.path.splitext(name)[1].lower()  # noqa: PTH122 (a Path for each of millions takes minutes)
                if any(map(is_hidden, name.split("/"))):
                    scan.skipped.add(HIDDEN, f"{path}/{name}")
                elif target is not None:
                    links[name] = target
                elif ending in IMAGE_ENDINGS:
                    scan.names.append(name)
                    scan.offsets.append(offset)
                    scan.sizes.append(size)
                elif ending in beside:
                    file.seek(offset)
                    beside[ending][_key(name)] = file.read(size)
                else:
                    scan.skipped.add(why_no_image(name), f"{path}/{name}")
        except tarfile.TarError as error:
            raise OSError(
                f"{path} is not a complete, uncompressed tar file: {error}. Download it again, or decompress it for "
                f"random access."
            ) from error
    for name in _follow(links, scan.names, scan.offsets, scan.sizes):
        scan.skipped.add("links to no image in their tar file", f"{path}/{name}")
    scan.labels = [_label(path, name, beside, label_key) for name in scan.names]
    if any(label is not None for label in scan.labels):
        keys = [_key(name) for name in scan.names]
        if len(set(keys)) < len(keys):
            twice = next(name for name, key in zip(scan.names, keys, strict=True) if keys.count(key) > 1)
            raise ValueError(f"{path} holds several images of the sample {_key(twice)!r}; a sample has one image.")
    return scan


class _Member(NamedTuple):
    """A file in a tar file with its offset in the outermost one, or a link to another member."""

    name: str
    offset: int
    size: int
    target: str | None = None


def _follow(links: dict[str, str], names: list[str], offsets: list[int], sizes: list[int]) -> list[str]:
    """Add the images behind links to files, and behind links to folders; return the links without an image."""
    left = dict(links)
    while left:  # links may point to links
        places = {name: place for place, name in enumerate(names)}
        found = {
            link: [target] if target in places else [name for name in names if name.startswith(f"{target}/")]
            for link, target in left.items()
            if not link.startswith(f"{target}/")  # not a link to a parent folder
        }
        found = {link: images for link, images in found.items() if images}
        complete = {
            link
            for link in found
            if left[link] in places or not any(other.startswith(f"{left[link]}/") for other in left)
        }
        for link in complete or found:  # links to files and to complete folders come first
            for name in found[link]:
                names.append(link + name.removeprefix(left[link]))
                offsets.append(offsets[places[name]])
                sizes.append(sizes[places[name]])
        if not found:
            break
        left = {link: target for link, target in left.items() if link not in (complete or found)}
    return list(left)


def _members(raw: BinaryIO, file: Any, start: int, prefix: str) -> Iterator[_Member]:
    """Yield each regular file and link in a tar file, and in the tar files inside it.

    ``file`` is the tar file, which begins at byte ``start`` of ``raw``.
    """
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # otherwise all headers stay in memory, which takes gigabytes
            name = posixpath.normpath(member.name)
            offset = start + member.offset_data
            if member.islnk() or member.issym():
                folder = posixpath.dirname(name) if member.issym() else ""  # hard links are relative to the root
                target = posixpath.normpath(posixpath.join(folder, member.linkname))
                yield _Member(prefix + name, 0, 0, prefix + target)
            elif member.isreg() and name.endswith(".tar") and not is_hidden(posixpath.basename(name)):
                inner = archive.extractfile(member)
                yield from _members(raw, inner, offset, f"{prefix}{name.removesuffix('.tar')}/")
            elif member.isreg():
                yield _Member(prefix + name, offset, member.size)


def _key(name: str) -> str:
    """Return the key of a webdataset sample: the path up to the first dot in the file's name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _label(path: str, name: str, beside: dict[str, dict[str, bytes]], label_key: str) -> int | None:
    key = _key(name)
    if key in beside[".cls"]:
        found: object = beside[".cls"][key].decode("ascii", "replace").strip()
        what = f"{path}/{key}.cls"
    elif key in beside[".json"]:
        what = f"{label_key!r} in {path}/{key}.json"
        try:
            found = json.loads(beside[".json"][key])[label_key]
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{path}/{key}.json gives no {label_key!r}: {type(error).__name__}: {error}. The option label_key "
                f"names the entry that holds the label."
            ) from error
    else:
        return None
    if not is_index(str(found)):
        raise ValueError(f"{what} must be the index of a class, from 0; got {found!r}.")
    return int(str(found))
