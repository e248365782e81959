"""Pages in headless Chromium, in a frame of a phone's width: what sticks out, what is broken, what the console says."""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTH = 390  # CSS pixels of a phone
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome")

# Each page is shown in a frame of a phone's width. Images are loaded at once, so that they have their size. What is
# folded is opened. A figure is opened at full size and closed.
PROBE = """<!doctype html><body><script>
const pages = %s, found = {};
async function probe(page) {
  const frame = document.createElement("iframe");
  frame.style.width = "%dpx"; frame.style.height = "800px";
  document.body.append(frame);
  frame.contentWindow.location = page;
  await new Promise(done => frame.onload = done);
  const view = frame.contentWindow, root = view.document.documentElement;
  for (const part of root.querySelectorAll("details")) part.open = true;
  const wide = [];
  if (root.scrollWidth > root.clientWidth)
    for (const part of root.querySelectorAll("%s"))
      if (part.getBoundingClientRect().right > root.clientWidth + 1) wide.push(part.outerHTML.slice(0, 120));
  const images = [...root.querySelectorAll("img")];
  const drawings = [...root.querySelectorAll(".zoom svg")];
  const links = [...root.querySelectorAll("a[href^='#']")].map(link => decodeURIComponent(link.hash.slice(1)));
  const zoom = root.querySelector(".zoom input"), zoomed = {};
  if (zoom) {
    const image = zoom.parentElement.querySelector("img, svg");
    zoomed.before = image.getBoundingClientRect().width;
    zoom.click();
    zoomed.after = image.getBoundingClientRect().width;
    zoomed.covers = zoom.parentElement.getBoundingClientRect().height;
    zoom.click();
  }
  found[page] = {
    title: view.document.title, wide: wide.slice(0, 3), over: root.scrollWidth - root.clientWidth,
    broken: images.filter(image => image.complete && !image.naturalWidth).map(image => image.src.slice(0, 80)),
    formulas: root.querySelectorAll("math").length, figures: drawings.length, zoomed,
    dark: drawings.filter(one => view.getComputedStyle(one.querySelector("text")).fill === "rgb(230, 230, 230)").length,
    ground: view.getComputedStyle(view.document.body).backgroundColor,
    lost: links.filter(name => name && !view.document.getElementById(name)),
  };
  frame.remove();
}
(async () => {
  for (const page of pages) await probe(page);
  await fetch("/found", {method: "POST", body: JSON.stringify(found)});
})();
</script></body>"""


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder without a log, and keeps what the page sends."""

    found: ClassVar[dict[str, Any]] = {}
    sent = threading.Event()

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        type(self).found = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        self.sent.set()


def probe(
    folder: Path, pages: Sequence[str], scratch: Path, *, parts: str = "body *", dark: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """Return what was found on each page, by its address below ``folder``, and the lines of the console.

    Args:
        folder: holds the pages; a page that sticks out and complains is added, and must be found to.
        pages: addresses, such as "/report.html".
        scratch: for the browser's profile.
        parts: selector of the parts that are reported if a page is too wide.
        dark: the reader prefers dark colors.
    """
    assert BROWSER is not None
    (folder / "control.html").write_text("<div style='width: 900px'>.</div><script>console.error('control')</script>")
    (folder / "probe.html").write_text(PROBE % (json.dumps([*pages, "/control.html"]), WIDTH, parts))
    log = scratch / f"log-{dark}"
    _Handler.sent.clear()
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={scratch / f'profile-{dark}'}",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--enable-logging=stderr",
            "--remote-debugging-port=0", f"http://127.0.0.1:{server.server_port}/probe.html",
        ]  # fmt: skip
        with (
            log.open("w") as file,
            subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True) as browser,
        ):
            try:
                answered = _Handler.sent.wait(600)
            finally:
                os.killpg(browser.pid, signal.SIGTERM)
                server.shutdown()
    assert answered, log.read_text()[-2000:]
    found = _Handler.found
    assert found.pop("/control.html")["over"] > 500
    assert set(found) == set(pages)
    console = [line for line in log.read_text().splitlines() if "CONSOLE" in line]
    (control,) = [line for line in console if "control" in line]
    console.remove(control)
    return found, console
