"""A server of a folder's files on this machine, with ranges of bytes, that counts requests."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


class Server(ThreadingHTTPServer):
    """Attributes: ``requests``, method and path of each; ``failures``, how many requests are answered by 503."""

    daemon_threads = True
    ranges = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, directory=str(root)))
        self.requests: list[tuple[str, str, str | None]] = []
        self.failures = 0
        self.refused = False

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that have gone."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving(root: Path) -> Iterator[Server]:
    with Server(root) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


class _Handler(SimpleHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        span = self.headers.get("Range")
        self.server.requests.append((self.command, self.path, span))
        path = Path(self.directory) / unquote(self.path).lstrip("/")
        if self.server.failures or self.server.refused or not path.is_file():
            self.server.failures = max(0, self.server.failures - 1)
            status = 404 if not path.is_file() else 403 if self.server.refused else 503
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content, status = path.read_bytes(), 200
        etag = f'"{len(content)}-{path.stat().st_mtime_ns}"'
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", span or "")
        if match and self.server.ranges:
            first, last = int(match[1]), int(match[2])
            status = 206 if first < len(content) else 416
            content = content[first : last + 1]
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", etag)
        self.end_headers()
        if body:
            self.wfile.write(content)
