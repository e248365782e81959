"""The built documentation in a browser: nothing sticks out on a phone, and no page reports an error."""

import subprocess
import sys
from pathlib import Path

import pytest

from browsing import needs_browser, probe

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@needs_browser
def test_pages_fit_a_phone_and_report_no_error(site, tmp_path):
    names = sorted(path.parent.relative_to(site).as_posix() for path in site.rglob("index.html"))
    pages = [f"/{name}/".replace("/./", "/") for name in names]
    found, console = probe(site, pages, tmp_path, parts=".md-content *")
    assert {page: one for page, one in found.items() if one["over"] > 0 or one["broken"]} == {}
    assert found["/gmconv/"]["formulas"] > 20
    assert not console
