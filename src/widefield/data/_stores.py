"""Read files below a root: a folder of this machine, or a URL of any file system of fsspec.

A remote file is read by requests for ranges of bytes. Nothing is open between two of them, so that copies of a data set
in other processes, forked or spawned, share no connection.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote, urlsplit

from widefield._extras import need
from widefield._files import cache_folder
from widefield.data.listing import is_hidden

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_INHERITED: list[Any] = []
"""File systems of the process that this one is a fork of. To close them would unregister the parent's connections from
the epoll instance that both share, and the parent would wait for their data in vain."""

T = TypeVar("T")
R = TypeVar("R")

_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
"""Protocol -> the module that fsspec needs for it."""
_CACHES = ("simplecache", "filecache", "blockcache", "cached")
_UNLISTED = ("http", "https")
_TRIES = 4
_FIRST_WAIT = 0.2
"""Seconds before the second try; each further one waits twice as long."""
_AT_ONCE = 8
"""Number of requests at once when a set is built."""
_LOCKS = 256
_CHUNK = 4 * 2**20
"""Bytes of a request when the headers of a tar file are read: they stand between images of about 100 kB."""
_MARKS = ("size", "etag", "md5hash", "crc32c", "generation", "content-md5", "digest")
_TIMES = ("mtime", "lastmodified", "last_modified", "last-modified", "updated", "created")
_SECRET = {"key", "secret", "token", "password", "passwd", "passphrase", "credential", "credentials", "auth", "sas"}
_SECRET |= {"authorization", "cookie", "cookies", "connection"}
_PUBLIC_TOKENS = ("anon", "google_default", "cloud", "cache", "browser")
"""Values of gcsfs' option ``token`` that say where credentials are, and hold none."""


def is_url(place: object) -> bool:
    """Return whether a root is a URL of fsspec, such as ``s3://bucket/pets`` or ``simplecache::s3://bucket/pets``."""
    return isinstance(place, str) and "://" in place


class Files(ABC):
    """Files below a root, by their paths relative to it, with ``/``.

    Attributes:
        place: the root, for messages.
    """

    place: str

    @abstractmethod
    def of(self, name: str) -> str:
        """Return the path or URL of a file, for messages."""

    @abstractmethod
    def matching(self, pattern: str) -> list[str]:
        """Return the files that fit a glob, in sorted order, without hidden ones; ValueError for a bad pattern."""

    @abstractmethod
    def identities(self, names: Sequence[str]) -> list[list[Any]]:
        """Return for each file what changes when its content does, for JSON; raises OSError for a missing file."""

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """Open a file of which many parts are read, in order."""

    @abstractmethod
    def read(self, name: str, start: int, size: int) -> bytes:
        """Return ``size`` bytes of a file, or fewer if it ends before."""

    @abstractmethod
    def map(self, function: Callable[[T], R], values: Sequence[T]) -> Iterator[R]:
        """Apply a function that reads files to each of some values, in order."""


class LocalFiles(Files):
    """Files in a folder of this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.place = str(root)

    def of(self, name: str) -> str:
        """Return the path of a file."""
        return str(self.root / name)

    def matching(self, pattern: str) -> list[str]:
        """Return the files that fit a glob of `pathlib`."""
        found = sorted(path for path in self.root.glob(pattern) if path.is_file() and not is_hidden(path.name))
        return [path.relative_to(self.root).as_posix() for path in found]

    def identities(self, names: Sequence[str]) -> list[list[Any]]:
        """Return length and modification time of each file."""
        found = ((self.root / name).stat() for name in names)
        return [[status.st_size, status.st_mtime_ns] for status in found]

    def open(self, name: str) -> BinaryIO:
        """Open a file."""
        return (self.root / name).open("rb")

    def read(self, name: str, start: int, size: int) -> bytes:
        """Return ``size`` bytes of a file, or fewer if it ends before."""
        with (self.root / name).open("rb", buffering=0) as file:
            file.seek(start)
            return file.read(size)

    def map(self, function: Callable[[T], R], values: Sequence[T]) -> Iterator[R]:
        """Apply a function to each of some values."""
        return map(function, values)


class RemoteFiles(Files):
    """Files below a URL.

    Args:
        url: for example ``s3://bucket/pets``.
        storage: options of the file system, such as ``{"anon": True}``; for chained URLs, those of each protocol.

    Raises:
        ModuleNotFoundError: the package for the protocol is not installed; the message names it.
        ValueError: the protocol is unknown, or ``url`` or ``storage`` holds credentials.
        TypeError: ``storage`` is no mapping.
    """

    def __init__(self, url: str, storage: Mapping[str, Any] | None = None) -> None:
        self.place = url.rstrip("/") if not url.endswith("://") else url
        self._protocols = protocols = [part.partition("://")[0] for part in url.split("::")]
        _check_url(url)
        self._storage = checked_storage(storage)
        for protocol in protocols:
            if protocol in _PACKAGES:
                need(_PACKAGES[protocol])
        lasting = [protocol for protocol in protocols if protocol not in _CACHES]
        self.is_listed = lasting[0] not in _UNLISTED
        """Whether its folders can be listed."""
        self._is_cached = len(lasting) < len(protocols)
        self._quoted = lasting[0] in _UNLISTED
        self._opened: tuple[int, Any, str] | None = None
        self._connected()

    def at(self, url: str) -> RemoteFiles:
        """Return the files below another URL, with the same options if it has the same protocols."""
        same = url.partition("://")[0] == self.place.partition("://")[0]
        return RemoteFiles(url, self._storage if same else None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def _connected(self) -> tuple[Any, str]:
        """Return this process's file system, and the root in it."""
        if self._opened is None or self._opened[0] != os.getpid():
            from fsspec.core import url_to_fs

            if self._opened is not None:
                _INHERITED.append(self._opened[1])
            try:
                system, root = url_to_fs(self.place, **self._options())
            except ImportError as error:
                raise ModuleNotFoundError(f"{self.place} cannot be read: {error}.") from error
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"{self.place} cannot be opened with storage={self._storage!r}: {error}. Check the protocol and "
                    f"the options of fsspec for it."
                ) from error
            self._opened = os.getpid(), system, root.rstrip("/")
        return self._opened[1:]

    def _options(self) -> dict[str, Any]:
        """Return the arguments of fsspec for a file system that it does not keep for others.

        Those that it keeps are closed in each forked process, even in workers that never read from them.
        """
        alone = {"skip_instance_cache": True}
        if len(self._protocols) == 1:
            return {**self._storage, **alone}
        return {**self._storage, **{name: {**self._storage.get(name, {}), **alone} for name in self._protocols}}

    def of(self, name: str) -> str:
        """Return the URL of a file."""
        return f"{self.place}{'' if self.place.endswith('/') else '/'}{name}" if name else self.place

    def _path(self, name: str) -> str:
        root = self._connected()[1]
        name = quote(name) if self._quoted else name
        return f"{root}/{name}" if root and name else root or name

    def _name(self, path: str) -> str:
        return path.removeprefix(self._connected()[1]).strip("/")

    def _tried(self, name: str, action: Callable[[Any, str], R]) -> R:
        """Return ``action(file system, path)``, tried again after errors that may pass; raises OSError."""
        system, path = self._connected()[0], self._path(name)
        for attempt in range(1, _TRIES + 1):
            try:
                return action(system, path)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"there is no {self.of(name)}.") from error
            except Exception as error:  # those of each file system are its own
                if isinstance(error, PermissionError) or getattr(error, "status", None) in (401, 403):
                    raise PermissionError(f"access to {self.of(name)} is refused: {error}. {_CREDENTIALS}") from error
                lasting = isinstance(error, (ValueError, TypeError, NotImplementedError, IsADirectoryError))
                if lasting or attempt == _TRIES:
                    tries = "" if lasting else f" in {_TRIES} tries"
                    raise OSError(
                        f"{self.of(name)} cannot be read{tries}: {type(error).__name__}: {error}. Check the network "
                        f"and the address. {_CREDENTIALS}"
                    ) from error
                time.sleep(_FIRST_WAIT * 2 ** (attempt - 1))
        raise AssertionError  # pragma: no cover

    def entries(self, folder: str = "") -> list[tuple[str, bool, list[Any]]]:
        """Return path, whether it is a folder, and identity of what lies in a folder, in sorted order.

        Raises:
            FileNotFoundError: there is no such folder.
            OSError: it cannot be listed.
        """

        def listed(system: Any, path: str) -> list[dict[str, Any]]:
            system.invalidate_cache()
            found: list[dict[str, Any]] = system.ls(path, detail=True)
            return found

        found = ((self._name(info["name"]), info) for info in self._tried(folder, listed))
        inside = ((name, info["type"] == "directory", _identity(info)) for name, info in found if name != folder)
        return sorted(inside, key=lambda entry: entry[0])

    def below(self, folder: str) -> list[str]:
        """Return the paths of all files in a folder, at any depth; raises OSError."""
        return [self._name(path) for path in self._tried(folder, lambda system, path: system.find(path))]

    def matching(self, pattern: str) -> list[str]:
        """Return the files that fit a glob of fsspec; a pattern without wildcards is a file."""
        if not pattern or pattern.startswith("/"):
            raise ValueError("not below the root")
        if not any(mark in pattern for mark in "*?["):
            return [pattern]
        if not self.is_listed:
            raise OSError(
                f"{self.place} cannot be listed, so {pattern!r} finds nothing there: number the files, such as "
                f"{re.sub('[*?]', '{000000..000099}', pattern, count=1)!r}."
            )

        def globbed(system: Any, path: str) -> list[str]:
            system.invalidate_cache()
            found: dict[str, dict[str, Any]] = system.glob(path, detail=True)
            return [path for path, info in found.items() if info["type"] != "directory"]

        names = (PurePosixPath(self._name(path)) for path in self._tried(pattern, globbed))
        return [str(name) for name in sorted(names) if not is_hidden(name.name)]

    def identities(self, names: Sequence[str]) -> list[list[Any]]:
        """Return length, checksums and times of each file, as far as the store knows them."""
        return list(self.map(lambda name: _identity(self._info(name)), names))

    def _info(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self._tried(name, lambda system, path: system.info(path))
        return found

    def open(self, name: str) -> BinaryIO:
        """Return a file of which parts are requested as they are read."""
        info = self._info(name)
        if info.get("size") is None:
            raise OSError(f"the server does not say how long {self.of(name)} is, so its parts cannot be requested.")
        return io.BufferedReader(_Ranges(self, name, int(info["size"])), _CHUNK)

    def read(self, name: str, start: int, size: int) -> bytes:
        """Return ``size`` bytes of a file, or fewer if it ends before."""
        if not size:
            return b""

        def ranged(system: Any, path: str) -> bytes:
            try:
                with self._alone(path):
                    return bytes(system.cat_file(path, start=start, end=start + size))
            except OSError:
                raise
            except Exception as error:
                if getattr(error, "status", None) == 416:  # the range begins behind the end
                    return b""
                raise

        content = self._tried(name, ranged)
        if len(content) > size:
            raise OSError(
                f"the server of {self.of(name)} answers a request for {size:,} bytes with {len(content):,}: it does "
                f"not support ranges of bytes, which random access needs. Use another server, or simplecache::"
                f"{self.place}, which downloads files as a whole."
            )
        return content

    def whole(self, name: str) -> bytes:
        """Return the content of a file."""

        def read(system: Any, path: str) -> bytes:
            with self._alone(path):
                return bytes(system.cat_file(path))

        return self._tried(name, read)

    @contextmanager
    def _alone(self, path: str) -> Iterator[None]:
        """Keep other processes of this machine from a file that fsspec may be writing to its cache, in place."""
        if not self._is_cached or fcntl is None:
            yield
            return
        bucket = int(hashlib.sha256(path.encode()).hexdigest(), 16) % _LOCKS
        lock = cache_folder() / "data" / f".lock-{bucket:03}"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # freed when the file is closed, even by the end of the process
            yield

    def map(self, function: Callable[[T], R], values: Sequence[T]) -> Iterator[R]:
        """Apply a function to each of some values, several at once, because requests wait for the network."""
        if len(values) < 2 or self._is_cached:  # fsspec's caches are not made for threads
            return map(function, values)
        self._connected()  # once, before there are threads
        return self._mapped(function, values)

    @staticmethod
    def _mapped(function: Callable[[T], R], values: Sequence[T]) -> Iterator[R]:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            yield from pool.map(function, values)


def files_at(root: str | Path, storage: Mapping[str, Any] | None = None) -> LocalFiles | RemoteFiles:
    """Return the files below a root.

    Raises:
        ValueError: ``storage`` for a folder of this machine, and the errors of `RemoteFiles`.
    """
    if is_url(root):
        return RemoteFiles(str(root), storage)
    if storage:
        raise ValueError(f"storage has the options of a URL's file system, and root is a folder: {str(root)!r}.")
    return LocalFiles(Path(root).expanduser())


class _Ranges(io.RawIOBase):
    """A remote file as a stream that requests what is read."""

    def __init__(self, files: RemoteFiles, name: str, size: int) -> None:
        self.files, self.name, self.size, self.position = files, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self.size - self.position))
        content = self.files.read(self.name, self.position, size)
        buffer[: len(content)] = content
        self.position += len(content)
        return len(content)


def _identity(info: Mapping[str, Any]) -> list[Any]:
    """Return what changes when a file does: its length, and its checksums, or else its times."""
    known = {key.lower(): str(value) for key, value in info.items() if value is not None}
    marks = [[key, known[key]] for key in _MARKS if key in known]
    return marks if len(marks) > 1 else [*marks, *([key, known[key]] for key in _TIMES if key in known)]


_CREDENTIALS = (
    "Credentials are taken from the environment: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or ~/.aws for s3, "
    "GOOGLE_APPLICATION_CREDENTIALS for gs, FSSPEC_PROTOCOL_OPTION or ~/.config/fsspec for all."
)


def _check_url(url: str) -> None:
    """Raise ValueError for a URL that holds a password, or the query of a signed address."""
    for part in url.split("::"):
        split = urlsplit(part)
        if split.password is not None:
            shown = part.replace(f":{split.password}@", ":...@")
            raise ValueError(f"root must not hold a password, as recipes are shared; got {shown!r}. {_CREDENTIALS}")
        if split.scheme in _UNLISTED and (split.query or split.fragment):
            raise ValueError(
                f"root must be the address of a folder, without a query; got {part.partition('?')[0]!r} with one. "
                f"{_CREDENTIALS}"
            )


def checked_storage(storage: object) -> dict[str, Any]:
    """Return options of a file system; raises TypeError unless they are a mapping, ValueError for credentials."""
    if storage is None:
        return {}
    if not isinstance(storage, Mapping):
        raise TypeError(f"storage must be a mapping of options, such as {{'anon': True}}; got {storage!r}.")
    _refuse_secrets(storage)
    return dict(storage)


def _refuse_secrets(options: Mapping[str, Any]) -> None:
    for key, value in options.items():
        words = set(re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(key)).lower()))
        if words & _SECRET and value not in _PUBLIC_TOKENS and value is not None:
            raise ValueError(
                f"storage must not hold {key!r}, as recipes and the folders of runs are shared: leave it out. "
                f"{_CREDENTIALS}"
            )
        if isinstance(value, Mapping):
            _refuse_secrets(value)
        elif is_url(value):
            _check_url(value)
