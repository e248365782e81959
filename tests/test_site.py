"""The built documentation in a browser: nothing sticks out on a phone, and no page reports an error."""

import functools
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import pytest

ROOT = Path(__file__).parent.parent
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTH = 390  # CSS pixels of a phone

# Each page is shown in a frame of a phone's width. Images are loaded at once, so that they have their size.
PROBE = """<!doctype html><body><script>
const pages = %s, found = {};
async function probe(page) {
  const frame = document.createElement("iframe");
  frame.style.width = "%dpx"; frame.style.height = "800px";
  document.body.append(frame);
  frame.contentWindow.location = page;
  await new Promise(done => frame.onload = done);
  const view = frame.contentWindow, root = view.document.documentElement;
  const wide = [];
  if (root.scrollWidth > root.clientWidth)
    for (const part of root.querySelectorAll(".md-content *"))
      if (part.getBoundingClientRect().right > root.clientWidth + 1) wide.push(part.outerHTML.slice(0, 120));
  const broken = [...root.querySelectorAll("img")].filter(image => image.complete && !image.naturalWidth);
  found[page] = {
    title: view.document.title, wide: wide.slice(0, 3), over: root.scrollWidth - root.clientWidth,
    broken: broken.map(image => image.src), formulas: root.querySelectorAll("math").length,
  };
  frame.remove();
}
(async () => {
  for (const page of pages) await probe(page);
  await fetch("/found", {method: "POST", body: JSON.stringify(found)});
})();
</script></body>"""


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder without a log, and keeps what the page sends."""

    found: ClassVar[dict] = {}
    sent = threading.Event()

    def log_message(self, *args):
        pass

    def do_POST(self):
        type(self).found = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        self.sent.set()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome")
def test_pages_fit_a_phone_and_report_no_error(site, tmp_path):
    names = sorted(path.parent.relative_to(site).as_posix() for path in site.rglob("index.html"))
    pages = [f"/{name}/".replace("/./", "/") for name in names]
    (site / "control.html").write_text("<div style='width: 900px'>.</div><script>console.error('control')</script>")
    (site / "probe.html").write_text(PROBE % (json.dumps([*pages, "/control.html"]), WIDTH))
    log = tmp_path / "log"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run",
            "--enable-logging=stderr", "--remote-debugging-port=0", f"http://127.0.0.1:{server.server_port}/probe.html",
        ]  # fmt: skip
        with (
            log.open("w") as file,
            subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True) as browser,
        ):
            try:
                answered = Handler.sent.wait(600)
            finally:
                os.killpg(browser.pid, signal.SIGTERM)
                server.shutdown()
    assert answered, log.read_text()[-2000:]
    found = Handler.found
    assert found.pop("/control.html")["over"] > 500
    assert set(found) == set(pages)
    assert {page: one for page, one in found.items() if one["over"] > 0 or one["broken"]} == {}
    assert found["/gmconv/"]["formulas"] > 20
    (control,) = [line for line in log.read_text().splitlines() if "CONSOLE" in line]
    assert "control" in control
