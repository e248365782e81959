"""Read the published files of CIFAR-10 and CIFAR-100: the binary version and the Python version of pickles."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Version:
    """File names of one version."""

    folder: str
    archive: str
    splits: Mapping[str, tuple[str, ...]]
    names: str
    """File with the names of the classes."""


@dataclass(frozen=True)
class Files:
    """Files and records of one of the two data sets."""

    title: str
    classes: int
    counts: Mapping[str, int]
    """Images in each file of a split."""
    label_bytes: int
    """Number of label bytes in a record of the binary version; the last one is the label."""
    label_key: str
    """Key in the Python version."""
    names_key: str
    versions: Mapping[str, Version]


CIFAR10 = Files(
    title="CIFAR-10",
    classes=10,
    counts={"train": 10_000, "val": 10_000},
    label_bytes=1,
    label_key="labels",
    names_key="label_names",
    versions={
        "binary": Version(
            "cifar-10-batches-bin",
            "cifar-10-binary.tar.gz",
            {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "val": ("test_batch.bin",)},
            "batches.meta.txt",
        ),
        "python": Version(
            "cifar-10-batches-py",
            "cifar-10-python.tar.gz",
            {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "val": ("test_batch",)},
            "batches.meta",
        ),
    },
)
CIFAR100 = Files(
    title="CIFAR-100",
    classes=100,
    counts={"train": 50_000, "val": 10_000},
    label_bytes=2,  # coarse, fine
    label_key="fine_labels",
    names_key="fine_label_names",
    versions={
        "binary": Version(
            "cifar-100-binary",
            "cifar-100-binary.tar.gz",
            {"train": ("train.bin",), "val": ("test.bin",)},
            "fine_label_names.txt",
        ),
        "python": Version(
            "cifar-100-python", "cifar-100-python.tar.gz", {"train": ("train",), "val": ("test",)}, "meta"
        ),
    },
)


def read_files(
    root: Path, files: Files, version: str, split: str
) -> tuple[tuple[str, ...], NDArray[np.uint8], NDArray[np.int64]]:
    """Return class names, pixels uint8 (N, 3072) as red, green and blue planes by row, and labels (N,).

    Raises:
        FileNotFoundError: the version is not in ``root``.
        OSError: a file cannot be read.
        ValueError: a file lacks images or labels.
    """
    layout = files.versions[version]
    place = _located(root, files, version)
    wanted = (*layout.splits[split], layout.names)
    contents = _from_archive(place, wanted) if place.is_file() else {n: (place / n).read_bytes() for n in wanted}
    names_of, images_of = (_binary_names, _binary_images) if version == "binary" else (_python_names, _python_images)
    names = names_of(contents[layout.names], f"{place}/{layout.names}", files)
    if len(names) != files.classes:
        raise ValueError(f"{place}/{layout.names} names {len(names)} classes; {files.title} has {files.classes}.")
    parts = []
    for name in layout.splits[split]:
        pixels, labels = images_of(contents[name], f"{place}/{name}", files)
        if len(pixels) != files.counts[split] or len(labels) != len(pixels):
            raise ValueError(
                f"{place}/{name} holds {len(pixels):,} images and {len(labels):,} labels; in {files.title} it has "
                f"{files.counts[split]:,} of each. Download it again."
            )
        parts.append((pixels, labels.astype(np.int64)))
    pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    _check_labels(labels, names, f"the {split} part in {place}", files)
    return names, pixels, labels


def _check_labels(labels: NDArray[np.int64], names: tuple[str, ...], where: str, files: Files) -> None:
    """Raise ValueError unless all classes are equally frequent, as in both published sets."""
    wrong = labels[(labels < 0) | (labels >= files.classes)]
    if len(wrong):
        raise ValueError(f"{where} has the label {wrong[0]}; those of {files.title} are 0 to {files.classes - 1}.")
    expected = len(labels) // files.classes
    for name, count in zip(names, np.bincount(labels, minlength=files.classes), strict=True):
        if count != expected:
            raise ValueError(
                f"{where} has {count:,} images of class {name!r}; {files.title} has {expected:,} of each. Download "
                f"it again."
            )


def _located(root: Path, files: Files, version: str) -> Path:
    """Return the folder or archive of a version in ``root``; raises FileNotFoundError."""
    found = _find(root, files.versions[version])
    if found is not None:
        return found
    layout = files.versions[version]
    other = next((name for name in files.versions if name != version and _find(root, files.versions[name])), None)
    hint = f" The {other} version is there: version={other!r} reads it." if other else ""
    raise FileNotFoundError(
        f"{str(root)!r} has no {version} version of {files.title}: neither {layout.folder} nor {layout.archive}.{hint}"
    )


def _find(root: Path, layout: Version) -> Path | None:
    marks = layout.splits["train"][0], layout.names
    for folder in (root, root / layout.folder):
        if all((folder / mark).is_file() for mark in marks):
            return folder
    for archive in (root, root / layout.archive):
        if archive.is_file() and archive.name == layout.archive:
            return archive
    return None


def _from_archive(archive: Path, wanted: tuple[str, ...]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r|gz") as members:
            for member in members:
                name = member.name.rpartition("/")[2]
                if name in wanted and member.isreg():
                    file = members.extractfile(member)
                    found[name] = file.read() if file else b""
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise OSError(f"{archive} is not a complete archive: {error}. Download it again.") from error
    missing = [name for name in wanted if name not in found]
    if missing:
        raise FileNotFoundError(f"{archive} lacks {', '.join(missing)}. Download it again.")
    return found


def _binary_names(content: bytes, path: str, files: Files) -> tuple[str, ...]:
    return tuple(content.decode("ascii", "replace").split())


def _binary_images(content: bytes, path: str, files: Files) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Read records of one or two label bytes and 3,072 bytes of pixels."""
    record = files.label_bytes + _PIXELS
    if len(content) % record:
        raise ValueError(
            f"{path} has {len(content):,} bytes, which is not a multiple of the {record:,} bytes of an image of "
            f"{files.title}. Download it again."
        )
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, record)
    return records[:, files.label_bytes :], records[:, files.label_bytes - 1]


def _python_names(content: bytes, path: str, files: Files) -> tuple[str, ...]:
    names = _unpickled(content, path).get(files.names_key)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} has no list of names, {files.names_key!r}.")
    return tuple(names)


def _python_images(content: bytes, path: str, files: Files) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    found = _unpickled(content, path)
    pixels, labels = found.get("data"), found.get(files.label_key)
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (_PIXELS,):
        raise ValueError(f"{path} has no array 'data' of {_PIXELS:,} bytes an image.")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise ValueError(f"{path} has no list of integers, {files.label_key!r}.")
    return pixels, np.array(labels, dtype=np.int64)


class _Plain(pickle.Unpickler):
    """An unpickler that creates only arrays, numbers, strings, lists and dictionaries, and rejects anything else."""

    _RECONSTRUCT = np.empty(0).__reduce__()[0]  # its module in numpy has changed since the files were written

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return self._RECONSTRUCT
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which CIFAR's files never do")


def _unpickled(content: bytes, path: str) -> dict[str, Any]:
    try:
        found = _Plain(io.BytesIO(content), encoding="latin1").load()  # numpy requires latin1 for Python 2's pickles
    except (pickle.UnpicklingError, EOFError, LookupError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a file of CIFAR's Python version: {type(error).__name__}: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a file of CIFAR's Python version: it holds {type(found).__name__}.")
    return found
